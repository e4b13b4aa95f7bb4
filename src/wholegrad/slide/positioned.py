"""Reads bytes of a file at a position, never through a memory map.

Mapped pages count in the resident set, which the budget bounds (rule 7); bytes read by ``pread`` land only
where they are asked for, and need no lock because no file position is shared.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import SlideError
from wholegrad.kernels import rows


class PositionedFile:
    """A file open for reading at positions. Thread-safe; reopens itself when pickled.

    Attributes:
        path: as given.
        size: in bytes, when opened.

    Raises:
        SlideError: the file is missing, a folder or not readable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = -1
        self._lock = threading.Lock()
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            cause = (error.strerror or str(error)).lower()
            raise SlideError(str(path), f"cannot be opened ({cause})", "check the path") from None
        told = os.fstat(self._fd)
        if stat.S_ISDIR(told.st_mode):  # which some systems open
            self.close()
            raise SlideError(str(path), "cannot be opened (is a folder)", "give the path of a file")
        self.size = told.st_size

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``.

        Raises:
            SlideError: the file ends before, cannot be read or is closed.
        """
        out = np.empty(size, np.uint8)
        self.read_into(offset, out)
        return out.tobytes()

    def read_into(self, offset: int, out: npt.NDArray[Any]) -> None:
        """Fill the C-contiguous array ``out`` with the bytes from ``offset`` on; errors as for ``read``."""
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        done = 0
        while done < len(view):
            try:
                count = self._once(offset + done, view[done:])
            except OSError as error:
                cause = "is closed" if self._fd < 0 else f"cannot be read ({error.strerror})"
                raise SlideError(str(self.path), cause, "open it again, check the disk") from None
            if count == 0:
                raise SlideError(
                    str(self.path),
                    f"ends at byte {self.size}, before byte {offset + len(view)} that was asked for",
                    "the file is truncated: copy it again",
                )
            done += count

    def read_rows(self, offset: int, step: int, out: npt.NDArray[Any]) -> None:
        """Fill the rows of a C-contiguous ``out`` with bytes that lie ``step`` apart from ``offset`` on.

        Raises:
            SlideError: as for ``read``.
        """
        size, to = out[0].nbytes, out.ctypes.data
        if self._fd >= 0 and rows.available() and rows.read_rows(self._fd, offset, step, size, len(out), to, size):
            return
        for i, row in enumerate(out):  # slower, but says what is wrong
            self.read_into(offset + i * step, row)

    def _once(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], offset)
        if hasattr(os, "pread"):
            data = os.pread(self._fd, min(len(view), 1 << 24), offset)
        else:  # Windows has no positioned read
            with self._lock:
                os.lseek(self._fd, offset, os.SEEK_SET)
                data = os.read(self._fd, min(len(view), 1 << 24))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Give the file back; reading afterwards is an error."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[PositionedFile], tuple[Path]]:
        return PositionedFile, (self.path,)

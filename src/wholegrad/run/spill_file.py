"""Files of boundaries: without a name, read and written past the page cache where that is possible.

Pages that the system caches for a file count towards a container's memory, though not towards this process. So files
are opened for direct input and output (``O_DIRECT``, on macOS ``F_NOCACHE``), whose calls on a megabyte also take a
quarter of the processor time of cached ones. Where a file system has no such thing, what was written is flushed and
dropped from the cache every few blocks.

A file has no name from the start (``O_TMPFILE``), or loses it at once where Linux or the file system cannot do that: it
is gone with the process, however that ends. A process that is killed between giving and taking a name leaves an empty
file; its name says whose it was, and the next run in the folder removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import psutil

from wholegrad.errors import SpillError
from wholegrad.plan.plan import show_bytes

TRIED = 4 << 20  # bytes of a block of a trial
FLUSHED = 32 << 20  # bytes that are written through the page cache before it is flushed
PREFIX, SUFFIX = "wholegrad-", ".map"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_HERE = {errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR}  # what a file system says to flags that it does not know
_DIRECT = getattr(os, "O_DIRECT", 0)
_UNNAMED = getattr(os, "O_TMPFILE", 0)


def spill_folder(folder: Path | None) -> Path:
    """Where boundaries on disk go."""
    return folder or Path(tempfile.gettempdir())


def check_space(needed: int, folder: Path) -> None:
    """Whether so many bytes of boundaries can lie on disk at once, before anything runs (rule 7).

    Raises:
        SpillError: they cannot.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        _refuse(folder, needed, error)
    if needed > free:
        cause = f"{show_bytes(needed)} of boundaries do not fit into the {show_bytes(free)} that are free"
        raise SpillError(f"spill folder {folder}", cause, "choose another spill_dir or a larger budget")


def _refuse(folder: Path, needed: int, error: OSError) -> NoReturn:
    """The folder takes no file."""
    cause = f"cannot hold {show_bytes(needed)} of boundaries: {error.strerror}"
    raise SpillError(f"spill folder {folder}", cause, "choose another spill_dir or a larger budget") from error


def _name() -> str:
    return f"{PREFIX}{socket.gethostname()}-{os.getpid()}-{uuid4().hex}{SUFFIX}"


def _owner(name: str) -> tuple[str, int] | None:
    """Host and process that gave a file this name; None for names that are not ours."""
    host, _, rest = name.removeprefix(PREFIX).removesuffix(SUFFIX).rpartition("-")[0].rpartition("-")
    ours = name.startswith(PREFIX) and name.endswith(SUFFIX) and host and rest.isdigit()
    return (host, int(rest)) if ours else None


def remove_orphans(folder: Path) -> list[Path]:
    """Remove files that processes of this machine left here when they were killed; returns them."""
    removed = []
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        owner = _owner(path.name)
        if owner is not None and owner[0] == socket.gethostname() and not psutil.pid_exists(owner[1]):
            with suppress(OSError):  # another run was quicker, or it is not ours to remove
                path.unlink()
                removed.append(path)
    return removed


def _open_unnamed(folder: Path) -> tuple[int, bool]:
    """Descriptor of a file without a name, and whether it is direct."""
    unnamed = [(_UNNAMED | _DIRECT, bool(_DIRECT)), (_UNNAMED, False)] if _UNNAMED else []
    named = [(os.O_CREAT | os.O_EXCL | _DIRECT, bool(_DIRECT)), (os.O_CREAT | os.O_EXCL, False)]
    for flags, direct in (*unnamed, *named):
        path = folder if flags & _UNNAMED == _UNNAMED != 0 else folder / _name()
        try:
            descriptor = os.open(path, flags | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if path != folder:
                with suppress(OSError):  # a file system may make a file and then not open it
                    path.unlink()
            if error.errno not in _NOT_HERE or not folder.is_dir():
                raise
            continue
        if path != folder:
            path.unlink()
        return descriptor, direct
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


class SpillFile:
    """A file of ``nbytes`` in ``folder``, written and read at offsets and in lengths of whole pages.

    Args:
        what: the boundary, for messages.

    Raises:
        SpillError: the folder takes no such file.
    """

    def __init__(self, folder: Path, nbytes: int, what: str) -> None:
        self.folder, self.nbytes, self.what = folder, nbytes, what
        self._unflushed = 0
        self._descriptor = -1
        try:
            self._descriptor, self.direct = _open_unnamed(folder)
            os.ftruncate(self._descriptor, nbytes)
        except OSError as error:
            self.close()
            self._fail(error, "make its file")
        if hasattr(fcntl, "F_NOCACHE"):  # macOS
            fcntl.fcntl(self._descriptor, fcntl.F_NOCACHE, 1)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        self._each(lambda rest, at: os.pwrite(self._descriptor, rest, at), data, offset, "write")
        if not self.direct:
            self._unflushed += len(data)
            if self._unflushed >= FLUSHED:
                self._drop_cached()

    def read(self, data: memoryview, offset: int) -> None:
        """Fill ``data`` from ``offset`` on."""
        self._each(lambda rest, at: os.preadv(self._descriptor, [rest], at), data, offset, "read")
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)

    def _each(self, move: Callable[[memoryview, int], int], data: memoryview, offset: int, doing: str) -> None:
        while data:
            try:
                count = move(data, offset)
                if not count:
                    raise OSError(errno.EIO, "the file ends early")
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    self._fail(error, f"{doing} {show_bytes(len(data))}")
                self._go_through_the_cache()  # other alignment is wanted
                continue
            data, offset = data[count:], offset + count

    def _go_through_the_cache(self) -> None:
        self.direct = False
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_DIRECT)

    def _drop_cached(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._fail(error, "flush")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._unflushed = 0

    def _fail(self, error: OSError, doing: str) -> NoReturn:
        try:
            free = show_bytes(shutil.disk_usage(self.folder).free)
        except OSError:
            free = "unknown"
        full = error.errno in _FULL
        cause = f"{self.what}, {show_bytes(self.nbytes)} on disk, cannot {doing}: {error.strerror}"
        remedy = "free space, or choose another spill_dir or a larger budget" if full else "choose another spill_dir"
        raise SpillError(f"spill folder {self.folder}", f"{cause} ({free} free)", remedy) from error

    def close(self) -> None:
        """Give the space back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True)
class Trial:
    """Seconds for writing and for reading as boundaries do, whether past the page cache, and whether all came back."""

    writing: float
    reading: float
    direct: bool
    same: bool


def trial(folder: Path, nbytes: int) -> Trial:
    """Write a file of ``nbytes`` (rounded up to blocks of 4 MiB) in ``folder``, and read it.

    Raises:
        SpillError: the folder takes no such file.
    """
    block = mmap(-1, TRIED)  # direct input and output wants whole pages
    block[:] = os.urandom(1 << 16) * (TRIED >> 16)
    sent, offsets = hashlib.sha256(block).digest(), range(0, nbytes, TRIED)
    file = SpillFile(folder, len(offsets) * TRIED, "a trial")
    try:
        with memoryview(block) as view:
            begin = time.perf_counter()
            for offset in offsets:
                file.write(view, offset)
            written = time.perf_counter()
            view[:] = bytes(TRIED)
            middle = time.perf_counter()
            for offset in offsets:
                file.read(view, offset)
            end = time.perf_counter()
    finally:
        file.close()
    return Trial(written - begin, end - middle, file.direct, hashlib.sha256(block).digest() == sent)

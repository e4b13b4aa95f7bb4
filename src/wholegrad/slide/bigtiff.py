"""Writes the skeleton of a tiled BigTIFF: tiles go straight to their place, directories follow at the end.

Follows TIFF 6.0 and the BigTIFF extension (Aldus 1992; libtiff 4.0). The file appears complete or not at all
(rule 11): it grows under a temporary name in its own folder, is synced, and is renamed when all is written.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from wholegrad.errors import SlideError

SHORT, LONG, RATIONAL, LONG8, ASCII = 3, 4, 5, 16, 2
_FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "I", LONG8: "Q", ASCII: "B"}

Tag = tuple[int, int, Sequence[int]]  # number, type, values (a rational is two values)


class PartialFile:
    """A file under a temporary name, which takes its real name only in ``commit``.

    Raises:
        SlideError: the folder is missing or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0
        try:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        except OSError as error:
            cause = f"cannot be written ({error.strerror})"
            raise SlideError(str(path), cause, "check that the folder exists and is writable") from None
        self._file, self._temporary = os.fdopen(handle, "wb"), Path(name)

    def append(self, data: bytes) -> int:
        """Write ``data`` at the end, on an even offset, which is returned."""
        try:
            if self.end % 2:
                self._file.write(b"\0")
                self.end += 1
            self._file.write(data)
        except OSError as error:
            raise SlideError(str(self.path), f"cannot be written ({error.strerror})", "free disk space") from error
        self.end += len(data)
        return self.end - len(data)

    def patch(self, offset: int, data: bytes | memoryview) -> None:
        """Write at a position, over bytes that were there or beyond the end; ``append`` goes on where it was."""
        try:
            self._file.seek(offset)
            self._file.write(data)
            self._file.seek(self.end)
        except OSError as error:
            raise SlideError(str(self.path), f"cannot be written ({error.strerror})", "free disk space") from error

    def commit(self) -> None:
        """Sync, and give the file its name."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            mask = os.umask(0)
            os.umask(mask)
            self._temporary.chmod(0o666 & ~mask)  # mkstemp's is private
            self._temporary.replace(self.path)
        except OSError as error:
            self.discard()
            raise SlideError(str(self.path), f"cannot be written ({error.strerror})", "free disk space") from error
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the temporary file; the real name is untouched."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where folders can be opened (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def start(file: PartialFile) -> None:
    """Write the header; its last eight bytes await the first directory's offset."""
    file.append(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))


def finish(file: PartialFile, directories: Sequence[Sequence[Tag]], sub: bool) -> None:
    """Write the directories of all levels, largest first: chained, or (``sub``) as SubIFDs of the first."""
    following, below = 0, list[int]()
    for number in range(len(directories) - 1, -1, -1):
        tags = list(directories[number])
        if sub and number == 0 and below:
            tags.append((330, LONG8, below[::-1]))
        offset = _write_directory(file, tags, 0 if sub else following)
        below.append(offset)
        following = offset
    file.patch(8, struct.pack("<Q", following))


def _write_directory(file: PartialFile, tags: Sequence[Tag], following: int) -> int:
    entries = [_entry(file, tag) for tag in sorted(tags, key=lambda tag: tag[0])]
    return file.append(struct.pack("<Q", len(entries)) + b"".join(entries) + struct.pack("<Q", following))


def _entry(file: PartialFile, tag: Tag) -> bytes:
    number, kind, values = tag
    data = struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values)
    count = len(values) // 2 if kind == RATIONAL else len(values)
    field = data.ljust(8, b"\0") if len(data) <= 8 else struct.pack("<Q", file.append(data))
    return struct.pack("<HHQ", number, kind, count) + field


def text(number: int, value: str) -> Tag:
    """A tag of UTF-8 text."""
    return number, ASCII, value.encode() + b"\0"


def rational(number: int, value: float) -> Tag:
    """A tag of one rational that fits in two unsigned 32-bit integers."""
    fraction = Fraction(value).limit_denominator(max(1, min(10**6, int((2**32 - 1) / max(value, 1)))))
    return number, RATIONAL, (fraction.numerator, fraction.denominator)

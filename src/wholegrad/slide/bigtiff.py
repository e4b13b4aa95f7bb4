"""Writes the skeleton of a tiled BigTIFF: tiles go straight to their place, directories follow at the end.

Follows TIFF 6.0 and the BigTIFF extension (Aldus 1992; libtiff 4.0). The file appears complete or not at all
(rule 11): it grows under a temporary name in its own folder, is synced, and is renamed when all is written.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from wholegrad.aside import aside, sweep
from wholegrad.errors import SlideError

SHORT, LONG, RATIONAL, LONG8, ASCII = 3, 4, 5, 16, 2
SUB_IFDS = 330
_FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "I", LONG8: "Q", ASCII: "B"}

BEHIND = 1 << 20  # bytes written at once from which on the disk is set to work meanwhile

Tag = tuple[int, int, Sequence[int]]  # number, type, values (a rational is two values)


class PartialFile:
    """A file under a temporary name, which takes its real name only in ``commit``.

    Raises:
        SlideError: the folder is missing or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0
        self._behind = 0, 1  # where what was written to disk last lies, and how long it is
        try:
            sweep(path.parent)
            self._temporary = aside(path)
            self._file = self._temporary.open("xb")
        except OSError as error:
            cause = f"cannot be written ({error.strerror})"
            raise SlideError(str(path), cause, "check that the folder exists and is writable") from None

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

    def join(self, data: bytes) -> None:
        """Write ``data`` right behind what is there."""
        self.patch(self.end, data)
        self.end += len(data)

    def patch(self, offset: int, data: bytes | memoryview) -> None:
        """Write at a position, over bytes that were there or beyond the end; ``append`` goes on where it was."""
        try:
            self._file.seek(offset)
            self._file.write(data)
            self._file.seek(self.end)
            size = memoryview(data).nbytes
            if size >= BEHIND:
                self._write_behind(offset, size)
        except OSError as error:
            raise SlideError(str(self.path), f"cannot be written ({error.strerror})", "free disk space") from error

    def _write_behind(self, offset: int, size: int) -> None:
        """Have these bytes written to disk meanwhile, and give up the pages of those before, which are there by now.

        So ``seal`` waits for the last only, and pages serve what follows: new ones are slow.
        """
        if hasattr(os, "posix_fadvise"):
            for start, length in (self._behind, (offset, size)):
                os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
        self._behind = offset, size

    def seal(self) -> None:
        """Sync and close: all is written but the name."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self.discard()
            raise SlideError(str(self.path), f"cannot be written ({error.strerror})", "free disk space") from error

    def publish(self) -> None:
        """Give the sealed file its name."""
        try:
            self._temporary.replace(self.path)
        except OSError as error:
            self.discard()
            raise SlideError(str(self.path), f"cannot be named ({error.strerror})", "check the folder") from error
        sync_folder(self.path.parent)

    def commit(self) -> None:
        """Sync, and give the file its name."""
        self.seal()
        self.publish()

    def discard(self) -> None:
        """Remove the temporary file; the real name is untouched."""
        with contextlib.suppress(OSError):  # what a full disk leaves in the buffer cannot be written
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
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


def finish(file: PartialFile, planes: Sequence[Sequence[Sequence[Tag]]], sub: bool) -> None:
    """Write the directories of each plane's levels, largest first in each.

    The levels of a single plane are chained, those of several follow no chain; with ``sub`` they are SubIFDs of the
    plane's first.
    """
    first = 0
    for levels in reversed(planes):
        following, below = 0, list[int]()
        for tags in reversed(levels[1:]):
            below.insert(0, _write_directory(file, tags, following))
            following = below[0] if len(planes) == 1 else 0
        more = [(SUB_IFDS, LONG8, below)] if sub and below else []
        first = _write_directory(file, [*levels[0], *more], following if len(planes) == 1 else first)
    file.patch(8, struct.pack("<Q", first))


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

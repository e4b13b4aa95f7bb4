"""The log, ``log.jsonl``: a line an event, each whole on disk before the next step, and none doubled by a resumed run.

A checkpoint notes how long the log was. A resumed run cuts it to that length and goes on from there.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from wholegrad.errors import ConfigError, WholegradError


class Log:
    """Lines of JSON, appended to a file.

    Args:
        path: of the file; made if it is not there.
        keep: bytes of it that stay, the rest being cut off.

    Raises:
        ConfigError: the file is shorter than what should stay.
        WholegradError: it cannot be written.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        try:
            self._file = path.open("ab")
            size = path.stat().st_size
            if size < keep:
                self._file.close()
                cause = f"has {size} bytes, and the checkpoint was written after {keep}"
                raise ConfigError(str(path), cause, "restore it, or start the run anew")
            self._file.truncate(keep)
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            WholegradError: the disk is full or gone.
        """
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def sync(self) -> int:
        """Put all lines on the disk; returns the file's length in bytes."""
        try:
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Close the file; what could not be written before cannot be now."""
        with suppress(OSError):
            self._file.close()

    def _unwritable(self, error: OSError) -> WholegradError:
        return WholegradError(str(self.path), f"cannot be written ({error.strerror})", "check space and rights")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that a killed run left incomplete does not count."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]

"""Names for what is still being written, beside what it will become, and the removal of what a killed process left.

A file or folder in the making is called ``.wholegrad-HOST-PROCESS-RANDOM.partial-NAME``, in the folder of the result,
so that one rename completes it (rule 11). A process that is killed cannot clean up, so whoever writes to that folder
next does: what a process made that no longer runs on this host goes. What another host or container made is left alone,
since nothing here can tell whether its process still runs; so is all on systems where asking after one may end it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from wholegrad.errors import WholegradError

PARTIAL, REPLACED = "partial", "replaced"
NAME = re.compile(r"\.wholegrad-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.(partial|replaced)-(.+)")
LONGEST = 150  # characters kept of a name, for a file system takes 255 bytes


def aside(path: Path, kind: str = PARTIAL) -> Path:
    """A new name, in the same folder, for what will become ``path``.

    Args:
        kind: ``PARTIAL``; or ``REPLACED``, for a result that steps aside for a new one, and gets its name back if the
            process is killed before the new one has it.
    """
    name = path.name if kind == REPLACED else path.name[-LONGEST:]
    return path.with_name(f".wholegrad-{host_number()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}-{name}")


@contextmanager
def held_folder(folder: Path) -> Iterator[Path]:
    """A folder within ``folder`` for what is needed meanwhile; it is gone when the block ends.

    Raises:
        WholegradError: it cannot be made.
    """
    sweep(folder)
    made = aside(folder / "meanwhile")
    try:
        made.mkdir(mode=0o700)
    except OSError as error:
        cause = f"cannot be written to ({error.strerror})"
        raise WholegradError(str(folder), cause, "check its rights, and free disk space") from None
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove from ``folder`` what processes of this host left there that no longer run."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            told = NAME.fullmatch(path.name)
            if told is not None and told[1] == host_number() and not process_runs(int(told[2])):
                with suppress(OSError):
                    _remove(path, told[4] if told[3] == REPLACED else None)


def _remove(path: Path, stands_for: str | None) -> None:
    if stands_for and not (path.parent / stands_for).exists():
        path.rename(path.parent / stands_for)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def process_runs(process: int) -> bool:
    """Whether a process of this number runs here; True where that cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's, or no number that a process has
        return True
    return True


@cache
def host_number() -> str:
    """This host, and where containers count processes apart, this container, as eight digits."""
    told = platform.node()
    with suppress(OSError):
        told += str(Path("/proc/self/ns/pid").readlink())  # Linux only
    return hashlib.sha256(told.encode()).hexdigest()[:8]

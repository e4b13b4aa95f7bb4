"""This process's memory: what it holds, what it held at most, and an allocator that keeps what tiles reuse.

Fresh pages are slow (a first touch costs more than the arithmetic of a thin convolution), and glibc returns large
blocks to the system on every free. :func:`reuse_memory` tells it to keep them while tiles run, and trims at the end.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP = 1 << 30


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """The most bytes that this process ever had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def available() -> int:
    """Bytes that this process could take without swapping, cgroup limits aside."""
    return int(psutil.virtual_memory().available)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@contextmanager
def reuse_memory() -> Iterator[None]:
    """While open, freed blocks stay with the process for the next tile; glibc only, elsewhere nothing happens."""
    library = _glibc()
    if library is None:
        yield
        return
    for parameter, value in ((_M_MMAP_THRESHOLD, _KEEP), (_M_TRIM_THRESHOLD, _KEEP), (_M_TOP_PAD, 1 << 24)):
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in (
            (_M_MMAP_THRESHOLD, 1 << 17),
            (_M_TRIM_THRESHOLD, 1 << 17),
            (_M_TOP_PAD, 1 << 17),
        ):
            library.mallopt(parameter, value)
        release_memory()


def release_memory() -> None:
    """Return free blocks to the system."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)

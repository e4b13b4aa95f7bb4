"""This process's memory: what it holds, what it held at most, and an allocator that keeps what tiles reuse.

Fresh pages are slow (a first touch costs more than the arithmetic of a thin convolution), and glibc returns large
blocks to the system on every free. :func:`reuse_memory` tells it to keep them while tiles run, and trims at the end,
unless the next step of the same plan is to find them (:mod:`wholegrad.run.heap`). Threads that start from then on share
one heap: a heap of a thread's own grows by pieces of at most 64 MiB, which a tile's tensors fill badly. That stays so
for the process; the rest goes back to glibc's defaults after the run.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from wholegrad import clock
from wholegrad.run import limits

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_WHILE_RUNNING = {  # glibc takes no higher threshold: larger blocks, each pages of its own, are the rare ones
    _M_ARENA_MAX: 1,
    _M_MMAP_THRESHOLD: 1 << 25,
    _M_TRIM_THRESHOLD: 1 << 30,
    _M_TOP_PAD: 1 << 26,
}
_GLIBC_DEFAULTS = {_M_MMAP_THRESHOLD: 1 << 17, _M_TRIM_THRESHOLD: 1 << 17, _M_TOP_PAD: 1 << 17}
_BETWEEN_STEPS = {**_GLIBC_DEFAULTS, _M_TRIM_THRESHOLD: 1 << 30}  # others' large blocks do not cut into what is kept


LOOK_EVERY, RELEASE_EVERY = 0.02, 0.2  # seconds between looks at this process's size, and after one that helped
NEAR = 48 << 20  # bytes below a projected peak from which on free memory is given back

_has_run = False
_times_given_back = 0
_keeps = False


def mark_run() -> None:
    """Note that a step ran here: libraries have loaded what they load on first use."""
    global _has_run
    _has_run = True


def has_run() -> bool:
    """Whether a step ran in this process."""
    return _has_run


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """The most bytes that this process ever had in memory.

    On Linux from ``VmHWM``: ``ru_maxrss`` of a process starts at the size of the one that started it.
    """
    if sys.platform.startswith("linux"):
        status = Path("/proc/self/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def total_memory() -> int:
    """Bytes of memory that this machine has."""
    return int(psutil.virtual_memory().total)


def machine() -> str:
    """This machine in a few words: processor, cores, memory in GiB."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {usable_cores()} cores, {total_memory() / 2**30:.2f} GiB"


def usable_cores() -> int:
    """Logical processors that this process may run on."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1


def available() -> int:
    """Bytes that this process could take without swapping or meeting a limit."""
    return limits.available()


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@contextmanager
def reuse_memory(keep: bool = False) -> Iterator[None]:
    """While open, freed blocks stay with the process for the next tile; glibc only, elsewhere nothing happens.

    Args:
        keep: whether they stay afterwards too, unless an error comes, until :func:`let_go`.
    """
    global _keeps
    library = _glibc()
    _set(library, _WHILE_RUNNING)
    kept = False
    try:
        yield
        kept = keep
    finally:
        mark_run()
        if kept:
            _keeps = True
            _set(library, _BETWEEN_STEPS)
        else:
            let_go()


def let_go() -> None:
    """Return free blocks to the system, those that are freed from now on too."""
    global _keeps
    _keeps = False
    _set(_glibc(), _GLIBC_DEFAULTS)
    release_memory()


def keeps() -> bool:
    """Whether a run left free blocks that are still there."""
    return _keeps


def _set(library: ctypes.CDLL | None, settings: dict[int, int]) -> None:
    for parameter, value in settings.items():
        if library is not None:
            library.mallopt(parameter, value)


@clock.timed("memory", "given back")
def release_memory() -> None:
    """Return free blocks to the system."""
    global _times_given_back
    _times_given_back += 1
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def times_given_back() -> int:
    """How often free blocks went back to the system, in this process."""
    return _times_given_back


class Ceiling:
    """Returns free memory to the system, now and then, where the heap comes apart into ever more pieces (rule 7).

    Args:
        peak: bytes below which this process should stay.
    """

    def __init__(self, peak: int) -> None:
        self.peak = peak
        self._next = 0.0

    def look(self) -> None:
        """Look at this process's size, if the last time is a while ago."""
        now = time.monotonic()
        if now < self._next:
            return
        near = resident() > self.peak - NEAR
        if near:
            release_memory()
        self._next = now + (RELEASE_EVERY if near else LOOK_EVERY)

"""What a thread of this machine could do while all others work too: measured in about a second, the best of many tries.

The bound that follows (Williams, Waterman and Patterson, "Roofline", CACM 2009) is of memory far away: what stays in a
core's cache between two ops may beat it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import perf_counter
from typing import NamedTuple

import torch

from wholegrad.kernels import peak
from wholegrad.kernels.host import host

SECONDS = 0.4  # of each measurement
ROUNDS = 100_000  # of the multiply-add loop, a millisecond
EDGE = 512  # of the matrices that are multiplied where there are no kernels
COPIED = 1 << 25  # bytes: with its copy more than a core's share of any cache


class Roofline(NamedTuple):
    """Of one thread: multiply-adds a second in float32, bytes read and written a second."""

    macs: float
    bytes: float

    def seconds(self, macs: float, wide: float, size: float) -> float:
        """The least time for so much work, ``wide`` multiply-adds of it in float64, which take twice as long."""
        return max((macs + wide) / self.macs, size / self.bytes)


def measure(threads: int) -> Roofline:
    """The roofline of one of ``threads`` threads that run at once."""
    return Roofline(_rate(_multiplier, threads), _rate(_copier, threads))


Work = Callable[[], int]


def _rate(prepare: Callable[[], Work], threads: int) -> float:
    """Units of work a second: the best try of each thread, averaged over threads."""
    start = Barrier(threads)

    def run() -> float:
        work = prepare()
        work()
        start.wait()
        best, end = 0.0, perf_counter() + SECONDS
        while (begin := perf_counter()) < end:
            done = work()
            best = max(best, done / (perf_counter() - begin))
        return best

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = [pool.submit(run) for _ in range(threads)]
        return sum(each.result() for each in found) / threads


def _multiplier() -> Work:
    """Multiply-adds in registers, or PyTorch's matrix product where kernels cannot be compiled."""
    if host() is not None:
        return lambda: peak.multiply_adds(ROUNDS)
    a, b, out = (torch.ones(EDGE, EDGE) for _ in range(3))

    def product() -> int:
        torch.mm(a, b, out=out)
        return EDGE**3

    return product


def _copier() -> Work:
    """Copies between two reused buffers; each byte is read and written."""
    source, to = (torch.zeros(COPIED // 4) for _ in range(2))

    def copy() -> int:
        to.copy_(source)
        return 2 * COPIED

    return copy

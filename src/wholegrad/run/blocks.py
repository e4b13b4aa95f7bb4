"""Blocks of the host's memory for boundaries, kept from one map to the next and from one step of a plan to the next.

The first touch of fresh pages takes ten times as long as writing to pages that are there (about 0.9 against 0.1 s a
GiB on a virtual machine), and a step of a wide network writes gigabytes of boundaries. A block that a map gives back
serves the next map of the same size. All together hold at most what the plan has of boundaries in memory at some
moment, and free blocks go back where a segment might else pass the projected peak (``Boundaries.make_room``). Blocks
belong to one plan, the last that ran, and go back to the system with it, or when another plan is made or run; so does
the heap that its steps leave (:mod:`wholegrad.run.heap`).
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from wholegrad.run import process
from wholegrad.run.heap import Heap


def anonymous(nbytes: int) -> torch.Tensor:
    """New bytes, zeros, which belong to no file."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


class Blocks:
    """Blocks in use and free ones.

    Attributes:
        most: bytes of all together, from which on a new one takes the place of free ones; None for no limit.
        make: a new block, all zeros.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self.make: Callable[[int], torch.Tensor] = anonymous
        self._used = 0
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int, zero: bool) -> torch.Tensor:
        """A block of ``nbytes`` (at least one) of type uint8; all zeros if ``zero``, else whatever it held."""
        with self._lock:
            found = next((i for i, block in enumerate(self._free) if block.numel() == nbytes), None)
            self._used += nbytes
            if found is None:
                self._drop(0 if self.most is None else self._used + self._free_bytes() - self.most)
                return self.make(nbytes)
            block = self._free.pop(found)
        return block.zero_() if zero else block

    def give(self, block: torch.Tensor) -> None:
        """Take a block back. Nobody may look at it any more."""
        with self._lock:
            self._used -= block.numel()
            self._free.append(block)

    def missing(self, sizes: Iterable[int]) -> int:
        """Bytes that maps of these sizes would take beyond the free blocks."""
        with self._lock:
            free = Counter(block.numel() for block in self._free)
        return sum(size * count for size, count in (Counter(sizes) - free).items())

    def shrink(self, nbytes: int, sizes: Iterable[int]) -> None:
        """Return free blocks of so many bytes to the system, or all but those that maps of ``sizes`` want."""
        wanted = Counter(sizes)
        with self._lock:
            spared = []
            for block in self._free:
                wanted[block.numel()] -= 1
                spared.append(wanted[block.numel()] >= 0)
            kept = []
            for block, spare in zip(self._free, spared, strict=True):
                if spare or nbytes <= 0:
                    kept.append(block)
                else:
                    nbytes -= block.numel()
            self._free = kept

    def _free_bytes(self) -> int:
        return sum(block.numel() for block in self._free)

    def _drop(self, nbytes: int) -> None:
        """Return free blocks of so many bytes together, or all."""
        while self._free and nbytes > 0:
            nbytes -= self._free.pop().numel()


class _Kept:
    """What the plan that ran last left, for as long as it lives."""

    def __init__(self) -> None:
        self.owner: weakref.ref[object] | None = None
        self.blocks, self.heap = Blocks(), Heap()

    def of(self, owner: object) -> tuple[Blocks, Heap]:
        if self.owner is None or self.owner() is not owner:
            self.drop()
            self.owner = weakref.ref(owner, lambda gone: self.drop() if gone is self.owner else None)
        return self.blocks, self.heap

    def drop(self) -> None:
        if process.keeps():
            process.let_go()
        self.owner, self.blocks, self.heap = None, Blocks(), Heap()


_kept = _Kept()


def left_by(owner: object) -> tuple[Blocks, Heap]:
    """The blocks and the heap that steps of this plan share; those of any other are returned to the system."""
    return _kept.of(owner)


def drop_all() -> None:
    """Return to the system what no step is using."""
    _kept.drop()

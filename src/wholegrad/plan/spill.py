"""How boundaries lie on disk, and how much memory stands before it: integers only.

A map is cut into blocks, each in one piece in its file. Blocks follow the cuts of the tiles that own the map's elements
(rule 1), so that a tile writes whole blocks and reads its map's gradient in whole blocks; a tile of another segment
reads every block that its box meets. A disk reads or writes a block of a megabyte at about full speed, and what a halo
reads beyond its box grows with blocks. Columns of narrow tiles share a block, since a row of tiles fills it at once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isqrt

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Ref
from wholegrad.plan.storage import stored_bytes

BLOCK = 1 << 20  # bytes of a block at most, unless a single pixel has more
ASPECT = 8  # columns of a block over its rows: blocks beside a tile are still in memory, those above it are not
PAGE = 4096  # blocks take multiples of it, as direct input and output want
HELD = 64 << 20  # bytes of blocks in memory: written lately, waiting to be written, read ahead
SPARE = 4  # blocks in use beside one for each worker: the caller's, one being written, one being read, one to come


def paged(size: int) -> int:
    """``size`` bytes rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True)
class Layout:
    """The blocks of a map, row by row: cuts ``0 = c0 < c1 < ... = size`` along both axes, bytes of a pixel."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    pixel: int

    @property
    def count(self) -> int:
        return (len(self.rows) - 1) * (len(self.cols) - 1)

    @cached_property
    def slot(self) -> int:
        """Bytes from one block to the next in the file: those of the largest, in whole pages."""
        height, width = (max(b - a for a, b in pairwise(cuts)) for cuts in (self.rows, self.cols))
        return paged(height * width * self.pixel)

    def box(self, number: int) -> Box:
        """The pixels of a block."""
        y, x = divmod(number, len(self.cols) - 1)
        return Box(self.rows[y], self.rows[y + 1], self.cols[x], self.cols[x + 1])

    def on(self, box: Box) -> list[int]:
        """The blocks that ``box`` meets, row by row."""
        if box.area <= 0:
            return []
        tops = range(bisect_right(self.rows, box.y0) - 1, bisect_left(self.rows, box.y1))
        lefts = range(bisect_right(self.cols, box.x0) - 1, bisect_left(self.cols, box.x1))
        return [y * (len(self.cols) - 1) + x for y in tops for x in lefts]


def layout(rows: Sequence[int], cols: Sequence[int], pixel: int) -> Layout:
    """Blocks of at most :data:`BLOCK` bytes, wider than high, for a map of ``pixel`` bytes a pixel.

    Args:
        rows, cols: cuts of the tiles that own the map, from 0 to its size.
    """
    area = max(BLOCK // pixel, 1)
    tallest, widest = (max(b - a for a, b in pairwise(cuts)) for cuts in (rows, cols))
    joined = _joined(cols, area // tallest)
    widest = max(widest, max(b - a for a, b in pairwise(joined)))
    width = min(widest, max(isqrt(area * ASPECT), area // tallest))
    height = min(tallest, max(area // width, 1))
    return Layout(_split(rows, height), _split(joined, width), pixel)


def _joined(cuts: Sequence[int], size: int) -> list[int]:
    """The cuts without those between neighbours that together have at most ``size`` pixels."""
    kept = [cuts[0]]
    for cut, following in pairwise(cuts[1:]):
        if following - kept[-1] > size:
            kept.append(cut)
    return [*kept, cuts[-1]]


def _split(cuts: Sequence[int], size: int) -> tuple[int, ...]:
    """The cuts and further ones, so that no two neighbours are more than ``size`` apart."""
    found = [cuts[0]]
    for low, high in pairwise(cuts):
        pieces = -(-(high - low) // size)
        found += [low + (high - low) * k // pieces for k in range(1, pieces + 1)]
    return tuple(found)


def spill_bytes(graph: Graph, spilled: Collection[Ref], narrow: torch.dtype | None, workers: int) -> int:
    """Bytes of memory that boundaries on disk take, all together: their blocks on the way to and from it.

    Args:
        spilled: the boundaries on disk.
        narrow: in which dtype they are stored; None for the graph's own.
        workers: threads that read and write them.
    """
    if not spilled:
        return 0
    specs = [graph.spec(ref) for ref in spilled]
    total = sum(stored_bytes(spec, narrow) + spec.nbytes for spec in specs)
    least = (workers + SPARE) * max(BLOCK, *(paged(spec.pixel_bytes) for spec in specs))
    return max(least, min(HELD, total))

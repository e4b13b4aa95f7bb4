"""Tiles: a grid over the largest map that a segment owns, carried over to its other maps. Rule 1 lives here.

Cuts along the base map are multiples of the tile size, which a plan chooses so that tiles are nearly equal. A map with
n' rows where the base has n is cut at ``floor(cut * n' / n)``: monotone, from 0 to n', so that its tiles partition it
too, whatever the ratio. A tile may own nothing of a small map. Where ranks share the image, tiles are counted
anew from each rank's cuts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.layout import Role
from wholegrad.graph.segment import Segment, spans
from wholegrad.plan.bands import Bands, carried

AHEAD = 1  # tiles that may be done, or wait to start, beyond those that workers run
ALIGNED = 32  # pixels: a multiple of most networks' strides, so that their maps are cut where kernels like it


def cuts(size: int, tile: int, edges: Sequence[int] = ()) -> list[int]:
    """Positions ``0 = c0 < c1 < ... = size`` at multiples of ``tile``, counted anew from each of ``edges``."""
    return [*(cut for lo, hi in pairwise(sorted({0, *edges, size})) for cut in range(lo, hi, tile)), size]


AXES = (Role.ROW, Role.COL)


def even(size: int, tile: int) -> int:
    """The least multiple of ``ALIGNED`` that cuts ``size`` into no more tiles than ``tile`` does, if it is less."""
    count = -(-size // tile)
    return min(tile, size if count == 1 else -(-size // (count * ALIGNED)) * ALIGNED)


@dataclass(frozen=True)
class AxisTiles:
    """The tiles of one segment along one axis.

    Attributes:
        owned: for each tile, the interval that it owns of each owned map; maps of which it owns nothing are left out.
        spans: for each tile, the interval of every node that it computes or reads, by node index.
        count: of them.
        edges: the first tile of each rank's band, and the number of all.
    """

    owned: tuple[dict[Ref, Interval], ...]
    spans: tuple[dict[int, Interval], ...]
    count: int
    edges: tuple[int, ...] = ()

    def part(self, band: int) -> AxisTiles:
        """The tiles of one rank's band, perhaps none."""
        mine = slice(self.edges[band], self.edges[band + 1])
        return AxisTiles(self.owned[mine], self.spans[mine], mine.stop - mine.start)

    @cached_property
    def largest(self) -> dict[int, int]:
        """The longest span of each node over all tiles."""
        result: dict[int, int] = {}
        for span in self.spans:
            for index, interval in span.items():
                result[index] = max(result.get(index, 0), interval.size)
        return result

    @cached_property
    def total(self) -> dict[int, int]:
        """The sum of each node's spans over all tiles: its size, and what is computed more than once."""
        result: dict[int, int] = {}
        for span in self.spans:
            for index, interval in span.items():
                result[index] = result.get(index, 0) + interval.size
        return result


def axis_tiles(graph: Graph, segment: Segment, role: Role, tile: int, bands: Bands | None = None) -> AxisTiles:
    """Cut one axis into tiles of ``tile`` pixels of the base map and work out what each must compute."""

    def size(ref: Ref) -> int:
        return graph.spec(ref).rows if role is Role.ROW else graph.spec(ref).cols

    base = size(segment.base)
    sizes = {ref: size(ref) for ref in segment.owned(graph)}
    owned, edges = [], () if bands is None else bands.on(role, base)
    found = cuts(base, tile, edges)
    for lo, hi in pairwise(found):
        mine = {ref: Interval(carried(lo, base, n), carried(hi, base, n)) for ref, n in sizes.items()}
        owned.append({ref: interval for ref, interval in mine.items() if interval.size > 0})
    firsts = tuple(bisect_left(found, edge) for edge in edges)
    return AxisTiles(tuple(owned), tuple(spans(graph, segment, role, mine) for mine in owned), len(owned), firsts)


@dataclass(frozen=True)
class Tile:
    """One tile: the box that it owns of each map, and the box of each node that it computes or reads."""

    number: int
    owned: dict[Ref, Box]
    boxes: dict[int, Box]


@dataclass(frozen=True)
class Grid:
    """All tiles of a segment, row by row."""

    rows: AxisTiles
    cols: AxisTiles

    def __len__(self) -> int:
        return self.rows.count * self.cols.count

    def part(self, place: tuple[int, int]) -> Grid:
        """The tiles of the rank at this band of rows and of columns."""
        return Grid(self.rows.part(place[0]), self.cols.part(place[1]))

    def __iter__(self) -> Iterator[Tile]:
        number = 0
        for row_owned, row_spans in zip(self.rows.owned, self.rows.spans, strict=True):
            for col_owned, col_spans in zip(self.cols.owned, self.cols.spans, strict=True):
                owned = {ref: Box.of(row_owned[ref], col_owned[ref]) for ref in row_owned if ref in col_owned}
                boxes = {i: Box.of(row_spans[i], col_spans[i]) for i in row_spans if i in col_spans}
                yield Tile(number, owned, boxes)
                number += 1


def grid(graph: Graph, segment: Segment, tile: tuple[int, int], bands: Bands | None = None) -> Grid:
    """The tiles of ``segment``, ``tile`` pixels (height, width) of its base map each, cut along ranks' bands too."""
    rows, cols = (axis_tiles(graph, segment, role, edge, bands) for role, edge in zip(AXES, tile, strict=True))
    return Grid(rows, cols)

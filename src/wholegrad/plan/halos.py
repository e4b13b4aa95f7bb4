"""What each rank holds of every boundary, and what ranks send each other of it: integers only.

A rank owns of a boundary what its tiles of the segment that makes it own; it holds that and its halo, the smallest box
around all that its tiles read in any sweep. Once a boundary is made, each owner sends every other rank what that one
needs of the owner's part. Once all readers of a boundary are pulled back, the same boxes go the other way with what was
added to their gradient, and are added up where they are owned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.layout import Role
from wholegrad.graph.recall import recallable
from wholegrad.graph.segment import Segment, spans
from wholegrad.plan.bands import Bands, carried
from wholegrad.plan.tiles import AxisTiles, Grid

Part = Interval | None  # of an axis, or nothing


@dataclass(frozen=True)
class Halo:
    """One boundary, shared out.

    Attributes:
        owned: what each rank owns of it; None for nothing.
        read: the smallest box around what each rank's tiles read of it.
    """

    owned: tuple[Box | None, ...]
    read: tuple[Box | None, ...]

    def held(self, rank: int) -> Box | None:
        """What a rank has memory for."""
        return _around(self.owned[rank], self.read[rank])

    def sent(self, rank: int) -> list[tuple[int, Box]]:
        """What a rank sends once the boundary is made: to whom, and which part of its own."""
        mine = self.owned[rank]
        return [] if mine is None else self._meets(mine, self.read, rank)

    def received(self, rank: int) -> list[tuple[int, Box]]:
        """What a rank is sent then: by whom, and which part of theirs."""
        mine = self.read[rank]
        return [] if mine is None else self._meets(mine, self.owned, rank)

    @property
    def most(self) -> int:
        """Pixels of what the rank with most holds."""
        boxes = (self.held(rank) for rank in range(len(self.owned)))
        return max((box.area for box in boxes if box is not None), default=0)

    def moved(self, ranks: Iterable[int]) -> int:
        """Pixels that one of these ranks sends and receives at once, the one with most."""
        return max(sum(box.area for _, box in (*self.sent(rank), *self.received(rank))) for rank in ranks)

    @staticmethod
    def _meets(mine: Box, others: Sequence[Box | None], rank: int) -> list[tuple[int, Box]]:
        found = ((peer, overlap(mine, box)) for peer, box in enumerate(others) if box is not None and peer != rank)
        return [(peer, box) for peer, box in found if box is not None]


def overlap(one: Box, other: Box) -> Box | None:
    """What lies in both boxes; None if nothing does."""
    box = Box(max(one.y0, other.y0), min(one.y1, other.y1), max(one.x0, other.x0), min(one.x1, other.x1))
    return box if box.height > 0 and box.width > 0 else None


def halos(
    graph: Graph, segments: Sequence[Segment], grids: Sequence[Grid], bands: Bands, backward: bool
) -> dict[Ref, Halo]:
    """Every map that a segment makes, as the ranks of ``bands`` share it out.

    Args:
        grids: of the segments, cut along the bands.
        backward: whether a backward sweep reads them again.
    """
    made = {ref: k for k, segment in enumerate(segments) for ref in segment.outputs}
    readers: dict[Ref, list[int]] = {ref: [] for ref in made}
    for k, segment in enumerate(segments):
        for ref in segment.maps:
            if ref in readers:
                readers[ref].append(k)
    return {
        ref: _halo(graph, ref, segments, grids, bands, (k, tuple(readers[ref])), backward) for ref, k in made.items()
    }


def _halo(
    graph: Graph,
    ref: Ref,
    segments: Sequence[Segment],
    grids: Sequence[Grid],
    bands: Bands,
    where: tuple[int, tuple[int, ...]],
    backward: bool,
) -> Halo:
    maker, readers = where
    again = backward and ref in recallable(graph, segments[maker], {ref})
    owned = boxes_owned(grids[maker], ref, bands)
    read: tuple[Box | None, ...] = (None,) * bands.ranks
    for k in (*readers, *([maker] if again else [])):
        axes = (grids[k].rows, grids[k].cols)
        more = _boxes(bands, *(_hulls(axis, [spans.get(ref.node) for spans in axis.spans]) for axis in axes))
        read = tuple(_around(one, other) for one, other in zip(read, more, strict=True))
    return Halo(owned, read)


def boxes_owned(grid: Grid, ref: Ref, bands: Bands) -> tuple[Box | None, ...]:
    """What the tiles of each rank own of a map, all together; None for nothing."""
    axes = (grid.rows, grid.cols)
    return _boxes(bands, *(_hulls(axis, [mine.get(ref) for mine in axis.owned]) for axis in axes))


def beyond_band(graph: Graph, segment: Segment, ref: Ref, bands: Bands) -> int:
    """Pixels of a map that a rank between others reads beyond its own, for what it owns of a segment's outputs."""
    base, spec = graph.spec(segment.base), graph.spec(ref)
    sizes = []
    for role, size, whole in ((Role.ROW, base.rows, spec.rows), (Role.COL, base.cols, spec.cols)):
        edges = bands.on(role, size)
        middle = (len(edges) - 2) // 2
        lo, hi = edges[middle], edges[middle + 1]
        owned = {}
        for each in segment.owned(graph):
            length = graph.spec(each).rows if role is Role.ROW else graph.spec(each).cols
            owned[each] = Interval(carried(lo, size, length), carried(hi, size, length))
        own = carried(hi, size, whole) - carried(lo, size, whole)
        owned = {each: interval for each, interval in owned.items() if interval.size > 0}
        read = spans(graph, segment, role, owned).get(ref.node)
        sizes.append((own, max(read.size if read else 0, own)))
    (own_rows, rows), (own_cols, cols) = sizes
    return rows * cols - own_rows * own_cols


def _hulls(axis: AxisTiles, parts: Sequence[Part]) -> list[Part]:
    """The smallest interval around what the tiles of each band have."""
    return [_hull(parts[lo:hi]) for lo, hi in pairwise(axis.edges)]


def _hull(parts: Iterable[Part]) -> Part:
    found = None
    for part in parts:
        if part is not None:
            found = part if found is None else found.union(part)
    return found


def _boxes(bands: Bands, rows: Sequence[Part], cols: Sequence[Part]) -> tuple[Box | None, ...]:
    places = map(bands.place, range(bands.ranks))
    pairs = ((rows[y], cols[x]) for y, x in places)
    return tuple(None if down is None or across is None else Box.of(down, across) for down, across in pairs)


def _around(one: Box | None, other: Box | None) -> Box | None:
    if one is None or other is None:
        return one or other
    return one.union(other)

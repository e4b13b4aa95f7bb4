"""What each segment costs with each tile, looked at once however many sets of boundaries and budgets share it.

Seconds come from a few tiles of each grid (its ends and one between). So does memory at first: an estimate that is
never more than what all tiles need, and that gives way to the latter where a plan is about to use it (`settle`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from wholegrad.graph.graph import Graph, Ref, Spec
from wholegrad.graph.inline import Inlined, inline, plain
from wholegrad.graph.layout import Role
from wholegrad.graph.segment import Segment
from wholegrad.plan import cost, devices, memory
from wholegrad.plan.devices import Apart
from wholegrad.plan.plan import SegmentPlan
from wholegrad.plan.rates import Rates
from wholegrad.plan.tiles import AxisTiles, Grid, axis_tiles, grid

ELEMENT_LIMIT = 2**31  # rule 8
HEIGHTS = (64, 128, 256, 384, 512, 768, 1024, 2048)
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COARSE = (64, 256, 512, 1024)  # both, while boundaries are being chosen
WIDEST = 32  # times its height that a tile is wide at most

Tile = tuple[int, int]


def too_large(area: int, spec: Spec, most_bytes: int | None) -> bool:
    """Whether so many pixels of a map reach the limits of rule 8: 2**31 elements, and a device's own in bytes."""
    elements = area * (spec.pixel_bytes // spec.dtype.itemsize)
    return elements >= ELEMENT_LIMIT or (most_bytes is not None and area * spec.pixel_bytes >= most_bytes)


class Option(NamedTuple):
    """One tile of a segment: predicted seconds of all tiles on all workers, both sweeps, and of each of the two."""

    seconds: float
    tile: Tile
    forward: float
    backward: float


@dataclass(frozen=True)
class Terms:
    """What of a request decides what tiles cost: everything but the budget.

    Attributes:
        workers: tiles that run at once.
        sinks: maps that go to the caller; ``sink_bytes`` for each pixel of a row of tiles, ``sink_held`` beside.
        apart: the device with memory of its own on which tiles run; None for the CPU.
    """

    backward: bool
    workers: int
    rates: Rates
    tile: Tile | None = None
    sinks: tuple[Ref, ...] = ()
    sink_bytes: int = 0
    sink_held: int = 0
    as_bytes: frozenset[Ref] = frozenset()
    raw: frozenset[Ref] = frozenset()
    apart: Apart | None = None


class Piece:
    """One segment.

    Args:
        fused: whether it runs in one pass (rule 4), so that it has no forward sweep of its own.
    """

    def __init__(self, graph: Graph, macs: Sequence[float], terms: Terms, segment: Segment, fused: bool) -> None:
        self.graph, self.macs, self.terms, self.segment, self.fused = graph, macs, terms, segment, fused
        self._axes: dict[tuple[Role, int], AxisTiles] = {}
        self._working: dict[Tile, memory.Working] = {}
        self._exact: dict[Tile, Grid] = {}

    @cached_property
    def _how(self) -> Inlined:
        terms = self.terms
        if terms.apart is not None:
            return plain(self.segment)
        return inline(self.graph, self.segment, terms.raw, not terms.backward, terms.as_bytes)

    @cached_property
    def _bill(self) -> cost.Bill:
        return cost.Bill(self.graph, self.macs, self.segment, self._how, self.terms.rates)

    @cached_property
    def coarse(self) -> list[Option]:
        """A few tiles, the fastest first."""
        return self._options(COARSE, COARSE)

    @cached_property
    def fine(self) -> list[Option]:
        """Every tile that a plan may use, the fastest first."""
        return self._options(HEIGHTS, WIDTHS)

    @cached_property
    def least(self) -> Option | None:
        """The smallest tile, which needs the fewest bytes; None if every one is too large for rule 8."""
        return min(self.coarse, key=lambda each: (each.tile[0] * each.tile[1], each), default=None)

    def fastest(self, options: Sequence[Option], forward: float, backward: float) -> Option | None:
        """The first whose tile needs at most so many bytes in each sweep."""
        least = self.least
        if least is None or max(self.needs(least.tile)) > max(forward, backward):
            return None
        for option in options:
            need = self.needs(option.tile)
            if need[0] <= forward and need[1] <= backward:
                return option
        return None

    def needs(self, tile: Tile) -> tuple[int, int]:
        """Bytes forward and backward; 0 in a sweep that does not happen."""
        found = self.working(tile)
        return 0 if self.fused else found.forward, found.backward if self.terms.backward else 0

    def working(self, tile: Tile) -> memory.Working:
        """Of the tiles that run side by side: at most what they need, and just that once :meth:`settle` was called."""
        if tile not in self._working:
            rows, cols = self._axis(Role.ROW, tile[0]), self._axis(Role.COL, tile[1])
            self._working[tile] = self._weigh(rows, cols)
        return self._working[tile]

    def settle(self, tile: Tile) -> None:
        """Look at every tile of a grid, for :meth:`working`."""
        if tile not in self._exact:
            found = grid(self.graph, self.segment, tile)
            self._exact[tile] = found
            self._working[tile] = self._weigh(found.rows, found.cols)

    def planned(self, option: Option) -> tuple[SegmentPlan, Grid]:
        """The segment with this tile, every tile looked at."""
        self.settle(option.tile)
        found = self._exact[option.tile]
        ahead = cost.forward_macs(self.macs, self.segment, found.rows, found.cols)
        again = cost.again_macs(self.graph, self.macs, self.segment, found.rows, found.cols)
        part = SegmentPlan(
            segment=self.segment,
            tile=option.tile,
            tiles=len(found),
            fused=self.fused,
            working=self.working(option.tile),
            forward_macs=ahead,
            again_macs=again,
            seconds=option.forward,
            backward_seconds=option.backward,
        )
        return part, found

    def _axis(self, role: Role, edge: int) -> AxisTiles:
        key = (role, edge)
        if key not in self._axes:
            self._axes[key] = axis_tiles(self.graph, self.segment, role, edge, sample=True)
        return self._axes[key]

    def _options(self, heights: Sequence[int], widths: Sequence[int]) -> list[Option]:
        spec, fixed = self.graph.spec(self.segment.base), self.terms.tile
        if fixed is not None:
            heights, widths = fixed[:1], fixed[1:]
        else:
            heights = list(dict.fromkeys(min(h, spec.rows) for h in heights))
            widths = list(dict.fromkeys(min(w, spec.cols) for w in widths))
        rows = [self._axis(Role.ROW, h) for h in heights]
        cols = [self._axis(Role.COL, w) for w in widths]
        found = self._bill.seconds(rows, cols)
        options = []
        for i, h in enumerate(heights):
            for j, w in enumerate(widths):
                if fixed is None and (not (min(h, spec.cols) <= w <= WIDEST * h) or self._gigantic(rows[i], cols[j])):
                    continue
                tiles = rows[i].count * cols[j].count
                of_thread = 1.0 if self.terms.apart else -(-tiles // self.terms.workers) / tiles  # idling is time lost
                ahead = 0.0 if self.fused else float(found.forward[i, j]) * of_thread
                back = float(found.backward[i, j]) * of_thread if self.terms.backward else 0.0
                options.append(Option(ahead + back, (h, w), ahead, back))
        return sorted(options)

    def _gigantic(self, rows: AxisTiles, cols: AxisTiles) -> bool:
        """Whether a tensor of a tile reaches the limit of rule 8."""
        most = None if self.terms.apart is None else self.terms.apart.most_bytes
        if most is None and max(rows.largest.values()) * max(cols.largest.values()) * self._channels < ELEMENT_LIMIT:
            return False
        specs = {i: self.graph.nodes[i].outputs[0] for i in rows.largest}
        return any(too_large(n * cols.largest.get(i, 0), specs[i], most) for i, n in rows.largest.items())

    @cached_property
    def _channels(self) -> int:
        """The most elements that a pixel of a map here has."""
        indices = (*self.segment.nodes, *(ref.node for ref in self.segment.maps))
        specs = [self.graph.nodes[i].outputs[0] for i in indices]
        return max((spec.pixel_bytes // spec.dtype.itemsize for spec in specs), default=1)

    def _weigh(self, rows: AxisTiles, cols: AxisTiles) -> memory.Working:
        """A tile's bytes for each that runs at once, and those of the row of tiles that sinks hold."""
        terms = self.terms
        side = min(terms.workers, rows.count * cols.count)
        if terms.apart is not None:
            tile = memory.working(self.graph, self.segment, self._how, rows, cols, devices.SLACK)
            read = self._in_flight(rows, cols) * memory.arriving(self.graph, self.segment, terms.raw, rows, cols)
            return memory.Working(side * tile.forward + read, side * tile.backward + read, tile.slack)
        tile = memory.working(self.graph, self.segment, self._how, rows, cols)
        band = self._band(rows)
        return memory.Working(side * tile.forward + band, side * tile.backward + band, tile.slack)

    def _band(self, rows: AxisTiles) -> int:
        """Bytes of the row of tiles that sinks hold."""
        sunk = [ref for ref in self.segment.outputs if ref in self.terms.sinks]
        band = sum(rows.largest[ref.node] * self.graph.spec(ref).cols for ref in sunk) * self.terms.sink_bytes
        return band + self.terms.sink_held

    def _in_flight(self, rows: AxisTiles, cols: AxisTiles) -> int:
        """Tiles whose pixels are on their way to a device, or there."""
        return min(self.terms.workers + devices.BEYOND, rows.count * cols.count)

    def staging(self, tile: Tile) -> int:
        """Bytes of the host's memory through which a device's tiles come and go."""
        rows, cols = self._axis(Role.ROW, tile[0]), self._axis(Role.COL, tile[1])
        read = memory.arriving(self.graph, self.segment, self.terms.raw, rows, cols)
        back = memory.returning(self.graph, self.segment, self._how, rows, cols)
        through = self._in_flight(rows, cols) * read + (self.terms.workers + 1) * back
        return int(devices.PINNED * through) + self._band(rows)

"""What each segment costs with each tile, looked at once however many sets of boundaries and budgets share it.

Seconds come from a few tiles of each grid (its ends and one between). So does memory at first: an estimate that is
never more than what all tiles need, and that gives way to the latter where a plan is about to use it (`settle`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wholegrad.graph.graph import READERS, Graph, Kind, Ref, Spec
from wholegrad.graph.inline import Inlined, Inliner, plain, with_tail
from wholegrad.graph.layout import Role
from wholegrad.graph.segment import Segment
from wholegrad.plan import cost, devices, memory
from wholegrad.plan.bands import Bands
from wholegrad.plan.devices import Apart
from wholegrad.plan.extents import LOOKED_AT, Extent, Extents, extent
from wholegrad.plan.halos import beyond_band
from wholegrad.plan.plan import SegmentPlan
from wholegrad.plan.rates import Rates
from wholegrad.plan.tiles import AHEAD, ALIGNED, Grid, even, grid
from wholegrad.plan.traffic import ASSUMED, Link
from wholegrad.plan.walk import Upkeep, Walk

ELEMENT_LIMIT = 2**31  # rule 8
HEIGHTS = (64, 128, 256, 384, 512, 768, 1024, 2048)
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COARSE = (64, 256, 512, 1024)  # both, while boundaries are being chosen
SURELY = 15 / 16  # of the size from which a block has pages of its own: copies with padding are larger
WIDEST, UPRIGHT = 32, 0.7  # times its height that a tile is wide at most, and at least

Tile = tuple[int, int]
Wear = npt.NDArray[np.float64] | None


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
        bands: how ranks share the image, and ``link`` how fast they talk; None for one that has it to itself.
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
    bands: Bands | None = None
    link: Link = ASSUMED


class Ground:
    """What all segments of a graph have in common, worked out once."""

    def __init__(self, graph: Graph, terms: Terms) -> None:
        self.graph, self.terms = graph, terms
        self.prices = cost.Prices(graph, terms.rates)
        self.inliner = Inliner(graph, terms.raw, None if terms.apart is None else terms.apart.triton)
        self.extents = Extents(graph, terms.bands)
        self.upkeep = Upkeep(graph)
        first = [node.outputs[0] for node in graph.nodes]
        self.elements = np.array([spec.pixel_bytes // spec.dtype.itemsize for spec in first], np.float64)  # of a pixel
        self.pixels = np.array([spec.pixel_bytes for spec in first], np.float64)  # bytes of one


class _Tiles(NamedTuple):
    """Every height with every width, and what such tiles reach."""

    high: list[int]
    wide: list[int]
    rows: Extent
    cols: Extent


def side_by_side(tiles: Sequence[int], workers: int) -> int:
    """The most bytes that so many workers may need at once, of tiles that need so many each and start in this order.

    Of any ``workers + AHEAD`` in a row, at most as many run as there are workers; one further on has not started.
    """
    window = workers + AHEAD
    runs = [sorted(tiles[k : k + window])[-workers:] for k in range(max(len(tiles) - window, 0) + 1)]
    return max(map(sum, runs), default=0)


class Piece:
    """One segment.

    Args:
        fused: whether it runs in one pass (rule 4), so that it has no forward sweep of its own.
        new: whether hardly anything of a step has run before.
    """

    def __init__(self, ground: Ground, segment: Segment, fused: bool, new: bool = False) -> None:
        self.ground, self.segment, self.fused, self.new = ground, segment, fused, new
        self.graph, self.terms = ground.graph, ground.terms
        self._needs: dict[Tile, tuple[int, int]] = {}
        self._exact: dict[Tile, tuple[Grid, memory.Working]] = {}

    @cached_property
    def _how(self) -> Inlined:
        """How tiles run forward: as the executor will find it."""
        apart = self.terms.apart
        if apart is not None:
            return plain(self.segment) if apart.triton is None else self.ground.inliner.inline(self.segment)
        return self.ground.inliner.inline(self.segment, not self.terms.backward, self.terms.as_bytes)

    @property
    def _held(self) -> tuple[Inlined, ...]:
        """Whose bytes count: those, and pulled back if that differs. What Triton saves stands for what it takes."""
        if self.terms.apart is not None:
            return (plain(self.segment),)
        return (self._how,) if self._pulled is self._how else (self._how, self._pulled)

    @cached_property
    def _pulled(self) -> Inlined:
        """How tiles run that are pulled back."""
        if self.terms.apart is not None or not self.terms.backward:
            return self._how
        return with_tail(self.graph, self.segment, self._how)

    @cached_property
    def _bill(self) -> cost.Bill:
        sent = self.terms.raw if self.terms.apart else frozenset[Ref]()
        return cost.Bill(self.ground.prices, self.segment, self._how, sent)

    @cached_property
    def _bill_pulled(self) -> cost.Bill:
        return cost.Bill(self.ground.prices, self.segment, self._pulled)

    @cached_property
    def _walk(self) -> Walk:
        return self._walks[0][0]

    @cached_property
    def _walks(self) -> list[tuple[Walk, Walk]]:
        """Of tiles that run forward, and if those differ of tiles that are pulled back; each also without padding."""
        slack, found = devices.SLACK if self.terms.apart else None, []
        for how in self._held:
            given = self.ground.upkeep, self.segment, how, slack, self.new
            walk = Walk(*given)
            found.append((walk, Walk(*given, True) if self._pads else walk))
        return found

    @cached_property
    def _pads(self) -> list[tuple[int, int]]:
        """Places among the bill's nodes of what pads at its map's ends, and of what it reads."""
        place, graph = self._bill.place, self.graph
        found = [i for i in self._held[0].nodes if self.ground.upkeep.pads[i]]
        return [(place[i], place[graph.nodes[i].operands[0].node]) for i in found]

    @cached_property
    def coarse(self) -> list[Option]:
        """A few tiles, the fastest first."""
        tiles = self._tiles(COARSE, COARSE)
        self._look(tiles)
        return self._options(tiles)

    @cached_property
    def fine(self) -> list[Option]:
        """Every tile that a plan may use, the fastest first."""
        return self._options(self._tiles(HEIGHTS, WIDTHS))

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
        """Bytes forward and backward of the tiles that run side by side; 0 in a sweep that does not happen.

        At most what they need, and just that once :meth:`settle` was called.
        """
        if tile not in self._needs:
            self._look(self._tiles(HEIGHTS, WIDTHS))
        return self._needs[tile]

    def _look(self, tiles: _Tiles) -> None:
        """Find out what tiles need that nobody asked about before."""
        forward, backward = self._weigh(tiles.rows, tiles.cols)
        for each, ahead, back in zip(product(tiles.high, tiles.wide), forward, backward, strict=True):
            self._needs.setdefault(each, self._asked(ahead, back))

    def settle(self, tile: Tile) -> None:
        """Look at every tile of a grid, for :meth:`needs`."""
        if tile not in self._exact:
            found, bands = grid(self.graph, self.segment, tile, self.terms.bands), self.terms.bands
            places = () if bands is None else dict.fromkeys(map(bands.place, bands.busiest))
            parts = [part for place in places if len(part := found.part(place))] or [found]
            weighed = [self._weigh_all(part) for part in parts]
            most = max(weighed, key=lambda each: each.backward if self.terms.backward else each.forward)
            forward, backward = max(each.forward for each in weighed), max(each.backward for each in weighed)
            self._exact[tile] = found, memory.Working(forward, backward, most.slack)
            self._needs[tile] = self._asked(forward, backward)

    def _weigh_all(self, tiles: Grid) -> memory.Working:
        """What the tiles of one process need."""
        rows, cols = (extent(each, self._bill.nodes, self._pads) for each in (tiles.rows, tiles.cols))
        (forward,), (backward,) = needed = self._weigh(rows, cols)
        seen, sweep = self._weigh(rows, cols, seen=True), int(self.terms.backward)
        slack = max(needed[sweep][0] / max(seen[sweep][0], 1), 1.0)
        return memory.Working(forward, backward, slack)

    def planned(self, option: Option) -> tuple[SegmentPlan, Grid]:
        """The segment with this tile, every tile looked at."""
        self.settle(option.tile)
        found, working = self._exact[option.tile]
        ahead = cost.forward_macs(self.ground.prices.macs, self.segment, found.rows, found.cols)
        again = cost.again_macs(self.graph, self.ground.prices.macs, self.segment, found.rows, found.cols)
        part = SegmentPlan(
            segment=self.segment,
            tile=option.tile,
            tiles=len(found),
            fused=self.fused,
            working=working,
            forward_macs=ahead,
            again_macs=again,
            seconds=option.forward,
            backward_seconds=option.backward,
            staging=0 if self.terms.apart is None else self.staging(option.tile),
            from_heap=self._from_heap(option.tile),
        )
        return part, found

    def _tiles(self, heights: Sequence[int], widths: Sequence[int]) -> _Tiles:
        """Heights and widths as they fit on the base map, or the one that is fixed, and what tiles of these reach."""
        spec, fixed = self.graph.spec(self.segment.base), self.terms.tile
        if fixed is not None:
            high, wide = [fixed[0]], [fixed[1]]
        else:
            reach = self._reach(spec)
            high, wide = self._edges(reach[0], heights), self._edges(reach[1], widths)
        of, given = self.ground.extents.of, (self.segment, self._bill.nodes)
        rows, cols = of(*given, Role.ROW, high, self._pads), of(*given, Role.COL, wide, self._pads)
        return _Tiles(high, wide, rows, cols)

    def _edges(self, size: int, edges: Sequence[int]) -> list[int]:
        """Edges of tiles, such that all tiles of a map are nearly equal; also one that gives each worker its share."""
        share = even(size, -(-size // (self.terms.workers * ALIGNED)) * ALIGNED)
        shares = [share] if len(edges) > len(COARSE) and edges[0] <= share <= edges[-1] else []
        return list(dict.fromkeys([*(even(size, edge) for edge in edges), *shares]))

    def _reach(self, spec: Spec) -> tuple[int, int]:
        """Rows and columns of a map that one rank owns, at most."""
        bands = self.terms.bands
        if bands is None:
            return spec.rows, spec.cols
        return max(bands.widest(Role.ROW, spec.rows), 1), max(bands.widest(Role.COL, spec.cols), 1)

    @cached_property
    def talk(self) -> tuple[float, float]:
        """Seconds in which ranks send each other what this segment reads of boundaries, and its gradients back."""
        bands, graph, link = self.terms.bands, self.graph, self.terms.link
        if bands is None or bands.ranks == 1:
            return 0.0, 0.0
        beyond = {ref: beyond_band(graph, self.segment, ref, bands) for ref in self.segment.maps}
        ahead = back = link.message * (2 + self.terms.backward)
        for ref, area in beyond.items():
            node = graph.nodes[ref.node]
            if node.kind not in READERS and node.kind is not Kind.SPREAD:
                ahead += area * graph.spec(ref).pixel_bytes * link.byte + link.message
                back += (area * graph.spec(ref).pixel_bytes * link.byte + link.message) * node.needs_grad
        return 0.0 if self.fused else ahead, back if self.terms.backward else 0.0

    def _options(self, tiles: _Tiles) -> list[Option]:
        rows, cols, workers = tiles.rows, tiles.cols, self.terms.workers
        found = self._bill.seconds(rows, cols)
        again = found if self._pulled is self._how else self._bill_pulled.seconds(rows, cols)
        ahead, back, once = (each.tolist() for each in (found.forward, again.backward, again.once))
        pulled, (talk, talk_back) = self.terms.backward, self.talk
        fixed, (_, width) = self.terms.tile is not None, self._reach(self.graph.spec(self.segment.base))
        narrowest, gigantic = tiles.wide[0], self._gigantic(rows, cols).tolist()
        options = []
        for (i, h), (j, w) in product(enumerate(tiles.high), enumerate(tiles.wide)):
            if fixed or (min(UPRIGHT * h, width) <= w <= max(WIDEST * h, narrowest) and not gigantic[i][j]):
                count = rows.counts[i] * cols.counts[j]
                of_thread = 1.0 if self.terms.apart else -(-count // workers) / count  # an idle worker is time lost
                forward = 0.0 if self.fused else ahead[i][j] * of_thread + once[i][j] * (not pulled)
                backward = back[i][j] * of_thread + once[i][j] if pulled else 0.0
                forward, backward = forward + talk, backward + talk_back
                options.append(Option(forward + backward, (h, w), forward, backward))
        return sorted(options)

    def _gigantic(self, rows: Extent, cols: Extent) -> npt.NDArray[np.bool_]:
        """Whether a tensor of a tile reaches the limit of rule 8, for each height and width."""
        elements = rows.largest * self.ground.elements[self._bill.nodes, None]
        most: npt.NDArray[np.float64] = (elements[:, :, None] * cols.largest[:, None, :]).max(0)
        if self.terms.apart is None or self.terms.apart.most_bytes is None:
            return most >= ELEMENT_LIMIT
        sizes = rows.largest * self.ground.pixels[self._bill.nodes, None]
        large: npt.NDArray[np.float64] = (sizes[:, :, None] * cols.largest[:, None, :]).max(0)
        return (most >= ELEMENT_LIMIT) | (large >= self.terms.apart.most_bytes)

    def _weigh(self, rows: Extent, cols: Extent, seen: bool = False) -> tuple[list[int], list[int]]:
        """A tile's bytes forward and backward, of all that run at once, and those of the row of tiles that sinks hold.

        One after another for each height with each width; ``seen``: without what the heap may take beside.
        """
        terms = self.terms
        count: npt.NDArray[np.int64] = np.outer(rows.counts, cols.counts).ravel()
        side = np.minimum(count, terms.workers)
        wear = None if seen else memory.wear(count, terms.workers, terms.backward)
        forward, backward = (side * each for each in self._largest(rows, cols, wear))
        if terms.apart is not None:
            areas = self._areas(self._walk, rows, cols)
            arriving = self._walk.arriving(areas, terms.raw)
            beside = self._in_flight(rows, cols) * arriving
            if terms.apart.graphs:  # what a recording reads and makes, and copies of that
                beside = beside + side * (arriving + 2 * self._walk.handed_on(areas))
            return (forward + beside).tolist(), (backward + beside).tolist()
        self._weigh_few(rows, cols, wear, forward, backward)
        if wear is not None:
            new = self._walk.new
            for each in (forward, backward):
                each += (np.minimum(each // 2, memory.HEAP) * wear).astype(np.int64) if new else memory.HEAP
        beside = self._band(rows, cols)
        return (forward + beside).tolist(), (backward + beside).tolist()

    def _largest(self, rows: Extent, cols: Extent, wear: Wear) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Bytes of the largest tile: of one that meets no padding, or of the largest in a row or column that does."""
        found = []
        for walk, inside in self._walks:
            each = [inside.bytes(self._areas(walk, rows, cols), wear)]
            if self._pads:
                at_ends = rows._replace(largest=rows.padded), cols._replace(largest=cols.padded)
                met = self._areas(walk, at_ends[0], cols), self._areas(walk, rows, at_ends[1])
                each += [walk.bytes(areas, wear) for areas in met]
            found.append([np.max(sweep, 0) for sweep in zip(*each, strict=True)])
        return found[0][0], found[-1][1]

    def _weigh_few(
        self,
        rows: Extent,
        cols: Extent,
        wear: Wear,
        forward: npt.NDArray[np.int64],
        backward: npt.NDArray[np.int64],
    ) -> None:
        """Where there are few tiles, count those that may really run side by side, not the largest several times."""
        few = [
            (i, j)
            for (i, high), (j, wide) in product(enumerate(rows.counts), enumerate(cols.counts))
            if high <= LOOKED_AT and wide <= LOOKED_AT and high * wide > 1
        ]
        if not few or self.terms.workers == 1:
            return
        tiles = [(i, r, j, c) for i, j in few for r in range(rows.counts[i]) for c in range(cols.counts[j])]
        i, r, j, c = np.array(tiles).T
        counts = [rows.counts[i] * cols.counts[j] for i, j in few]
        worn = None if wear is None else np.repeat([wear[i * len(cols.counts) + j] for i, j in few], counts)
        found = []
        for walk, _ in self._walks:
            chosen = [self._bill.place[index] for index in walk.nodes]
            areas = rows.each[chosen][:, i, r] * cols.each[chosen][:, j, c]
            found.append([each.tolist() for each in walk.bytes(areas.astype(np.int64), worn)])
        ahead, back = found[0][0], found[-1][1]
        first = 0
        for high, wide in few:
            at, last = high * len(cols.counts) + wide, first + rows.counts[high] * cols.counts[wide]
            for largest, each in ((forward, ahead), (backward, back)):
                largest[at] = min(largest[at], side_by_side(each[first:last], self.terms.workers))
            first = last

    def _areas(self, walk: Walk, rows: Extent, cols: Extent) -> npt.NDArray[np.int64]:
        """Pixels of the largest box of each node of the walk, for each height with each width."""
        chosen = [self._bill.place[index] for index in walk.nodes]
        areas = rows.largest[chosen, :, None] * cols.largest[chosen, None, :]
        found: npt.NDArray[np.int64] = areas.reshape(len(chosen), -1).astype(np.int64)
        return found

    def _band(self, rows: Extent, cols: Extent) -> npt.NDArray[np.int64]:
        """Bytes of the row of tiles that sinks hold."""
        terms, graph, at = self.terms, self.graph, self._bill.place
        sunk = [ref for ref in self.segment.outputs if ref in terms.sinks]
        lines = sum((rows.largest[at[ref.node]] * graph.spec(ref).cols for ref in sunk), np.zeros(len(rows.counts)))
        band: npt.NDArray[np.int64] = np.repeat(
            lines.astype(np.int64) * terms.sink_bytes + terms.sink_held, len(cols.counts)
        )
        return band

    def _in_flight(self, rows: Extent, cols: Extent) -> npt.NDArray[np.int64]:
        """Tiles whose pixels are on their way to a device, or there."""
        count: npt.NDArray[np.int64] = np.outer(rows.counts, cols.counts).ravel()
        return np.minimum(count, self.terms.workers + devices.BEYOND)

    def staging(self, tile: Tile) -> int:
        """Bytes of the host's memory through which a device's tiles come and go."""
        tiles = self._tiles([tile[0]], [tile[1]])
        areas = self._areas(self._walk, tiles.rows, tiles.cols)
        read = self._in_flight(tiles.rows, tiles.cols) * self._walk.arriving(areas, self.terms.raw)
        through = read + (self.terms.workers + 1) * self._walk.handed_on(areas)
        through = through + self.terms.workers * self._walk.fetched(areas)
        return int(devices.PINNED * int(through[0])) + int(self._band(tiles.rows, tiles.cols)[0])

    def _from_heap(self, tile: Tile) -> bool:
        """Whether all tensors of tiles come from the heap, and hardly anything else does."""
        tiles = self._tiles([tile[0]], [tile[1]])
        sweeps = self._walks[-1:] if self.fused else self._walks  # a fused segment has no forward sweep
        walks = [walk for pair in sweeps for walk in pair]
        most = max(int(walk.largest(self._areas(walk, tiles.rows, tiles.cols))[0]) for walk in walks)
        return all(walk.new for walk in walks) and most < memory.PAGED * SURELY

    def _asked(self, forward: int, backward: int) -> tuple[int, int]:
        """These, less the sweep that does not happen."""
        return 0 if self.fused else forward, backward if self.terms.backward else 0

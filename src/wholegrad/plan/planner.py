"""Choose boundaries, tiles and placements: the least predicted time whose projected peak fits the budget.

A greedy search. It starts with the cuts that reductions force, adds the one boundary that saves the most predicted
time, and stops when none does. For each set of boundaries every segment takes the fastest tile that fits in what
boundaries and reserved memory leave. Boundaries go to host memory while they fit there, else to disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from wholegrad.errors import BudgetError, PlanError
from wholegrad.graph import fusion
from wholegrad.graph.graph import Graph, Kind, Node, Ref
from wholegrad.graph.inline import Inlined, inline
from wholegrad.graph.layout import Role
from wholegrad.graph.segment import Segment, cut
from wholegrad.plan import cost, memory
from wholegrad.plan.boundaries import candidates, summed
from wholegrad.plan.plan import Placement, Plan, SegmentPlan, show_bytes
from wholegrad.plan.spill import spill_bytes
from wholegrad.plan.storage import stored_bytes
from wholegrad.plan.tiles import AxisTiles, axis_tiles

ELEMENT_LIMIT = 2**31  # rule 8
TILE_EDGES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
WIDE_EDGES = (8192, 16384)  # also columns of a tile where no gradient is wanted: few of its maps are held whole
HIGHEST = 2048  # rows of a tile; wide ones are read faster
COARSE_EDGES = (64, 256, 512, 1024)  # while boundaries are being chosen
LOOKED_AT = 8  # boundaries weighed anew at each step
WORTHWHILE = 0.98  # of the predicted time, to which a change of boundaries must bring it
WORTH_A_LAST_LOOK = 0.997  # the same once none of those is left, and what does not pay is dropped
FEW = 16  # candidates up to which each is also tried alone for the smallest budget
HOST_SHARES = (1.5, 1.0, 0.5, 0.0)  # of free memory, for boundaries and gradients as if all were held at once
MARGIN = 16 << 20  # added to the smallest budget that is reported


@dataclass(frozen=True)
class Request:
    """What is asked of the planner.

    Attributes:
        budget: bytes for the whole process; None for no limit.
        reserved: bytes that interpreter and libraries take, readers' caches included.
        backward: whether gradients are wanted.
        workers: tiles that run side by side, each with its own working set.
        sinks: output maps that are written to the caller's destination rather than kept (prediction).
        tile, boundaries, placement: fixed by the caller where not None.
        boundary_dtype: in which boundaries of a wider dtype are stored; None for the graph's own.
    """

    budget: int | None
    reserved: int
    backward: bool
    workers: int = 1
    sinks: tuple[Ref, ...] = ()
    tile: tuple[int, int] | None = None
    boundaries: frozenset[Ref] | None = None
    placement: Placement | Mapping[Ref, Placement] | None = None
    spill_dir: Path | None = None
    boundary_dtype: torch.dtype | None = None
    sink_bytes: int = 0  # what sinks hold, in bytes for each pixel of one row of tiles
    sink_held: int = 0  # bytes that sinks hold beside
    as_bytes: frozenset[Ref] = frozenset()  # outputs of which masks are stored where a kernel can
    raw: frozenset[Ref] = frozenset()  # images whose pixels are 8-bit fractions of 255


def make_plan(graph: Graph, request: Request) -> Plan:
    """The plan of least predicted time that fits.

    Raises:
        BudgetError: none fits; carries the smallest budget that would do.
        PlanError: what the caller fixed cannot be planned.
    """
    if request.backward and (graph.loss is None or not graph.nodes[graph.loss.node].needs_grad):
        raise PlanError("loss", "depends on no parameter that is trained", "set requires_grad on some")
    best = _best(graph, request)
    if best is None:
        search = _Search(graph, request)
        smallest = search.smallest()
        assert request.budget is not None
        raise BudgetError(
            f"budget {show_bytes(request.budget)}",
            f"too small for an image of {' x '.join(map(str, graph.image.outputs[0].shape))}{_dense(graph)}",
            f"the smallest that would do is {show_bytes(smallest)} ({smallest} bytes)",
            smallest,
        )
    return best


def _dense(graph: Graph) -> str:
    """What is held whole, in words, where it counts."""
    held, largest = memory.held_whole(graph), memory.largest_whole(graph)
    if largest is None or held < MARGIN:
        return ""
    return f" ({show_bytes(held)} of it held whole, such as {largest.outputs[0].shape} for {_reader(graph, largest)})"


def _reader(graph: Graph, node: Node) -> str:
    """The op for which a map is held whole."""
    later = [graph.nodes[i] for i in graph.consumers(node.index)]
    return (later[0] if node.kind is Kind.REDUCTION and later else node).place


def _best(graph: Graph, request: Request) -> Plan | None:
    """The best plan by estimates, made exact; with a slightly smaller budget if it does not quite fit then."""
    for share in (1.0, 0.98, 0.95, 0.9):
        budget = None if request.budget is None else int(request.budget * share)
        search = _Search(graph, replace(request, budget=budget))
        found = search.run()
        if found is None:
            return None
        parts = [search.exact(part) for part in found.segments]
        fused = bool(found.segments) and found.segments[-1].fused
        plan = replace(search.assemble(parts, fused, found.placements), budget=request.budget)
        if request.budget is None or plan.projected <= request.budget:
            return plan
    return None


class _Search:
    """One search; remembers segments' spans, which many sets of boundaries share."""

    def __init__(self, graph: Graph, request: Request) -> None:
        self.graph = graph
        self.request = request
        self.always = memory.gradient_accumulators(graph) + memory.held_whole(graph)
        self.macs = cost.pixel_macs(graph)
        self.edges: tuple[int, ...] = COARSE_EDGES
        self.whole = max(cost.whole_macs(graph), 1.0)
        self.axes: dict[tuple[Segment, Role, int], AxisTiles] = {}
        self.inlined: dict[Segment, Inlined] = {}
        self.apart = request.boundary_dtype is not None  # sums see boundaries as they are stored
        self.measured: dict[tuple[Segment, tuple[int, int]], SegmentPlan] = {}
        self.tried: dict[frozenset[Ref], float] = {}

    def run(self) -> Plan | None:
        """The best plan found, its tiles chosen from all sizes."""
        fixed = frozenset(self.request.sinks) | (self.request.boundaries or frozenset())
        chosen = fixed if self.request.boundaries is not None else self.chosen(fixed)
        self.edges = TILE_EDGES
        return None if chosen is None else self.plan(chosen)

    def chosen(self, fixed: frozenset[Ref]) -> frozenset[Ref] | None:
        """The boundaries of the best plan found.

        The search starts from nothing, and from what reductions force to be computed anyway (a convolution before a
        norm); it adds what saves most, drops what no longer does, and does both once more for smaller savings.
        """
        pool = [ref for ref in candidates(self.graph) if ref not in fixed]
        found = [(self.seconds(start), i, start) for i, start in enumerate(self.starts(fixed, pool))]
        best, _, chosen = min(found)
        for worth in (WORTHWHILE, WORTH_A_LAST_LOOK):
            best, chosen = self.grown(best, chosen, pool, worth)
            if best == float("inf"):
                return None
            for ref in sorted(chosen - fixed, key=lambda ref: -self.graph.spec(ref).nbytes):
                seconds = self.seconds(chosen - {ref})
                if seconds <= best:
                    best, chosen = seconds, chosen - {ref}
        return chosen

    def starts(self, fixed: frozenset[Ref], pool: list[Ref]) -> list[frozenset[Ref]]:
        """No boundary, those that reductions sum, and every candidate."""
        return list(dict.fromkeys([fixed, fixed | summed(self.graph, pool), fixed | frozenset(pool)]))

    def grown(self, best: float, chosen: frozenset[Ref], pool: list[Ref], worth: float) -> tuple[float, frozenset[Ref]]:
        """Add boundaries greedily. A saving rarely grows as others are added, so the last ones known bound the next."""
        known = [(self.seconds(chosen | {ref}), ref) for ref in pool if ref not in chosen]
        while known:
            known.sort()
            fresh = {known[0][1]: self.seconds(chosen | {known[0][1]})}
            while len(fresh) < min(LOOKED_AT, len(known)) and min(fresh.values()) > known[len(fresh)][0]:
                ref = known[len(fresh)][1]
                fresh[ref] = self.seconds(chosen | {ref})
            seconds, ref = min((seconds, ref) for ref, seconds in fresh.items())
            if seconds > worth * best or seconds == float("inf"):
                break
            change = best - seconds if best < float("inf") else 0.0
            best, chosen = seconds, chosen | {ref}
            known = [(fresh.get(other, old - change), other) for old, other in known if other != ref]
        return best, chosen

    def seconds(self, boundaries: frozenset[Ref]) -> float:
        """Predicted seconds of the best plan with these boundaries; infinite if none fits."""
        if boundaries not in self.tried:
            made = self.plan(boundaries)
            self.tried[boundaries] = float("inf") if made is None else made.seconds
        return self.tried[boundaries]

    def smallest(self) -> int:
        """The least projected peak over the sets of boundaries from which the search starts, on smallest tiles."""
        start = frozenset(self.request.sinks) | (self.request.boundaries or frozenset())
        sets = [start]
        if self.request.boundaries is None:
            pool = [ref for ref in candidates(self.graph) if ref not in start]
            sets = self.starts(start, pool)
            sets += [start | {ref} for ref in pool if len(pool) <= FEW]
        unlimited = _Search(self.graph, replace(self.request, budget=None))
        found = [plan.projected for boundaries in sets for plan in unlimited.frugal(boundaries)]
        return min(found) + MARGIN

    def frugal(self, boundaries: frozenset[Ref]) -> list[Plan]:
        """The plan with the least memory for these boundaries."""
        plans = []
        for segments, fused in self.variants(boundaries):
            parts = [min((self.part(s, tile) for tile in self.tiles(s)), key=self.needs) for s in segments]
            places = self.places(boundaries, 0)
            plans.append(self.assemble(parts, fused, places))
        return plans

    # One set of boundaries.

    def variants(self, boundaries: frozenset[Ref]) -> list[tuple[tuple[Segment, ...], bool]]:
        """Ways to cut, each with whether its last segment may run in one pass."""
        plain = cut(self.graph, boundaries, apart=self.apart)
        if not self.request.backward or not plain:
            return [(plain, False)]
        last = plain[-1]
        if not last.outputs and fusion.known_before(self.graph, last.reductions):
            return [(plain, True)]
        free = fusion.free_reductions(self.graph, last.reductions)
        rest = tuple(index for index in last.reductions if index not in free)
        if free and rest and not last.outputs and len(plain) == 1 and fusion.known_before(self.graph, rest):
            return [(cut(self.graph, boundaries, free, apart=self.apart), True), (plain, False)]
        return [(plain, False)]

    def plan(self, boundaries: frozenset[Ref]) -> Plan | None:
        found = [self.fastest(segments, fused, boundaries) for segments, fused in self.variants(boundaries)]
        return min((plan for plan in found if plan is not None), key=lambda plan: plan.seconds, default=None)

    def fastest(self, segments: tuple[Segment, ...], fused: bool, boundaries: frozenset[Ref]) -> Plan | None:
        """The fastest tiles that fit, with more or less of the memory given to boundaries."""
        budget = self.request.budget
        free = None if budget is None else max(budget - self.request.reserved - self.always, 0)
        rooms = [float("inf")] if free is None else [free * share for share in HOST_SHARES]
        ways = {tuple(places.items()): places for places in (self.places(boundaries, room) for room in rooms)}
        found = [self.placed(segments, fused, places) for places in ways.values()]
        return min((plan for plan in found if plan is not None), key=lambda plan: plan.seconds, default=None)

    def placed(self, segments: tuple[Segment, ...], fused: bool, places: dict[Ref, Placement]) -> Plan | None:
        base = self.request.reserved + self.always + memory.leftover(len(segments)) + self.spill(places)
        forward, backward = self.held(segments, places)
        parts = []
        for i, segment in enumerate(segments):
            held = max(forward[i], backward[i])
            room = None if self.request.budget is None else self.request.budget - base - held
            options = [self.part(segment, tile) for tile in self.tiles(segment)]
            fitting = [part for part in options if room is None or self.needs(part) <= room]
            if not fitting:
                return None
            parts.append(min(fitting, key=self.total_seconds))
        plan = self.assemble(parts, fused, places)
        fits = self.request.budget is None or plan.projected <= self.request.budget
        return plan if fits else None

    def total_seconds(self, part: SegmentPlan) -> float:
        return part.seconds + part.backward_seconds if self.request.backward else part.seconds

    def needs(self, part: SegmentPlan) -> int:
        return part.working.backward if self.request.backward else part.working.forward

    def tiles(self, segment: Segment) -> Sequence[tuple[int, int]]:
        if self.request.tile is not None:
            return [self.request.tile]
        spec = self.graph.spec(segment.base)
        edges = self.edges
        widths = edges if self.request.backward else edges + WIDE_EDGES
        shapes = [(h, w) for h in edges for w in widths if h <= HIGHEST and w in [h << k for k in range(5)]]
        return list(dict.fromkeys((min(h, spec.rows), min(w, spec.cols)) for h, w in shapes))

    def how(self, segment: Segment) -> Inlined:
        """What of a segment is computed where it is read."""
        if segment not in self.inlined:
            self.inlined[segment] = inline(
                self.graph, segment, self.request.raw, not self.request.backward, self.request.as_bytes
            )
        return self.inlined[segment]

    def axis(self, segment: Segment, role: Role, tile: int) -> AxisTiles:
        key = (segment, role, tile)
        if key not in self.axes:
            self.axes[key] = axis_tiles(self.graph, segment, role, tile, sample=True)
        return self.axes[key]

    def part(self, segment: Segment, tile: tuple[int, int]) -> SegmentPlan:
        key = (segment, tile)
        if key not in self.measured:
            rows, cols = self.axis(segment, Role.ROW, tile[0]), self.axis(segment, Role.COL, tile[1])
            self.measured[key] = self.weighed(segment, tile, rows, cols)
        return self.measured[key]

    def exact(self, part: SegmentPlan) -> SegmentPlan:
        """The same with every tile looked at, where estimates looked at a few."""
        rows = axis_tiles(self.graph, part.segment, Role.ROW, part.tile[0])
        cols = axis_tiles(self.graph, part.segment, Role.COL, part.tile[1])
        return replace(self.weighed(part.segment, part.tile, rows, cols), fused=part.fused)

    def weighed(self, segment: Segment, tile: tuple[int, int], rows: AxisTiles, cols: AxisTiles) -> SegmentPlan:
        tiles = rows.count * cols.count
        rounds = -(-tiles // self.request.workers)  # an idle worker is time lost
        of_thread = rounds / tiles
        return SegmentPlan(
            segment,
            tile,
            tiles,
            False,
            self.working(segment, rows, cols),
            cost.forward_macs(self.macs, segment, rows, cols),
            cost.again_macs(self.graph, self.macs, segment, rows, cols),
            cost.forward_seconds(self.graph, self.macs, segment, self.how(segment), rows, cols) * of_thread,
            cost.backward_seconds(self.graph, self.macs, segment, self.how(segment), rows, cols) * of_thread,
        )

    def working(self, segment: Segment, rows: AxisTiles, cols: AxisTiles) -> memory.Working:
        """A tile's bytes, and those of the row of tiles that sinks hold."""
        tile = memory.working(self.graph, segment, self.how(segment), rows, cols)
        sunk = [ref for ref in segment.outputs if ref in self.request.sinks]
        band = sum(rows.largest[ref.node] * self.graph.spec(ref).cols for ref in sunk) * self.request.sink_bytes
        band += self.request.sink_held
        side = min(self.request.workers, rows.count * cols.count)
        return memory.Working(side * tile.forward + band, side * tile.backward + band, tile.slack)

    def places(self, boundaries: frozenset[Ref], room: float) -> dict[Ref, Placement]:
        """Host memory for the smallest boundaries and their gradients, up to ``room`` bytes; disk for the rest."""
        written = {ref for ref in self.request.sinks if not self.graph.consumers(ref.node)}  # and read no more
        kept = sorted(boundaries - written, key=self.stored)
        wanted = self.request.placement
        if isinstance(wanted, Placement):
            return dict.fromkeys(kept, wanted)
        result = {}
        for ref in kept:
            room -= self.with_gradient(ref)
            fixed = wanted.get(ref) if wanted is not None else None
            result[ref] = fixed or (Placement.HOST if room >= 0 else Placement.DISK)
        return result

    def stored(self, ref: Ref) -> int:
        """Bytes of a boundary as it is stored."""
        return stored_bytes(self.graph.spec(ref), self.request.boundary_dtype)

    def with_gradient(self, ref: Ref) -> int:
        """The same with its gradient, which is kept in the graph's dtype."""
        return self.stored(ref) + self.graph.spec(ref).nbytes

    def held(
        self, segments: tuple[Segment, ...], places: Mapping[Ref, Placement], where: Placement = Placement.HOST
    ) -> tuple[list[int], list[int]]:
        """Bytes of boundaries and their gradients that lie there while each segment runs forward, and backward."""
        there = [ref for ref, place in places.items() if place is where]
        kept = memory.kept(self.graph, segments, there, self.request.boundary_dtype, self.request.backward)
        forward = [each.forward for each in kept]
        return forward, [each.backward + each.gradients for each in kept] if self.request.backward else forward

    def assemble(self, parts: Sequence[SegmentPlan], fused: bool, places: dict[Ref, Placement]) -> Plan:
        graph, request = self.graph, self.request
        segments = tuple(part.segment for part in parts)
        one_pass = [fused and i == len(parts) - 1 for i in range(len(parts))]
        peak = 0
        forward, backward = self.held(segments, places)
        for i, part in enumerate(parts):
            if not (fused and i == len(parts) - 1):
                peak = max(peak, forward[i] + part.working.forward)
            if request.backward:
                peak = max(peak, backward[i] + part.working.backward)
        final = tuple(replace(part, fused=fuse) for part, fuse in zip(parts, one_pass, strict=True))
        ahead = [part for part in final if not part.fused]
        macs = sum(part.forward_macs for part in ahead)
        seconds = sum(part.seconds for part in ahead)
        if request.backward:
            macs += sum(part.again_macs for part in final)
            seconds += sum(part.backward_seconds for part in final)
        return Plan(
            graph=graph,
            segments=final,
            placements=places,
            budget=request.budget,
            reserved=request.reserved,
            projected=request.reserved + self.always + peak + memory.leftover(len(parts)) + self.spill(places),
            whole_image=memory.whole_image(graph),
            recompute=macs / self.whole,
            seconds=seconds + self.disk_seconds(places),
            backward=request.backward,
            workers=request.workers,
            spill_dir=request.spill_dir,
            on_disk=max(max(held, default=0) for held in self.held(segments, places, Placement.DISK)),
            boundary_dtype=request.boundary_dtype,
        )

    def spill(self, places: Mapping[Ref, Placement]) -> int:
        """Bytes of memory that boundaries on disk take."""
        spilled = [ref for ref, place in places.items() if place is Placement.DISK]
        return spill_bytes(self.graph, spilled, self.request.boundary_dtype, self.request.workers)

    def disk_seconds(self, places: Mapping[Ref, Placement]) -> float:
        spilled = sum(self.with_gradient(ref) for ref, place in places.items() if place is Placement.DISK)
        return spilled * cost.SECONDS_PER_DISK_BYTE


def check_elements(plan: Plan) -> None:
    """Rule 8: no tile's tensor reaches 2**31 elements.

    Raises:
        PlanError: one would; names the node.
    """
    for i, part in enumerate(plan.segments):
        tiles = plan.grid(i)
        for index in (*part.segment.nodes, *(ref.node for ref in part.segment.maps)):
            area = tiles.rows.largest.get(index, 0) * tiles.cols.largest.get(index, 0)
            spec = plan.graph.nodes[index].outputs[0]
            if area * (spec.pixel_bytes // spec.dtype.itemsize) >= ELEMENT_LIMIT:
                place = plan.graph.nodes[index].place
                raise PlanError(place, f"a tile of {part.tile} needs 2**31 elements or more", "choose a smaller tile")

"""Choose boundaries, tiles and placements: the least predicted time whose projected peak fits the budget.

:mod:`wholegrad.plan.search` finds sets of boundaries worth looking at, the same whatever the budget, but more of them
for a larger one. Of these sets, some placements of each (:meth:`Cutting.ways`) and every tile, the fastest
that fits is the plan. So a larger budget never makes a plan that is predicted to be slower.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from pathlib import Path

import torch

from wholegrad.errors import BudgetError, PlanError
from wholegrad.graph.graph import Graph, Kind, Node, Ref
from wholegrad.plan import cost, memory
from wholegrad.plan.bands import Bands
from wholegrad.plan.check import check_elements
from wholegrad.plan.cuttings import Choice, Cutting, Cuttings, Way
from wholegrad.plan.devices import Apart, Host
from wholegrad.plan.pieces import Terms
from wholegrad.plan.plan import Placement, Plan, show_bytes
from wholegrad.plan.rates import BUILT_IN, Rates
from wholegrad.plan.search import NEVER, Search
from wholegrad.plan.traffic import ASSUMED, Link, traffic

__all__ = ["Planner", "Request", "check_elements", "make_plan"]

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
    rates: Rates = BUILT_IN  # of the machine
    apart: Apart | None = None  # the device with memory of its own on which tiles run; budget and reserved are its own
    bands: Bands | None = None  # how ranks share the image; bytes are of each
    link: Link = ASSUMED  # how fast these talk


def make_plan(graph: Graph, request: Request) -> Plan:
    """The plan of least predicted time that fits; :class:`Planner` for several budgets.

    Raises:
        BudgetError: none fits; carries the smallest budget that would do.
        PlanError: what the caller fixed cannot be planned.
    """
    try:
        with no_collection():  # until what was found on the way is gone again
            return Planner(graph, request).plan(request.budget)
    finally:
        graph.spans_known.clear()  # megabytes, which a step would miss


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


@contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's search for cycles: planning makes none, and each goes through all that PyTorch has loaded."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class Planner:
    """One graph and request, and plans for any number of budgets: the second costs little.

    Args:
        request: its ``budget`` does not count here.

    Raises:
        PlanError: what the caller fixed cannot be planned.
    """

    def __init__(self, graph: Graph, request: Request) -> None:
        if request.backward and (graph.loss is None or not graph.nodes[graph.loss.node].needs_grad):
            raise PlanError("loss", "depends on no parameter that is trained", "set requires_grad on some")
        self.graph, self.request = graph, request
        self.always = memory.gradient_accumulators(graph) + memory.held_whole(graph)
        terms = Terms(
            backward=request.backward,
            workers=request.workers,
            rates=request.rates,
            tile=request.tile,
            sinks=request.sinks,
            sink_bytes=request.sink_bytes,
            sink_held=request.sink_held,
            as_bytes=request.as_bytes,
            raw=request.raw,
            apart=request.apart,
            bands=request.bands,
            link=request.link,
        )
        self.cuttings = Cuttings(graph, terms, request.placement, request.boundary_dtype)
        fixed = frozenset(request.sinks) | (request.boundaries or frozenset())
        self.search = Search(graph, self.cuttings, fixed, request.boundaries is None)

    def plan(self, budget: int | None) -> Plan:
        """The plan of least predicted time whose projected peak is at most ``budget`` bytes; None for no limit.

        Raises:
            BudgetError: none is; carries the smallest budget that would do.
        """
        room = NEVER if budget is None else float(budget - self.request.reserved - self.always)
        found = self._best(room)
        if found is not None:
            return self._assembled(*found, budget)
        self._blame_host()
        assert budget is not None, "without a limit something fits"
        smallest = self.smallest()
        raise BudgetError(
            f"budget {show_bytes(budget)}",
            f"too small for an image of {' x '.join(map(str, self.graph.image.outputs[0].shape))}{_dense(self.graph)}",
            f"the smallest that would do is {show_bytes(smallest)} ({smallest} bytes)",
            smallest,
        )

    def _blame_host(self) -> None:
        """Say so if it is the host's memory that is too small for a plan on a device.

        Raises:
            BudgetError: it is.
        """
        apart = self.request.apart
        if apart is None or apart.host_budget is None:
            return
        cuttings = [each for boundaries in self.search.starts for each in self.cuttings.of(boundaries)]
        needs = [each.host_peak(each.smallest) for each in cuttings if each.smallest is not None]
        needed = apart.host_reserved + min(needs, default=0) + MARGIN
        if needed > apart.host_budget:
            raise BudgetError(
                f"host budget {show_bytes(apart.host_budget)}",
                f"is too small for tiles on {apart.name}",
                f"the smallest that would do is about {show_bytes(needed)} ({needed} bytes)",
                needed,
            )

    @no_collection()
    def smallest(self) -> int:
        """The least budget that would do, and a little more: a process may come to hold more until it is tried."""
        sets = [*self.search.starts, *self.search.singles]
        cuttings = [cutting for boundaries in sets for cutting in self.cuttings.of(boundaries)]
        known = [
            (c.peak(c.smallest), k, c, c.smallest, False) for k, c in enumerate(cuttings) if c.smallest is not None
        ]
        heapify(known)
        while not known[0][4]:  # by a few tiles of each grid, which is never too much
            _, k, cutting, choice, _ = heappop(known)
            cutting.settle(choice)
            heappush(known, (cutting.peak(choice), k, cutting, choice, True))
        return self.request.reserved + self.always + known[0][0] + MARGIN

    @no_collection()
    def _best(self, room: float) -> tuple[Cutting, Choice] | None:
        """Of all sets, placements and tiles: a queue of bounds, each made closer when it comes up, until one is met.

        Neither the seconds of fastest tiles nor memory by a few tiles of a grid is ever more than what it stands for.
        """
        cuttings = [each for boundaries in self.search.sets(room) for each in self.cuttings.of(boundaries)]
        queue: list[tuple[float, int, Cutting, Way, Choice | None]] = []
        for cutting in cuttings:
            for way in cutting.ways() if room < NEVER else [cutting.way(cutting.open)]:
                queue.append((cutting.least_seconds + way.seconds, len(queue), cutting, way, None))
        heapify(queue)
        while queue:
            _, number, cutting, way, choice = heappop(queue)
            if choice is not None:
                cutting.settle(choice)
                if cutting.peak(choice) <= room:
                    return cutting, choice
            choice = cutting.choose(room, way)
            if choice is not None:
                heappush(queue, (choice.seconds, number, cutting, way, choice))
        return None

    def _assembled(self, cutting: Cutting, choice: Choice, budget: int | None) -> Plan:
        graph, request = self.graph, self.request
        cutting.settle(choice)
        made = [piece.planned(option) for piece, option in zip(cutting.pieces, choice.options, strict=True)]
        parts = tuple(part for part, _ in made)
        macs = sum(part.forward_macs for part in parts if not part.fused)
        macs += sum(part.again_macs for part in parts) if request.backward else 0.0
        apart, host = request.apart, None
        if apart is not None:
            host = Host(apart.host_budget, apart.host_reserved, apart.host_reserved + cutting.host_peak(choice))
        made_plan = Plan(
            graph=graph,
            segments=parts,
            placements=choice.way.places,
            budget=budget,
            reserved=request.reserved,
            projected=request.reserved + self.always + cutting.peak(choice),
            whole_image=memory.whole_image(graph),
            recompute=macs / max(cost.whole_macs(graph, self.cuttings.ground.prices.macs), 1.0),
            seconds=choice.seconds + request.rates.step,
            backward=request.backward,
            workers=request.workers,
            spill_dir=request.spill_dir,
            on_disk=cutting.on_disk(choice.way.places),
            boundary_dtype=request.boundary_dtype,
            apart=apart,
            host=host,
            bands=request.bands,
            _grids={k: grid for k, (_, grid) in enumerate(made)},
        )
        return made_plan if request.bands is None else self._talking(made_plan, cutting.talk)

    def _talking(self, made: Plan, estimate: float) -> Plan:
        """The plan with all that its ranks send each other in its seconds, where the search estimated halos."""
        assert made.bands is not None
        link = self.request.link
        talk = max(traffic(made, rank).seconds(link) for rank in made.bands.busiest) if made.bands.ranks > 1 else 0.0
        return replace(made, seconds=made.seconds - estimate + talk, talk=talk)

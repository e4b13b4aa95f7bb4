"""The ways to hold activations, by name: what plans of whole maps are, and what they would take.

==========  ==================================================================================================
in-core     whole-image autograd of the model as it is: everything that the backward pass needs stays in memory
recompute   whole maps; only what passes between chunks of the graph is kept, the rest is computed twice
offload     whole-image autograd; what the backward pass needs waits in a file (of a GPU: in the host's memory)
managed     of a GPU: whole-image autograd in memory that its driver pages between the GPU and the host
stream      tiles (:mod:`wholegrad.plan.planner`)
auto        whichever of these is predicted to be fastest of those that fit
==========  ==================================================================================================

Bytes come from a rehearsal (:mod:`wholegrad.run.rehearse`), times from multiply-adds and bytes as in
:mod:`wholegrad.plan.cost`, but of PyTorch's own kernels on whole maps: those are slow where channels are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import torch

from wholegrad.errors import BudgetError, PlanError, TooLargeError
from wholegrad.graph.graph import READERS, SOURCES, Graph, Kind, Node
from wholegrad.plan import cost
from wholegrad.plan.devices import Apart
from wholegrad.plan.pieces import ELEMENT_LIMIT
from wholegrad.plan.plan import Plan, show_bytes
from wholegrad.plan.planner import MARGIN
from wholegrad.plan.rates import BUILT_IN, Rates

aten = torch.ops.aten


class Strategy(StrEnum):
    """How activations are held."""

    AUTO = "auto"
    IN_CORE = "in-core"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"
    MANAGED = "managed"
    STREAM = "stream"


ON_CPU = (Strategy.IN_CORE, Strategy.RECOMPUTE, Strategy.OFFLOAD)  # of those on whole maps
WHOLE = (*ON_CPU, Strategy.MANAGED)
CHUNKS = (
    0.7,
    0.5,
    0.35,
    0.25,
    0.18,
    0.125,
)  # bytes of the largest chunk, as shares of all; less adds what is kept

# Measured on whole maps in channels_last, with PyTorch's default allocator and all of its threads (docs/strategies.md).
WIDE = 16  # channels from which on a convolution keeps the vector units busy
SECONDS_PER_MAC = 2.0e-11
MACS_BACKWARD = 2.2
FAR = 2**31  # bytes of a map from which on the gradient of a convolution's weight leaves oneDNN's fast kernels
SECONDS_PER_FAR_MAC = 5.5e-9  # which costs so much more: 20 to 30 times as long in torch 2.13
SECONDS_PER_BYTE = 5e-10  # of a map that an op makes: fresh pages
BYTES_BACKWARD = 1.5
SECONDS_PER_CALL = 2e-5
SECONDS_PER_MOVED_BYTE = 1.2e-9  # written to the file and read back, through the page cache


@dataclass(frozen=True)
class Footprint:
    """What a step on whole maps holds, in bytes.

    Attributes:
        peak: the most tensors alive at once, inputs included.
        saved: what is kept from the forward sweep for the backward.
        moved: of it, what waits elsewhere.
        largest: elements of the largest tensor, and the op that makes it.
    """

    peak: int
    saved: int
    moved: int
    largest: int
    place: str


@dataclass(frozen=True, eq=False)
class WholePlan(Plan):
    """A plan on whole maps; it has no segments.

    Attributes:
        footprint: what it holds.
        chunks: node indices of each chunk that is computed twice (``recompute``).
        interleaved: whether images lie in memory with their channels last.
        beyond: bytes of managed memory for which the device may have no room; they count in ``host.projected``. The
            driver decides what they are, and takes all of the device for the others.
    """

    footprint: Footprint = Footprint(0, 0, 0, 0, "")
    chunks: tuple[tuple[int, int], ...] = ()
    interleaved: bool = False
    beyond: int = 0

    def __str__(self) -> str:
        foot = self.footprint
        shape = " x ".join(map(str, self.image_shape))
        where = "a file" if self.apart is None else "the host's memory"
        how = {
            Strategy.IN_CORE: f"whole-image autograd; {show_bytes(foot.saved)} kept for the backward pass",
            Strategy.RECOMPUTE: f"whole maps in {len(self.chunks)} chunks; {show_bytes(foot.saved)} kept between them",
            Strategy.OFFLOAD: f"whole-image autograd; {show_bytes(foot.moved)} kept in {where} for the backward pass",
            Strategy.MANAGED: f"whole-image autograd in managed memory; {show_bytes(foot.saved)} kept for the backward "
            f"pass; {show_bytes(self.beyond)} may have no room on {self.device} and lie in the host's memory",
        }[Strategy(self.strategy)]
        return "\n".join(
            [
                f"{self.strategy}: {how}",
                "",
                f"image {shape}; forward work x {self.recompute:.2f}; predicted {self.seconds:.2f} s a step",
                f"projected peak {self._of_tensors}{show_bytes(self.projected)} "
                f"(of which reserved {show_bytes(self.reserved)})"
                + (f" of a budget of {show_bytes(self.budget)}" if self.budget and not self.beyond else ""),
                *self._host_lines(),
            ]
        )

    @property
    def _of_tensors(self) -> str:
        return "of tensors, wherever they lie, " if self.strategy == Strategy.MANAGED else self._of_device


def check_strategy(name: str) -> Strategy:
    """The strategy of this name.

    Raises:
        PlanError: there is none.
    """
    try:
        return Strategy(name)
    except ValueError as error:
        known = ", ".join(Strategy)
        raise PlanError("strategy", f"{name!r} is unknown", f"choose from {known}") from error


def check_whole(plan: WholePlan) -> None:
    """Rules 7 and 8: the plan fits, and no tensor of it reaches 2**31 elements.

    Raises:
        BudgetError: it does not fit; says the smallest budget that would do.
        TooLargeError: a tensor is too large, whatever the budget.
    """
    foot = plan.footprint
    shape = " x ".join(map(str, plan.image_shape))
    if foot.largest >= ELEMENT_LIMIT:
        raise TooLargeError(
            f"strategy {plan.strategy}",
            f"has a tensor of {foot.largest} elements ({foot.place}) at {shape}, and 2**31 are too many; it would "
            f"need {show_bytes(plan.projected)}",
            "use strategy stream",
            plan.projected,
            plan.seconds,
        )
    item = plan.graph.image.outputs[0].dtype.itemsize
    if plan.apart is not None and plan.apart.most_bytes is not None and foot.largest * item >= plan.apart.most_bytes:
        raise TooLargeError(
            f"strategy {plan.strategy}",
            f"has a tensor of {foot.largest * item} bytes ({foot.place}) at {shape}; {plan.device} takes fewer than "
            f"{plan.apart.most_bytes}",
            "use strategy stream",
            plan.projected,
            plan.seconds,
        )
    host = plan.host
    if host is not None and host.budget is not None and host.projected > host.budget:
        raise BudgetError(
            f"host budget {show_bytes(host.budget)}",
            f"too small for strategy {plan.strategy} on an image of {shape}" + _beyond(plan),
            f"the smallest that would do is {show_bytes(host.projected)} ({host.projected} bytes)",
            host.projected,
        )
    if plan.strategy == Strategy.MANAGED:
        _check_driver(plan, shape)
    elif plan.budget is not None and plan.projected > plan.budget:
        smallest = plan.projected + MARGIN
        raise BudgetError(
            f"budget {show_bytes(plan.budget)}",
            f"too small for strategy {plan.strategy} on an image of {shape}",
            f"the smallest that would do is {show_bytes(smallest)} ({smallest} bytes), or use strategy stream",
            smallest,
        )


def _beyond(plan: WholePlan) -> str:
    return f": {show_bytes(plan.beyond)} of it may have no room on {plan.device}" if plan.beyond else ""


def _check_driver(plan: WholePlan, shape: str) -> None:
    """Refuse a budget that somebody named for managed memory, and that its driver would not keep."""
    apart, budget = plan.apart, plan.budget
    if apart is None or budget is None or not apart.named or plan.projected <= budget or budget >= apart.room:
        return
    smallest = min(plan.projected + MARGIN, apart.room)
    raise BudgetError(
        f"budget {show_bytes(budget)}",
        f"too small for strategy {plan.strategy} on an image of {shape}, and would not be kept: the driver takes all "
        f"of {plan.device} before it pages anything out",
        f"name none, or one of at least {show_bytes(smallest)} ({smallest} bytes), or use strategy stream",
        smallest,
    )


# Time.


def whole_seconds(graph: Graph, threads: int, rates: Rates, apart: Apart | None = None) -> tuple[float, float]:
    """Predicted seconds of the forward and of the backward sweep by whole-image autograd.

    This file's rates are those of the machine of ``BUILT_IN``: on another they are taken in proportion. On a device
    with memory of its own none of them holds: there whole maps take what tiles of PyTorch's ops take, on any threads.
    """
    if apart is not None:
        return _seconds_there(graph, rates)
    slower = rates.wide[-1][0] / BUILT_IN.wide[-1][0]
    macs = cost.pixel_macs(graph)
    ahead = back = 0.0
    for node, each in zip(graph.nodes, macs, strict=True):
        if node.kind in SOURCES:
            continue
        work = each * node.outputs[0].rows * node.outputs[0].cols * SECONDS_PER_MAC * _thinness(graph, node) / threads
        made = made_bytes(node) * SECONDS_PER_BYTE
        ahead += work + made + SECONDS_PER_CALL
        if node.needs_grad:
            back += work * MACS_BACKWARD + made * BYTES_BACKWARD + 2 * SECONDS_PER_CALL
            back += _far_macs(graph, node, each) * SECONDS_PER_FAR_MAC / threads
    return ahead * slower, back * slower


def _seconds_there(graph: Graph, rates: Rates) -> tuple[float, float]:
    """On a device, by its own rates: inputs cross once, as the floats that the model sees."""
    prices = cost.Prices(graph, rates)
    ahead = back = 0.0
    for node in graph.nodes:
        if node.kind in READERS:
            ahead += node.outputs[0].nbytes * rates.pixels
        if node.kind in SOURCES:
            continue
        area, made = node.outputs[0].rows * node.outputs[0].cols, made_bytes(node) * rates.made
        forward, backward = prices.multiplied(node.index, thin=False, recalled=True)
        ahead += area * forward + made + rates.call
        back += (area * backward + made * rates.backward + 2 * rates.call) * node.needs_grad
    return ahead, back


def _far_macs(graph: Graph, node: Node, macs: float) -> float:
    """Multiply-adds of the gradient of a weight if it is a convolution's that reads or makes a map past ``FAR``."""
    if node.op is not aten.convolution.default or not graph.nodes[node.operands[1].node].needs_grad:
        return 0.0
    far = max(graph.spec(node.operands[0]).nbytes, node.outputs[0].nbytes) >= FAR
    return macs * node.outputs[0].rows * node.outputs[0].cols if far else 0.0


def _thinness(graph: Graph, node: Node) -> float:
    """How many times longer a multiply-add takes for want of channels."""
    if node.op is not aten.convolution.default:
        return 1.0
    weight = graph.spec(node.operands[1]).shape
    return max(1.0, WIDE / min(weight[:2]))


def made_bytes(node: Node) -> int:
    """Bytes of what a node makes; none for views."""
    schema = getattr(node.op, "_schema", None)
    if schema is not None and any(found.alias_info is not None for found in schema.returns):
        return 0
    return 0 if node.kind is Kind.SPREAD else sum(spec.nbytes for spec in node.outputs)


# Chunks.


def cut_into_chunks(graph: Graph, most: float) -> tuple[tuple[int, int], ...]:
    """Chunks ``(first, last + 1)`` of nodes, each making at most ``most`` bytes, that pass on the fewest bytes.

    What a chunk passes on are the values that later chunks read. The sum of it is least by dynamic programming over
    the places where the graph may be cut: after a node that makes something.
    """
    count = len(graph.nodes)
    size = [0 if node.kind in SOURCES else made_bytes(node) for node in graph.nodes]
    last = [max(graph.consumers(i), default=i) for i in range(count)]
    places = [0, *(i + 1 for i in range(count - 1) if size[i]), count]
    best: list[tuple[float, int]] = [(0.0, 0)]  # bytes passed on before a place, and the place before it
    for j in range(1, len(places)):
        found: list[tuple[float, int]] = []
        made = passed = 0
        for i in range(j - 1, -1, -1):
            inside = range(places[i], places[i + 1])
            made += sum(size[k] for k in inside)
            passed += sum(size[k] for k in inside if last[k] >= places[j])
            if made > most and found:
                break
            found.append((best[i][0] + passed, i))
        best.append(min(found, key=lambda each: (each[0], each[1])))
    cuts = [len(places) - 1]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    edges = [places[i] for i in reversed(cuts)]
    return tuple(pairwise(edges))


def choices_of_chunks(graph: Graph) -> list[tuple[tuple[int, int], ...]]:
    """Ways to cut the graph, from the fewest chunks to the most."""
    total = sum(made_bytes(node) for node in graph.nodes if node.kind not in SOURCES)
    return list(dict.fromkeys(cut_into_chunks(graph, total * share) for share in CHUNKS))


def recomputed(graph: Graph, chunks: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Forward work over that of one forward run, and the share of the forward sweep that runs twice."""
    macs = cost.pixel_macs(graph)
    each = [m * node.outputs[0].rows * node.outputs[0].cols for m, node in zip(macs, graph.nodes, strict=True)]
    weight = [w + made_bytes(node) * (node.kind not in SOURCES) for w, node in zip(each, graph.nodes, strict=True)]
    first = chunks[-1][0] if chunks else 0
    twice = sum(each[:first]) / max(sum(each), 1.0)
    return 1 + twice, sum(weight[:first]) / max(sum(weight), 1.0)

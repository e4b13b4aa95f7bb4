"""What ranks send each other in a step, in bytes and rounds, and how long that takes: a model to be measured against.

A rank sends (``N`` ranks, ``P`` elements of parameters; bytes of one step):

    halos       what others read of its boundaries, once; and what its tiles added to others' gradients, once
    sums        its partial sums, and its gradients of small values, to each of the others: (N - 1) times their bytes
    parameters  2 (N - 1) / N times 8 P: a part is added up by each rank, and brought to all
    control     at each meeting a head of 24 bytes to each of the others, and digests before the step

    seconds   = bytes sent * link.byte + rounds * link.message

Rounds are exchanges that wait for the one before. Up to 16 ranks write to each other directly; more pass small messages
on in ``log2 N`` rounds, and large ones around a ring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import TYPE_CHECKING

from wholegrad.graph.graph import Graph, Kind, Ref, Spec
from wholegrad.graph.rules.reduction import GATHER
from wholegrad.graph.segment import Segment
from wholegrad.plan.bands import Bands
from wholegrad.plan.halos import Halo, boxes_owned

if TYPE_CHECKING:
    from wholegrad.plan.plan import Plan

DIRECT = 16  # ranks up to which every one writes to every other; more pass messages on
BUCKET = 1 << 21  # elements of parameters' gradients that are added up at once
HEAD = 24  # bytes with which ranks meet
DIGESTS = 430  # bytes of what they compare before a step
NAMED = 42  # bytes of the heading of a tensor that travels by name
DOUBLE = 8


@dataclass(frozen=True)
class Link:
    """How fast a rank's connection is.

    Attributes:
        byte: seconds a byte that it sends.
        message: seconds of a round, however short its messages.
    """

    byte: float = 8e-10
    message: float = 1e-4


ASSUMED = Link()  # 10 Gbit/s, and a round trip through the kernel: not measured


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a step, in bytes, and the rounds that it takes part in."""

    halos: int = 0
    sums: int = 0
    parameters: int = 0
    control: int = 0
    rounds: int = 0

    @property
    def total(self) -> int:
        """Bytes sent."""
        return self.halos + self.sums + self.parameters + self.control

    def seconds(self, link: Link) -> float:
        """Predicted."""
        return self.total * link.byte + self.rounds * link.message


def hops(ranks: int) -> int:
    """Rounds of a short message from everyone to everyone."""
    return 1 if ranks <= DIRECT else ceil(log2(ranks))


def passes(graph: Graph, segment: Segment) -> list[Ref]:
    """The small values to which tiles of a segment give a gradient that is pulled back further."""
    spread = [graph.nodes[ref.node].operands[0] for ref in segment.maps if graph.nodes[ref.node].kind is Kind.SPREAD]
    nodes = {ref: graph.nodes[ref.node] for ref in (*segment.smalls, *spread)}
    return [ref for ref, node in nodes.items() if node.needs_grad and node.kind is not Kind.PARAMETER]


def parameters(graph: Graph, segments: Sequence[Segment]) -> list[Ref]:
    """The trained parameters that tiles read; the gradients of others every rank has from small values."""
    read = {ref for segment in segments for ref in segment.smalls}
    trained = [Ref(node.index) for node in graph.of_kind(Kind.PARAMETER) if node.needs_grad]
    spread = {graph.nodes[ref.node].operands[0] for segment in segments for ref in segment.maps
              if graph.nodes[ref.node].kind is Kind.SPREAD}  # fmt: skip
    return [ref for ref in trained if ref in read or ref in spread]


def small_only(graph: Graph, segments: Sequence[Segment]) -> list[Ref]:
    """The trained parameters that no tile reads: a norm's slope, a linear layer after pooling."""
    read = set(parameters(graph, segments))
    trained = [Ref(node.index) for node in graph.of_kind(Kind.PARAMETER) if node.needs_grad]
    return [ref for ref in trained if ref not in read]


def buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Which of so many tensors are added up together: as many as fit into a bucket, or one that does not."""
    found: list[list[int]] = []
    room = 0
    for k, size in enumerate(sizes):
        if not found or size > room:
            found.append([])
            room = BUCKET
        found[-1].append(k)
        room -= size
    return found


def traffic(plan: Plan, rank: int) -> Traffic:
    """What a rank of the plan sends in one step."""
    if plan.bands is None:
        return Traffic()
    graph, others = plan.graph, plan.bands.ranks - 1
    halos, rounds = _halos(plan, rank)
    sums, meetings = 0, 4 + plan.backward  # two to agree, one on which parameters have gradients, two at the end
    for number, part in enumerate(plan.segments):
        segment = part.segment
        meetings += 1 + plan.backward * (2 if segment.outputs else 1) - part.fused
        for index in segment.reductions:
            sums += others * _state(plan, number, index, rank)
        if plan.backward:
            sums += others * sum(DOUBLE * graph.spec(ref).numel + NAMED for ref in passes(graph, segment))
    segments = [part.segment for part in plan.segments]
    read = parameters(graph, segments) if plan.backward else []
    trained = [graph.spec(ref).numel for ref in read]
    if rank == 0 and plan.backward:  # whose bits all take
        kept = [*small_only(graph, segments), *graph.updates.values(), *graph.metrics.values()]
        sums += others * sum(DOUBLE * graph.spec(ref).numel + NAMED for ref in kept)
    groups = sum(ceil(sum(trained[k] for k in bucket) / BUCKET) for bucket in buckets(trained))
    return Traffic(
        halos=halos,
        sums=sums,
        parameters=2 * DOUBLE * sum(trained) * others // (others + 1),
        control=others * (meetings * HEAD + DIGESTS),
        rounds=rounds + 2 * meetings * hops(others + 1) + 2 * groups,
    )


def shared(spec: Spec, halo: Halo, size: int) -> int:
    """Of a map's bytes, what the rank with most of it holds."""
    return -(-size * halo.most // (spec.rows * spec.cols))


def at_once(graph: Graph, segments: Sequence[Segment], halos: Mapping[Ref, Halo], bands: Bands, backward: bool) -> int:
    """Bytes that a rank sends and receives at once, whatever runs then: copies of them are made on the way."""
    boxes = [2 * halo.moved(bands.busiest) * graph.spec(ref).pixel_bytes for ref, halo in halos.items()]
    held = sum(spec.held_bytes for node in graph.of_kind(Kind.REDUCTION) for spec in node.outputs)
    gathered = [spec.nbytes for node in graph.of_kind(Kind.REDUCTION) if node.op is GATHER for spec in node.outputs]
    small = sum(spec.held_bytes for node in graph.of_kind(Kind.SMALL) for spec in node.outputs if node.needs_grad)
    sums = 2 * (held - sum(gathered) + small) * bands.ranks + 3 * sum(gathered)
    refs = [*parameters(graph, segments), *small_only(graph, segments)] if backward else []
    return max([bucket_bytes([graph.spec(ref).numel for ref in refs]), sums, *boxes])


def bucket_bytes(sizes: Sequence[int]) -> int:
    """Bytes that adding up gradients of so many elements takes beside them: a bucket flat, and four on their way."""
    flat = max((sum(sizes[k] for k in group) for group in buckets(sizes)), default=0)
    return (flat + 4 * min(flat, BUCKET)) * DOUBLE


def _halos(plan: Plan, rank: int) -> tuple[int, int]:
    """Bytes of boundaries and of their gradients that a rank sends, and the rounds of that."""
    size = rounds = 0
    for ref, halo in plan.halos.items():
        spec = plan.graph.spec(ref)
        elements = spec.pixel_bytes // spec.dtype.itemsize
        size += sum(box.area for _, box in halo.sent(rank)) * elements * plan.stored_dtype(ref).itemsize
        rounds += 1
        if plan.backward and plan.graph.nodes[ref.node].needs_grad:
            size += sum(box.area for _, box in halo.received(rank)) * spec.pixel_bytes
            rounds += 1
    return size, rounds


def _state(plan: Plan, number: int, index: int, rank: int) -> int:
    """Bytes of a rank's partial result of a reduction."""
    graph, node = plan.graph, plan.graph.nodes[index]
    if node.op is GATHER:
        assert plan.bands is not None
        box = boxes_owned(plan.grid(number), node.operands[0], plan.bands)[rank]
        return 0 if box is None else box.area * graph.spec(node.operands[0]).pixel_bytes + NAMED
    return sum(DOUBLE * spec.numel + NAMED for spec in node.outputs)

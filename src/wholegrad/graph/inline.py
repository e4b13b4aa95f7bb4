"""Which maps of a segment need never be: pointwise ops that the kernels compute as they read.

A thin convolution reads its input into scratch memory anyway, and a sum reads it once: what stands between them and the
last map that must exist (a convolution's output, a boundary, the image) is written into the kernel as a
:class:`~wholegrad.kernels.expression.Program`. Concatenations along channels are parts of such an input. Pointwise ops
that nobody inlines run as chains: one pass forward, one back. Everything else runs as it did, op by op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

from wholegrad.graph.graph import Graph, Node, Ref
from wholegrad.graph.programs import MOST_LEAVES, OPS, REALS, Found, Programs, Reading, planar_layout
from wholegrad.graph.rules.base import bind
from wholegrad.graph.rules.reduction import SumOrMean
from wholegrad.graph.segment import Segment, reduction_rule
from wholegrad.graph.strips import Strip, find
from wholegrad.graph.tails import Tail
from wholegrad.graph.tails import find as find_tail
from wholegrad.kernels.choice import THIN, suits, triton_suits
from wholegrad.kernels.expression import IDENTITY, Leaf
from wholegrad.kernels.host import host
from wholegrad.kernels.stage import Part

aten = torch.ops.aten
CHEAP = 16  # instructions for a vector that may be done again by every kernel that reads


@dataclass(frozen=True)
class Inlined:
    """How a segment's nodes run.

    Attributes:
        nodes: indices of those that run at all, in order.
        convolutions: of thin convolutions by index: what stands in place of their first operand.
        chains: of pointwise nodes by index: what computes them.
        sums: of reductions by index: what computes their terms.
        raw: images that are read as the bytes that they are; those in ``floats`` are wanted as floats too.
        strip: convolutions that run together where ``nodes`` has the strip's output, if any.
        tail: convolutions that run together with sums, which are not in ``sums``, after all of ``nodes``.
    """

    nodes: tuple[int, ...]
    convolutions: dict[int, Reading]
    chains: dict[int, Reading]
    sums: dict[int, Reading]
    raw: frozenset[Ref]
    floats: frozenset[Ref]
    strip: Strip | None = None
    tail: Tail | None = None

    @property
    def summed(self) -> frozenset[int]:
        """The reductions whose terms no map holds."""
        return frozenset(self.sums) | (frozenset() if self.tail is None else frozenset(self.tail.sums))

    def runs(self, index: int) -> tuple[int, ...]:
        """The nodes that run where this one of ``nodes`` does."""
        return self.strip.nodes if self.strip is not None and self.strip.out.node == index else (index,)

    def pixel_bytes(self, graph: Graph, index: int) -> int:
        """Bytes of a pixel of the largest map that a node makes."""
        as_bytes = self.strip is not None and self.strip.as_bytes and self.strip.out.node == index
        specs = graph.nodes[index].outputs
        return max(spec.pixel_bytes // (spec.dtype.itemsize if as_bytes else 1) for spec in specs)

    def reads(self, graph: Graph, index: int) -> tuple[Ref, ...]:
        """Every value that a node takes when it runs."""
        node = graph.nodes[index]
        if self.strip is not None and index == self.strip.out.node:
            weights = (ref for i in self.strip.nodes for ref in graph.nodes[i].operands[1:])
            return (*self.strip.leaves(self), *weights)
        if index in self.convolutions:
            return (*self.convolutions[index].leaves, *node.operands[1:])
        reading = self.chains.get(index) or self.sums.get(index)
        return reading.leaves if reading else node.operands


def inline(
    graph: Graph,
    segment: Segment,
    raw: frozenset[Ref] = frozenset(),
    strips: bool = False,
    as_bytes: frozenset[Ref] = frozenset(),
    tails: bool = False,
    triton: int | None = None,
) -> Inlined:
    """Decide it for one segment; :class:`Inliner` for many.

    Args:
        raw: the images whose pixels are 8-bit fractions of 255.
        triton: on a GPU, channels up to which a convolution is thin to Triton's kernels; None for the CPU's.
        strips: whether convolutions may run strip by strip: where no gradient is wanted.
        as_bytes: outputs that a strip may store as bytes.
        tails: whether convolutions and sums may run block by block: where tiles are pulled back.
    """
    return Inliner(graph, raw, triton).inline(segment, strips, as_bytes, tails)


class Way(Enum):
    """Who computes an op: the thin kernels, a program, nobody (a concatenation is read in parts), or PyTorch."""

    THIN = "thin"
    WRITTEN = "written"
    JOINED = "joined"
    OPAQUE = "opaque"


class Inliner:
    """Decides it for segments of one graph: what they share is found once."""

    def __init__(self, graph: Graph, raw: frozenset[Ref], triton: int | None = None) -> None:
        self.graph, self.raw, self.triton = graph, raw, triton
        self.compiles = triton is not None or host() is not None  # whether there are kernels at all
        self.programs = Programs(graph, raw)
        self._ways: dict[int, Way] = {}

    def ways(self, nodes: Sequence[int]) -> dict[int, Way]:
        """Who may compute each of these nodes."""
        known = self._ways
        for index in nodes:
            if index not in known:
                known[index] = _way(self.graph, self.graph.nodes[index], self.triton)
        return {index: known[index] for index in nodes}

    def inline(
        self,
        segment: Segment,
        strips: bool = False,
        as_bytes: frozenset[Ref] = frozenset(),
        tails: bool = False,
    ) -> Inlined:
        """:func:`inline`"""
        how = _Inliner(self, segment).run()
        if tails:
            return with_tail(self.graph, segment, how)
        found = find(self.graph, segment, how) if strips else None
        if found is None:
            return how
        found = replace(found, as_bytes=found.out in as_bytes)
        return replace(how, nodes=tuple(i for i in how.nodes if i not in found.inside), strip=found)


def with_tail(graph: Graph, segment: Segment, how: Inlined) -> Inlined:
    """The same with a tail, if the segment has one."""
    tail = find_tail(graph, segment, how)
    if tail is None:
        return how
    sums = {index: reading for index, reading in how.sums.items() if index not in tail.sums}
    return replace(how, nodes=tuple(i for i in how.nodes if i not in tail.inside), sums=sums, tail=tail)


def _way(graph: Graph, node: Node, triton: int | None) -> Way:
    if _thin(graph, node, triton):
        return Way.THIN
    if node.op in OPS:
        return Way.WRITTEN
    return Way.JOINED if node.op is aten.cat.default else Way.OPAQUE


def _thin(graph: Graph, node: Node, triton: int | None) -> bool:
    """Whether a node is a convolution that the thin kernels serve."""
    if node.op is not aten.convolution.default or len(node.outputs[0].shape) != 4:
        return False
    weight = graph.spec(node.operands[1])
    same = weight.dtype == node.outputs[0].dtype == graph.spec(node.operands[0]).dtype
    if triton is not None:
        return same and weight.dtype in REALS and triton_suits(weight.shape, node.args[8], triton)
    return same and suits(weight.shape, weight.dtype, node.args[3], node.args[8])


def plain(segment: Segment) -> Inlined:
    """Nothing is: every node runs by itself, in PyTorch's ops, as on a device that has no kernels of the project's."""
    none = frozenset[Ref]()
    return Inlined(segment.nodes, {}, {}, {}, none, none)


class _Inliner:
    """Decides it for one segment."""

    def __init__(self, every: Inliner, segment: Segment) -> None:
        self.graph, self.segment, self.raw, self.programs = every.graph, segment, every.raw, every.programs
        self.compiles = every.compiles
        self.ways = every.ways(segment.nodes)
        self.known: dict[int, bool] = {}
        self.forced = self._forced()
        self.free = {i for i, way in self.ways.items() if way is Way.WRITTEN and i not in self.forced}

    def run(self) -> Inlined:
        graph = self.graph
        required = {ref.node for ref in self.segment.outputs}
        convolutions, chains, sums = {}, {}, {}
        for index in self.segment.reductions:
            reading = self._sum(graph.nodes[index])
            if reading is not None:
                sums[index] = reading
            required.update([ref.node for ref in (reading.leaves if reading else graph.nodes[index].operands)])
        nodes, opaque = [], set(self.segment.outputs)
        for index in reversed(self.segment.nodes):
            if index not in required:
                continue
            node = graph.nodes[index]
            nodes.append(index)
            if self.ways[index] is Way.THIN:
                convolutions[index] = self._input(node)
                read = convolutions[index].leaves
            elif (chain := self._chain(node)) is not None:
                chains[index] = chain.reading
                read = chain.reading.leaves
            else:
                read = node.operands
                opaque.update(read)
            required.update([ref.node for ref in read])
        opaque.update(graph.nodes[i].operands[0] for i in self.segment.reductions if i not in sums)
        return Inlined(tuple(reversed(nodes)), convolutions, chains, sums, self.raw, frozenset(opaque & self.raw))

    def _forced(self) -> set[int]:
        """Nodes whose maps must exist whoever inlines them: outputs, and what ops without a kernel read."""
        graph = self.graph
        whole = [i for i in self.segment.reductions if not isinstance(reduction_rule(graph, i), SumOrMean)]
        whole += [index for index, way in self.ways.items() if way is Way.OPAQUE]
        return {ref.node for ref in (*self.segment.outputs, *(ref for i in whole for ref in graph.nodes[i].operands))}

    def _planar(self, ref: Ref) -> bool:
        """Whether a map comes with its columns next to each other in memory."""
        node, spec = self.graph.nodes[ref.node], self.graph.spec(ref)
        if ref.node not in self.ways:
            return spec.shape[1] <= THIN
        way = self.ways[ref.node]
        return way is Way.THIN or spec.shape[1] == 1 or (way is Way.WRITTEN and self._planar_chain(node))

    def _planar_chain(self, node: Node) -> bool:
        """Whether a node is one pass over planar maps."""
        if node.index not in self.known:
            self.known[node.index] = False
            chain = self._chain(node)
            self.known[node.index] = chain is not None and all(self._planar(each) for each in chain.maps)
        return self.known[node.index]

    def _input(self, node: Node) -> Reading:
        """What a thin convolution reads."""
        parts: list[Part] = []
        leaves: list[Ref] = []
        for ref in self._pieces(node.operands[0]):
            reading = self._piece(ref)
            parts.extend(reading.parts)
            leaves.extend(reading.leaves)
        return Reading(tuple(parts), tuple(leaves))

    def _pieces(self, ref: Ref) -> list[Ref]:
        """The maps that a concatenation along channels lays side by side."""
        node = self.graph.nodes[ref.node]
        if ref.node not in self.ways or ref.node in self.forced or node.op is not aten.cat.default:
            return [ref]
        bound = bind(node.op, node.args, node.kwargs)
        same = {self.graph.spec(piece).dtype for piece in node.operands} == {self.graph.spec(ref).dtype}
        if bound["dim"] % 4 != 1 or not planar_layout(self.graph.spec(ref)) or not same:
            return [ref]
        return [piece for each in bound["tensors"] for piece in self._pieces(each)]

    def _piece(self, ref: Ref) -> Reading:
        """One map computed while it is staged, or as it is: one derivative at most, and nothing dear."""
        found = self.programs.find(self.free, ref)
        if found is not None and found.smooth <= 1 and found.cost <= CHEAP:
            return found.reading
        program = IDENTITY._replace(leaves=(Leaf(grad=self.graph.nodes[ref.node].needs_grad),))
        return Reading((Part(program, self.graph.spec(ref).shape[1]),), (ref,))

    def _chain(self, node: Node) -> Found | None:
        """A pointwise node as one pass over maps, planar if there are bytes; None if it cannot be."""
        if self.ways[node.index] is not Way.WRITTEN or not self.compiles:
            return None
        ref = Ref(node.index)
        found = self.programs.find(self.free, ref, top=True)
        if found is None or ref in found.maps or not found.program.steps or node.outputs[0].dtype not in REALS:
            return None
        return None if found.bytes and not all(self._planar(each) for each in found.maps) else found

    def _sum(self, node: Node) -> Reading | None:
        """A sum over everything, computed while its terms are."""
        rule, spec = reduction_rule(self.graph, node.index), self.graph.spec(node.operands[0])
        if not self.compiles or not isinstance(rule, SumOrMean) or math.prod(node.outputs[0].shape) != 1:
            return None
        made = node.outputs[0].dtype
        whole = spec.dtype.is_floating_point and not made.is_floating_point  # each term is cut to a whole number first
        if not planar_layout(spec) or whole or (node.needs_grad and made != spec.dtype):
            return None
        for real in (spec.dtype,) if node.needs_grad else REALS:  # a count is the same in any
            found = self._terms(node.operands[0], real)
            if found is not None:
                return found
        return None

    def _terms(self, ref: Ref, real: torch.dtype) -> Reading | None:
        """The terms of a sum over ``ref``, computed in this precision."""
        spec = self.graph.spec(ref)
        if spec.dtype not in (real, torch.bool):
            return None
        found = self.programs.find(self.free, ref, real)
        if found is None or found.smooth > MOST_LEAVES or not all(self._planar(each) for each in found.maps):
            return None
        return found.reading

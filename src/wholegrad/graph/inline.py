"""Which maps of a segment need never be: pointwise ops that the kernels compute as they read.

A thin convolution reads its input into scratch memory anyway, and a sum reads it once: what stands between them and the
last map that must exist (a convolution's output, a boundary, the image) is written into the kernel as a
:class:`~wholegrad.kernels.expression.Program`. Concatenations along channels are parts of such an input. Pointwise ops
that nobody inlines run as chains: one pass forward, one back. Everything else runs as it did, op by op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from wholegrad.graph.graph import Graph, Node, Ref
from wholegrad.graph.layout import Role
from wholegrad.graph.rules.base import bind
from wholegrad.graph.rules.reduction import SumOrMean
from wholegrad.graph.segment import Segment, reduction_rule
from wholegrad.kernels.choice import THIN, suits
from wholegrad.kernels.expression import EACH, IDENTITY, MAP, MASKS, ONE, Leaf, Program, Step
from wholegrad.kernels.host import host
from wholegrad.kernels.stage import Part

aten = torch.ops.aten
REALS = (torch.float32, torch.float64)
BYTES = (torch.uint8, torch.bool)
MOST_LEAVES = 8
DEEPEST = 48  # ops on ops in one program, which are followed by recursion
CHEAP = 16  # instructions for a vector that may be done again by every kernel that reads
PLANAR = (Role.PLAIN, Role.PLAIN, Role.ROW, Role.COL)


class Reading(NamedTuple):
    """What a kernel reads: parts, and the values that their programs take, in order."""

    parts: tuple[Part, ...]
    leaves: tuple[Ref, ...]


@dataclass(frozen=True)
class Inlined:
    """How a segment's nodes run.

    Attributes:
        nodes: indices of those that run at all, in order.
        convolutions: of thin convolutions by index: what stands in place of their first operand.
        chains: of pointwise nodes by index: what computes them.
        sums: of reductions by index: what computes their terms.
        raw: images that are read as the bytes that they are; those in ``floats`` are wanted as floats too.
    """

    nodes: tuple[int, ...]
    convolutions: dict[int, Reading]
    chains: dict[int, Reading]
    sums: dict[int, Reading]
    raw: frozenset[Ref]
    floats: frozenset[Ref]

    def reads(self, graph: Graph, index: int) -> tuple[Ref, ...]:
        """Every value that a node takes when it runs."""
        node = graph.nodes[index]
        if index in self.convolutions:
            return (*self.convolutions[index].leaves, *node.operands[1:])
        reading = self.chains.get(index) or self.sums.get(index)
        return reading.leaves if reading else node.operands


def inline(graph: Graph, segment: Segment, raw: frozenset[Ref] = frozenset()) -> Inlined:
    """Decide it for one segment; ``raw`` are the images whose pixels are 8-bit fractions of 255."""
    return _Inliner(graph, segment, raw).run()


class _Stop(Exception):  # noqa: N818  no error: another way is taken
    """This value cannot be computed while it is read."""


class _Inliner:
    def __init__(self, graph: Graph, segment: Segment, raw: frozenset[Ref]) -> None:
        self.graph, self.segment, self.raw = graph, segment, raw
        self.inside = set(segment.nodes)
        self.known: dict[int, bool] = {}
        self.forced = self._forced()

    def run(self) -> Inlined:
        graph = self.graph
        required = set(self.segment.outputs)
        convolutions, chains, sums = {}, {}, {}
        for index in self.segment.reductions:
            reading = self._sum(graph.nodes[index])
            if reading is not None:
                sums[index] = reading
            required.update(reading.leaves if reading else graph.nodes[index].operands)
        nodes = []
        for index in reversed(self.segment.nodes):
            node = graph.nodes[index]
            if not required.intersection(node.refs):
                continue
            nodes.append(index)
            if self._thin(node):
                convolutions[index] = self._input(node)
                required.update(convolutions[index].leaves)
            elif (chain := self._chain(node)) is not None:
                chains[index] = chain
                required.update(chain.leaves)
            else:
                required.update(node.operands)
        opaque = {
            ref
            for index in nodes
            if index not in convolutions and index not in chains
            for ref in graph.nodes[index].operands
        }
        opaque |= {graph.nodes[i].operands[0] for i in self.segment.reductions if i not in sums}
        opaque.update(self.segment.outputs)
        return Inlined(tuple(reversed(nodes)), convolutions, chains, sums, self.raw, frozenset(opaque & self.raw))

    def _forced(self) -> set[Ref]:
        """Maps that must exist whoever inlines them: outputs, and what ops without a kernel read."""
        graph = self.graph
        forced = set(self.segment.outputs)
        for index in self.segment.nodes:
            node = graph.nodes[index]
            if not self._thin(node) and node.op not in OPS and node.op is not aten.cat.default:
                forced.update(node.operands)
        for index in self.segment.reductions:
            if not isinstance(reduction_rule(graph, index), SumOrMean):
                forced.update(graph.nodes[index].operands)
        return forced

    def _thin(self, node: Node) -> bool:
        """Whether a node is a convolution that the thin kernels serve."""
        if node.op is not aten.convolution.default or len(node.outputs[0].shape) != 4:
            return False
        weight = self.graph.spec(node.operands[1])
        same = weight.dtype == node.outputs[0].dtype == self.graph.spec(node.operands[0]).dtype
        return same and suits(weight.shape, weight.dtype, node.args[3], node.args[8])

    def _planar(self, ref: Ref) -> bool:
        """Whether a map comes with its columns next to each other in memory."""
        node, spec = self.graph.nodes[ref.node], self.graph.spec(ref)
        if ref.node not in self.inside:
            return spec.shape[1] <= THIN
        return self._thin(node) or (node.op in OPS and self._chain_known(node)) or spec.shape[1] == 1

    def _chain_known(self, node: Node) -> bool:
        if node.index not in self.known:
            self.known[node.index] = False
            self.known[node.index] = self._chain(node) is not None
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
        if ref.node not in self.inside or ref in self.forced or node.op is not aten.cat.default:
            return [ref]
        bound = bind(node.op, node.args, node.kwargs)
        same = {self.graph.spec(piece).dtype for piece in node.operands} == {self.graph.spec(ref).dtype}
        if bound["dim"] % 4 != 1 or not self._planar_layout(ref) or not same:
            return [ref]
        return [piece for each in bound["tensors"] for piece in self._pieces(each)]

    def _planar_layout(self, ref: Ref) -> bool:
        layout = self.graph.spec(ref).layout
        return len(layout) == 4 and all(
            len(dim) == 1 and dim[0].role is role for dim, role in zip(layout, PLANAR, strict=True)
        )

    def _piece(self, ref: Ref) -> Reading:
        """One map computed while it is staged, or as it is: one derivative at most, and nothing dear."""
        spec = self.graph.spec(ref)
        try:
            program, leaves = _Build(self, ref).finish()
        except _Stop:
            program, leaves = None, ()
        if program is not None and len(program.wanted) <= 1 and program.cost() <= CHEAP:
            small = [i for i in program.wanted if program.leaves[i].kind != MAP]
            if not small:
                return Reading((Part(program, spec.shape[1]),), leaves)
        grad = self.graph.nodes[ref.node].needs_grad
        program = IDENTITY._replace(leaves=(Leaf(grad=grad),))
        return Reading((Part(program, spec.shape[1]),), (ref,))

    def _chain(self, node: Node) -> Reading | None:
        """A pointwise node as one pass over planar maps; None if it cannot be."""
        if host() is None or node.op not in OPS:
            return None
        ref = Ref(node.index)
        try:
            program, leaves = _Build(self, ref).finish(top=True)
        except _Stop:
            return None
        maps = [leaf for leaf, each in zip(leaves, program.leaves, strict=True) if each.kind == MAP]
        own = ref not in leaves and bool(program.steps) and node.outputs[0].dtype in REALS
        if not own or not all(self._planar(each) for each in maps):
            return None
        return Reading((Part(program, node.outputs[0].shape[1]),), leaves)

    def _sum(self, node: Node) -> Reading | None:
        """A sum over everything, computed while its terms are."""
        rule, spec = reduction_rule(self.graph, node.index), self.graph.spec(node.operands[0])
        if host() is None or not isinstance(rule, SumOrMean) or math.prod(node.outputs[0].shape) != 1:
            return None
        ref = node.operands[0]
        if spec.dtype not in REALS or node.outputs[0].dtype != spec.dtype or not self._planar_layout(ref):
            return None
        try:
            program, leaves = _Build(self, ref).finish(top=ref not in self.forced)
        except _Stop:
            return None
        if any(program.leaves[i].kind != MAP for i in program.wanted):
            return None
        maps = [leaf for leaf, each in zip(leaves, program.leaves, strict=True) if each.kind == MAP]
        if not all(self._planar(each) for each in maps):
            return None
        return Reading((Part(program, spec.shape[1]),), leaves)


class _Build:
    """A program in the making, from the value at its end."""

    def __init__(self, inliner: _Inliner, ref: Ref) -> None:
        self.inliner, self.graph, self.ref = inliner, inliner.graph, ref
        self.spec = self.graph.spec(ref)
        if self.spec.dtype not in REALS or not inliner._planar_layout(ref):
            raise _Stop
        self.leaves: dict[tuple[Ref, bool], Leaf] = {}
        self.steps: list[Step] = []  # leaves are numbered -1, -2, .. until all are known
        self.memory: dict[tuple[Ref, bool], int] = {}
        self.masks: set[int] = set()
        self.depth = 0

    def finish(self, top: bool = False) -> tuple[Program, tuple[Ref, ...]]:
        """The program; with ``top``, of the op itself even where its value must exist."""
        last = self.value(self.ref, True, top)
        if last in self.masks:
            last = self.step("real", last)
        if len(self.leaves) > MOST_LEAVES or not any(leaf.kind == MAP for leaf in self.leaves.values()):
            raise _Stop
        count = len(self.leaves)

        def place(number: int) -> int:
            return -number - 1 if number < 0 else number + count

        steps = [step._replace(values=tuple(place(i) for i in step.values)) for step in self.steps]
        if steps and place(last) != count + len(steps) - 1:
            raise _Stop
        return Program(tuple(self.leaves.values()), tuple(steps)), tuple(ref for ref, _ in self.leaves)

    def step(self, op: str, *values: int, numbers: tuple[float, ...] = ()) -> int:
        self.steps.append(Step(op, values, numbers))
        if op in MASKS:
            self.masks.add(len(self.steps) - 1)
        return len(self.steps) - 1

    def real(self, arg: Any, grad: bool) -> int:
        """An argument as a real number."""
        if not isinstance(arg, Ref):
            return self.step("constant", numbers=(float(arg),))
        found = self.value(arg, grad)
        return self.step("real", found) if found in self.masks else found

    def mask(self, arg: Any) -> int:
        """An argument as a mask."""
        found = self.value(arg, False)
        return found if found in self.masks else self.step("ne", found, numbers=(0.0,))

    def value(self, ref: Ref, grad: bool, top: bool = False) -> int:
        node = self.graph.nodes[ref.node]
        grad = grad and node.needs_grad
        if (ref, grad) in self.memory:
            return self.memory[ref, grad]
        may = ref.node in self.inliner.inside and node.op in OPS and self.depth < DEEPEST
        found = self._inner(node, grad) if may and (top or ref not in self.inliner.forced) else None
        if found is None:
            found = self._leaf(ref, grad)
        self.memory[ref, grad] = found
        return found

    def _inner(self, node: Node, grad: bool) -> int | None:
        """The op's steps; None if it must be a leaf instead."""
        spec = node.outputs[0]
        before = len(self.steps), dict(self.leaves), dict(self.memory), set(self.masks)
        self.depth += 1
        try:
            if spec.dtype not in (self.spec.dtype, torch.bool) or spec.shape != self.spec.shape:
                raise _Stop
            found = OPS[node.op](self, bind(node.op, node.args, node.kwargs), grad)
            if spec.dtype == torch.bool and found not in self.masks:  # true plus true is true
                found = self.step("ne", found, numbers=(0.0,))
            return found
        except _Stop:
            del self.steps[before[0] :]
            self.leaves, self.memory, self.masks = before[1:]
            return None
        finally:
            self.depth -= 1

    def _leaf(self, ref: Ref, grad: bool) -> int:
        spec, real = self.graph.spec(ref), self.spec.dtype
        if spec.is_map:
            if spec.layout != self.spec.layout or spec.dtype not in (real, *BYTES):
                raise _Stop
            raw = ref in self.inliner.raw
            leaf = Leaf(MAP, int(raw or spec.dtype in BYTES), grad and spec.dtype == real)
        else:
            leaf = Leaf(self._small(spec.shape), 0, grad)
            if spec.dtype != real:
                raise _Stop
        self.leaves[ref, grad] = leaf
        number = -1 - list(self.leaves).index((ref, grad))
        return self.step("u8", number) if spec.is_map and ref in self.inliner.raw else number

    def _small(self, shape: Sequence[int]) -> str:
        if math.prod(shape) == 1:
            return ONE
        channels = self.spec.shape[1]
        if len(shape) in (3, 4) and math.prod(shape) == channels and shape[-3] == channels:
            return EACH
        raise _Stop


Writer = Callable[[_Build, dict[str, Any], bool], int]


def _unary(op: str, *names: str) -> Writer:
    """An op of one value, with numbers from arguments of these names."""

    def write(build: _Build, bound: dict[str, Any], grad: bool) -> int:
        numbers = tuple(float(bound[name]) for name in names)
        return build.step(op, build.real(bound.get("self", bound.get("input")), grad), numbers=numbers)

    return write


def _binary(op: str, reverse: bool = False) -> Writer:
    def write(build: _Build, bound: dict[str, Any], grad: bool) -> int:
        a, b = (build.real(bound[name], grad) for name in ("self", "other"))
        a, b = (b, a) if reverse else (a, b)
        alpha = bound.get("alpha", 1)
        return build.step(op, a, b, numbers=(float(alpha),) if alpha != 1 else ())

    return write


def _compare(op: str) -> Writer:
    def write(build: _Build, bound: dict[str, Any], grad: bool) -> int:
        a, other = build.real(bound["self"], False), bound["other"]
        if isinstance(other, Ref):
            return build.step(op, a, build.real(other, False))
        if isinstance(other, int) and not 0 <= other < 256 and build.graph.spec(bound["self"]).dtype == torch.uint8:
            raise _Stop  # PyTorch compares with what is left of it in 8 bits
        return build.step(op, a, numbers=(float(other),))

    return write


def _logic(op: str) -> Writer:
    def write(build: _Build, bound: dict[str, Any], grad: bool) -> int:
        return build.step(op, *(build.mask(bound[name]) for name in ("self", "other") if name in bound))

    return write


def _clamp(op: str, low: str, high: str) -> Writer:
    def write(build: _Build, bound: dict[str, Any], grad: bool) -> int:
        ends = [bound[name] for name in (low, high)]
        if any(isinstance(end, Ref) or (end is not None and math.isnan(end)) for end in ends):
            raise _Stop
        numbers = tuple(
            float(end) if end is not None else sign * math.inf for end, sign in zip(ends, (-1, 1), strict=True)
        )
        return build.step(op, build.real(bound["self"], grad), numbers=numbers)

    return write


def _same(build: _Build, bound: dict[str, Any], grad: bool) -> int:
    """A copy, perhaps of masks or bytes to real numbers, or to masks."""
    dtype = bound.get("dtype")
    if dtype == torch.bool:
        return build.mask(bound["self"])
    if dtype not in (None, build.spec.dtype):
        raise _Stop
    return build.value(bound["self"], grad) if dtype is None else build.real(bound["self"], grad)


def _where(build: _Build, bound: dict[str, Any], grad: bool) -> int:
    mask = build.mask(bound["condition"])
    return build.step("where", mask, build.real(bound["self"], grad), build.real(bound["other"], grad))


def _power(build: _Build, bound: dict[str, Any], grad: bool) -> int:
    if bound["exponent"] != 2:
        raise _Stop
    return build.step("square", build.real(bound["self"], grad))


def _bce(build: _Build, bound: dict[str, Any], grad: bool) -> int:
    truth = bound["target"]
    plain = bound["weight"] is None and bound["pos_weight"] is None and bound["reduction"] == 0
    if not plain or (grad and build.graph.nodes[truth.node].needs_grad):
        raise _Stop
    return build.step("bce", build.real(bound["self"], grad), build.real(truth, False))


OPS: dict[Any, Writer] = {
    aten.add.Tensor: _binary("add"),
    aten.add.Scalar: _binary("add"),
    aten.sub.Tensor: _binary("sub"),
    aten.sub.Scalar: _binary("sub"),
    aten.rsub.Tensor: _binary("sub", reverse=True),
    aten.rsub.Scalar: _binary("sub", reverse=True),
    aten.mul.Tensor: _binary("mul"),
    aten.mul.Scalar: _binary("mul"),
    aten.div.Tensor: _binary("div"),
    aten.div.Scalar: _binary("div"),
    aten.neg.default: _unary("neg"),
    aten.leaky_relu.default: _unary("leaky", "negative_slope"),
    aten.relu.default: _unary("relu"),
    aten.hardtanh.default: _clamp("hardtanh", "min_val", "max_val"),
    aten.clamp.default: _clamp("clamp", "min", "max"),
    aten.abs.default: _unary("abs"),
    aten.square.default: _unary("square"),
    aten.pow.Tensor_Scalar: _power,
    aten.exp.default: _unary("exp"),
    aten.sigmoid.default: _unary("sigmoid"),
    aten.silu.default: _unary("silu"),
    aten.binary_cross_entropy_with_logits.default: _bce,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten._to_copy.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.logical_and.default: _logic("and"),
    aten.logical_or.default: _logic("or"),
    aten.logical_not.default: _logic("not"),
    aten.bitwise_and.Tensor: _logic("and"),
    aten.bitwise_or.Tensor: _logic("or"),
    aten.bitwise_not.default: _logic("not"),
    **{
        op: _compare(name)
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for op in (getattr(aten, name).Scalar, getattr(aten, name).Tensor)
    },
}

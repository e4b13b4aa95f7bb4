"""From pointwise ops to the small programs that kernels compute (:mod:`wholegrad.kernels.expression`).

:data:`OPS` has every op that has a program, and how it is written. What cannot be one, for its types or shapes, stops
and is left to PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from wholegrad.graph.graph import Graph, Node, Ref, Spec
from wholegrad.graph.layout import Role
from wholegrad.graph.rules.base import bind
from wholegrad.graph.rules.normalize import NORMALIZE
from wholegrad.kernels.expression import EACH, MAP, MASKS, ONE, Leaf, Program, Step
from wholegrad.kernels.stage import Part

aten = torch.ops.aten
REALS = (torch.float32, torch.float64)
BYTES = (torch.uint8, torch.bool)
MOST_LEAVES = 8
DEEPEST = 48  # ops on ops in one program, which are followed by recursion
PLANAR = (Role.PLAIN, Role.PLAIN, Role.ROW, Role.COL)


class Stop(Exception):  # noqa: N818  no error: another way is taken
    """This value cannot be computed while it is read."""


def planar_layout(spec: Spec) -> bool:
    """Whether a value is a map ``(N, C, H, W)``."""
    return len(spec.layout) == 4 and all(
        len(dim) == 1 and dim[0].role is role for dim, role in zip(spec.layout, PLANAR, strict=True)
    )


class Reading(NamedTuple):
    """What a kernel reads: parts, and the values that their programs take, in order."""

    parts: tuple[Part, ...]
    leaves: tuple[Ref, ...]


@dataclass(frozen=True)
class Found:
    """A program and the values that its leaves are, and what is asked of it again and again."""

    program: Program
    reading: Reading

    @cached_property
    def maps(self) -> tuple[Ref, ...]:
        """The maps that it reads."""
        leaves = zip(self.reading.leaves, self.program.leaves, strict=True)
        return tuple(ref for ref, leaf in leaves if leaf.kind == MAP)

    @cached_property
    def bytes(self) -> bool:
        """Whether it reads bytes."""
        return any(leaf.bytes for leaf in self.program.leaves)

    @cached_property
    def smooth(self) -> int:
        """How many derivatives are wanted, if all are with respect to maps; else more than there are leaves."""
        wanted = self.program.wanted
        return len(wanted) if all(self.program.leaves[i].kind == MAP for i in wanted) else MOST_LEAVES + 1

    @cached_property
    def cost(self) -> int:
        """Instructions for a vector, about."""
        return self.program.cost()


class Programs:
    """The programs of one graph: what was found for one segment stands for each that is alike where the search looked.

    Args:
        raw: images that are bytes.
    """

    def __init__(self, graph: Graph, raw: frozenset[Ref]) -> None:
        self.graph, self.raw = graph, raw
        self._known: dict[Any, list[tuple[frozenset[int], frozenset[int], Found | None]]] = {}

    def find(
        self, free: AbstractSet[int], ref: Ref, real: torch.dtype | None = None, top: bool = False
    ) -> Found | None:
        """What computes a value; None if nothing can.

        Args:
            free: nodes with a program that may be computed where they are read.
            real: the precision; by default the value's own.
            top: whether the value's own op may be computed even if it is not free.
        """
        known = self._known.setdefault((ref.node, ref.out, real, top), [])
        for opened, closed, found in known:
            if opened <= free and closed.isdisjoint(free):
                return found
        try:
            build = Build(self, free, ref, real)
        except Stop:
            known.append((frozenset(), frozenset(), None))
            return None
        try:
            found = build.finish(top)
        except Stop:
            found = None
        known.append((frozenset(build.looked & free), frozenset(build.looked - free), found))
        return found


class Build:
    """A program in the making, from the value at its end; ``looked`` has the nodes that had to be free or not."""

    def __init__(self, programs: Programs, free: AbstractSet[int], ref: Ref, real: torch.dtype | None) -> None:
        self.programs, self.free, self.graph, self.ref = programs, free, programs.graph, ref
        self.spec = self.graph.spec(ref)
        self.dtype = real or self.spec.dtype
        if self.dtype not in REALS or not planar_layout(self.spec):
            raise Stop
        self.looked: set[int] = set()
        self.leaves: dict[tuple[Ref, bool], Leaf] = {}
        self.steps: list[Step] = []  # leaves are numbered -1, -2, .. until all are known
        self.memory: dict[tuple[Ref, bool], int] = {}
        self.masks: set[int] = set()
        self.depth = 0

    def finish(self, top: bool) -> Found:
        """The program; with ``top``, of the op itself even where its value must exist."""
        last = self.value(self.ref, True, top)
        if last in self.masks:
            last = self.step("real", last)
        if len(self.leaves) > MOST_LEAVES or not any(leaf.kind == MAP for leaf in self.leaves.values()):
            raise Stop
        count = len(self.leaves)

        def place(number: int) -> int:
            return -number - 1 if number < 0 else number + count

        steps = [step._replace(values=tuple(place(i) for i in step.values)) for step in self.steps]
        if steps and place(last) != count + len(steps) - 1:
            raise Stop
        program = Program(tuple(self.leaves.values()), tuple(steps))
        return Found(program, Reading((Part(program, self.spec.shape[1]),), tuple(ref for ref, _ in self.leaves)))

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
        found = self._inner(node, grad) if top or self._may(ref.node) else None
        if found is None:
            found = self._leaf(ref, grad)
        self.memory[ref, grad] = found
        return found

    def _may(self, index: int) -> bool:
        """Whether a node may be computed here."""
        if self.depth >= DEEPEST:
            return False
        self.looked.add(index)
        return index in self.free

    def _inner(self, node: Node, grad: bool) -> int | None:
        """The op's steps; None if it must be a leaf instead."""
        spec = node.outputs[0]
        before = len(self.steps), dict(self.leaves), dict(self.memory), set(self.masks)
        self.depth += 1
        try:
            if spec.dtype not in (self.dtype, torch.bool) or spec.shape != self.spec.shape:
                raise Stop
            found = OPS[node.op](self, bind(node.op, node.args, node.kwargs), grad)
            if spec.dtype == torch.bool and found not in self.masks:  # true plus true is true
                found = self.step("ne", found, numbers=(0.0,))
            return found
        except Stop:
            del self.steps[before[0] :]
            self.leaves, self.memory, self.masks = before[1:]
            return None
        finally:
            self.depth -= 1

    def _leaf(self, ref: Ref, grad: bool) -> int:
        spec, real = self.graph.spec(ref), self.dtype
        if spec.is_map:
            if spec.layout != self.spec.layout or spec.dtype not in (real, *BYTES):
                raise Stop
            raw = ref in self.programs.raw
            leaf = Leaf(MAP, int(raw or spec.dtype in BYTES), grad and spec.dtype == real)
        else:
            leaf = Leaf(self._small(spec.shape), 0, grad)
            if spec.dtype != real:
                raise Stop
        self.leaves[ref, grad] = leaf
        number = -1 - list(self.leaves).index((ref, grad))
        return self.step("u8", number) if spec.is_map and ref in self.programs.raw else number

    def _small(self, shape: Sequence[int]) -> str:
        if math.prod(shape) == 1:
            return ONE
        channels = self.spec.shape[1]
        if len(shape) in (3, 4) and math.prod(shape) == channels and shape[-3] == channels:
            return EACH
        raise Stop


Writer = Callable[[Build, dict[str, Any], bool], int]


def _unary(op: str, *names: str) -> Writer:
    """An op of one value, with numbers from arguments of these names."""

    def write(build: Build, bound: dict[str, Any], grad: bool) -> int:
        numbers = tuple(float(bound[name]) for name in names)
        return build.step(op, build.real(bound.get("self", bound.get("input")), grad), numbers=numbers)

    return write


def _binary(op: str, reverse: bool = False) -> Writer:
    def write(build: Build, bound: dict[str, Any], grad: bool) -> int:
        a, b = (build.real(bound[name], grad) for name in ("self", "other"))
        a, b = (b, a) if reverse else (a, b)
        alpha = bound.get("alpha", 1)
        return build.step(op, a, b, numbers=(float(alpha),) if alpha != 1 else ())

    return write


def _compare(op: str) -> Writer:
    def write(build: Build, bound: dict[str, Any], grad: bool) -> int:
        a, other = build.real(bound["self"], False), bound["other"]
        if isinstance(other, Ref):
            return build.step(op, a, build.real(other, False))
        if isinstance(other, int) and not 0 <= other < 256 and build.graph.spec(bound["self"]).dtype == torch.uint8:
            raise Stop  # PyTorch compares with what is left of it in 8 bits
        return build.step(op, a, numbers=(float(other),))

    return write


def _logic(op: str) -> Writer:
    def write(build: Build, bound: dict[str, Any], grad: bool) -> int:
        return build.step(op, *(build.mask(bound[name]) for name in ("self", "other") if name in bound))

    return write


def _clamp(op: str, low: str, high: str) -> Writer:
    def write(build: Build, bound: dict[str, Any], grad: bool) -> int:
        ends = [bound[name] for name in (low, high)]
        if any(isinstance(end, Ref) or (end is not None and math.isnan(end)) for end in ends):
            raise Stop
        numbers = tuple(
            float(end) if end is not None else sign * math.inf for end, sign in zip(ends, (-1, 1), strict=True)
        )
        return build.step(op, build.real(bound["self"], grad), numbers=numbers)

    return write


def _same(build: Build, bound: dict[str, Any], grad: bool) -> int:
    """A copy, perhaps of masks or bytes to real numbers, or to masks."""
    dtype = bound.get("dtype")
    if dtype == torch.bool:
        return build.mask(bound["self"])
    if dtype not in (None, build.dtype):
        raise Stop
    return build.value(bound["self"], grad) if dtype is None else build.real(bound["self"], grad)


def _where(build: Build, bound: dict[str, Any], grad: bool) -> int:
    mask = build.mask(bound["condition"])
    return build.step("where", mask, build.real(bound["self"], grad), build.real(bound["other"], grad))


def _power(build: Build, bound: dict[str, Any], grad: bool) -> int:
    if bound["exponent"] != 2:
        raise Stop
    return build.step("square", build.real(bound["self"], grad))


def _prelu(build: Build, bound: dict[str, Any], grad: bool) -> int:
    return build.step("prelu", *(build.real(bound[name], grad) for name in ("self", "weight")))


def _normalize(build: Build, bound: dict[str, Any], grad: bool) -> int:
    x, mean, scale, shift = (build.real(bound[name], grad) for name in ("x", "mean", "scale", "shift"))
    return build.step("add", build.step("mul", build.step("sub", x, mean), scale), shift)


def _bce(build: Build, bound: dict[str, Any], grad: bool) -> int:
    truth = bound["target"]
    plain = bound["weight"] is None and bound["pos_weight"] is None and bound["reduction"] == 0
    if not plain or (grad and build.graph.nodes[truth.node].needs_grad):
        raise Stop
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
    aten._prelu_kernel.default: _prelu,
    NORMALIZE: _normalize,
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

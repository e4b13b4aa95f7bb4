"""What a rule is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Node, Ref, Spec, unsupported
from wholegrad.graph.layout import Layout, Role, shape_of


def bind(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call by the name that the op's schema gives it, defaults filled in."""
    arguments = op._schema.arguments
    found = {argument.name: argument.default_value for argument in arguments}
    found.update(zip((argument.name for argument in arguments), args, strict=False))
    found.update(kwargs)
    return found


CPU = torch.device("cpu")
NO_DOUBLE = {"mps"}  # types of devices that have no float64


@dataclass(frozen=True)
class LayoutRequest:
    """What a rule sees when a node is captured.

    Attributes:
        place: module path and op, for errors.
        op, args, kwargs: the call, with Refs for tensors.
        specs: operand Specs by Ref.
        shapes: the shapes of the outputs, as PyTorch inferred them.
    """

    place: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    specs: dict[Ref, Spec]
    shapes: tuple[tuple[int, ...], ...]

    def layout(self, ref: Ref) -> Layout:
        return self.specs[ref].layout

    @cached_property
    def bound(self) -> dict[str, Any]:
        """Every argument by the name that the op's schema gives it, defaults filled in."""
        return bind(self.op, self.args, self.kwargs)

    def refuse(self, cause: str) -> Exception:
        """The error to raise when this call has no locality that the rule knows."""
        return unsupported(self.place, cause)


@dataclass(frozen=True)
class Tile:
    """Where a node runs: its own box and, by position in ``node.operands``, the boxes of its map operands."""

    box: Box
    operands: tuple[Box | None, ...]
    specs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    seed: int = 0  # of the step, for random ops
    device: torch.device = CPU  # where tensors lie, for what is made from nothing


class Rule:
    """One op's rule. Subclass :class:`MapRule` or :class:`ReductionRule`."""

    view = False  # whether its output lies in the memory of its first operand
    copies = (0, 0)  # of its first operand and of its output that it holds beside them (padded, cropped, rearranged)
    aligned = False  # whether a small operand that runs along the image lines up with the maps, as in broadcasting

    whole: tuple[str, ...] = ()  # arguments that arrive whole although ``aligned``: positions, not pixels

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        """Layouts of the outputs.

        Raises:
            UnsupportedOpError: the call is used in a way that has no locality.
        """
        raise NotImplementedError

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        """The interval of map operand ``operand`` that ``out`` depends on, clipped to that map, never empty.

        Args:
            specs: one Spec for each of ``node.operands``.
            role: ``Role.ROW`` or ``Role.COL``.
            out: non-empty interval of the node's own map along that axis.
        """
        return out

    def borders(self, node: Node) -> tuple[int, int] | None:
        """At how many ends of rows and columns it makes anything, and else passes its input on; None: everywhere."""
        return None

    def macs(self, node: Node, specs: Sequence[Spec]) -> float:
        """Multiply-adds for one output pixel (all channels); 0 for anything cheaper than a convolution."""
        return 0.0


class MapRule(Rule):
    """An op that yields maps."""

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        """The outputs on ``tile.box``, differentiable with respect to ``tensors``.

        Args:
            tensors: one for each of ``node.operands``: a small tensor whole, a map on exactly ``tile.operands[i]``.
        """
        table = dict(zip(node.operands, tensors, strict=True))
        return node.call(table.__getitem__)


State = tuple[torch.Tensor, ...]


class ReductionRule(Rule):
    """An op that sums a map away (rule 3): partial results of tiles are merged in tile order, then finished.

    Attributes:
        linear: whether the gradient with respect to the map needs no finished value, so that the op may be part of a
            segment that runs forward and backward in one pass (rule 4).
        sums: whether partial results are sums, which must be finite.
    """

    linear = True
    sums = True

    def partial(self, node: Node, tile: torch.Tensor) -> State:
        """The partial result of the elements that a tile owns; sums in float64. Runs without gradient."""
        raise NotImplementedError

    def merge(self, node: Node, spec: Spec, total: State | None, part: State, box: Box) -> State:
        """``total`` with one more tile, whose elements lie on ``box`` of the operand; may write into ``total``."""
        return part if total is None else tuple(a + b for a, b in zip(total, part, strict=True))

    def share(self, node: Node, spec: Spec, total: State, box: Box) -> State:
        """What another process needs to know of a total whose tiles, all together, lie on ``box``: by default all."""
        return total

    def join(self, node: Node, spec: Spec, total: State | None, other: State, box: Box) -> State:
        """:meth:`merge` with what :meth:`share` gave in another process, whose tiles lie on ``box``."""
        return self.merge(node, spec, total, other, box)

    def finish(self, node: Node, spec: Spec, total: State) -> tuple[torch.Tensor, ...]:
        """The op's outputs from the merged state, by default that. ``spec`` is the operand's, at the true size."""
        return total

    def pull(
        self,
        node: Node,
        spec: Spec,
        tile: torch.Tensor,
        box: Box,
        total: State,
        grads: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """The gradient with respect to the elements that a tile owns, of the shape of ``tile``.

        Args:
            tile: those elements, on ``box`` of the operand.
            total: the merged state; empty in a one-pass segment, where ``linear`` promises that nobody looks.
            grads: gradients of the outputs; None for one that no gradient reaches.
        """
        raise NotImplementedError

    def pull_onto(
        self,
        more: torch.Tensor | None,
        node: Node,
        spec: Spec,
        tile: torch.Tensor,
        box: Box,
        total: State,
        grads: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """:meth:`pull` added to the gradient ``more``, which stays as it is."""
        found = self.pull(node, spec, tile, box, total, grads)
        return found if more is None else more + found


_RULES: dict[Any, Rule] = {}
R = TypeVar("R", bound=type[Rule])


def register(*ops: Any) -> Callable[[R], R]:
    """Class decorator: an instance of the class is the rule of these ATen overloads.

    Raises:
        TypeError: an argument is not an ``OpOverload`` such as ``torch.ops.aten.relu.default``.
        ValueError: the overload has a rule already.
    """

    def add(cls: R) -> R:
        rule = cls()
        for op in ops:
            if not isinstance(op, torch._ops.OpOverload):
                raise TypeError(f"register takes ATen overloads such as torch.ops.aten.relu.default, not {op!r}")
            if op in _RULES:
                raise ValueError(f"{op} has a rule already: {type(_RULES[op]).__name__}")
            _RULES[op] = rule
        return cls

    return add


def registered() -> dict[Any, Rule]:
    """A copy of the table of explicit rules."""
    return dict(_RULES)


def rule_for(op: Any) -> Rule | None:
    """The rule of an overload: its own, or the pointwise one if PyTorch tags the op as pointwise."""
    if op in _RULES:
        return _RULES[op]
    random = torch.Tag.nondeterministic_seeded in op.tags
    return _RULES[torch.ops.aten.add.Tensor] if torch.Tag.pointwise in op.tags and not random else None


def resized(layout: Layout, role: Role, size: int) -> Layout:
    """``layout`` with the axis of this role made ``size`` long."""
    return tuple(tuple(axis._replace(size=size) if axis.role is role else axis for axis in dim) for dim in layout)


def checked(request: LayoutRequest, layout: Layout, index: int = 0) -> Layout:
    """``layout`` if it has the shape that PyTorch inferred; a rule that disagrees is a defect."""
    if shape_of(layout) != request.shapes[index]:
        raise request.refuse(f"rule expects shape {shape_of(layout)}, PyTorch says {request.shapes[index]}")
    return layout

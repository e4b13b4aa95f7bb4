"""A strip of a map, held whole: what circular padding brings from one side of the map to the other.

As a slice it would tie a tile at the left border to the right one, and its box would span the map; as a reduction
every tile gives the part of the strip that it owns, and a later one reads the strip like a map of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Layout, Role, plain
from wholegrad.graph.rules.base import LayoutRequest, ReductionRule, State, register


@torch.library.custom_op("wholegrad::strip", mutates_args=())
def strip(x: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    """``x.narrow(dim, start, length)``, with ``dim`` counted from the back: -2 for rows, -1 for columns."""
    return x.narrow(dim, start, length).clone()


@strip.register_fake
def _(x: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    return torch.empty_like(x.narrow(dim, start, length))


def _setup(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.shape, ctx.where = inputs[0].shape, inputs[1:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    result = grad.new_zeros(ctx.shape)
    result.narrow(*ctx.where).copy_(grad)
    return result, None, None, None


strip.register_autograd(_backward, setup_context=_setup)


STRIP = torch.ops.wholegrad.strip.default


@register(STRIP)
class Strip(ReductionRule):
    """The strip, every element from the tile that owns it."""

    sums = False

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        if len(layout) < 2 or [tuple(axis.role for axis in dim) for dim in layout[-2:]] != [(Role.ROW,), (Role.COL,)]:
            raise request.refuse("takes a strip along dimensions that are not rows and columns")
        return (plain(request.shapes[0]),)

    def _parts(self, node: Node, box: Box) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
        """Where a tile on ``box`` and the strip meet: the index into the strip and the one into the tile."""
        dim, start, length = node.args[1:]
        have = box.rows if dim == -2 else box.cols
        lo, hi = max(have.lo, start), min(have.hi, start + length)
        if lo >= hi:
            return None
        rows, cols = box.slices()
        along, inside = slice(lo - start, hi - start), slice(lo - have.lo, hi - have.lo)
        if dim == -2:
            return (..., along, cols), (..., inside, slice(None))
        return (..., rows, along), (..., slice(None), inside)

    def partial(self, node: Node, tile: torch.Tensor) -> State:
        return (tile,)

    def merge(self, node: Node, spec: Spec, total: State | None, part: State, box: Box) -> State:
        whole = part[0].new_zeros(node.outputs[0].shape, dtype=spec.dtype) if total is None else total[0]
        if (found := self._parts(node, box)) is not None:
            whole[found[0]] = part[0][found[1]]
        return (whole,)

    def share(self, node: Node, spec: Spec, total: State, box: Box) -> State:
        found = self._parts(node, box)
        return (total[0][:0] if found is None else total[0][found[0]],)

    def join(self, node: Node, spec: Spec, total: State | None, other: State, box: Box) -> State:
        whole = other[0].new_zeros(node.outputs[0].shape, dtype=spec.dtype) if total is None else total[0]
        if (found := self._parts(node, box)) is not None:
            whole[found[0]] = other[0]
        return (whole,)

    def pull(
        self, node: Node, spec: Spec, tile: torch.Tensor, box: Box, total: State, grads: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        result, grad = torch.zeros_like(tile), grads[0]
        assert grad is not None
        if (found := self._parts(node, box)) is not None:
            result[found[1]] = grad[found[0]].to(tile.dtype)
        return result

"""Ops that take a map's rows and columns away: cut points of the graph (rule 3).

A tile's partial result covers the elements that it owns; partial results are merged in tile order in float64, and the
op's outputs follow from the total. In the backward sweep each rule gives the gradient of the owned elements directly:

* sum: every element gets the sum's gradient; mean: an n-th of it. No value is needed.
* extreme value: the gradient is shared by all elements that equal it, as PyTorch shares it.
* variance and mean (:mod:`wholegrad.graph.rules.variance`).
* gather: the map itself, held whole, for what has no locality (rule 10); every element gets its own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Axis, Layout, crop, full_box, on_box, plain, spatial_dims, unflattened
from wholegrad.graph.rules.base import (
    NO_DOUBLE,
    LayoutRequest,
    MapRule,
    ReductionRule,
    State,
    Tile,
    bind,
    checked,
    register,
)

aten = torch.ops.aten


def dims_of(bound: dict[str, Any], rank: int) -> list[int]:
    """The dimensions that an op works over; all where it names none."""
    dims = bound.get("dim", bound.get("dims"))
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])]


def node_dims(node: Node, rank: int) -> list[int]:
    return dims_of(bind(node.op, node.args, node.kwargs), rank)


def wide(dtype: torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """What sums are held in: float64 for floats (float32 on a device that has no float64), int64 for the rest."""
    if device is not None and device.type in NO_DOUBLE and dtype.is_floating_point:
        return torch.float32
    return torch.float64 if dtype.is_floating_point else torch.int64


def unsqueezed(node: Node, spec: Spec, value: torch.Tensor) -> torch.Tensor:
    """An output of a reduction with the dimensions that it lost put back, each of size one."""
    dims = node_dims(node, len(spec.shape))
    return value.reshape([1 if i in dims else size for i, size in enumerate(spec.shape)])


class OverDims(ReductionRule, MapRule):
    """An op over some dimensions: a reduction if they hold rows and columns, pixel by pixel if they hold neither."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        dims = dims_of(request.bound, len(layout))
        spatial = spatial_dims(layout)
        if spatial <= set(dims):
            return tuple(plain(shape) for shape in request.shapes)
        if spatial & set(dims):
            raise request.refuse("works over rows or columns but not both")
        keeps = bool(request.bound.get("keepdim", False))
        one: tuple[Axis, ...] = (Axis(1),)
        kept = tuple(one if i in dims else dim for i, dim in enumerate(layout) if i not in dims or keeps)
        return tuple(checked(request, kept, i) for i in range(len(request.shapes)))

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        return node.call(lambda ref: tensors[0])


@register(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
class SumOrMean(OverDims):
    """Sum or mean."""

    def partial(self, node: Node, tile: torch.Tensor) -> State:
        total = tile.sum(node_dims(node, tile.dim()), keepdim=True, dtype=wide(node.outputs[0].dtype, tile.device))
        return (total.reshape(node.outputs[0].shape),)

    def _count(self, node: Node, spec: Spec) -> int:
        if node.op in (aten.sum.default, aten.sum.dim_IntList):
            return 1
        return prod(spec.shape[dim] for dim in node_dims(node, len(spec.shape)))

    def finish(self, node: Node, spec: Spec, total: State) -> tuple[torch.Tensor, ...]:
        count = self._count(node, spec)
        return (total[0] / count if count != 1 else total[0],)

    def pull(
        self, node: Node, spec: Spec, tile: torch.Tensor, box: Box, total: State, grads: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        grad = grads[0]
        assert grad is not None
        share = unsqueezed(node, spec, grad / self._count(node, spec))
        return share.to(tile.dtype).expand(tile.shape)


_LEAST = {aten.amin.default, aten.min.default}


@register(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
class Extreme(OverDims):
    """Largest or smallest value, and how many elements equal it."""

    linear = False
    sums = False

    def partial(self, node: Node, tile: torch.Tensor) -> State:
        dims = node_dims(node, tile.dim())
        best = (torch.amin if node.op in _LEAST else torch.amax)(tile, dims, keepdim=True)
        count = (tile == best).sum(dims, keepdim=True)
        return best.reshape(node.outputs[0].shape), count.reshape(node.outputs[0].shape)

    def merge(self, node: Node, spec: Spec, total: State | None, part: State, box: Box) -> State:
        if total is None:
            return part
        best = (torch.minimum if node.op in _LEAST else torch.maximum)(total[0], part[0])
        counts = [torch.where(value == best, count, 0) for value, count in (total, part)]
        return best, counts[0] + counts[1]

    def finish(self, node: Node, spec: Spec, total: State) -> tuple[torch.Tensor, ...]:
        return (total[0],)

    def pull(
        self, node: Node, spec: Spec, tile: torch.Tensor, box: Box, total: State, grads: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        grad = grads[0]
        assert grad is not None
        best, ties = total
        share = unsqueezed(node, spec, grad / ties).to(tile.dtype)
        return torch.where(tile == unsqueezed(node, spec, best), share, 0)


@register(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims)
class AnyOrAll(OverDims):
    """Whether any or all elements are true. No gradient."""

    sums = False

    def _any(self, node: Node) -> bool:
        return node.op in (aten.any.default, aten.any.dim, aten.any.dims)

    def partial(self, node: Node, tile: torch.Tensor) -> State:
        dims = node_dims(node, tile.dim())
        found = (torch.any if self._any(node) else torch.all)(tile, dims, keepdim=True)
        return (found.reshape(node.outputs[0].shape),)

    def merge(self, node: Node, spec: Spec, total: State | None, part: State, box: Box) -> State:
        if total is None:
            return part
        return ((torch.logical_or if self._any(node) else torch.logical_and)(total[0], part[0]),)


@torch.library.custom_op("wholegrad::gather", mutates_args=())
def gather(x: torch.Tensor) -> torch.Tensor:
    """The map ``x`` as a tensor that is held whole."""
    return x.clone()


@gather.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


GATHER = torch.ops.wholegrad.gather.default


@register(GATHER)
class Gather(ReductionRule):
    """The map itself, every element from the tile that owns it."""

    sums = False

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        return (plain(request.shapes[0]),)

    def partial(self, node: Node, tile: torch.Tensor) -> State:
        return (tile,)

    def merge(self, node: Node, spec: Spec, total: State | None, part: State, box: Box) -> State:
        whole = part[0].new_zeros(spec.shape, dtype=spec.dtype) if total is None else total[0]
        on_box(whole, spec.layout, box).copy_(unflattened(part[0], spec.layout, box))
        return (whole,)

    def share(self, node: Node, spec: Spec, total: State, box: Box) -> State:
        return (crop(total[0], spec.layout, full_box(spec.layout), box).contiguous(),)

    def pull(
        self, node: Node, spec: Spec, tile: torch.Tensor, box: Box, total: State, grads: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        grad = grads[0]
        assert grad is not None
        return crop(grad, spec.layout, full_box(spec.layout), box).to(tile.dtype)

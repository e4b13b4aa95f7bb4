"""Ops that look at one pixel at a time: pointwise functions with broadcasting, and ops over channels only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Node, Ref, Spec
from wholegrad.graph.layout import Axis, Layout, Role, axes, broadcast, extent, is_map, spatial_dims, tile_shape
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, register

aten = torch.ops.aten


# Losses per pixel, once capture has split their reduction off.
PIXEL_LOSSES = (
    aten.binary_cross_entropy_with_logits.default,
    aten.binary_cross_entropy.default,
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.soft_margin_loss.default,
)


@register(
    aten.add.Tensor,
    aten._to_copy.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.log_sigmoid_forward.default,
    aten._prelu_kernel.default,
    *PIXEL_LOSSES,
    aten.fill.Scalar,
    aten.fill.Tensor,
)
class Pointwise(MapRule):
    """Each output pixel depends on the same pixel of every map operand."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        maps = [spec.layout for spec in request.specs.values() if spec.is_map]
        smalls = [spec.layout for spec in request.specs.values() if not spec.is_map]
        result = []
        for shape in request.shapes:
            self._refuse_spatial_small(request, maps)
            layout = broadcast([*maps, *smalls], shape)
            if layout is None or not is_map(layout):
                shapes = [spec.shape for spec in request.specs.values()]
                raise request.refuse(f"operands {shapes} do not agree on rows and columns")
            result.append(layout)
        return tuple(result)

    def _refuse_spatial_small(self, request: LayoutRequest, maps: Sequence[Layout]) -> None:
        """A small tensor may not run along rows or columns: a tile would need its own part of it."""
        wide = {dim - len(layout) for layout in maps for dim in spatial_dims(layout)}  # counted from the back
        for spec in request.specs.values():
            sizes = [(i - len(spec.shape), size) for i, size in enumerate(spec.shape)]
            if not spec.is_map and any(size != 1 and back in wide for back, size in sizes):
                raise request.refuse(f"a tensor of shape {spec.shape} that is not a map runs along the image")

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        one = extent(specs[operand].layout, role) == 1
        return Interval(0, 1) if one else out


def dim_of(request: LayoutRequest, ref: Ref, dim: int) -> int:
    """``dim`` counted from the front.

    Raises:
        UnsupportedOpError: the dimension runs along rows or columns.
    """
    layout = request.layout(ref)
    dim = dim % max(len(layout), 1)
    if dim in spatial_dims(layout):
        raise request.refuse(f"works along rows or columns (dimension {dim} of {request.specs[ref].shape})")
    return dim


@register(aten.copy.default)
class Copy(Pointwise):
    """``copy(x, source)``: the source with x's shape and dtype; what ``x.copy_(source)`` becomes."""

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        spec = node.outputs[0]
        return (tensors[-1].to(spec.dtype).expand(tile_shape(spec.layout, tile.box)),)


@register(aten._softmax.default, aten._log_softmax.default)
class AlongChannels(MapRule):
    """``op(x, dim, ...)`` with the shape of x, where dim is not spatial."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        dim_of(request, request.args[0], request.args[1])
        return (request.layout(request.args[0]),)


@register(aten.cat.default)
class Concatenate(MapRule):
    """Maps joined along a dimension that is not spatial."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        refs = request.args[0]
        dim = request.args[1] if len(request.args) > 1 else 0
        first = next(ref for ref in refs if request.specs[ref].is_map)
        dim = dim_of(request, first, dim)
        layout = list(request.layout(first))
        for ref in refs:
            other = request.layout(ref)
            if [axis for axis in axes(other) if axis.role] != [axis for axis in axes(tuple(layout)) if axis.role]:
                raise request.refuse("joins maps with a tensor that is not a map of the same size")
        layout[dim] = (Axis(request.shapes[0][dim]),)
        return (tuple(layout),)


@register(aten.slice_scatter.default, aten.select_scatter.default)
class Scatter(MapRule):
    """``op(x, part, dim, ...)``: x with some channels replaced; what writing into a view becomes."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        if not all(spec.is_map for spec in request.specs.values()):
            raise request.refuse("writes a tensor that is not a map into a map")
        dim_of(request, request.args[0], request.args[2] if len(request.args) > 2 else 0)
        return (request.layout(request.args[0]),)

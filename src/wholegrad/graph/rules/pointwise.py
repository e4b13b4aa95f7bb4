"""Ops that look at one element at a time, with broadcasting: activations, arithmetic, losses per pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Node, Ref, Spec
from wholegrad.graph.layout import Layout, Role, broadcast, extent, is_map, spatial_dims, tile_shape
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
    aten.masked_fill.Tensor,
    aten.hardswish.default,
    aten.floor_divide.default,
    aten.rsub.Tensor,
    aten.complex.default,
    aten.polar.default,
    aten.isin.Tensor_Scalar,
    *PIXEL_LOSSES,
    aten.fill.Scalar,
    aten.fill.Tensor,
)
class Pointwise(MapRule):
    """Each output pixel depends on the same pixel of every map operand."""

    aligned = True

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        maps = [spec.layout for spec in request.specs.values() if spec.is_map]
        smalls = [spec.layout for spec in request.specs.values() if not spec.is_map]
        result = []
        for shape in request.shapes:
            refuse_spatial_small(request, maps, request.specs.values())
            layout = broadcast([*maps, *smalls], shape)
            if layout is None or not is_map(layout):
                shapes = [spec.shape for spec in request.specs.values()]
                raise request.refuse(f"operands {shapes} do not agree on rows and columns")
            result.append(layout)
        return tuple(result)

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        one = extent(specs[operand].layout, role) == 1
        return Interval(0, 1) if one else out


def refuse_spatial_small(request: LayoutRequest, maps: Sequence[Layout], specs: Iterable[Spec]) -> None:
    """A small tensor may not run along rows or columns: a tile would need its own part of it."""
    wide = {dim - len(layout) for layout in maps for dim in spatial_dims(layout)}  # counted from the back
    for spec in specs:
        sizes = [(i - len(spec.shape), size) for i, size in enumerate(spec.shape)]
        if not spec.is_map and any(size != 1 and back in wide for back, size in sizes):
            raise request.refuse(f"a tensor of shape {spec.shape} that is not a map runs along the image")


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

"""Ops that look at one pixel at a time: pointwise functions with broadcasting, and ops over channels only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Node, Ref, Spec
from wholegrad.graph.layout import Axis, Layout, Role, axes, broadcast, extent, is_map, spatial_dims
from wholegrad.graph.rules.base import LayoutRequest, MapRule, register

aten = torch.ops.aten


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
    aten.binary_cross_entropy_with_logits.default,
    aten.binary_cross_entropy.default,
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.soft_margin_loss.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.copy.default,
)
class Pointwise(MapRule):
    """Each output pixel depends on the same pixel of every map operand. Loss ops come here with reduction='none'."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        operands = [spec.layout for spec in request.specs.values()]
        result = []
        for shape in request.shapes:
            layout = broadcast(operands, shape)
            if layout is None or not is_map(layout):
                raise request.refuse(
                    f"operands {[spec.shape for spec in request.specs.values()]} do not agree on rows and columns"
                )
            self._refuse_spatial_small(request, layout)
            result.append(layout)
        return tuple(result)

    def _refuse_spatial_small(self, request: LayoutRequest, layout: Layout) -> None:
        """A small tensor may not run along rows or columns: a tile would need its own part of it."""
        wide = spatial_dims(layout)
        for spec in request.specs.values():
            offset = len(layout) - len(spec.layout)
            if not spec.is_map and any(size != 1 and i + offset in wide for i, size in enumerate(spec.shape)):
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

"""Ops along dimensions that are neither rows nor columns: they see one pixel at a time, with all of its channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Axis, Layout, Role, axes, plain, roles, spatial_dims
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, checked, register
from wholegrad.graph.rules.pointwise import dim_of
from wholegrad.graph.rules.reduction import dims_of
from wholegrad.graph.rules.shape import clip, place, planar, shifted

aten = torch.ops.aten


@register(
    aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default, aten.cumsum.default,
    aten.cumprod.default, aten.logcumsumexp.default, aten.sort.default, aten.sort.stable,
    aten.cummax.default,
)  # fmt: skip
class AlongChannels(MapRule):
    """``op(x, dim, ...)`` with outputs of the shape of x, where dim is not spatial."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        if set(dims_of(request.bound, len(layout))) & spatial_dims(layout):
            raise request.refuse(f"works along rows or columns of {request.specs[request.args[0]].shape}")
        return (layout,) * len(request.shapes)


@register(
    aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim, aten.median.dim, aten.mode.default,
    aten.kthvalue.default, aten.prod.dim_int, aten.logsumexp.default, aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
)  # fmt: skip
class OverChannels(MapRule):
    """``op(x, dim, keepdim)``: dimensions that are not spatial reduced to one element or dropped."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        dims = dims_of(request.bound, len(layout))
        if set(dims) & spatial_dims(layout):
            raise request.refuse(f"works over rows or columns of {request.specs[request.args[0]].shape}")
        one = plain([1])[0]
        keeps = request.bound.get("keepdim")
        kept = tuple(one if i in dims else dim for i, dim in enumerate(layout) if i not in dims or keeps)
        return tuple(checked(request, kept, i) for i in range(len(request.shapes)))


@register(
    aten.topk.default, aten.glu.default, aten.index_select.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.chunk.default, aten.repeat_interleave.self_int,
)  # fmt: skip
class ResizesChannels(MapRule):
    """``op(x, ..., dim)``: a dimension that is not spatial gets another size."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        bound = request.bound.get("dim", 0)
        dim = dim_of(request, request.args[0], 0 if bound is None else bound)
        found = ((*layout[:dim], (Axis(shape[dim]),), *layout[dim + 1 :]) for shape in request.shapes)
        return tuple(checked(request, each, i) for i, each in enumerate(found))


@register(aten.unbind.int)
class Unbind(MapRule):
    """A dimension that is not spatial taken apart."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        dim = dim_of(request, request.args[0], request.bound["dim"])
        return (layout[:dim] + layout[dim + 1 :],) * len(request.shapes)


@register(aten.stack.default)
class Stack(MapRule):
    """Maps of one shape along a new dimension."""

    aligned = True

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        refs = request.args[0]
        first = next(ref for ref in refs if request.specs[ref].is_map)
        layout = request.layout(first)
        _same_axes(request, refs, layout)
        dim = request.bound["dim"] % (len(layout) + 1)
        return (checked(request, (*layout[:dim], (Axis(len(refs)),), *layout[dim:])),)


@register(aten.repeat.default)
class Repeat(MapRule):
    """Plain dimensions repeated; rows and columns once."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        source, times = request.layout(request.args[0]), request.args[1]
        old = (*plain([1] * (len(times) - len(source))), *source)
        if any(count != 1 and roles(dim) for dim, count in zip(old, times, strict=True)):
            raise request.refuse("repeats rows or columns")
        shape = request.shapes[0]
        return (checked(request, tuple(dim if roles(dim) else (Axis(n),) for dim, n in zip(old, shape, strict=True))),)


@register(aten.avg_pool3d.default)
class AverageOfChannels(MapRule):
    """``avg_pool3d`` of (..., C, H, W) with windows along channels alone, as local response norm has it."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        kernel, stride, padding = (request.bound[name] for name in ("kernel_size", "stride", "padding"))
        if [_planar(value) for value in (kernel, stride or kernel, padding)] != [{1}, {1}, {0}]:
            raise request.refuse("averages over rows or columns and channels at once")
        return planar(request)


def _planar(value: int | Sequence[int]) -> set[int]:
    """What an ``int[3]`` argument says of rows and columns."""
    return {value} if isinstance(value, int) else set(value[-2:])


@register(aten.native_layer_norm.default, aten._fused_rms_norm.default)
class LayerNorm(MapRule):
    """Normalises over the last dimensions, where they are not spatial: over the channels of one pixel."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        last = len(request.args[1])
        if spatial_dims(layout) & set(range(len(layout) - last, len(layout))):
            raise request.refuse("normalises over rows or columns together with other dimensions")
        one = (*layout[: len(layout) - last], *plain([1] * last))
        return tuple(checked(request, each, i) for i, each in enumerate((layout, one, one)[: len(request.shapes)]))


def _same_axes(request: LayoutRequest, refs: Sequence[object], layout: Layout) -> None:
    wanted = [axis for axis in axes(layout) if axis.role]
    for ref in refs:
        if [axis for axis in axes(request.layout(ref)) if axis.role] != wanted:  # type: ignore[arg-type]
            raise request.refuse("joins maps with a tensor that is not a map of the same size")


@register(aten.cat.default)
class Concatenate(MapRule):
    """Maps joined along channels, or along rows or columns.

    Along rows, operand k covers the rows from the sum of the heights before it; a tile takes from each operand what
    lies on it, and from one that does not reach it a single row that is then dropped.
    """

    aligned = True

    def _dim(self, args: tuple[object, ...], rank: int) -> int:
        dim = args[1] if len(args) > 1 else 0
        assert isinstance(dim, int)
        return dim % rank

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        refs = request.args[0]
        layout = list(request.layout(next(ref for ref in refs if request.specs[ref].is_map)))
        dim = self._dim(request.args, len(layout))
        along = roles(layout[dim])
        if along and len(layout[dim]) != 1:
            raise request.refuse("joins a dimension that merges several")
        for ref in refs:
            other = request.layout(ref)
            same = [a for a in axes(other) if a.role and a.role not in along]
            if same != [a for a in axes(tuple(layout)) if a.role and a.role not in along] or roles(other[dim]) != along:
                raise request.refuse("joins maps with a tensor that is not a map of the same size")
        layout[dim] = (Axis(request.shapes[0][dim], layout[dim][0].role if along else Role.PLAIN),)
        return (checked(request, tuple(layout)),)

    def _along(self, node: Node) -> Role:
        dim = node.outputs[0].layout[self._dim(node.args, len(node.outputs[0].layout))]
        return dim[0].role if len(dim) == 1 else Role.PLAIN

    def _pieces(self, node: Node, specs: Sequence[Spec]) -> list[tuple[int, Interval]]:
        """For each argument its operand's position and where it lies along the joined dimension."""
        dim = self._dim(node.args, len(node.outputs[0].layout))
        at, result = 0, []
        for ref in node.args[0]:
            position = node.operands.index(ref)
            size = specs[position].shape[dim]
            result.append((position, Interval(at, at + size)))
            at += size
        return result

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        if role is not self._along(node):
            return out
        found = [
            clip(shifted(out, -piece.lo), piece.size)
            for position, piece in self._pieces(node, specs)
            if position == operand
        ]
        return Interval(min(i.lo for i in found), max(i.hi for i in found))

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        role = self._along(node)
        if role is Role.PLAIN:
            return super().run(node, tensors, tile)
        dim = self._dim(node.args, len(node.outputs[0].layout))
        want = tile.box.rows if role is Role.ROW else tile.box.cols
        parts = []
        for position, piece in self._pieces(node, tile.specs):
            lo, hi = max(want.lo, piece.lo), min(want.hi, piece.hi)
            box = tile.operands[position]
            if lo < hi and box is not None:
                have = shifted(box.rows if role is Role.ROW else box.cols, piece.lo)
                parts.append(place(tensors[position], have, Interval(lo, hi), dim))
        return (torch.cat(parts, dim),)


@register(aten.slice_scatter.default, aten.select_scatter.default)
class ScatterSlice(MapRule):
    """``op(x, part, dim, ...)``: x with some channels replaced; what writing into a view becomes."""

    aligned = True

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        if not all(spec.is_map for spec in request.specs.values()):
            raise request.refuse("writes a tensor that is not a map into a map")
        dim_of(request, request.args[0], request.args[2] if len(request.args) > 2 else 0)
        return (request.layout(request.args[0]),)

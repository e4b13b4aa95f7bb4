"""Ops that move, drop or cut elements without computing: views, crops and constant padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Axis, Layout, Role, map_layout, plain, regroup, roles, spatial_dims, tile_shape
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, checked, register, resized
from wholegrad.graph.rules.pointwise import dim_of

aten = torch.ops.aten


@register(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
class View(MapRule):
    """The same elements in the same order under another shape; rows and columns may merge, never split."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = regroup(request.layout(request.args[0]), request.shapes[0])
        if layout is None:
            shapes = f"{request.specs[request.args[0]].shape} to {request.shapes[0]}"
            raise request.refuse(f"the view from {shapes} splits rows or columns")
        return (layout,)

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        return (tensors[0].reshape(tile_shape(node.outputs[0].layout, tile.box)),)


@register(aten.unsqueeze.default)
class Unsqueeze(MapRule):
    """A new dimension of size one."""

    view = True

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        dim = request.args[1] % (len(layout) + 1)
        return ((*layout[:dim], (Axis(1),), *layout[dim:]),)


@register(aten.permute.default, aten.transpose.int, aten.t.default)
class Permute(MapRule):
    """Dimensions in another order."""

    view = True

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = list(request.layout(request.args[0]))
        if request.op is aten.permute.default:
            return (tuple(layout[dim] for dim in request.args[1]),)
        a, b = request.args[1:] if len(request.args) > 1 else (0, 1)
        layout[a], layout[b] = layout[b], layout[a]
        return (tuple(layout),)


@register(aten.select.int)
class Select(MapRule):
    """One index of a dimension that is not spatial."""

    view = True

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        ref, dim = request.args[:2]
        dim = dim_of(request, ref, dim)
        layout = request.layout(ref)
        return (checked(request, layout[:dim] + layout[dim + 1 :]),)


@register(aten.expand.default)
class Expand(MapRule):
    """Plain dimensions of size one repeated; rows and columns stay."""

    view = True

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        source = request.layout(request.args[0])
        shape = request.shapes[0]
        added = plain(shape[: len(shape) - len(source)])
        kept = tuple(
            dim if roles(dim) else (Axis(size),) for dim, size in zip(source, shape[len(added) :], strict=True)
        )
        return (checked(request, added + kept),)

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        return (tensors[0].expand(tile_shape(node.outputs[0].layout, tile.box)),)


def place(tile: torch.Tensor, have: Interval, want: Interval, dim: int, fill: float = 0.0) -> torch.Tensor:
    """``tile``, which holds ``have`` along ``dim``, on ``want``: cropped where longer, filled where shorter."""
    lo, hi = max(have.lo, want.lo), min(have.hi, want.hi)
    if lo >= hi:
        lo, hi = have.lo, have.lo  # nothing in common: all fill
    if (lo, hi) != (have.lo, have.hi):  # else a slice whose gradient would be copied
        tile = tile.narrow(dim, lo - have.lo, hi - lo)
    before, after = (lo - want.lo, want.hi - hi) if lo < hi else (want.size, 0)
    if before == after == 0:
        return tile
    pads = [0, 0] * (tile.dim() - 1 - dim) + [before, after]
    return torch.nn.functional.pad(tile, pads, value=fill)


@register(aten.constant_pad_nd.default)
class ConstantPad(MapRule):
    """Padding (or, where negative, cropping) with a constant: where the op's own map ends, and only there (rule 2)."""

    def _pads(self, node_args: tuple[object, ...], rank: int) -> dict[int, tuple[int, int]]:
        pads = node_args[1]
        assert isinstance(pads, list | tuple)
        return {rank - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2)}

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = list(request.layout(request.args[0]))
        for dim, pads in self._pads(request.args, len(layout)).items():
            if any(pads) and len(layout[dim]) != 1:
                raise request.refuse("pads a dimension that merges several")
            if any(pads):
                axis = layout[dim][0]
                layout[dim] = (axis._replace(size=axis.size + sum(pads)),)
        return (checked(request, tuple(layout)),)

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        before = self._before(node, role)
        size = specs[0].rows if role is Role.ROW else specs[0].cols
        return clip(Interval(out.lo - before, out.hi - before), size)

    def borders(self, node: Node) -> tuple[int, int] | None:
        layout = node.outputs[0].layout
        ends = {Role.ROW: 0, Role.COL: 0}
        for dim, pads in self._pads(node.args, len(layout)).items():
            if max(pads) > 0 and layout[dim][0].role is Role.PLAIN:
                return None
            if max(pads) > 0:
                ends[layout[dim][0].role] += sum(pad > 0 for pad in pads)
        return ends[Role.ROW], ends[Role.COL]

    def _before(self, node: Node, role: Role) -> int:
        layout = node.outputs[0].layout
        pads = self._pads(node.args, len(layout))
        return sum(pads.get(dim, (0, 0))[0] for dim in spatial_dims(layout) if roles(layout[dim]) == {role})

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        result, fill = tensors[0], float(node.args[2]) if len(node.args) > 2 else 0.0
        layout, have = node.outputs[0].layout, tile.operands[0]
        assert have is not None
        for dim, (before, after) in self._pads(node.args, len(layout)).items():
            found = roles(layout[dim])
            if not found:
                size = tile.specs[0].shape[dim]
                result = place(result, Interval(0, size), Interval(-before, size + after), dim, fill)
            elif found == {Role.ROW}:
                result = place(result, have.rows, shifted(tile.box.rows, -before), dim, fill)
            else:
                result = place(result, have.cols, shifted(tile.box.cols, -before), dim, fill)
        return (result,)


def shifted(interval: Interval, by: int) -> Interval:
    return Interval(interval.lo + by, interval.hi + by)


def clip(interval: Interval, size: int) -> Interval:
    """``interval`` within ``[0, size)``; the nearest single element if it lies outside, so that it is never empty."""
    lo = min(max(interval.lo, 0), size - 1)
    return Interval(lo, max(min(interval.hi, size), lo + 1))


@register(aten.slice.Tensor, aten.narrow.default)
class Slice(MapRule):
    """``x[start:end:step]`` along one dimension, spatial or not."""

    view = True

    def _range(self, args: tuple[object, ...], op: object, size: int) -> tuple[int, int]:
        """First index and step."""
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        assert isinstance(start, int)
        step = args[4] if len(args) > 4 and op is aten.slice.Tensor else 1
        assert isinstance(step, int)
        return max(start + size if start < 0 else start, 0), step

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        ref = request.args[0]
        layout = request.layout(ref)
        dim = (request.args[1] if len(request.args) > 1 else 0) % len(layout)
        size, axis = request.shapes[0][dim], layout[dim]
        if size == request.specs[ref].shape[dim]:
            return (layout,)
        if len(axis) != 1:
            raise request.refuse("cuts a dimension that merges several")
        if axis[0].role is not Role.PLAIN:
            return (checked(request, resized(layout, axis[0].role, size)),)
        return (checked(request, (*layout[:dim], (Axis(size),), *layout[dim + 1 :])),)

    def _role(self, node: Node) -> tuple[int, Role]:
        layout = node.outputs[0].layout
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(layout)
        return dim, layout[dim][0].role if len(layout[dim]) == 1 else Role.PLAIN

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        dim, cut = self._role(node)
        if cut is not role:
            return out
        start, step = self._range(node.args, node.op, specs[0].shape[dim])
        return Interval(start + step * out.lo, start + step * (out.hi - 1) + 1)

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        dim, cut = self._role(node)
        if cut is Role.PLAIN:
            if node.outputs[0].shape[dim] == tile.specs[0].shape[dim]:
                return (tensors[0],)
            return super().run(node, tensors, tile)
        step = self._range(node.args, node.op, tile.specs[0].shape[dim])[1]
        return (tensors[0][(slice(None),) * dim + (slice(None, None, step),)],)


def boxes(tile: Tile, operand: int) -> Box:
    """The box of a map operand."""
    box = tile.operands[operand]
    assert box is not None
    return box


def extent_of(spec: Spec, role: Role) -> int:
    """Rows or columns of a map."""
    return spec.rows if role is Role.ROW else spec.cols


def planar(request: LayoutRequest) -> tuple[Layout, ...]:
    """Layouts of the outputs of an op on ``(N, C, H, W)`` or ``(C, H, W)``: rows and columns stay the last dimensions.

    Raises:
        UnsupportedOpError: the last two dimensions of the first operand are not rows and columns.
    """
    ref = request.args[0]
    if request.layout(ref)[-2:] != map_layout(request.specs[ref].shape)[-2:]:
        raise request.refuse("works along other dimensions than rows and columns of a (..., C, H, W) map")
    return tuple(checked(request, map_layout(shape), i) for i, shape in enumerate(request.shapes))


def arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call by its name in the op's schema, defaults included."""
    schema = op._schema.arguments
    found = {argument.name: argument.default_value for argument in schema}
    found.update(zip((argument.name for argument in schema), args, strict=False))
    return found | dict(kwargs)


def taken(x: torch.Tensor, index: npt.NDArray[np.int64], dim: int) -> torch.Tensor:
    """``x`` at these positions of ``dim``, counted from the front; channels stay last in memory where they are.

    A view where positions advance by a fixed step, as most do.
    """
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    if step > 0 and bool((np.diff(index) == step).all()):
        return x[(slice(None),) * dim + (slice(int(index[0]), int(index[-1]) + 1, step),)]
    position = torch.from_numpy(index).to(x.device)
    if x.dim() == 4 and x.stride(1) == 1:
        return x.permute(0, 2, 3, 1).index_select(dim - 1, position).permute(0, 3, 1, 2)
    return x.index_select(dim, position)

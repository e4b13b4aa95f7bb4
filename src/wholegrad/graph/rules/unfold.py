"""``unfold`` and ``fold``: windows laid out as columns, and columns added up to a map.

``im2col`` gives ``(N, C kernel, L)``, a column for each position of a window; its rows and columns are merged in
the last dimension. ``col2im`` is its transpose. Where windows lie is as for a convolution and a transposed one
(:mod:`wholegrad.graph.rules.window`); the kernel is PyTorch's own, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Axis, Layout, Role, map_layout
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, bind, checked, register
from wholegrad.graph.rules.pool import Along, pair
from wholegrad.graph.rules.shape import boxes, clip, extent_of, place
from wholegrad.graph.rules.window import reach, sources, window

aten = torch.ops.aten


class Windows(MapRule):
    """What both share: where windows lie, and how many there are."""

    copies = (1, 1)

    def along(self, node: Node | LayoutRequest, role: Role) -> Along:
        bound = bind(node.op, node.args, node.kwargs)
        names = ("kernel_size", "stride", "padding", "dilation")
        return Along(*(pair(bound[name])[0 if role is Role.ROW else 1] for name in names))

    def count(self, request: LayoutRequest, role: Role, size: int) -> int:
        """Windows along an axis of the image."""
        kernel, stride, pad, dilation = self.along(request, role)
        return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1

    def columns(self, request: LayoutRequest, shape: tuple[int, ...], size: Sequence[int]) -> Layout:
        """The layout of ``(N, C kernel, L)`` of an image of this size."""
        roles = (Role.ROW, Role.COL)
        merged = tuple(Axis(self.count(request, role, n), role) for role, n in zip(roles, size, strict=True))
        return (*((Axis(n),) for n in shape[:-1]), merged)

    def sizes(self, node: Node) -> tuple[list[int], list[int], list[int]]:
        """Kernel, dilation and stride, rows first."""
        rows, cols = self.along(node, Role.ROW), self.along(node, Role.COL)
        return [rows.kernel, cols.kernel], [rows.dilation, cols.dilation], [rows.stride, cols.stride]


@register(aten.im2col.default)
class Unfold(Windows):
    """``im2col(x, kernel, dilation, padding, stride)``."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        x = request.specs[request.args[0]]
        if x.layout[-2:] != map_layout(x.shape)[-2:]:
            raise request.refuse("unfolds along other dimensions than rows and columns of a (..., C, H, W) map")
        return (checked(request, self.columns(request, request.shapes[0], x.shape[-2:])),)

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        return clip(window(out, *self.along(node, role)), extent_of(specs[0], role))

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        x, have = tensors[0], boxes(tile, 0)
        kernel, dilation, stride = self.sizes(node)
        x = place(x, have.rows, window(tile.box.rows, *self.along(node, Role.ROW)), x.dim() - 2)
        x = place(x, have.cols, window(tile.box.cols, *self.along(node, Role.COL)), x.dim() - 1)
        return (aten.im2col(x, kernel, dilation, [0, 0], stride),)


@register(aten.col2im.default)
class Fold(Windows):
    """``col2im(x, size, kernel, dilation, padding, stride)``."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        x, size = request.specs[request.args[0]], request.bound["output_size"]
        if x.layout != self.columns(request, x.shape, size):
            raise request.refuse("folds what is not one column for each window of the map")
        return (checked(request, map_layout(request.shapes[0])),)

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        return clip(sources(out, *self.along(node, role)), extent_of(specs[0], role))

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        have = boxes(tile, 0)
        rows, cols = self.along(node, Role.ROW), self.along(node, Role.COL)
        kernel, dilation, stride = self.sizes(node)
        got = Box.of(reach(have.rows, *rows), reach(have.cols, *cols))
        x = aten.col2im(tensors[0], [got.height, got.width], kernel, dilation, [0, 0], stride)
        return (place(place(x, got.rows, tile.box.rows, x.dim() - 2), got.cols, tile.box.cols, x.dim() - 1),)

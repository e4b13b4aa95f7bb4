"""Ops that exchange channels among themselves or for pixels: sub-pixel upsampling, its inverse, shuffles and flips.

Shuffling by r makes r x r pixels of each one, from r r channels: outputs ``[a, b)`` come from inputs
``[floor(a / r), ceil(b / r))``, and unshuffling reads ``[a r, b r)``. Example: r = 2, outputs [1, 4) come from [0, 2),
which make outputs [0, 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Layout, Role, roles
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, register
from wholegrad.graph.rules.pointwise import dim_of
from wholegrad.graph.rules.shape import boxes, extent_of, planar

aten = torch.ops.aten


@register(aten.pixel_shuffle.default)
class PixelShuffle(MapRule):
    """``pixel_shuffle(x, r)``: ``(..., C r r, H, W)`` to ``(..., C, H r, W r)``."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        return planar(request)

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        return Interval(out.lo // node.args[1], -(-out.hi // node.args[1]))

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        made = Box(*(node.args[1] * edge for edge in boxes(tile, 0)))
        rows, cols = tile.box.slices(made)
        return (aten.pixel_shuffle(tensors[0], node.args[1])[..., rows, cols],)


@register(aten.pixel_unshuffle.default)
class PixelUnshuffle(MapRule):
    """``pixel_unshuffle(x, r)``: ``(..., C, H r, W r)`` to ``(..., C r r, H, W)``."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        return planar(request)

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        return Interval(out.lo * node.args[1], out.hi * node.args[1])


@register(aten.channel_shuffle.default)
class ChannelShuffle(MapRule):
    """``channel_shuffle(x, groups)``: channels interleaved."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        dim_of(request, request.args[0], 1)
        return (request.layout(request.args[0]),)


@register(aten.flip.default)
class Flip(MapRule):
    """``flip(x, dims)``: outputs ``[a, b)`` along a mirrored axis of n come from inputs ``[n - b, n - a)``."""

    def _mirrored(self, dims: Sequence[int], layout: Layout) -> set[Role]:
        return {role for dim in dims for role in roles(layout[dim % len(layout)])}

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        if any(len(layout[dim]) > 1 and roles(layout[dim]) for dim in request.args[1]):
            raise request.refuse("mirrors a dimension that merges several")
        return (layout,)

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        if role not in self._mirrored(node.args[1], specs[0].layout):
            return out
        size = extent_of(specs[0], role)
        return Interval(size - out.hi, size - out.lo)


@register(aten.roll.default)
class Roll(MapRule):
    """``roll(x, shifts, dims)`` along dimensions that hold neither rows nor columns."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        ref = request.args[0]
        layout = request.layout(ref)
        dims = request.bound["dims"]
        if not dims and any(roles(dim) for dim in layout):
            raise request.refuse("rolls the flattened map")
        for dim in [dims] if isinstance(dims, int) else dims:
            dim_of(request, ref, dim)
        return (layout,)

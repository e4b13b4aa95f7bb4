"""Max and average pooling: windows of fixed size, so that a network may shrink its maps without a convolution.

Windows sit as a convolution's do (:mod:`wholegrad.graph.rules.window`), and the kernel is PyTorch's own. Where the map
ends (rule 2) the low side is left to the kernel, which pads both sides alike, and what the high side lacks beyond that
is filled in; windows past the tile's last are dropped. Max pooling fills with -inf, average pooling with 0.

What average pooling divides by is the product of one count for rows and one for columns. With n inputs, kernel k,
stride s and padding p, window o starts at ``a = o s - p`` and ends at ``b = min(a + k, n + p)``: in ceil mode the last
window may hang over the padding, and what hangs over never counts. Padding counts (``b - a``) or does not
(``min(b, n) - max(a, 0)``).

Example: n = 4, k = 3, s = 2, p = 1, ceil mode. Windows start at -1, 1, 3 and end at 2, 4, min(6, 5) = 5. Counting
padding they divide by 3, 3, 2; otherwise by 2, 3, 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Layout, Role
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, register
from wholegrad.graph.rules.shape import arguments, boxes, clip, extent_of, place, planar
from wholegrad.graph.rules.window import window

aten = torch.ops.aten


class Along(NamedTuple):
    """How windows sit along one axis."""

    kernel: int
    stride: int
    pad: int
    dilation: int


def pair(value: Any) -> tuple[int, int]:
    """Rows' and columns' number of an ``int[2]`` argument."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def lowest(dtype: torch.dtype) -> float:
    """What no element is less than."""
    return float("-inf") if dtype.is_floating_point else float(torch.iinfo(dtype).min)


def whole_index(local: torch.Tensor, width: int, corner: tuple[int, int], whole_width: int) -> torch.Tensor:
    """Flat positions in the whole plane from those in a box of it that is ``width`` wide and starts at ``corner``."""
    offset = corner[0] * whole_width + corner[1]
    if width == whole_width:
        return local + offset
    rows = torch.div(local, width, rounding_mode="floor")
    return rows.mul_(whole_width - width).add_(local).add_(offset)


class Pooling(MapRule):
    """What max and average pooling share: where windows sit, and the input that they read."""

    copies = (1, 1)

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        return planar(request)

    def along(self, node: Node, role: Role) -> Along:
        given = arguments(node.op, node.args, node.kwargs)
        i = 0 if role is Role.ROW else 1
        kernel = pair(given["kernel_size"])[i]
        stride = pair(given["stride"])[i] if given["stride"] else kernel
        return Along(kernel, stride, pair(given["padding"])[i], pair(given.get("dilation", 1))[i])

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        return clip(window(out, *self.along(node, role)), extent_of(specs[0], role))

    def padded(self, node: Node, x: torch.Tensor, tile: Tile, fill: float) -> tuple[torch.Tensor, list[int]]:
        """The input from its own first row and column on, and the padding of both sides that the kernel must add.

        With that padding windows fit at least as often as ``tile.box`` is long.
        """
        have, pads = boxes(tile, 0), []
        for role, out, got in ((Role.ROW, tile.box.rows, have.rows), (Role.COL, tile.box.cols, have.cols)):
            read = window(out, *self.along(node, role))
            low, high = got.lo - read.lo, read.hi - got.hi
            if high > low:
                dim = x.dim() - (2 if role is Role.ROW else 1)
                x = place(x, got, Interval(got.lo, read.hi - low), dim, fill)
            pads.append(low)
        return x, pads


def owned(found: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The windows of the tile's own box, which come first."""
    return found[..., : tile.box.height, : tile.box.width]


@register(aten.max_pool2d_with_indices.default)
class MaxPool(Pooling):
    """``max_pool2d_with_indices``: the largest element of each window and its flat position in the whole plane."""

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        rows, cols = self.along(node, Role.ROW), self.along(node, Role.COL)
        x, pads = self.padded(node, tensors[0], tile, lowest(tensors[0].dtype))
        kernel, stride = [rows.kernel, cols.kernel], [rows.stride, cols.stride]
        found, local = aten.max_pool2d_with_indices(x, kernel, stride, pads, [rows.dilation, cols.dilation])
        have = boxes(tile, 0)
        index = whole_index(owned(local, tile), x.shape[-1], (have.y0, have.x0), tile.specs[0].cols)
        return owned(found, tile), index


@register(aten.avg_pool2d.default)
class AveragePool(Pooling):
    """``avg_pool2d`` with every way of counting."""

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        given = arguments(node.op, node.args, node.kwargs)
        rows, cols = self.along(node, Role.ROW), self.along(node, Role.COL)
        x, pads = self.padded(node, tensors[0], tile, 0.0)
        with_pad, divisor = given["count_include_pad"], given["divisor_override"]
        high = counts(tile.box.rows, rows, tile.specs[0].rows, with_pad)
        wide = counts(tile.box.cols, cols, tile.specs[0].cols, with_pad)
        full = set(high) == {rows.kernel} and set(wide) == {cols.kernel}
        by = divisor if divisor is not None else rows.kernel * cols.kernel if full else 1
        found = aten.avg_pool2d(x, [rows.kernel, cols.kernel], [rows.stride, cols.stride], pads, False, True, by)
        found = owned(found, tile)
        if divisor is not None or full:
            return (found,)
        return (found / torch.outer(torch.tensor(high), torch.tensor(wide)).to(found.dtype).to(found.device),)


def counts(out: Interval, along: Along, size: int, with_pad: bool) -> list[int]:
    """How many inputs, padding included or not, each of these windows counts along one axis."""
    result = []
    for o in range(out.lo, out.hi):
        start = o * along.stride - along.pad
        end = min(start + along.kernel, size + along.pad)
        result.append(end - start if with_pad else min(end, size) - max(start, 0))
    return result

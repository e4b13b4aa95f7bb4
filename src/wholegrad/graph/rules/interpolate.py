"""Resampling to another size: nearest, bilinear and bicubic, at any scale, with PyTorch's own idea of where pixels lie.

Along one axis with n inputs and m outputs, the step r is ``1 / scale`` if a scale was given, otherwise ``n / m``;
with corners aligned ``(n - 1) / (m - 1)``.

* *nearest*: output o is input ``floor(o r)``, *nearest exact* ``floor((o + 1/2) r)``, at most n - 1. Which input
  that is hangs on the last bit where the product is close to a whole number, so products are rounded as PyTorch's
  ``nearest_idx`` rounds them: in float32, whatever the data. Twice the size is exactly ``o // 2``, the same size o.
  PyTorch's backward kernels and its forward ones with channels last in memory were all found to pick so. Its forward
  kernels without channels last may round otherwise, and then disagree with their own backward. At whole scales none
  did. Of 600 random pairs of sizes at other scales, from 500 inputs on, nearest differed at one in float32 (951 to
  1902 with the scale given as 2.0005: twice the size is not special there), but at 379 in float64.
* *linear*: output o lies at ``x = max(0, (o + 1/2) r - 1/2)`` (``o r`` with corners aligned) and blends inputs
  ``floor(x)`` and the next. *Cubic* does not clamp x and blends four. Inputs past the map's ends are its first or last.

Example: n = 5, m = 10. Output 4 lies at 4.5 / 2 - 0.5 = 1.75: a quarter of input 1 and three quarters of input 2. A
tile that owns outputs [4, 6) needs inputs 1 .. 3 and PyTorch's kernel makes outputs [2, 8) of them: 2 and 7, where it
clamps at the tile's border, are cropped. So the kernel is used where scales are whole numbers. At other scales a
tile's border lies at a fraction, and taps are picked and weighted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Layout, Role
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, register
from wholegrad.graph.rules.shape import arguments, boxes, clip, extent_of, planar, taken

aten = torch.ops.aten
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
CUBIC = -0.75  # the slope that makes PyTorch's cubic kernel


class Axis(NamedTuple):
    """How many inputs become how many outputs; ``scale`` as given, or None."""

    inputs: int
    outputs: int
    scale: float | None
    corners: bool

    @property
    def whole(self) -> int:
        """How many outputs each input becomes, if that is a whole number and corners are not aligned; otherwise 0."""
        times = self.outputs // self.inputs
        exact = times * self.inputs == self.outputs and self.scale in (None, times) and not self.corners
        return times if exact else 0


def nearest(axis: Axis, o: Ints) -> Ints:
    """The inputs that nearest-neighbour upsampling picks."""
    if axis.outputs == axis.inputs:
        return o
    if axis.outputs == 2 * axis.inputs:
        return o // 2
    return _floored(o.astype(np.float32) * _single_step(axis), axis.inputs)


def nearest_exact(axis: Axis, o: Ints) -> Ints:
    """The inputs that "nearest-exact" picks."""
    product = (o + 0.5) * np.float64(_single_step(axis))
    return _floored(product.astype(np.float32), axis.inputs)


def _floored(at: npt.NDArray[np.floating[Any]], size: int) -> Ints:
    """The inputs at or before these positions; the last for those past it."""
    first: Ints = np.floor(at).astype(np.int64)
    return np.minimum(first, np.int64(size - 1), out=first)


def _single_step(axis: Axis) -> np.float32:
    return np.float32(1.0 / axis.scale) if axis.scale else np.float32(axis.inputs) / np.float32(axis.outputs)


def positions(axis: Axis, o: Ints) -> Floats:
    """Where outputs lie among inputs, in input pixels, not clamped."""
    if axis.corners:
        return np.float64((axis.inputs - 1) / (axis.outputs - 1) if axis.outputs > 1 else 0.0) * o
    step = np.float64(1.0 / axis.scale if axis.scale else axis.inputs / axis.outputs)
    return step * (o + 0.5) - 0.5


def linear(axis: Axis, o: Ints) -> tuple[Ints, Floats]:
    """Taps ``(2, outputs)`` and their weights."""
    if axis.outputs == axis.inputs:
        return np.stack([o, o]), np.stack([np.ones(len(o)), np.zeros(len(o))])
    first, part = _split(np.maximum(positions(axis, o), 0.0), axis.inputs)
    return np.stack([first, np.minimum(first + 1, axis.inputs - 1)]), np.stack([1.0 - part, part])


def cubic(axis: Axis, o: Ints) -> tuple[Ints, Floats]:
    """Taps ``(4, outputs)`` and their weights."""
    first, part = _split(positions(axis, o), axis.inputs)
    taps = np.clip(first + np.arange(-1, 3)[:, None], 0, axis.inputs - 1)
    weights = [_outer(part + 1.0), _inner(part), _inner(1.0 - part), _outer(2.0 - part)]
    return taps, np.stack(weights)


def _split(at: Floats, size: int) -> tuple[Ints, Floats]:
    """The input at or before each position, and how far behind it the position lies, 0 to 1."""
    first = _floored(at, size)
    return first, np.clip(at - first, 0.0, 1.0)


def _inner(x: Floats) -> Floats:
    return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1


def _outer(x: Floats) -> Floats:
    return ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC


class Upsample(MapRule):
    """``op(x, output_size, [align_corners,] scales_h, scales_w)``."""

    copies = (1, 1)

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        return planar(request)

    def axis(self, node: Node, source: Spec, role: Role) -> Axis:
        given = arguments(node.op, node.args, node.kwargs)
        scale = given["scales_h" if role is Role.ROW else "scales_w"]
        ends = extent_of(source, role), extent_of(node.outputs[0], role)
        return Axis(*ends, scale if scale and scale > 0 else None, bool(given.get("align_corners")))

    def reads(self, node: Node, axis: Axis, o: Ints) -> Ints:
        """The inputs that each output reads, in any order: monotone in the output."""
        raise NotImplementedError

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        axis = self.axis(node, specs[0], role)
        found = self.reads(node, axis, np.array([out.lo, out.hi - 1], dtype=np.int64))
        return clip(Interval(int(found.min()), int(found.max()) + 1), axis.inputs)

    def native(self, node: Node, x: torch.Tensor, tile: Tile, times: tuple[int, int]) -> torch.Tensor:
        """PyTorch's kernel on the tile's input, every pixel ``times`` as many, cropped to the tile's own."""
        have = boxes(tile, 0)
        made = Box(have.y0 * times[0], have.y1 * times[0], have.x0 * times[1], have.x1 * times[1])
        rows, cols = tile.box.slices(made)
        flags = [] if "align_corners" not in arguments(node.op, node.args, node.kwargs) else [False]
        return node.op(x, [made.height, made.width], *flags)[..., rows, cols]  # type: ignore[no-any-return]


@register(aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default)
class Nearest(Upsample):
    """One input for each output: the pixels that PyTorch picks, found by its own arithmetic."""

    def reads(self, node: Node, axis: Axis, o: Ints) -> Ints:
        pick = nearest if node.op is aten.upsample_nearest2d.default else nearest_exact
        return pick(axis, o)

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        x, have = tensors[0], boxes(tile, 0)
        spans = ((Role.ROW, tile.box.rows, have.rows), (Role.COL, tile.box.cols, have.cols))
        axes = [self.axis(node, tile.specs[0], role) for role, _, _ in spans]
        picks = [
            self.reads(node, axis, np.arange(out.lo, out.hi)) - got.lo
            for axis, (_, out, got) in zip(axes, spans, strict=True)
        ]
        if all(self._repeats(node, *each) for each in zip(axes, picks, spans, strict=True)):
            return (self.native(node, x, tile, (axes[0].whole, axes[1].whole)),)
        return (taken(taken(x, picks[0], 2), picks[1], 3),)

    def _repeats(self, node: Node, axis: Axis, picks: Ints, span: tuple[Role, Interval, Interval]) -> bool:
        """Whether outputs repeat inputs evenly, in the whole map and for PyTorch on the tile: rounding may spoil it."""
        times, (_, out, have) = axis.whole, span
        if times < 1:
            return False
        local = np.arange(out.lo, out.hi) - have.lo * times
        here = self.reads(node, Axis(have.size, have.size * times, None, False), local)
        return bool((picks == local // times).all() and (here == local // times).all())


@register(aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default)
class Smooth(Upsample):
    """A weighted sum of two or four inputs along each axis."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        if not request.specs[request.args[0]].dtype.is_floating_point:
            raise request.refuse("blends whole numbers")
        return super().layouts(request)

    def reads(self, node: Node, axis: Axis, o: Ints) -> Ints:
        return self._taps(node, axis, o)[0]

    def _taps(self, node: Node, axis: Axis, o: Ints) -> tuple[Ints, Floats]:
        return (linear if node.op is aten.upsample_bilinear2d.default else cubic)(axis, o)

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        x, have = tensors[0], boxes(tile, 0)
        rows, cols = (self.axis(node, tile.specs[0], role) for role in (Role.ROW, Role.COL))
        if rows.whole and cols.whole:
            return (self.native(node, x, tile, (rows.whole, cols.whole)),)
        spans = [(cols, tile.box.cols, have.cols, 3), (rows, tile.box.rows, have.rows, 2)]
        for axis, out, got, dim in sorted(spans, key=lambda span: span[0].outputs / span[0].inputs):  # shrink first
            if axis.outputs == axis.inputs and node.op is aten.upsample_bilinear2d.default:
                continue  # a copy
            taps, weights = self._taps(node, axis, np.arange(out.lo, out.hi))
            x = blended(x, taps - got.lo, weights, dim)
        return (x,)


def blended(x: torch.Tensor, taps: Ints, weights: Floats, dim: int) -> torch.Tensor:
    """The sum over taps of ``x`` there times its weight, along ``dim`` of ``(N, C, H, W)``."""
    shape = [-1 if i == dim else 1 for i in range(x.dim())]
    by = torch.from_numpy(weights).to(x.dtype).to(x.device)
    result = taken(x, taps[0], dim) * by[0].view(shape)
    for tap, weight in zip(taps[1:], by[1:], strict=True):
        result = torch.addcmul(result, taken(x, tap, dim), weight.view(shape))
    return result

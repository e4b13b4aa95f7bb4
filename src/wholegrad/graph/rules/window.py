"""Ops that slide a window over the map: convolution and transposed convolution, any kernel, stride and dilation.

Along one axis, with kernel k, stride s, padding p, dilation d and n input elements:

* convolution: output o reads inputs ``o s - p + d t`` for taps t = 0 .. k-1, so outputs ``[a, b)`` read
  ``[a s - p, (b-1) s - p + d (k-1) + 1)``. What lies outside ``[0, n)`` is padding.
* transposed convolution: input i writes outputs ``i s - p + d t``, so outputs ``[a, b)`` hear from inputs
  ``ceil((a + p - d (k-1)) / s) .. floor((b - 1 + p) / s)``.

  Example: k = 8, s = 4, p = 2. Outputs [0, 4) hear from inputs ceil(-5/4) = -1 .. floor(5/4) = 1, that is 0 and 1;
  inputs [0, 2) write outputs [-2, 10), of which [0, 4) are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Layout, Role, map_layout
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, checked, register
from wholegrad.graph.rules.convolve import convolve
from wholegrad.graph.rules.shape import boxes, clip

aten = torch.ops.aten


def window(out: Interval, kernel: int, stride: int, pad: int, dilation: int) -> Interval:
    """Inputs that a convolution reads for these outputs, padding included."""
    return Interval(out.lo * stride - pad, (out.hi - 1) * stride - pad + dilation * (kernel - 1) + 1)


def sources(out: Interval, kernel: int, stride: int, pad: int, dilation: int) -> Interval:
    """Inputs that a transposed convolution reads for these outputs, beyond the map's ends included; may be empty."""
    return Interval(-((dilation * (kernel - 1) - out.lo - pad) // stride), (out.hi - 1 + pad) // stride + 1)


def reach(inputs: Interval, kernel: int, stride: int, pad: int, dilation: int) -> Interval:
    """Outputs that a transposed convolution writes from these inputs."""
    return Interval(inputs.lo * stride - pad, (inputs.hi - 1) * stride - pad + dilation * (kernel - 1) + 1)


@register(aten.convolution.default)
class Convolution(MapRule):
    """``convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)`` in 2-d.

    An operand beyond these is the output itself, known from before (:mod:`wholegrad.graph.recall`).
    """

    copies = (1, 0)  # and one of the output if transposed

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        if layout[2:] != map_layout(request.specs[request.args[0]].shape)[2:] or len(layout) != 4:
            raise request.refuse("convolves along other dimensions than rows and columns of an (N, C, H, W) map")
        if request.specs[request.args[1]].is_map:
            raise request.refuse("has a weight that is a map")
        return (checked(request, map_layout(request.shapes[0])),)

    def _axis(self, node: Node, specs: Sequence[Spec], role: Role) -> tuple[int, int, int, int]:
        """Kernel, stride, padding and dilation along one axis."""
        i = 0 if role is Role.ROW else 1
        stride, pad, dilation = (values[i % len(values)] for values in node.args[3:6])
        return specs[1].shape[2 + i], stride, pad, dilation

    def _known(self, node: Node) -> int:
        """Which operand is the output itself, if there is one."""
        return 2 if node.args[2] is None else 3

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        if operand == self._known(node):
            return out
        axis = self._axis(node, specs, role)
        size = specs[0].rows if role is Role.ROW else specs[0].cols
        return clip(sources(out, *axis) if node.args[6] else window(out, *axis), size)

    def lead(self, node: Node, specs: Sequence[Spec], role: Role, out: Interval, have: Interval) -> int:
        """Padding before ``have`` of the input, which ``out`` is computed from; transposed: what is cropped."""
        axis = self._axis(node, specs, role)
        return out.lo - reach(have, *axis).lo if node.args[6] else have.lo - window(out, *axis).lo

    def macs(self, node: Node, specs: Sequence[Spec]) -> float:
        batch, channels = node.outputs[0].shape[:2]
        taps = prod(specs[1].shape[1:])  # (inputs / groups) x kernel area, or its mirror image if transposed
        if not node.args[6]:
            return float(batch * channels * taps)
        return float(batch * specs[0].shape[1] * taps / prod(node.args[3]))

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        x, weight = tensors[0], tensors[1]
        bias = tensors[2] if node.args[2] is not None else None
        known = tensors[self._known(node)] if len(tensors) > self._known(node) else None
        run = self._transposed if node.args[6] else self._plain
        return (run(node, x, weight, bias, tile, known),)

    def _plain(
        self,
        node: Node,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tile: Tile,
        known: torch.Tensor | None,
    ) -> torch.Tensor:
        stride, _, dilation, groups = node.args[3], node.args[4], node.args[5], node.args[8]
        have = boxes(tile, 0)
        rows = window(tile.box.rows, *self._axis(node, tile.specs, Role.ROW))
        cols = window(tile.box.cols, *self._axis(node, tile.specs, Role.COL))
        edges = (have.y0 - rows.lo, rows.hi - have.y1, have.x0 - cols.lo, cols.hi - have.x1)
        return convolve(x, weight, bias, stride, edges, dilation, False, groups, known)

    def _transposed(
        self,
        node: Node,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tile: Tile,
        known: torch.Tensor | None,
    ) -> torch.Tensor:
        stride, dilation, groups = node.args[3], node.args[5], node.args[8]
        row_axis, col_axis = (self._axis(node, tile.specs, role) for role in (Role.ROW, Role.COL))
        have = boxes(tile, 0)
        got = Box.of(reach(have.rows, *row_axis), reach(have.cols, *col_axis))
        box = tile.box
        edges = (box.y0 - got.y0, got.y1 - box.y1, box.x0 - got.x0, got.x1 - box.x1)
        return convolve(x, weight, bias, stride, edges, dilation, True, groups, known)

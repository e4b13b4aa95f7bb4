"""Padding that repeats the map's own pixels, mirrored or stretched: networks use it to keep seams out of their borders.

It happens where the op's own map ends (rule 2), and a tile there may read pixels that its outputs do not sit on.
Output o sits on input ``o - before``. Of n inputs, reflection reads ``-i`` for i < 0 and ``2 (n - 1) - i`` for i >= n;
replication reads the first or the last. Negative padding crops and needs nothing else.

Example: n = 5, two mirrored before. Outputs [0, 3) sit on [-2, 1) and read 2, 1, 0, that is [0, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Layout, Role
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, register
from wholegrad.graph.rules.shape import boxes, extent_of, planar, shifted

aten = torch.ops.aten


def parts(out: Interval, size: int) -> tuple[Interval, Interval, Interval]:
    """What of ``out`` lies before, on and after a map of ``size``; each may be empty."""
    low, high = (min(max(edge, out.lo), out.hi) for edge in (0, size))
    return Interval(out.lo, low), Interval(low, high), Interval(high, out.hi)


class BorderPad(MapRule):
    """``op(x, [left, right, top, bottom])`` on ``(N, C, H, W)`` or ``(C, H, W)``."""

    copies = (1, 1)

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        return planar(request)

    def borders(self, node: Node) -> tuple[int, int] | None:
        left, right, top, bottom = node.args[1]
        return (top > 0) + (bottom > 0), (left > 0) + (right > 0)

    def sources(self, node: Node, size: int, role: Role, out: Interval) -> tuple[Interval, Interval, Interval]:
        """The inputs that outputs before, on and after the map read; empty where there are no such outputs."""
        before = node.args[1][2 if role is Role.ROW else 0]
        low, middle, high = parts(shifted(out, -before), size)
        return self.source(low, size) if low.size else low, middle, self.source(high, size) if high.size else high

    def source(self, outside: Interval, size: int) -> Interval:
        """The inputs that an interval on one side of the map reads."""
        raise NotImplementedError

    def filled(self, border: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        """``length`` padding elements from the inputs that they read."""
        raise NotImplementedError

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        found = self.sources(node, extent_of(specs[0], role), role, out)
        return reduce(Interval.union, [interval for interval in found if interval.size])

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        x, have = tensors[0], boxes(tile, 0)
        x = self._along(node, x, tile.specs[0].rows, Role.ROW, tile.box.rows, have.rows)
        return (self._along(node, x, tile.specs[0].cols, Role.COL, tile.box.cols, have.cols),)

    def _along(self, node: Node, x: torch.Tensor, size: int, role: Role, out: Interval, have: Interval) -> torch.Tensor:
        dim = x.dim() - (2 if role is Role.ROW else 1)
        before = node.args[1][2 if role is Role.ROW else 0]
        lengths = [part.size for part in parts(shifted(out, -before), size)]
        pieces = []
        for i, (interval, length) in enumerate(zip(self.sources(node, size, role, out), lengths, strict=True)):
            if length:
                piece = x.narrow(dim, interval.lo - have.lo, interval.size)
                pieces.append(piece if i == 1 else self.filled(piece, dim, length))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


@register(aten.reflection_pad2d.default)
class ReflectionPad(BorderPad):
    """The map mirrored at its first and last pixel, which are not repeated."""

    def source(self, outside: Interval, size: int) -> Interval:
        mirror = 0 if outside.lo < 0 else 2 * (size - 1)
        return Interval(mirror - outside.hi + 1, mirror - outside.lo + 1)

    def filled(self, border: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        return border.flip(dim)


@register(aten.replication_pad2d.default)
class ReplicationPad(BorderPad):
    """The first and the last pixel repeated."""

    def source(self, outside: Interval, size: int) -> Interval:
        return Interval(0, 1) if outside.lo < 0 else Interval(size - 1, size)

    def filled(self, border: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        return border.expand([length if i == dim else -1 for i in range(border.dim())])

"""Boxes and intervals: the integer arithmetic on which ownership and halos rest. No tensors."""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    """Half-open integer range ``[lo, hi)`` along one axis of a map."""

    lo: int
    hi: int

    @property
    def size(self) -> int:
        return self.hi - self.lo

    def union(self, other: Interval) -> Interval:
        """The smallest interval that holds both."""
        return Interval(min(self.lo, other.lo), max(self.hi, other.hi))

    def holds(self, other: Interval) -> bool:
        return self.lo <= other.lo and other.hi <= self.hi


class Box(NamedTuple):
    """Half-open integer region ``(y0, y1, x0, x1)`` of a map, in that map's own pixels."""

    y0: int
    y1: int
    x0: int
    x1: int

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def rows(self) -> Interval:
        return Interval(self.y0, self.y1)

    @property
    def cols(self) -> Interval:
        return Interval(self.x0, self.x1)

    @staticmethod
    def of(rows: Interval, cols: Interval) -> Box:
        return Box(rows.lo, rows.hi, cols.lo, cols.hi)

    def union(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return Box.of(self.rows.union(other.rows), self.cols.union(other.cols))

    def holds(self, other: Box) -> bool:
        return self.rows.holds(other.rows) and self.cols.holds(other.cols)

    def slices(self, origin: Box | None = None) -> tuple[slice, slice]:
        """Row and column slices of this box in an array that starts at ``origin`` (default: at 0, 0)."""
        y, x = (origin.y0, origin.x0) if origin else (0, 0)
        return slice(self.y0 - y, self.y1 - y), slice(self.x0 - x, self.x1 - x)

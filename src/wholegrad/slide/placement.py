"""Where the pixels of a map lie on their slide, in exact fractions: what masks, outlines and regions are aligned by.

Positions are in level-0 pixels; pixel ``i`` of level 0 reaches from ``i`` to ``i + 1``. Nothing here depends on how a
map is read, so that labels do not either.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from wholegrad.slide.reader import MapReader


@dataclass(frozen=True)
class Axis:
    """A map's pixels along rows or columns: pixel ``i`` covers ``start + i * step`` to ``start + (i + 1) * step``."""

    start: Fraction
    step: Fraction

    def part(self, first: int) -> Axis:
        """The axis of a crop that begins at pixel ``first``."""
        return Axis(self.start + first * self.step, self.step)

    def scaled(self, before: int, after: int) -> Axis:
        """The axis of as much of the slide in ``after`` pixels instead of ``before``."""
        return Axis(self.start, self.step * Fraction(before, after))

    def nearest(self, first: int, last: int, stored: int, size: int) -> npt.NDArray[np.int64]:
        """Which of ``stored`` equal parts of the slide's ``size`` pixels holds each centre of ``first .. last - 1``."""
        at = (self.start + self.step / 2) * Fraction(stored, size)
        by = self.step * Fraction(stored, size)
        whole = at.denominator * by.denominator
        at_whole, by_whole = int(at * whole), int(by * whole)
        if abs(at_whole) + by_whole * last < 2**63:
            return (at_whole + by_whole * np.arange(first, last, dtype=np.int64)) // whole
        return np.array([(at_whole + by_whole * i) // whole for i in range(first, last)], np.int64)

    def centres(self, first: int, last: int) -> npt.NDArray[np.float64]:
        """Positions of the centres of pixels ``first .. last - 1``; the same numbers whatever the range."""
        return float(self.start + self.step / 2) + float(self.step) * np.arange(first, last, dtype=np.float64)


@dataclass(frozen=True)
class Placement:
    """A map's rows and columns on its slide, whose level 0 has ``size`` ``(H, W)`` pixels."""

    size: tuple[int, int]
    rows: Axis
    cols: Axis

    def part(self, y: int, x: int) -> Placement:
        """The placement of a crop whose corner is pixel ``(y, x)``."""
        return Placement(self.size, self.rows.part(y), self.cols.part(x))

    def scaled(self, before: tuple[int, int], after: tuple[int, int]) -> Placement:
        """The placement of the same part of the slide on ``after`` ``(H, W)`` pixels instead of ``before``."""
        return Placement(self.size, self.rows.scaled(before[0], after[0]), self.cols.scaled(before[1], after[1]))

    def corner(self, y: float, x: float) -> tuple[float, float]:
        """A point of the map, ``(y, x)`` in its pixels, as ``(x, y)`` in level-0 pixels, as annotations have it."""
        across = float(self.cols.start) + x * float(self.cols.step)
        return across, float(self.rows.start) + y * float(self.rows.step)


def whole_slide(size: tuple[int, int], shape: tuple[int, int]) -> Placement:
    """The placement of a map ``(H, W)`` that shows all of a slide of that size."""
    (height, width), (h, w) = size, shape
    zero = Fraction(0)
    return Placement(size, Axis(zero, Fraction(height, h)), Axis(zero, Fraction(width, w)))


def placement_of(reader: MapReader) -> Placement:
    """The reader's own placement, or that of a slide whose level 0 it is."""
    own = getattr(reader, "placement", None)
    size = (reader.shape[1], reader.shape[2])
    return own if isinstance(own, Placement) else whole_slide(size, size)

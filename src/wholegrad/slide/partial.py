"""Labels of a part of a slide, shown on all of it: beyond the part every pixel is 255, which means "not counted"."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import numpy as np

from wholegrad.errors import SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.buffers import ReusedBuffer, check_box
from wholegrad.slide.mask import LabelMask, Labels, StoredMask
from wholegrad.slide.placement import Axis, Placement, placement_of
from wholegrad.slide.reader import MapReader

BEYOND = 255
SLACK = 0.02  # by which the sides of a stored map and of its part may be in other proportion, and two pixels
Part = tuple[Fraction, Fraction, Fraction, Fraction]  # y0, y1, x0, x1 in level-0 pixels


class PartMask(LabelMask):
    """``mask`` where a pixel's centre lies within ``part``, ``BEYOND`` elsewhere.

    Args:
        mask: at the whole slide's resolution; read within the part alone.
        part: in level-0 pixels.
        grid: ``(h, w)`` of the whole slide in pixels like those of the part as it is stored, if it is.
    """

    def __init__(self, mask: LabelMask, part: Part, grid: tuple[int, int] | None = None) -> None:
        self.mask, self.part, self.grid = mask, part, grid
        self.shape, self.placement = mask.shape, mask.placement
        self._out = ReusedBuffer()

    @property
    def name(self) -> str:
        return self.mask.name

    @property
    def cache_bytes(self) -> int:
        return self.mask.cache_bytes

    def inner(self, box: Box) -> Box | None:
        """As much of a box as lies within the part; None if nothing does."""
        y0, y1, x0, x1 = self.part
        rows = _within(self.placement.rows, y0, y1, box.y0, box.y1)
        cols = _within(self.placement.cols, x0, x1, box.x0, box.x1)
        return Box(*rows, *cols) if rows[0] < rows[1] and cols[0] < cols[1] else None

    def read(self, box: Box) -> Labels:
        check_box(self.name, self.shape, box)
        out = self._out.take((box.height, box.width)).view(np.uint8)
        inner = self.inner(box)
        if inner != box:
            out[...] = BEYOND
        if inner is not None:
            out[inner.slices(box)] = self.mask.read(inner)[0]
        return out[None]

    def at(self, height: int, width: int) -> PartMask:
        return PartMask(self.mask.at(height, width), self.part, self.grid)

    def close(self) -> None:
        self.mask.close()


def of_part(stored: MapReader, like: MapReader, part: Part) -> PartMask:
    """A label map as stored, ``(1, h, w)``, that shows only ``part`` of the slide ``like``.

    Raises:
        SlideError: its sides are in another proportion than the part's, or the part is not on the slide.
    """
    placed = placement_of(like)
    y0, y1, x0, x1 = part
    high, wide = placed.size
    if not (0 <= y0 < y1 and 0 <= x0 < x1 and y1 <= high + 1 and x1 <= wide + 1):
        cause = f"shows x {float(x0):.0f} to {float(x1):.0f}, y {float(y0):.0f} to {float(y1):.0f}"
        raise SlideError(
            stored.name, f"{cause}, beyond {like.name} ({wide} x {high} pixels)", "give the prediction of this slide"
        )
    _, h, w = stored.shape
    scale_y, scale_x = (y1 - y0) / h, (x1 - x0) / w
    if abs(scale_y / scale_x - 1) > SLACK + Fraction(2, min(h, w)):
        cause = f"is {h} x {w} pixels, which is not {float(y1 - y0):.0f} x {float(x1 - x0):.0f} at another scale"
        raise SlideError(stored.name, cause, "give the region that was predicted")
    mask = StoredMask.of(
        stored,
        like,
        Placement(
            (h, w),  # in pixels as they are stored
            Axis((placed.rows.start - y0) / scale_y, placed.rows.step / scale_y),
            Axis((placed.cols.start - x0) / scale_x, placed.cols.step / scale_x),
        ),
    )
    return PartMask(mask, part, (max(1, round(high / scale_y)), max(1, round(wide / scale_x))))


def _within(axis: Axis, low: Fraction, high: Fraction, first: int, last: int) -> tuple[int, int]:
    """Of pixels ``first .. last - 1`` those whose centre is at ``low`` or beyond and before ``high``."""
    begin, end = (ceil((at - axis.start) / axis.step - Fraction(1, 2)) for at in (low, high))
    return max(first, begin), min(last, end)

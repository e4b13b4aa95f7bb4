"""Drops small pieces of a mask and fills its small holes, whatever the mask's size: by outlines, band by band.

The mask is traced once (``trace``), which leaves out the rings that are too small; then it is painted anew from the
rings that remain. A pixel is painted where the rings wind around it more than not: outer rings count one, holes take
one away, so that a piece within a hole that was filled changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from wholegrad.slide.loops import wind
from wholegrad.slide.trace import Rings, Tracer

Labels = npt.NDArray[np.uint8]


def tidied(bands: Iterable[Labels], width: int, min_area: float, min_hole: float) -> Painting:
    """A mask ``(H, W)`` of 0 and 1, given in bands, without pieces and holes that are smaller than so many pixels.

    A piece's size is that of all that its outer outline encloses.

    Raises:
        ShapeError: a band of another width or dtype.
    """
    tracer, height = Tracer(width, min_area, min_hole), 0
    for band in bands:
        tracer.add(band)
        height += len(band)
    return Painting(tracer.finish(), (height, width))


class Painting:
    """A mask ``(H, W)`` of 0 and 1 as its rings; holds the rings only."""

    def __init__(self, rings: Rings, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._edges = _vertical_edges(rings)

    def rows(self, y0: int, y1: int) -> Labels:
        """Rows ``y0 .. y1 - 1``, ``(y1 - y0, W)``."""
        out = np.zeros((y1 - y0, self.shape[1]), np.uint8)
        x, top, bottom, turn = self._edges
        last = int(np.searchsorted(top, y1, side="left"))
        meets = np.flatnonzero(bottom[:last] > y0)
        wind(x[meets], np.maximum(top[meets], y0) - y0, np.minimum(bottom[meets], y1) - y0, turn[meets], out)
        return out

    def bands(self, height: int) -> Iterator[tuple[int, Labels]]:
        """All rows, ``height`` at once, each with its first."""
        for y0 in range(0, self.shape[0], height):
            yield y0, self.rows(y0, min(y0 + height, self.shape[0]))


def _vertical_edges(rings: Rings) -> tuple[npt.NDArray[np.int32], ...]:
    """Of each vertical side: column, first row, last row + 1, and 1 where the inside begins or -1 where it ends."""
    following = np.arange(1, len(rings.xy) + 1)
    ends = rings.starts[1:] - 1
    following[ends] = rings.starts[:-1]
    (x, y), below = rings.xy.T, rings.xy[following, 1]
    upright = np.flatnonzero(y != below)
    # a label lies to the right as seen on the screen: up along its left side
    order = upright[np.argsort(np.minimum(y, below)[upright], kind="stable")]
    turn = np.where(below[order] < y[order], 1, -1).astype(np.int32)
    return x[order], np.minimum(y, below)[order], np.maximum(y, below)[order], turn

"""How far two outlines lie apart: boundary F1, Hausdorff-95 and mean surface distance, in um, in bounded memory.

Boundary F1 (Csurka et al., BMVC 2013) is the harmonic mean of the shares of each boundary that lie within the tolerance
of the other. Hausdorff-95 is the larger of the two 95th percentiles of the distances from one to the other. Distances
are between pixel centres; ``edges`` says what a boundary is.

Where neither map has the class: F1 is 1, distances 0. Where one has: F1 is 0, distances are None.

A band of rows needs the nearest boundary pixel of each column above it, which a pass downward knows, and below it,
which only a pass upward does. That pass goes first, and keeps what it knew at every so many bands; the pass downward
begins there to learn the rest again, for one group of bands at a time:

    upward    bands 8 7 6 | 5 4 3 | 2 1 0     kept at each |
    downward  group 0 1 2: upward from its | once more, all kept; then 0, 1, 2 are measured. Then 3 4 5, 6 7 8.

So both maps are read three times, and what is kept grows with the square root of their height.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wholegrad.metrics.edges import NONE, Array, Band, Bands, Columns
from wholegrad.metrics.nearest import Counted
from wholegrad.slide.reader import MapReader

BAND_BYTES = 8 << 20  # pixels of a band


@dataclass(frozen=True)
class Distances:
    """Of one class: F1 within the tolerance, Hausdorff-95 and mean surface distance, um."""

    f1: float
    hausdorff95: float | None
    mean: float | None


class Boundaries:
    """The boundaries of two label maps ``(1, H, W)`` of one size.

    Args:
        on_band: told each band's predicted and true labels ``(h, W)`` once, in the first pass.
    """

    def __init__(self, predicted: MapReader, true: MapReader, on_band: Callable[[Array, Array], None]) -> None:
        self._width = true.shape[2]
        self._bands = Bands(predicted, true, max(16, BAND_BYTES // self._width))
        self._group = math.isqrt(max(len(self._bands) - 1, 0)) + 1
        self._counts = np.zeros((2, 256), np.int64)  # boundary pixels of each label
        self._kept: dict[int, Columns] = {}  # what is below each group
        below = Columns(self._width, NONE)
        for number, band in self._bands.backwards():
            if number == len(self._bands) - 1 or (number + 1) % self._group == 0:
                self._kept[number // self._group] = below.copy()
            on_band(band.predicted, band.true)
            self._counts += [np.bincount(edges.ravel(), minlength=256) for edges in band.edges]
            below.meet(band, upward=True)
        self._counts[:, 0] = 0  # no boundary, not that of a label

    def distances(self, labels: tuple[int, ...], tolerance: float, mpp: float) -> dict[int, Distances]:
        """Compare the boundaries of each label.

        Args:
            tolerance: um; as near as this counts as right.
            mpp: um a pixel.
        """
        reach = min(int((tolerance * (1 + 1e-9) / mpp) ** 2), 2**62)  # the tolerance but for rounding is within it
        counted = {k: (Counted(reach), Counted(reach)) for k in labels if self._counts[:, k].all()}
        if counted:
            self._measure(counted)
        return {k: _result(*counted[k], mpp) if k in counted else self._without(k) for k in labels}

    def _measure(self, counted: dict[int, tuple[Counted, Counted]]) -> None:
        above = Columns(self._width, -NONE)
        for first in range(0, len(self._bands), self._group):
            last, below = min(first + self._group, len(self._bands)), self._kept[first // self._group].copy()
            under: dict[int, Columns] = {last - 1: below.copy()}
            for number, band in self._bands.backwards(first + 1, last):
                below.meet(band, upward=True)
                under[number - 1] = below.copy()
            for number in range(first, last):
                band = self._bands[number]
                for label, pair in counted.items():
                    _measure_band(band, label, above, under[number], pair)
                above.meet(band, upward=False)

    def _without(self, label: int) -> Distances:
        return Distances(0.0, None, None) if self._counts[:, label].any() else Distances(1.0, 0.0, 0.0)


def _measure_band(band: Band, label: int, above: Columns, below: Columns, counted: tuple[Counted, Counted]) -> None:
    for which in range(2):
        asked, others = band.edges[which], band.edges[1 - which]
        if (asked == label).any():
            upper, lower = above.of(label, 1 - which), below.of(label, 1 - which)
            counted[which].measure(asked, others, label, band.top, upper, lower)


def _result(there: Counted, back: Counted, mpp: float) -> Distances:
    precision, recall = there.within, back.within
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    worst = max(there.percentile(95), back.percentile(95)) * mpp
    return Distances(f1, worst, (there.total + back.total) * mpp / (there.count + back.count))

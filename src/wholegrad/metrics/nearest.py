"""How far each boundary pixel of a band is from the nearest one of another boundary, wherever on the map that is.

Exact, whatever the distance, after Meijster, Roerdink and Hesselink, "A general algorithm for computing distance
transforms in linear time" (2000): a column needs only its nearest pixels above and below a row, and the nearest of all
is the least of ``(x - x')**2 + rows(x')**2`` over columns ``x'``. Squared distances are whole numbers, so that they are
counted and nothing is rounded.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
EXACT = 512  # pixels up to which every distance is counted by itself
OCTAVES, PARTS = 12, 1 << 14  # farther ones are counted in so many parts of each doubling
PATIENCE = 8  # columns looked at, in widths of the map, after which a row's distances are found all at once


class Counted:
    """How often each distance, in pixels, was met.

    Attributes:
        count: of all; ``within``: of those that are at most ``reach`` (squared, pixels).
    """

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._near = np.zeros(EXACT**2 + 1, np.int64)  # by squared distance
        self._far = np.zeros(OCTAVES * PARTS, np.int64)
        self._sums = np.zeros(2, np.float64)  # how many are within reach; the sum of far distances

    def measure(self, asked: Array, others: Array, label: int, top: int, above: Array, below: Array) -> None:
        """Count the distances of the boundary pixels of a band.

        Args:
            asked: boundary labels ``(h, W)`` of the map whose pixels are asked for.
            others: those of the map to which distances are.
            top: the band's first row.
            above, below: row of the nearest pixel of ``others`` above and below the band, ``(W,)`` of int32.
        """
        _measure(asked, others, label, top, above.copy(), below, self._reach, self._near, self._far, self._sums)

    @property
    def count(self) -> int:
        return int(self._near.sum() + self._far.sum())

    @property
    def within(self) -> float:
        """The share that is within reach."""
        return float(self._sums[0]) / self.count

    @property
    def total(self) -> float:
        """The sum of all, pixels."""
        return float(self._near @ np.sqrt(np.arange(len(self._near)))) + float(self._sums[1])

    def percentile(self, percent: float) -> float:
        """As NumPy has it, pixels; beyond ``EXACT`` to one part in 47 000."""
        at = percent / 100 * (self.count - 1)
        low, high = self._ranked(int(at)), self._ranked(min(int(at) + 1, self.count - 1))
        return low + (high - low) * (at - int(at))

    def _ranked(self, rank: int) -> float:
        near = np.cumsum(self._near)
        if rank < near[-1]:
            return float(np.sqrt(np.searchsorted(near, rank, side="right")))
        part = float(np.searchsorted(np.cumsum(self._far), rank - near[-1], side="right"))
        return float(EXACT * 2 ** ((part + 0.5) / PARTS))


@numba.njit(cache=True)
def _measure(asked, others, label, top, above, below, reach, near, far, sums):  # type: ignore[no-untyped-def]
    height, width = asked.shape
    under = np.empty((height, width), np.int32)
    current = below.copy()
    for y in range(height - 1, -1, -1):
        for x in range(width):
            if others[y, x] == label:
                current[x] = top + y
            under[y, x] = current[x]
    whole, sites, starts = np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int64)
    for y in range(height):
        row, looked, known = top + y, 0, False
        for x in range(width):
            if others[y, x] == label:
                above[x] = row
        for x in range(width):
            if asked[y, x] != label:
                continue
            if not known and looked > PATIENCE * width:
                _whole_row(above, under[y], row, whole, sites, starts)
                known = True
            if known:
                squared = whole[x]
            else:
                squared, steps = _outward(above, under[y], row, x)
                looked += steps
            sums[0] += squared <= reach
            if squared <= EXACT * EXACT:
                near[squared] += 1
            else:
                distance = np.sqrt(squared)
                far[min(int(np.log2(distance / EXACT) * PARTS), len(far) - 1)] += 1
                sums[1] += distance


@numba.njit(inline="always")
def _rows(above, under, row, x):  # type: ignore[no-untyped-def]
    """Rows to the nearest pixel in column ``x``."""
    return np.int64(min(row - above[x], under[x] - row))


@numba.njit(cache=True)
def _outward(above, under, row, x):  # type: ignore[no-untyped-def]
    """The least squared distance from column ``x``, column by column outward, and how many steps that took."""
    best, k = _rows(above, under, row, x) ** 2, np.int64(1)
    while k * k < best and (k <= x or x + k < len(above)):
        if k <= x:
            best = min(best, _rows(above, under, row, x - k) ** 2 + k * k)
        if x + k < len(above):
            best = min(best, _rows(above, under, row, x + k) ** 2 + k * k)
        k += 1
    return best, k


@numba.njit(cache=True)
def _whole_row(above, under, row, out, sites, starts):  # type: ignore[no-untyped-def]
    """The least squared distances of all columns: the lower envelope of a parabola a column, in whole numbers."""
    width, last = len(above), 0
    sites[0], starts[0] = 0, 0
    for u in range(1, width):
        height = _rows(above, under, row, u) ** 2
        while last >= 0:
            i, t = sites[last], starts[last]
            if (t - i) ** 2 + _rows(above, under, row, i) ** 2 <= (t - u) ** 2 + height:
                break
            last -= 1
        if last < 0:
            last, sites[0] = 0, u
            continue
        i = sites[last]
        start = 1 + (u * u - i * i + height - _rows(above, under, row, i) ** 2) // (2 * (u - i))
        if start < width:
            last += 1
            sites[last], starts[last] = u, start
    for x in range(width - 1, -1, -1):
        i = sites[last]
        out[x] = (x - i) ** 2 + _rows(above, under, row, i) ** 2
        if x == starts[last]:
            last -= 1

"""How far two outlines lie apart: boundary F1, Hausdorff-95 and mean surface distance, in um.

A class's boundary is its pixels that have a neighbour (above, below, left, right) of another label or beyond the map's
edge; a neighbour that the truth says to ignore makes no boundary, and ignored pixels are none. These are the edges that
MONAI and SciPy take (mask minus its erosion). They are gathered band by band, and distances between pixel centres are
found with a k-d tree, so that memory follows the length of the outlines and not the area.

Boundary F1 (Csurka et al., BMVC 2013) is the harmonic mean of the shares of each boundary that lie within the tolerance
of the other. Hausdorff-95 is the larger of the two 95th percentiles of the distances from one to the other.

Where neither map has the class: F1 is 1, distances 0. Where one has: F1 is 0, distances are None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from wholegrad.metrics.counts import IGNORE

Array = npt.NDArray[Any]
QUERY = 1 << 20  # points asked for at once


@dataclass(frozen=True)
class Distances:
    """Of one class: F1 within the tolerance, Hausdorff-95 and mean surface distance, um."""

    f1: float
    hausdorff95: float | None
    mean: float | None


class Edges:
    """Boundary pixels of every label of a map and of the truth, gathered from bands ``(h, W)`` top to bottom."""

    def __init__(self, width: int) -> None:
        self._held = np.zeros((2, 2, width), np.uint8)  # the last two rows of predicted and true
        self._y = -1  # row number of the last of them
        self._found: tuple[list[Array], list[Array]] = ([], [])

    def add(self, predicted: Array, true: Array) -> None:
        """Take the next rows."""
        rows = [np.concatenate([held, band]) for held, band in zip(self._held, (predicted, true), strict=True)]
        self._gather(rows, 2 if self._y < 0 else 1, False)
        self._held = np.stack([both[-2:] for both in rows])
        self._y += len(true)

    def finish(self) -> None:
        """The last row has no next one."""
        if self._y >= 0:
            self._gather([np.concatenate([held, held[-1:]]) for held in self._held], 1, True)

    def _gather(self, rows: list[Array], first: int, last: bool) -> None:
        """Boundary pixels of rows ``first`` to the last but one; the row above is outside if it is the map's first."""
        y0 = self._y - 1  # the number of rows[0]
        for which in range(2):
            found = _edges(rows[which], rows[1], first, y0, last)
            if len(found):
                self._found[which].append(found)

    def of(self, label: int) -> tuple[Array, Array]:
        """Boundary pixels ``(n, 2)``, y and x, of a label in the predicted and the true map."""
        return self._points(0, label), self._points(1, label)

    def _points(self, which: int, label: int) -> Array:
        parts = [part[part[:, 0] == label, 1:] for part in self._found[which]]
        return np.concatenate(parts) if parts else np.zeros((0, 2), np.int32)


def distances(predicted: Array, true: Array, tolerance: float, mpp: float) -> Distances:
    """Compare two boundaries ``(n, 2)`` of pixels.

    Args:
        tolerance: um; as near as this counts as right.
        mpp: um a pixel.
    """
    if not len(predicted) and not len(true):
        return Distances(1.0, 0.0, 0.0)
    if not len(predicted) or not len(true):
        return Distances(0.0, None, None)
    there, back = _nearest(predicted, true) * mpp, _nearest(true, predicted) * mpp
    near = tolerance * (1 + 1e-9)  # a distance that is the tolerance but for rounding is within it
    precision, recall = float((there <= near).mean()), float((back <= near).mean())
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    worst = max(float(np.percentile(there, 95)), float(np.percentile(back, 95)))
    return Distances(f1, worst, float((there.sum() + back.sum()) / (len(there) + len(back))))


def _nearest(points: Array, others: Array) -> npt.NDArray[np.float64]:
    """For each point how far the nearest of the others is, pixels."""
    tree = cKDTree(others.astype(np.float64))
    parts = [tree.query(points[i : i + QUERY].astype(np.float64))[0] for i in range(0, len(points), QUERY)]
    return np.concatenate(parts)


@numba.njit(cache=True)
def _is_edge(rows, true, y, x, top, bottom):  # type: ignore[no-untyped-def]
    label = rows[y, x]
    for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        if (dy < 0 and top) or (dy > 0 and bottom) or not 0 <= x + dx < rows.shape[1]:
            return True
        if rows[y + dy, x + dx] != label and true[y + dy, x + dx] != IGNORE:
            return True
    return False


@numba.njit(cache=True)
def _edges(rows, true, first, y0, last):  # type: ignore[no-untyped-def]
    """Label, y and x of boundary pixels in rows ``first`` to the last but one; ``last``: that one is the map's last."""
    found = np.empty((1024, 3), np.int32)
    n = 0
    for y in range(first, rows.shape[0] - 1):
        top, bottom = y0 + y == 0, last and y == rows.shape[0] - 2
        for x in range(rows.shape[1]):
            if rows[y, x] == 0 or true[y, x] == IGNORE:
                continue
            if _is_edge(rows, true, y, x, top, bottom):
                if n == len(found):
                    longer = np.empty((2 * n, 3), np.int32)
                    longer[:n] = found
                    found = longer
                found[n, 0], found[n, 1], found[n, 2] = rows[y, x], y0 + y, x
                n += 1
    return found[:n].copy()

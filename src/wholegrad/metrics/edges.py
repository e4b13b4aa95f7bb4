"""Boundary pixels of two label maps, band by band, and what a column remembers of those above and below a band.

A class's boundary is its pixels that have a neighbour (above, below, left, right) of another label or beyond the map's
edge; a neighbour that the truth says to ignore makes no boundary, and ignored pixels are none. These are the edges that
MONAI and SciPy take (mask minus its erosion).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.metrics.counts import IGNORE
from wholegrad.slide.reader import MapReader

Array = npt.NDArray[Any]
NONE = 1 << 29  # as far as no row is, in either direction


@dataclass(frozen=True)
class Band:
    """Some rows of both maps, from row ``top`` on.

    Attributes:
        predicted, true: labels ``(h, W)``.
        edges: ``(2, h, W)``, predicted and true: the label where a boundary pixel is, else 0.
    """

    top: int
    predicted: Array
    true: Array
    edges: Array


class Bands:
    """Two maps ``(1, H, W)`` in bands of ``rows`` rows, read anew each time a band is asked for."""

    def __init__(self, predicted: MapReader, true: MapReader, rows: int) -> None:
        self._maps = predicted, true
        _, self._height, self.width = true.shape
        self._tops = list(range(0, self._height, rows))
        self._rows = rows

    def __len__(self) -> int:
        return len(self._tops)

    def __getitem__(self, number: int) -> Band:
        top, bottom = self._tops[number], min(self._tops[number] + self._rows, self._height)
        box = Box(max(top - 1, 0), min(bottom + 1, self._height), 0, self.width)
        predicted, true = (np.ascontiguousarray(each.read(box)[0]) for each in self._maps)
        inner = slice(top - box.y0, bottom - box.y0)
        edges = np.stack([edge_map(labels, true, inner.start, inner.stop) for labels in (predicted, true)])
        return Band(top, predicted[inner], true[inner], edges)

    def backwards(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Band]]:
        """Numbers and bands, from the last to the first."""
        for number in range((len(self) if last is None else last) - 1, first - 1, -1):
            yield number, self[number]


class Columns:
    """Of each label, map and column the row of the boundary pixel that was met last.

    Attributes:
        rows: ``(n, 2, W)`` of int32, for the ``n`` labels met so far; ``slot`` says which is whose.
    """

    def __init__(self, width: int, none: int) -> None:
        self.slot, self._none = np.full(256, -1, np.int32), none
        self.rows = np.empty((0, 2, width), np.int32)

    def copy(self) -> Columns:
        other = Columns.__new__(Columns)
        other.slot, other._none, other.rows = self.slot.copy(), self._none, self.rows.copy()
        return other

    def of(self, label: int, which: int) -> Array:
        """Rows ``(W,)`` of a label's boundary in one of the maps."""
        slot = int(self.slot[label])
        return self.rows[slot, which] if slot >= 0 else np.full(self.rows.shape[2], self._none, np.int32)

    def meet(self, band: Band, upward: bool) -> None:
        """Take over a band's boundary pixels, row after row downward or upward."""
        new = [k for k in np.flatnonzero(np.bincount(band.edges.ravel(), minlength=256)[1:]) + 1 if self.slot[k] < 0]
        if new:
            self.slot[new] = np.arange(len(self.rows), len(self.rows) + len(new))
            more = np.full((len(new), *self.rows.shape[1:]), self._none, np.int32)
            self.rows = np.concatenate([self.rows, more])
        _meet(band.edges, band.top, upward, self.slot, self.rows)


@numba.njit(cache=True)
def edge_map(labels, true, first, stop):  # type: ignore[no-untyped-def]
    """Labels of boundary pixels in rows ``first`` to ``stop - 1``; beyond the rows given is beyond the map."""
    height, width = labels.shape
    found = np.zeros((stop - first, width), np.uint8)
    for y in range(first, stop):
        for x in range(width):
            label = labels[y, x]
            if label == 0 or true[y, x] == IGNORE:
                continue
            for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                v, u = y + dy, x + dx
                if not (0 <= v < height and 0 <= u < width) or (labels[v, u] != label and true[v, u] != IGNORE):
                    found[y - first, x] = label
                    break
    return found


@numba.njit(cache=True)
def _meet(edges, top, upward, slot, rows):  # type: ignore[no-untyped-def]
    height, width = edges.shape[1:]
    for which in range(2):
        for i in range(height):
            y = height - 1 - i if upward else i
            for x in range(width):
                if edges[which, y, x]:
                    rows[slot[edges[which, y, x]], which, x] = top + y

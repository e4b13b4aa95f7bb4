"""Rasterises outlines by box, when a tile asks (rule 9): no label map of the slide ever exists.

A pixel belongs to an area if its centre does, by the even-odd rule over all rings of the area. An edge from
``(x0, y0)`` down to ``(x1, y1)`` counts for rows whose centre has ``y0 <= y < y1``, and toggles from the first column
whose centre is not left of the crossing. Both depend on the edge and on the pixel's place on the map alone, so every
tiling gives the same labels, and areas that share an edge leave neither gap nor overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry.base import BaseGeometry

from wholegrad.graph.geometry import Box
from wholegrad.slide import loops
from wholegrad.slide.buffers import ReusedBuffer
from wholegrad.slide.outlines_read import Outline
from wholegrad.slide.placement import Axis, Placement

Labels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


class Drawing:
    """Areas with labels, to be painted in order on any map of their slide. Thread-safe.

    Args:
        name: of the file, for messages.
        painted: ``(label, outline)``; where areas overlap, the later wins.
        origin: ``(x, y)`` in level-0 pixels that the outlines count from.

    Attributes:
        bounds: of all outlines, ``(left, top, right, bottom)`` in level-0 pixels; all zero without outlines.
        count: of outlines.
        nbytes: held.
    """

    def __init__(
        self, name: str, painted: Sequence[tuple[int, Outline]], origin: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self.name, self.count = name, len(painted)
        self._labels = [label for label, _ in painted]
        shift = np.array([*origin, *origin], np.float64)
        self._edges = [_edges_of(outline.area) + shift for _, outline in painted]
        self._bounds = np.array([outline.area.bounds for _, outline in painted], np.float64).reshape(-1, 4) + shift
        low, high = self._bounds.min(axis=0, initial=np.inf), self._bounds.max(axis=0, initial=-np.inf)
        ends = (low[0], low[1], high[2], high[3]) if painted else (0.0, 0.0, 0.0, 0.0)
        self.bounds = tuple(float(end) for end in ends)
        self._tree = shapely.STRtree(shapely.box(*self._bounds.T))
        self._flips = ReusedBuffer()
        self.nbytes = sum(edges.nbytes for edges in self._edges) + 512 * len(self._edges)

    def paint(self, box: Box, placement: Placement, out: Labels) -> None:
        """Fill ``out`` ``(h, w)`` with the labels of a box of a map that lies at ``placement``."""
        out[...] = 0
        rows, cols = placement.rows, placement.cols
        ys, xs = rows.centres(box.y0, box.y1), cols.centres(box.x0, box.x1)
        for number in np.sort(self._tree.query(shapely.box(xs[0], ys[0], xs[-1], ys[-1]))).tolist():
            left, top, right, bottom = self._bounds[number].tolist()
            y0, y1 = np.searchsorted(ys, (top, bottom), side="left").tolist()
            x0, x1 = int(np.searchsorted(xs, left)), int(np.searchsorted(xs, right, side="right"))
            if y0 >= y1 or x0 >= x1:
                continue
            flips = self._flips.take((y1 - y0, x1 - x0 + 1)).view(np.uint8)
            flips[...] = 0
            start, step = _floats(cols)
            loops.toggle(self._edges[number], ys[y0:y1], start, step, box.x0 + x0, flips)
            loops.paint(flips, self._labels[number], out[y0:y1, x0:x1])


def _floats(axis: Axis) -> tuple[float, float]:
    return float(axis.start + axis.step / 2), float(axis.step)


def _edges_of(area: BaseGeometry) -> Floats:
    """All edges of an area but the level ones, ``(n, 4)``: upper x, y, lower x, y."""
    rings = shapely.get_rings(shapely.get_parts(area))
    found = []
    for ring in rings:
        points = shapely.get_coordinates(ring)
        edges = np.concatenate([points[:-1], points[1:]], axis=1)
        upward = edges[:, 1] > edges[:, 3]
        edges[upward] = edges[upward][:, [2, 3, 0, 1]]
        found.append(edges[edges[:, 1] != edges[:, 3]])
    return np.ascontiguousarray(np.concatenate(found)) if found else np.empty((0, 4))

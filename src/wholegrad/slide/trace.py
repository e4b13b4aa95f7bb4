"""Traces the outlines of a label map that comes in bands of rows: exact rings along pixel edges, in linear time.

Between two rows lies a line of vertices. Where rows differ, outlines turn, begin or end:

    row y-1   a | b       an outline of label k passes a vertex if k is among a, b, c, d and not all of them;
    ----------- + ---     it runs with k on its right hand as seen on the screen: down along k's right side, left along
    row y     c | d       its underside, up along its left side, right along its top

Open chains hang from the vertical edges that cross the line (``left`` and ``right`` of them hold a label each), and two
are joined where one's head meets the other's tail; a chain that meets itself is a ring. Pixels that touch at a corner
only are taken as apart (4-neighbours), and a ring that touches itself at such a corner is cut there, so that every ring
is simple: outer ones have positive area (x right, y down), holes negative. Rings of one connected piece share a root
of a union-find over the chains: both ends of a run of pixels belong to one piece.

Held are the open chains and the rings wanted, not the map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ShapeError
from wholegrad.slide.trace_lines import (
    CLOSED,
    END_FREE,
    END_TOP,
    FREE,
    N_CLOSED,
    N_END_FREE,
    N_FREE,
    NODES,
    TOP,
    extract,
    find_all,
    measure,
    trace,
)  # fmt: skip

Ints = npt.NDArray[np.int32]
Array = npt.NDArray[Any]

_ROWS = 256  # rows at once


class Rings(NamedTuple):
    """Simple closed rings: ring ``i`` is ``xy[starts[i]:starts[i + 1]]``, corners only, the first not repeated.

    Attributes:
        xy: int32 ``(n, 2)``, pixels; (0, 0) is the top left corner of the map's first pixel.
        starts: int64 ``(rings + 1,)``.
        labels: uint8; whose outline it is.
        pieces: int32; the same number for all rings of one connected piece.
        areas: int64, pixels; positive for outer rings, negative for holes.
    """

    xy: Ints
    starts: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint8]
    pieces: Ints
    areas: npt.NDArray[np.int64]


class Tracer:
    """Outlines of a label map ``(H, W)`` given in bands; label 0 has none.

    Args:
        width: of the map, pixels.
        min_area: outer rings that enclose fewer pixels are dropped, with the holes in them.
        min_hole: holes of fewer pixels are dropped (so that they are filled).
    """

    def __init__(self, width: int, min_area: float = 0, min_hole: float = 0) -> None:
        self.width = width
        self._limits = (float(min_area), float(min_hole))
        self._rows = np.zeros((_ROWS + 1, (width // 8 + 1) * 8), np.uint8)  # the last column of all is background
        self._y = 0
        self._left, self._right = (np.full(width + 1, -1, np.int32) for _ in "lr")
        self._room = 4 * (width + 1)  # most vertices, ends or rings that one line of vertices makes
        self._vertices = np.zeros((self._room, 4), np.int32)  # x, y, next, whether pixels touch at a corner here
        self._ends = np.full((self._room, 3), -1, np.int32)  # vertex, partner at the chain's other end, node
        self._parents = np.zeros(self._room, np.int32)
        self._closed = np.zeros((CLOSED + self._room, 3), np.int32)  # a vertex of the ring, label, node
        self._counters = np.zeros(8, np.int64)
        self._counters[[FREE, END_FREE]] = -1
        self._compact_at = 1 << 22
        self._kept: list[Rings] = []

    @property
    def held_bytes(self) -> int:
        """Bytes of chains and rings held now."""
        own = (self._rows, self._vertices, self._ends, self._parents, self._closed, self._left, self._right)
        return sum(a.nbytes for a in own) + sum(a.nbytes for rings in self._kept for a in rings)

    def add(self, rows: Array) -> None:
        """Take the next rows ``(h, W)``, uint8.

        Raises:
            ShapeError: another width or dtype.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width or rows.dtype != np.uint8:
            cause = f"rows of shape {rows.shape}, {rows.dtype}"
            raise ShapeError("outlines", cause, f"give labels (h, {self.width}) as uint8")
        for top in range(0, len(rows), _ROWS):
            part = rows[top : top + _ROWS]
            self._rows[1 : 1 + len(part), : self.width] = part
            self._advance(len(part))

    def finish(self) -> Rings:
        """All rings wanted, when no more rows come."""
        self._rows[1] = 0
        self._advance(1)
        self._collect()
        kept, self._kept = self._kept or [_nothing()], []
        pieces = np.concatenate([rings.pieces for rings in kept])
        find_all(self._parents, pieces)
        labels, areas = (np.concatenate([getattr(rings, name) for rings in kept]) for name in ("labels", "areas"))
        lengths = np.concatenate([np.diff(rings.starts) for rings in kept])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        xy, end = np.empty((int(starts[-1]), 2), np.int32), int(starts[-1])
        while kept:  # from the last, each given up once copied: outlines are never held twice
            part = kept.pop().xy
            xy[end - len(part) : end] = part
            end -= len(part)
        return Rings(xy, starts, labels, pieces, areas)

    def _advance(self, count: int) -> None:
        row = 1
        while row <= count:
            self._make_room()
            state = (self._left, self._right, self._vertices, self._ends, self._parents, self._closed, self._counters)
            row = trace(self._rows, self._rows.view(np.uint64), row, count, self._y, self._room, *state)
            if row <= count and self._counters[N_CLOSED] >= CLOSED:
                self._collect()
        self._y += count
        self._rows[0] = self._rows[count]
        self._collect()

    def _make_room(self) -> None:
        counters = self._counters
        if len(self._vertices) - counters[TOP] + counters[N_FREE] < self._room:
            self._vertices = _longer(self._vertices, self._room)
        if len(self._ends) - counters[END_TOP] + counters[N_END_FREE] < self._room:
            self._ends = _longer(self._ends, self._room)
        if counters[NODES] > self._compact_at:
            self._compact()
        if len(self._parents) - counters[NODES] < self._room:
            self._parents = _longer(self._parents, self._room)

    def _compact(self) -> None:
        """Number anew the pieces still spoken of; a map full of specks would else fill memory with old ones."""
        self._collect()
        open_ends = self._ends[:, 1] >= 0
        spoken = [self._ends[open_ends, 2].copy(), *(rings.pieces for rings in self._kept)]
        for nodes in spoken:
            find_all(self._parents, nodes)
        roots = np.unique(np.concatenate(spoken))
        self._ends[open_ends, 2] = np.searchsorted(roots, spoken[0])
        for nodes in spoken[1:]:
            nodes[:] = np.searchsorted(roots, nodes)
        self._parents[: len(roots)] = np.arange(len(roots))
        self._counters[NODES] = len(roots)
        self._compact_at = max(1 << 22, 2 * len(roots))

    def _collect(self) -> None:
        """Take the closed rings out of the chains; keep those wanted."""
        count = int(self._counters[N_CLOSED])
        if not count:
            return
        closed, self._counters[N_CLOSED] = self._closed[:count], 0
        total, longest = measure(self._vertices, closed)
        rings = 2 * count + total // 4
        out = (np.empty((total, 2), np.int32), np.zeros(rings + 1, np.int64), np.empty((rings, 2), np.int32))
        areas = np.empty(rings, np.int64)
        kept, used = extract(self._vertices, closed, longest, *self._limits, self._counters, *out, areas)
        if kept:
            xy, starts, whose = out
            labels, pieces = whose[:kept, 0].astype(np.uint8), whose[:kept, 1].copy()
            self._kept.append(Rings(xy[:used].copy(), starts[: kept + 1].copy(), labels, pieces, areas[:kept].copy()))


def _nothing() -> Rings:
    none = np.zeros(0, np.int32)
    return Rings(none.reshape(0, 2), np.zeros(1, np.int64), none.astype(np.uint8), none, none.astype(np.int64))


def _longer(array: Ints, room: int) -> Ints:
    longer = np.full((len(array) + max(room, len(array) // 2), *array.shape[1:]), -1, np.int32)
    longer[: len(array)] = array
    return longer

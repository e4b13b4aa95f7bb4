"""Leaves out vertices of outlines on the pixel grid, by at most a tolerance, so that no two lines come to cross.

Douglas and Peucker's rule (1973) ring by ring, and then a repair: wherever two of the remaining lines cross, touch or
lie on each other, both get their farthest vertex back, until none do. Vertices are integers, so the tests are exact.
GEOS's simplifier, which also keeps the topology, takes 20 s for a million vertices with some thousand holes; this
takes about a second, since few lines ever meet.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

ROUNDS = 64  # of repair; each gives vertices back, and none are left to give after a few


def simplify(xy: Ints, starts: npt.NDArray[np.int64], tolerance: float) -> npt.NDArray[np.bool_]:
    """Which vertices of one piece's rings stay.

    Args:
        xy: ``(n, 2)``, ring ``i`` from ``starts[i]`` to ``starts[i + 1]``, each simple and of four vertices or more.
        tolerance: pixels; no vertex left out lies further from the line that replaces it.

    Returns:
        ``(n,)``; four or more of each ring, and all where rings touch.
    """
    keys = (xy[:, 1].astype(np.int64) << 32) + xy[:, 0]
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    kept = np.zeros(len(xy), np.bool_)
    kept[order[same]] = kept[order[same + 1]] = True
    _reduce(xy, starts, float(tolerance) ** 2, kept)
    for _ in range(ROUNDS):
        lines = _lines(starts, kept)
        crossing = _crossing(xy, lines, *_grid(xy, lines))
        if not crossing.any() or not _give_back(xy, starts, lines[crossing], kept):
            return kept
    return np.ones(len(xy), np.bool_)


def _grid(xy: Ints, lines: Ints) -> tuple[int, int, int, int, int]:
    """Origin, cell edge and size of a grid with about as many cells as there are lines, or fewer."""
    low, high = xy.min(axis=0).astype(np.int64), xy.max(axis=0).astype(np.int64) + 1
    area = float((high[0] - low[0]) * (high[1] - low[1]))
    cell = max(2, int(np.ceil(np.sqrt(area / (2 * len(lines))))))
    columns, rows = (int(size) // cell + 1 for size in high - low)
    return int(low[0]), int(low[1]), cell, columns, rows


@numba.njit(cache=True)
def _farthest(xy, start, stop, p, q, steps):  # type: ignore[no-untyped-def]
    """The vertex between ``p`` and ``q``, ``steps`` on, farthest from the line between them; its squared distance."""
    px, py = np.float64(xy[p, 0]), np.float64(xy[p, 1])
    dx, dy = xy[q, 0] - px, xy[q, 1] - py
    length = dx * dx + dy * dy
    best, most, i = -1, -1.0, p
    for _ in range(steps - 1):
        i = i + 1 if i + 1 < stop else start
        x, y = xy[i, 0] - px, xy[i, 1] - py
        along = 0.0 if length == 0 else min(1.0, max(0.0, (x * dx + y * dy) / length))
        x, y = x - along * dx, y - along * dy
        away = x * x + y * y
        if away > most:
            best, most = i, away
    return best, most


@numba.njit(cache=True)
def _steps(start, stop, p, q):  # type: ignore[no-untyped-def]
    """How many vertices on from ``p`` the vertex ``q`` is; once around the ring if they are the same."""
    return q - p if q > p else q - p + stop - start


@numba.njit(cache=True)
def _reduce(xy, starts, limit, kept):  # type: ignore[no-untyped-def]
    """Douglas and Peucker between the vertices that are kept already, or once around from the first."""
    for ring in range(len(starts) - 1):
        start, stop = starts[ring], starts[ring + 1]
        first = start
        while first < stop and not kept[first]:
            first += 1
        if first == stop:
            first = start
            kept[first] = True
        stack = [(first, first)]
        stack.pop()
        p = first
        for offset in range(1, stop - start + 1):
            q = first + offset
            q = q if q < stop else q - (stop - start)
            if kept[q]:
                stack.append((p, q))
                p = q
        while len(stack):
            p, q = stack.pop()
            middle, away = _farthest(xy, start, stop, p, q, _steps(start, stop, p, q))
            if middle >= 0 and away > limit:
                kept[middle] = True
                stack.append((p, middle))
                stack.append((middle, q))
        _at_least_four(xy, start, stop, kept)


@numba.njit(cache=True)
def _at_least_four(xy, start, stop, kept):  # type: ignore[no-untyped-def]
    """A ring keeps its inside: where fewer than four vertices are left, the farthest come back."""
    while True:
        count, p = 0, start
        for i in range(start, stop):
            if kept[i]:
                count, p = count + 1, i
        if count >= 4:
            return
        best, most = -1, -1.0
        for i in range(start, stop):
            if kept[i]:
                middle, away = _farthest(xy, start, stop, p, i, _steps(start, stop, p, i))
                if middle >= 0 and away > most:
                    best, most = middle, away
                p = i
        kept[best] = True


@numba.njit(cache=True)
def _lines(starts, kept):  # type: ignore[no-untyped-def]
    """Ring, first and last vertex of every line left."""
    lines, n = np.empty((kept.sum(), 3), np.int32), 0
    for ring in range(len(starts) - 1):
        begin = n
        for i in range(starts[ring], starts[ring + 1]):
            if kept[i]:
                lines[n, 0], lines[n, 1] = ring, i
                if n > begin:
                    lines[n - 1, 2] = i
                n += 1
        lines[n - 1, 2] = lines[begin, 1]
    return lines


@numba.njit(cache=True)
def _cells(xy, line, left, top, cell, columns, column):  # type: ignore[no-untyped-def]
    """First and last row of the cells of one column that a line passes."""
    x0, y0 = xy[line[1], 0] - left, xy[line[1], 1] - top
    x1, y1 = xy[line[2], 0] - left, xy[line[2], 1] - top
    low, high = min(y0, y1), max(y0, y1)
    if x0 != x1:
        slope = (y1 - y0) / (x1 - x0)
        a, b = y0 + (column * cell - x0) * slope, y0 + ((column + 1) * cell - x0) * slope
        low, high = max(low, min(a, b) - 1e-6), min(high, max(a, b) + 1e-6)
    return int(max(low, 0.0)) // cell, int(max(high, 0.0)) // cell


@numba.njit(cache=True)
def _crossing(xy, lines, left, top, cell, columns, rows):  # type: ignore[no-untyped-def]
    """Which lines meet another one elsewhere than in a common end."""
    counts = np.zeros(columns * rows + 1, np.int64)
    members = np.empty(0, np.int32)
    for fill in (False, True):
        if fill:
            counts[1:] = np.cumsum(counts[1:])
            members = np.empty(counts[-1], np.int32)
        for i in range(len(lines) - 1, -1, -1):
            x0, x1 = xy[lines[i, 1], 0] - left, xy[lines[i, 2], 0] - left
            for column in range(min(x0, x1) // cell, max(x0, x1) // cell + 1):
                low, high = _cells(xy, lines[i], left, top, cell, columns, column)
                for row in range(low, min(high, rows - 1) + 1):
                    place = row * columns + column + 1
                    if fill:
                        counts[place] -= 1
                        members[counts[place]] = i
                    else:
                        counts[place] += 1
    found = np.zeros(len(lines), np.bool_)
    for place in range(1, len(counts)):
        begin = counts[place]
        end = counts[place + 1] if place + 1 < len(counts) else len(members)
        for m in range(begin, end):
            for n in range(m + 1, end):
                i, j = members[m], members[n]
                if not (found[i] and found[j]) and _meet(xy, lines[i, 1], lines[i, 2], lines[j, 1], lines[j, 2]):
                    found[i] = found[j] = True
    return found


@numba.njit(cache=True)
def _turn(xy, p, q, r):  # type: ignore[no-untyped-def]
    """Which side of the line ``p`` to ``q`` the vertex ``r`` is on."""
    ax, ay = np.int64(xy[q, 0]) - xy[p, 0], np.int64(xy[q, 1]) - xy[p, 1]
    bx, by = np.int64(xy[r, 0]) - xy[p, 0], np.int64(xy[r, 1]) - xy[p, 1]
    return np.sign(ax * by - ay * bx)


@numba.njit(cache=True)
def _same(xy, p, q):  # type: ignore[no-untyped-def]
    return xy[p, 0] == xy[q, 0] and xy[p, 1] == xy[q, 1]


@numba.njit(cache=True)
def _meet(xy, a, b, c, d):  # type: ignore[no-untyped-def]
    """Whether the lines a-b and c-d meet elsewhere than in one common end."""
    if _same(xy, a, d) or _same(xy, b, d):
        c, d = d, c
    if _same(xy, b, c):
        a, b = b, a
    if _same(xy, a, c):
        if _turn(xy, a, b, d) != 0:
            return False
        along = (np.int64(xy[b, 0]) - xy[a, 0]) * (np.int64(xy[d, 0]) - xy[a, 0])
        return along + (np.int64(xy[b, 1]) - xy[a, 1]) * (np.int64(xy[d, 1]) - xy[a, 1]) > 0
    for axis in range(2):
        if max(xy[a, axis], xy[b, axis]) < min(xy[c, axis], xy[d, axis]):
            return False
        if max(xy[c, axis], xy[d, axis]) < min(xy[a, axis], xy[b, axis]):
            return False
    return _turn(xy, a, b, c) * _turn(xy, a, b, d) <= 0 and _turn(xy, c, d, a) * _turn(xy, c, d, b) <= 0


@numba.njit(cache=True)
def _give_back(xy, starts, lines, kept):  # type: ignore[no-untyped-def]
    """Put the farthest vertex of each line back; whether there was any."""
    any_left = False
    for i in range(len(lines)):
        ring, p, q = lines[i]
        start, stop = starts[ring], starts[ring + 1]
        middle, _ = _farthest(xy, start, stop, p, q, _steps(start, stop, p, q))
        if middle >= 0:
            kept[middle] = any_left = True
    return any_left

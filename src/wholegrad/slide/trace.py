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

import numba
import numpy as np
import numpy.typing as npt

from wholegrad.errors import ShapeError

Ints = npt.NDArray[np.int32]
Array = npt.NDArray[Any]

_ROWS = 256  # rows at once
_CLOSED = 1 << 16  # rings that may wait for collection
_BROADCAST = np.uint64(0x0101010101010101)

# Fields of the state's counters.
_TOP, _FREE, _N_FREE, _END_TOP, _END_FREE, _N_END_FREE, _NODES, _N_CLOSED = range(8)


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
        self._closed = np.zeros((_CLOSED + self._room, 3), np.int32)  # a vertex of the ring, label, node
        self._counters = np.zeros(8, np.int64)
        self._counters[[_FREE, _END_FREE]] = -1
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
        kept = self._kept or [_nothing()]
        starts = np.cumsum([0, *(len(rings.xy) for rings in kept)])[:-1]
        pieces = np.concatenate([rings.pieces for rings in kept])
        _find_all(self._parents, pieces)
        return Rings(
            np.concatenate([rings.xy for rings in kept]),
            np.concatenate(
                [
                    *(r.starts[:-1] + start for r, start in zip(kept, starts, strict=True)),
                    [sum(len(r.xy) for r in kept)],
                ]
            ),
            np.concatenate([rings.labels for rings in kept]),
            pieces,
            np.concatenate([rings.areas for rings in kept]),
        )

    def _advance(self, count: int) -> None:
        row = 1
        while row <= count:
            self._make_room()
            state = (self._left, self._right, self._vertices, self._ends, self._parents, self._closed, self._counters)
            row = _trace(self._rows, self._rows.view(np.uint64), row, count, self._y, self._room, *state)
            if row <= count and self._counters[_N_CLOSED] >= _CLOSED:
                self._collect()
        self._y += count
        self._rows[0] = self._rows[count]
        self._collect()

    def _make_room(self) -> None:
        counters = self._counters
        if len(self._vertices) - counters[_TOP] + counters[_N_FREE] < self._room:
            self._vertices = _longer(self._vertices, self._room)
        if len(self._ends) - counters[_END_TOP] + counters[_N_END_FREE] < self._room:
            self._ends = _longer(self._ends, self._room)
        if counters[_NODES] > self._compact_at:
            self._compact()
        if len(self._parents) - counters[_NODES] < self._room:
            self._parents = _longer(self._parents, self._room)

    def _compact(self) -> None:
        """Number anew the pieces still spoken of; a map full of specks would else fill memory with old ones."""
        self._collect()
        open_ends = self._ends[:, 1] >= 0
        spoken = [self._ends[open_ends, 2].copy(), *(rings.pieces for rings in self._kept)]
        for nodes in spoken:
            _find_all(self._parents, nodes)
        roots = np.unique(np.concatenate(spoken))
        self._ends[open_ends, 2] = np.searchsorted(roots, spoken[0])
        for nodes in spoken[1:]:
            nodes[:] = np.searchsorted(roots, nodes)
        self._parents[: len(roots)] = np.arange(len(roots))
        self._counters[_NODES] = len(roots)
        self._compact_at = max(1 << 22, 2 * len(roots))

    def _collect(self) -> None:
        """Take the closed rings out of the chains; keep those wanted."""
        count = int(self._counters[_N_CLOSED])
        if not count:
            return
        closed, self._counters[_N_CLOSED] = self._closed[:count], 0
        total, longest = _measure(self._vertices, closed)
        rings = 2 * count + total // 4
        out = (np.empty((total, 2), np.int32), np.zeros(rings + 1, np.int64), np.empty((rings, 2), np.int32))
        areas = np.empty(rings, np.int64)
        kept, used = _extract(self._vertices, closed, longest, *self._limits, self._counters, *out, areas)
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


@numba.njit(cache=True)
def _find(parents, node):  # type: ignore[no-untyped-def]
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@numba.njit(cache=True)
def _find_all(parents, nodes):  # type: ignore[no-untyped-def]
    for i in range(len(nodes)):
        nodes[i] = _find(parents, nodes[i])


@numba.njit(cache=True)
def _unite(parents, one, other):  # type: ignore[no-untyped-def]
    one, other = _find(parents, one), _find(parents, other)
    if one < other:
        parents[other] = one
    elif other < one:
        parents[one] = other


@numba.njit(cache=True)
def _take(table, counters, top, free, spare, link):  # type: ignore[no-untyped-def]
    """A free entry of a table whose free entries are linked through a column."""
    if counters[free] >= 0:
        entry = counters[free]
        counters[free] = table[entry, link]
        counters[spare] -= 1
        return entry
    counters[top] += 1
    return counters[top] - 1


@numba.njit(cache=True)
def _drop_end(ends, counters, end):  # type: ignore[no-untyped-def]
    ends[end, 1] = -1
    ends[end, 0] = counters[_END_FREE]
    counters[_END_FREE] = end
    counters[_N_END_FREE] += 1


@numba.njit(cache=True)
def _corner(x, y, touch, label, head, tail, vertices, ends, parents, closed, counters):  # type: ignore[no-untyped-def]
    """One turn of an outline: join the chain that comes in by its head and the one that goes out from its tail.

    -1 stands for an edge that begins here. Returns what hangs from the edge in and from the edge out, where they do.
    """
    vertex = _take(vertices, counters, _TOP, _FREE, _N_FREE, 2)
    vertices[vertex, 0], vertices[vertex, 1], vertices[vertex, 3] = x, y, touch
    if head >= 0:
        vertices[ends[head, 0], 2] = vertex
    if tail >= 0:
        vertices[vertex, 2] = ends[tail, 0]
    if head >= 0 and tail >= 0:
        other, far = ends[head, 1], ends[tail, 1]
        if other == tail:
            n = counters[_N_CLOSED]
            closed[n, 0], closed[n, 1], closed[n, 2] = vertex, label, ends[head, 2]
            counters[_N_CLOSED] = n + 1
        else:
            ends[other, 1], ends[far, 1] = far, other
            _unite(parents, ends[head, 2], ends[tail, 2])
        _drop_end(ends, counters, head)
        _drop_end(ends, counters, tail)
        return -1, -1
    if head >= 0:
        ends[head, 0] = vertex
        return -1, head
    if tail >= 0:
        ends[tail, 0] = vertex
        return tail, -1
    head = _take(ends, counters, _END_TOP, _END_FREE, _N_END_FREE, 0)
    tail = _take(ends, counters, _END_TOP, _END_FREE, _N_END_FREE, 0)
    node = counters[_NODES]
    counters[_NODES] += 1
    parents[node] = node
    ends[head, 0], ends[head, 1], ends[head, 2] = vertex, tail, node
    ends[tail, 0], ends[tail, 1], ends[tail, 2] = vertex, head, node
    return tail, head


@numba.njit(cache=True)
def _next_difference(words, row, x, width):  # type: ignore[no-untyped-def]
    """The first eight pixels from ``x`` on, by their start, in which two rows differ; ``width`` if none."""
    for word in range(x >> 3, words.shape[1]):
        if words[row - 1, word] != words[row, word]:
            return max(x, word << 3)
    return width


@numba.njit(cache=True)
def _run_end(rows, words, row, x, width):  # type: ignore[no-untyped-def]
    """Where the run of equal pixels that starts at ``x`` ends."""
    label = rows[row, x]
    same = np.uint64(label) * _BROADCAST
    while x < width:
        if x & 7 == 0 and words[row, x >> 3] == same:
            x += 8
        elif rows[row, x] == label:
            x += 1
        else:
            return x
    return width


@numba.njit(cache=True)
def _unite_runs(rows, words, row, width, left, right, ends, parents):  # type: ignore[no-untyped-def]
    """Both ends of every run of a row belong to one piece."""
    x = 0
    while x < width:
        stop = _run_end(rows, words, row, x, width)
        if rows[row, x] != 0:
            _unite(parents, ends[right[x], 2], ends[left[stop], 2])
        x = stop


@numba.njit(cache=True)
def _trace(rows, words, first, last, y0, room, left, right, vertices, ends, parents, closed, counters):  # type: ignore[no-untyped-def]
    """Pass the lines above rows ``first`` to ``last``; returns the row to go on with, once there is room for it."""
    width = len(left) - 1
    for row in range(first, last + 1):
        if (
            counters[_N_CLOSED] >= _CLOSED
            or len(vertices) - counters[_TOP] + counters[_N_FREE] < room
            or len(ends) - counters[_END_TOP] + counters[_N_END_FREE] < room
            or len(parents) - counters[_NODES] < room
        ):
            return row
        x = _next_difference(words, row, 0, width)
        if x == width:
            continue
        while x < width:
            if rows[row - 1, x] == rows[row, x]:
                x += 1
                if x & 7 == 0:
                    x = _next_difference(words, row, x, width)
                continue
            up = down = np.int64(
                -1
            )  # the chains that come along the horizontal edge on the left: of the label above, and below
            while True:
                a = rows[row - 1, x - 1] if x else np.uint8(0)
                c = rows[row, x - 1] if x else np.uint8(0)
                b, d = rows[row - 1, x], rows[row, x]
                if a != b or c != d:
                    up, down = _vertex(
                        x, y0 + row - 1, a, b, c, d, up, down, left, right, vertices, ends, parents, closed, counters
                    )
                if x == width or b == d:
                    break
                x += 1
        _unite_runs(rows, words, row, width, left, right, ends, parents)
    return last + 1


@numba.njit(cache=True)
def _vertex(x, y, a, b, c, d, up, down, left, right, vertices, ends, parents, closed, counters):  # type: ignore[no-untyped-def]
    """Every label's outline at one vertex. Returns what goes on along the horizontal edge on the right."""
    above_l, above_r = np.int64(left[x]), np.int64(right[x])
    next_up, next_down = up, down
    for which in range(4):
        k = a if which == 0 else b if which == 1 else c if which == 2 else d
        if k == 0 or (which > 0 and k == a) or (which > 1 and k == b) or (which > 2 and k == c):
            continue
        in_a, in_b, in_c, in_d = a == k, b == k, c == k, d == k
        count = int(in_a) + int(in_b) + int(in_c) + int(in_d)
        if count == 4 or (count == 2 and in_a in (in_b, in_c)):
            continue  # inside, or straight on
        if count == 2 and in_a:
            _corner(x, y, 1, k, above_l, up, vertices, ends, parents, closed, counters)
            right[x], next_down = _corner(x, y, 1, k, -1, -1, vertices, ends, parents, closed, counters)
        elif count == 2:
            next_up, _ = _corner(x, y, 1, k, -1, above_r, vertices, ends, parents, closed, counters)
            _, left[x] = _corner(x, y, 1, k, down, -1, vertices, ends, parents, closed, counters)
        elif in_a != in_b and in_a != in_c:  # edges above and on the left
            if in_a:
                _corner(x, y, 0, k, above_l, up, vertices, ends, parents, closed, counters)
            else:
                _corner(x, y, 0, k, down, above_r, vertices, ends, parents, closed, counters)
        elif in_a != in_b:  # above and on the right
            if in_a:
                _, next_down = _corner(x, y, 0, k, above_l, -1, vertices, ends, parents, closed, counters)
            else:
                next_up, _ = _corner(x, y, 0, k, -1, above_r, vertices, ends, parents, closed, counters)
        elif in_a != in_c:  # below and on the left
            if in_a:
                right[x], _ = _corner(x, y, 0, k, -1, up, vertices, ends, parents, closed, counters)
            else:
                _, left[x] = _corner(x, y, 0, k, down, -1, vertices, ends, parents, closed, counters)
        elif in_d:  # below and on the right
            right[x], next_down = _corner(x, y, 0, k, -1, -1, vertices, ends, parents, closed, counters)
        else:
            next_up, left[x] = _corner(x, y, 0, k, -1, -1, vertices, ends, parents, closed, counters)
    return next_up, next_down


@numba.njit(cache=True)
def _measure(vertices, closed):  # type: ignore[no-untyped-def]
    """Vertices of all rings together, and of the longest."""
    total = longest = 0
    for ring in range(len(closed)):
        vertex, n = vertices[closed[ring, 0], 2], 1
        while vertex != closed[ring, 0]:
            vertex = vertices[vertex, 2]
            n += 1
        total += n
        longest = max(longest, n)
    return total, longest


@numba.njit(cache=True)
def _extract(vertices, closed, longest, min_area, min_hole, counters, xy, starts, whose, areas):  # type: ignore[no-untyped-def]
    """Copy the rings wanted, cut into simple ones, and free all vertices; returns how many rings and points."""
    ring, mate = np.empty((longest, 3), np.int32), np.empty(longest, np.int32)
    stack, place = np.empty(longest, np.int32), np.empty(longest, np.int32)
    kept = used = 0
    for number in range(len(closed)):
        n, touching, vertex = 0, 0, closed[number, 0]
        while True:
            ring[n, 0], ring[n, 1], ring[n, 2] = vertices[vertex, 0], vertices[vertex, 1], vertices[vertex, 3]
            touching += ring[n, 2]
            n += 1
            following = vertices[vertex, 2]
            vertices[vertex, 2] = counters[_FREE]
            counters[_FREE] = vertex
            counters[_N_FREE] += 1
            vertex = following
            if vertex == closed[number, 0]:
                break
        if touching > 1:
            _match(ring[:n], mate)
        else:
            mate[:n] = -1
        top = 0
        for i in range(n + 1):
            cut = 0 if i == n else top  # from where on the stack is a ring
            if i < n and mate[i] >= 0 and place[mate[i]] >= 0:
                cut = place[mate[i]]
            if cut < top:
                area = np.int64(0)
                for j in range(cut, top):
                    p, q = stack[j], stack[j + 1 if j + 1 < top else cut]
                    area += np.int64(ring[p, 0]) * ring[q, 1] - np.int64(ring[q, 0]) * ring[p, 1]
                area //= 2
                if area >= min_area if area > 0 else -area >= min_hole:
                    for j in range(cut, top):
                        xy[used, 0], xy[used, 1] = ring[stack[j], 0], ring[stack[j], 1]
                        used += 1
                    whose[kept, 0], whose[kept, 1], areas[kept] = closed[number, 1], closed[number, 2], area
                    kept += 1
                    starts[kept] = used
                for j in range(cut, top):
                    place[stack[j]] = -1
                top = cut
            if i < n:
                stack[top], place[i] = i, top
                top += 1
    return kept, used


@numba.njit(cache=True)
def _match(ring, mate):  # type: ignore[no-untyped-def]
    """For each vertex that the ring passed before, where; else -1."""
    mate[: len(ring)] = -1
    places = np.flatnonzero(ring[:, 2])
    keys = (ring[places, 1].astype(np.int64) << 32) + ring[places, 0]
    order = np.argsort(keys, kind="mergesort")
    for i in range(1, len(order)):
        if keys[order[i]] == keys[order[i - 1]]:
            mate[places[order[i]]] = places[order[i - 1]]

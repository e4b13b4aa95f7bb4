"""The loops of :mod:`wholegrad.slide.trace`: lines of vertices, chains, rings.

Tables are shared by all functions: ``vertices`` (x, y, next, whether pixels touch at a corner there), ``ends`` of open
chains (vertex, partner at the other end, node), ``parents`` of nodes in the union-find, ``closed`` rings (a vertex,
label, node). Free entries are linked; ``counters`` say where the lists begin and how far the tables are used.
"""

from __future__ import annotations

import numba
import numpy as np

# Fields of the counters.
TOP, FREE, N_FREE, END_TOP, END_FREE, N_END_FREE, NODES, N_CLOSED = range(8)
CLOSED = 1 << 16  # rings that may wait for collection
_BROADCAST = np.uint64(0x0101010101010101)


@numba.njit(cache=True)
def _find(parents, node):  # type: ignore[no-untyped-def]
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@numba.njit(cache=True)
def find_all(parents, nodes):  # type: ignore[no-untyped-def]
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
    ends[end, 0] = counters[END_FREE]
    counters[END_FREE] = end
    counters[N_END_FREE] += 1


@numba.njit(cache=True)
def _corner(x, y, touch, label, head, tail, vertices, ends, parents, closed, counters):  # type: ignore[no-untyped-def]
    """One turn of an outline: join the chain that comes in by its head and the one that goes out from its tail.

    -1 stands for an edge that begins here. Returns what hangs from the edge in and from the edge out, where they do.
    """
    vertex = _take(vertices, counters, TOP, FREE, N_FREE, 2)
    vertices[vertex, 0], vertices[vertex, 1], vertices[vertex, 3] = x, y, touch
    if head >= 0:
        vertices[ends[head, 0], 2] = vertex
    if tail >= 0:
        vertices[vertex, 2] = ends[tail, 0]
    if head >= 0 and tail >= 0:
        other, far = ends[head, 1], ends[tail, 1]
        if other == tail:
            n = counters[N_CLOSED]
            closed[n, 0], closed[n, 1], closed[n, 2] = vertex, label, ends[head, 2]
            counters[N_CLOSED] = n + 1
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
    head = _take(ends, counters, END_TOP, END_FREE, N_END_FREE, 0)
    tail = _take(ends, counters, END_TOP, END_FREE, N_END_FREE, 0)
    node = counters[NODES]
    counters[NODES] += 1
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
def trace(rows, words, first, last, y0, room, left, right, vertices, ends, parents, closed, counters):  # type: ignore[no-untyped-def]
    """Pass the lines above rows ``first`` to ``last``; returns the row to go on with, once there is room for it."""
    width = len(left) - 1
    for row in range(first, last + 1):
        if (
            counters[N_CLOSED] >= CLOSED
            or len(vertices) - counters[TOP] + counters[N_FREE] < room
            or len(ends) - counters[END_TOP] + counters[N_END_FREE] < room
            or len(parents) - counters[NODES] < room
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
def measure(vertices, closed):  # type: ignore[no-untyped-def]
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
def extract(vertices, closed, longest, min_area, min_hole, counters, xy, starts, whose, areas):  # type: ignore[no-untyped-def]
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
            vertices[vertex, 2] = counters[FREE]
            counters[FREE] = vertex
            counters[N_FREE] += 1
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

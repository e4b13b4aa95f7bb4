"""How far the tiles of a segment reach on each of its maps, for tiles of many sizes at once, each step worked out once.

Planning asks this of hundreds of segments of one graph, which differ in where they begin and end: what lies between
is the same again and again. So the intervals that a few tiles of each size need of a map are one *bundle*, bundles that
are equal are one number, and the step from a node's bundle to its operands' is remembered by numbers: for the node, and
for all nodes that are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Graph, Node, Ref, substitute
from wholegrad.graph.layout import Role
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment
from wholegrad.plan.bands import Bands, carried
from wholegrad.plan.tiles import AxisTiles, cuts

LOOKED_AT = 3  # tiles of each size
EMPTY = Interval(1 << 40, -(1 << 40))  # beyond any map: a union with it changes nothing

Table = npt.NDArray[np.float64]
Pads = Sequence[tuple[int, int]]


class Extent(NamedTuple):
    """Along one axis: a row for each node, a column for each size of tiles.

    Attributes:
        largest: pixels of the longest interval that a tile looks at.
        total: of the intervals of all tiles, what is computed several times counted each time.
        counts: tiles of each size.
        each: where there are no more than ``LOOKED_AT`` tiles, the interval of each; 0 beyond the last.
        padded: the longest of tiles in which padding makes anything; 0 if there are none.
        ends: how many of the map's two ends these tiles reach.
    """

    largest: Table
    total: Table
    counts: list[int]
    each: Table
    padded: Table
    ends: int = 2


class Extents:
    """Those of one graph.

    Only the tiles at both ends and one in the middle of each size are looked at: a total is an estimate, and nothing
    found here is longer than what all tiles would give. Where ranks share the image, tiles are those of one with most.
    """

    def __init__(self, graph: Graph, bands: Bands | None = None) -> None:
        self.graph, self.bands = graph, bands
        self._alike = alike(graph)
        self._read = [tuple(ref.node for ref in node.operands if graph.spec(ref).is_map) for node in graph.nodes]
        self._axes: dict[tuple[Role, tuple[int, ...], int], _Axis] = {}

    def of(self, segment: Segment, nodes: Sequence[int], role: Role, edges: Sequence[int], pads: Pads = ()) -> Extent:
        """Of these nodes of a segment, along rows or columns, for tiles that are so long there on its base map.

        Args:
            pads: places in ``nodes`` of what pads and of what it reads.
        """
        base = _size(self.graph, segment.base, role)
        key = (role, tuple(edges), base)
        axis = self._axes.get(key)
        if axis is None:
            span = (0, base) if self.bands is None else self.bands.largest(role, base)
            axis = self._axes[key] = _Axis(self.graph, role, edges, base, span)
        need: dict[int, int] = {}
        for ref in segment.owned(self.graph):
            mine = axis.owned(_size(self.graph, ref, role))
            need[ref.node] = axis.union(need.get(ref.node, mine), mine)
        steps, kinds, reads = axis.steps, self._alike, self._read
        for index in reversed(segment.nodes):  # hundreds of thousands of times
            kind, bundle = kinds[index], need[index]
            found = steps[kind].get(bundle) or axis.step(kind, index, bundle)
            for operand, other in zip(reads[index], found, strict=True):
                mine = need.setdefault(operand, other)
                if mine != other:
                    need[operand] = axis.union(mine, other)
        sizes = axis.sizes[[need[index] for index in nodes]]
        each = sizes[:, 2:].transpose(0, 2, 1)
        return Extent(sizes[:, 0].copy(), sizes[:, 1].copy(), axis.counts, each, _padded(each, pads), axis.ends)


class _Axis:
    """Bundles along one axis: of a few tiles of each of some sizes, on a span of a base map of one size."""

    def __init__(self, graph: Graph, role: Role, edges: Sequence[int], base: int, span: tuple[int, int]) -> None:
        self.graph, self.role, self.base = graph, role, base
        self.ends = (span[0] == 0) + (span[1] == base)
        tiles: list[tuple[int, int]] = []
        weights: list[float] = []
        firsts: list[int] = []
        self.counts: list[int] = []
        for edge in edges:
            ends = [span[0] + cut for cut in cuts(span[1] - span[0], edge)]
            count = len(ends) - 1
            self.counts.append(count)
            firsts.append(len(tiles))
            for i, weight in _sampled(count):
                tiles.append((ends[i], ends[i + 1]))
                weights.append(weight)
        self.tiles, self.weights, self.firsts = tiles, np.array(weights), firsts
        looked_at, slots = np.diff([*firsts, len(tiles)]), np.arange(LOOKED_AT)[:, None]
        self.there = slots < looked_at
        self.slots = np.where(self.there, np.array(firsts) + slots, 0)
        self.bundles: list[npt.NDArray[np.int64]] = []
        self.sizes = np.zeros(
            (64, 2 + LOOKED_AT, len(firsts))
        )  # of each bundle: largest, total, each, by size of tiles
        self.steps: defaultdict[int, dict[int, tuple[int, ...]]] = defaultdict(dict)  # by kind of node and bundle
        self._numbers: dict[bytes, int] = {}
        self._owned: dict[int, int] = {}
        self._unions: dict[tuple[int, int], int] = {}

    def owned(self, size: int) -> int:
        """What the tiles own of a map of this size."""
        if size not in self._owned:
            mine = [(carried(lo, self.base, size), carried(hi, self.base, size)) for lo, hi in self.tiles]
            self._owned[size] = self._number(np.array([each if each[0] < each[1] else EMPTY for each in mine]).T)
        return self._owned[size]

    def union(self, one: int, other: int) -> int:
        """The smallest intervals that hold those of both."""
        if one == other:
            return one
        key = (one, other)
        found = self._unions.get(key)
        if found is None:
            (a, b), (c, d) = self.bundles[one], self.bundles[other]
            found = self._unions[key] = self._number(np.stack((np.minimum(a, c), np.maximum(b, d))))
        return found

    def step(self, kind: int, index: int, bundle: int) -> tuple[int, ...]:
        """What nodes of this kind, such as that of ``index``, need of each map that they read; kept in ``steps``."""
        self.steps[kind][bundle] = found = tuple(self._needs(self.graph.nodes[index], bundle))
        return found

    def _needs(self, node: Node, bundle: int) -> list[int]:
        specs, rule = [self.graph.spec(ref) for ref in node.operands], rule_for(node.op)
        assert rule is not None
        out = [Interval(lo, hi) for lo, hi in self.bundles[bundle].T.tolist()]
        found = []
        for k, spec in enumerate(specs):
            if spec.is_map:
                read = [rule.needs(node, specs, k, self.role, each) if each.lo < each.hi else EMPTY for each in out]
                found.append(bundle if read == out else self._number(np.array(read, np.int64).T))
        return found

    def _number(self, bundle: npt.NDArray[np.int64]) -> int:
        key = bundle.tobytes()
        if key not in self._numbers:
            number = self._numbers[key] = len(self.bundles)
            self.bundles.append(bundle)
            if number == len(self.sizes):
                self.sizes = np.concatenate((self.sizes, np.zeros_like(self.sizes)))
            lengths = np.maximum(bundle[1] - bundle[0], 0)
            self.sizes[number, 0] = np.maximum.reduceat(lengths, self.firsts)
            self.sizes[number, 1] = np.add.reduceat(self.weights * lengths, self.firsts)
            self.sizes[number, 2:] = lengths[self.slots] * self.there
        return self._numbers[key]


def _padded(each: Table, pads: Pads) -> Table:
    """Of the tiles in which one of ``pads`` is longer than what it reads, the longest intervals."""
    if not pads:
        return np.zeros(each.shape[:2])
    longer = [each[pad] != each[read] for pad, read in pads]
    found: Table = (each * np.logical_or.reduce(longer)).max(2)
    return found


def extent(tiles: AxisTiles, nodes: Sequence[int], pads: Pads = ()) -> Extent:
    """Of one size of tiles, each of which was looked at."""
    largest, total = ([[float(sizes.get(i, 0))] for i in nodes] for sizes in (tiles.largest, tiles.total))
    few = tiles.spans if pads else tiles.spans[:LOOKED_AT]
    each = np.zeros((len(nodes), 1, max(len(few), LOOKED_AT)))
    for k, span in enumerate(few):
        each[:, 0, k] = [span[i].size if i in span else 0 for i in nodes]
    return Extent(np.array(largest), np.array(total), [tiles.count], each[:, :, :LOOKED_AT], _padded(each, pads))


def _size(graph: Graph, ref: Ref, role: Role) -> int:
    return graph.spec(ref).rows if role is Role.ROW else graph.spec(ref).cols


def _sampled(count: int) -> list[tuple[int, float]]:
    """Which of ``count`` tiles to look at, and how many each stands for: the ends, and one for all in between."""
    if count <= LOOKED_AT:
        return [(i, 1.0) for i in range(count)]
    return [(0, 1.0), (count // 2, count - 2.0), (count - 1, 1.0)]


def alike(graph: Graph) -> list[int]:
    """For each node a number: two nodes of one op, with equal arguments and shapes, have the same."""
    numbers: dict[Any, int] = {}

    def number(node: Node) -> int:
        place = {ref: k for k, ref in enumerate(dict.fromkeys(node.operands))}
        given = substitute((node.args, *node.kwargs.items()), lambda ref: ("operand", place[ref]))
        shapes = tuple(graph.spec(ref) for ref in node.operands), node.outputs
        return numbers.setdefault((node.op, frozen(given), shapes), len(numbers))

    return [number(node) for node in graph.nodes]


def frozen(value: Any) -> Any:
    """Nested lists as tuples."""
    return tuple(frozen(item) for item in value) if isinstance(value, tuple | list) else value

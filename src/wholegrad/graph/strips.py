"""Which convolutions at the end of a segment run a strip of rows at a time, their maps never whole.

A tile is as large as its halo at the lowest resolution asks for, and its maps at full resolution leave the cache
between one kernel and the next. Where no gradient is wanted nobody needs them afterwards: the last thin convolutions
of full resolution run together (:mod:`wholegrad.kernels.strips`).
Cropping what the last one gives is left to the boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Graph, Node, Ref
from wholegrad.graph.layout import Role
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment

if TYPE_CHECKING:
    from wholegrad.graph.inline import Inlined

aten = torch.ops.aten
BUFFERS = 2 << 20  # bytes of all layers' rows of a strip: a core's own cache and its share of the next
HEIGHTS = (48, 24, 12)  # rows of a strip: multiples of the rows that kernels block, 1 to 6
WIDTHS = (2048, 1024, 512)  # columns of a panel: wide ones are fetched better, and overlap less
FULL = 2  # a map belongs to the strip if it has more than one pixel for so many of the result


@dataclass(frozen=True)
class Strip:
    """Convolutions that run together.

    Attributes:
        nodes: their indices, in order; the last one's map is the result.
        out: the output that the result is, cropped.
        inside: the nodes that do not run by themselves: all but that of ``out``.
        edges: rows of a strip and columns of a panel, of the result.
        as_bytes: whether a mask is stored instead of the result.
    """

    nodes: tuple[int, ...]
    out: Ref
    inside: frozenset[int]
    edges: tuple[int, int]
    as_bytes: bool = False

    @property
    def last(self) -> int:
        return self.nodes[-1]

    def leaves(self, how: Inlined) -> tuple[Ref, ...]:
        """What comes from outside: every value that the convolutions' inputs are computed from."""
        mine = set(self.nodes)
        found = (ref for index in self.nodes for ref in how.convolutions[index].leaves if ref.node not in mine)
        return tuple(dict.fromkeys(found))


def find(graph: Graph, segment: Segment, how: Inlined) -> Strip | None:
    """The strip of a segment that else runs as ``how`` says."""
    if len(segment.outputs) != 1 or segment.reductions:
        return None
    (out,) = segment.outputs
    node, between = source(graph, out)
    if node.index not in how.convolutions or not between <= set(how.nodes) or node.outputs[0].shape[0] != 1:
        return None
    members = _grown(graph, how, node, between)
    while members:
        edges = _edges(graph, how, members)
        if edges is not None:
            return Strip(tuple(members), out, (frozenset(members) | between) - {out.node}, edges)
        members = members[1:]
    return None


def source(graph: Graph, ref: Ref) -> tuple[Node, set[int]]:
    """The node whose map a value is, perhaps cropped, and the nodes that crop it."""
    node, between = graph.nodes[ref.node], set[int]()
    while node.op is aten.slice.Tensor and _crops(graph, node):
        between.add(node.index)
        node = graph.nodes[node.operands[0].node]
    return node, between


def _crops(graph: Graph, node: Node) -> bool:
    """Whether a slice leaves rows and columns where they are, and is the only reader of its operand."""
    rule, specs = rule_for(node.op), [graph.spec(ref) for ref in node.operands]
    assert rule is not None
    same = all(rule.needs(node, specs, 0, role, Interval(0, 1)) == Interval(0, 1) for role in (Role.ROW, Role.COL))
    step = node.args[4] if len(node.args) > 4 else 1
    channels = specs[0].shape[:2] == node.outputs[0].shape[:2]
    return same and step == 1 and channels and len(graph.consumers(node.operands[0].node)) == 1


def _grown(graph: Graph, how: Inlined, last: Node, crops: set[int]) -> list[int]:
    """Convolutions of about the result's resolution, or higher, whose maps only the strip reads."""
    members = [last.index]
    area = last.outputs[0].rows * last.outputs[0].cols
    readers: dict[int, set[int]] = {}
    for index in how.nodes:
        for ref in how.reads(graph, index):
            readers.setdefault(ref.node, set()).add(index)
    if readers.get(last.index, set()) - crops:
        return []
    for index in reversed(how.nodes):
        spec = graph.nodes[index].outputs[0]
        full = spec.is_map and spec.rows * spec.cols * FULL > area and spec.shape[0] == 1
        if index in how.convolutions and full and readers.get(index) and readers[index] <= set(members):
            members.insert(0, index)
    return members


def needs(
    graph: Graph,
    how: Inlined,
    members: Sequence[int],
    role: Role,
    result: Interval,
    before: Mapping[int, Interval] | None = None,
) -> dict[int, Interval]:
    """The interval of each member's map that an interval of the last one's depends on.

    Args:
        before: intervals of the members' maps that are there already, up to whose ends nothing need be computed.
    """
    found = {members[-1]: result}
    for index in reversed(members):
        node, reading, mine = graph.nodes[index], how.convolutions[index], found[index]
        done = before[index].hi if before else mine.lo
        rule, specs = rule_for(node.op), [graph.spec(ref) for ref in node.operands]
        assert rule is not None
        wanted = rule.needs(node, specs, 0, role, Interval(min(max(mine.lo, done), mine.hi - 1), mine.hi))
        for ref in reading.leaves:
            if ref.node in members:
                found[ref.node] = found[ref.node].union(wanted) if ref.node in found else wanted
    return found


def _edges(graph: Graph, how: Inlined, members: Sequence[int]) -> tuple[int, int] | None:
    """The strip of least waste whose rows fit; None if none does."""
    spec = graph.nodes[members[-1]].outputs[0]
    found: list[tuple[float, tuple[int, int]]] = []
    for high in HEIGHTS:
        for wide in WIDTHS:
            inner = [
                Interval((size - min(edge, size)) // 2, (size + min(edge, size)) // 2)
                for size, edge in ((spec.rows, high), (spec.cols, wide))
            ]
            rows, cols = (needs(graph, how, members, role, each)
                          for role, each in zip((Role.ROW, Role.COL), inner, strict=True))  # fmt: skip
            areas = {i: rows[i].size * cols[i].size for i in members[:-1]}
            held = sum(area * graph.nodes[i].outputs[0].pixel_bytes for i, area in areas.items())
            if held <= BUFFERS:
                again = max((cols[i].size / inner[1].size for i in members), default=1.0)
                found.append((again + 2 / high, (high, wide)))  # each kernel stages its window's rows again
    return min(found)[1] if found else None

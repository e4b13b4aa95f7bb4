"""Which convolutions before a loss run forward and back a block at a time, their maps and gradients never whole.

A tile is as large as its halo at the lowest resolution asks for, and its maps at full resolution leave the cache
between one kernel and the next, twice over in a backward sweep. The last thin convolutions of full resolution and the
sums that end in the loss need not: a block of pixels goes forward through all of them, gets the gradient of its terms,
which is known before the sum (rule 4), and comes back through all of them while its maps are in the core's own cache
(:mod:`wholegrad.kernels.tail`). Blocks own the terms of their own pixels (rule 1) and compute their halos again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Graph, Node, Ref
from wholegrad.graph.layout import Role
from wholegrad.graph.programs import Reading
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment
from wholegrad.graph.strips import needs, source
from wholegrad.kernels.expression import Leaf

if TYPE_CHECKING:
    from wholegrad.graph.inline import Inlined

HELD = 2 << 20  # bytes of maps and gradients of a block: a core's own cache and its share of the next
HEIGHTS = (96, 64, 48, 32, 24, 16)  # rows of a block
WIDTHS = (1024, 512, 256, 128)  # columns
FULL = 2  # a map belongs to the tail if it has more than one pixel for so many of the loss's
STAGED = 2  # rows that a kernel stages beside a block's own, as work


@dataclass(frozen=True)
class Tail:
    """Convolutions that run together with the sums over the last one's map.

    Attributes:
        nodes: their indices, in order; each but the last is read by one other only.
        out: the map that the sums read: the last one's, perhaps cropped.
        sums: of each of these reductions, what computes its terms.
        inside: the nodes that do not run by themselves.
        edges: rows and columns of a block.
        bytes: of a block's maps and gradients.
        again: how many times each convolution's map is computed, halos of blocks counted.
    """

    nodes: tuple[int, ...]
    out: Ref
    sums: dict[int, Reading]
    inside: frozenset[int]
    edges: tuple[int, int]
    bytes: int
    again: tuple[float, ...]

    @property
    def last(self) -> int:
        return self.nodes[-1]

    def leaves(self, how: Inlined) -> tuple[Ref, ...]:
        """What comes from outside: every value that convolutions' inputs and terms are computed from."""
        mine = {*self.nodes, self.out.node}
        readings = [*(how.convolutions[index] for index in self.nodes), *self.sums.values()]
        return tuple(dict.fromkeys(ref for each in readings for ref in each.leaves if ref.node not in mine))

    def wanted(self, how: Inlined) -> tuple[Ref, ...]:
        """The maps from outside whose gradients are wanted."""
        found = [
            ref
            for index in self.nodes
            for ref, leaf in zip(how.convolutions[index].leaves, _leaves(how.convolutions[index]), strict=True)
            if leaf.grad and ref.node not in self.nodes
        ]
        return tuple(dict.fromkeys(found))


def find(graph: Graph, segment: Segment, how: Inlined) -> Tail | None:
    """The tail of a segment that else runs as ``how`` says; None if it has none."""
    outs = {ref for reading in how.sums.values() for ref in _wanted(reading)}
    if len(outs) != 1:
        return None
    (out,) = outs
    node, between = source(graph, out)
    readers = _readers(graph, segment, how)
    sums = {index: reading for index, reading in how.sums.items() if out in reading.leaves}
    kept = {ref.node for ref in segment.outputs}
    if set(readers[out.node]) != {~index for index in sums} or kept & {node.index, *between}:
        return None
    terms = [graph.spec(graph.nodes[index].operands[0]) for index in sums]
    real = (node.outputs[0].dtype, torch.bool)
    if any(spec.shape != graph.spec(out).shape or spec.dtype not in real for spec in terms):
        return None
    members = _grown(graph, how, node, readers, kept)
    while members:
        edges = _edges(graph, how, members)
        if edges is not None:
            areas = block_areas(graph, how, members, edges)
            pixels = {i: graph.nodes[i].outputs[0].rows * graph.nodes[i].outputs[0].cols for i in members}
            again = tuple(areas[i] / areas[members[-1]] * pixels[members[-1]] / pixels[i] for i in members)
            inside = frozenset({*members, *between})
            return Tail(tuple(members), out, sums, inside, edges, held(graph, members, areas), again)
        members = members[1:]
    return None


def _leaves(reading: Reading) -> list[Leaf]:
    return [leaf for part in reading.parts for leaf in part.program.leaves]


def _wanted(reading: Reading) -> list[Ref]:
    return [ref for ref, leaf in zip(reading.leaves, _leaves(reading), strict=True) if leaf.grad]


def _readers(graph: Graph, segment: Segment, how: Inlined) -> dict[int, list[int]]:
    """Who reads each node's map, once for every time: indices of nodes, ``~index`` of reductions."""
    found: dict[int, list[int]] = {}
    for index in how.nodes:
        for ref in how.reads(graph, index):
            found.setdefault(ref.node, []).append(index)
    for index in segment.reductions:
        for ref in how.sums[index].leaves if index in how.sums else graph.nodes[index].operands:
            found.setdefault(ref.node, []).append(~index)
    return found


def _suits(graph: Graph, how: Inlined, index: int) -> bool:
    """Whether a node is a thin convolution of one image whose values are not known from before."""
    node = graph.nodes[index]
    operands = 3 if node.args[2] is not None else 2
    return index in how.convolutions and node.outputs[0].shape[0] == 1 and len(node.operands) == operands


def _grown(graph: Graph, how: Inlined, last: Node, readers: dict[int, list[int]], kept: set[int]) -> list[int]:
    """Convolutions of about the loss's resolution, or higher, each of which is read once, by the tail."""
    if last.index not in how.convolutions or not _suits(graph, how, last.index):
        return []
    members, area = [last.index], last.outputs[0].rows * last.outputs[0].cols
    for index in reversed(how.nodes):
        spec, reader = graph.nodes[index].outputs[0], readers.get(index, [])
        full = spec.is_map and spec.rows * spec.cols * FULL > area
        if index in how.convolutions and full and len(reader) == 1 and reader[0] in members and index not in kept:
            pulled = Ref(index) in _wanted(how.convolutions[reader[0]]) or not graph.nodes[index].needs_grad
            if pulled and _suits(graph, how, index) and spec.dtype == last.outputs[0].dtype:
                members.insert(0, index)
    return members


def _edges(graph: Graph, how: Inlined, members: list[int]) -> tuple[int, int] | None:
    """The block of least work a pixel whose maps and gradients fit; None if none does."""
    spec = graph.nodes[members[-1]].outputs[0]
    macs = {index: _macs(graph, index) for index in members}
    found: list[tuple[float, tuple[int, int]]] = []
    for high, wide in product(HEIGHTS, WIDTHS):
        areas = block_areas(graph, how, members, (high, wide))
        if held(graph, members, areas) <= HELD:
            mine = min(high, spec.rows) * min(wide, spec.cols)
            work = sum(macs[index] * areas[index] for index in members) / mine
            found.append((work * (1 + STAGED / high), (high, wide)))
    return min(found)[1] if found else None


def _macs(graph: Graph, index: int) -> float:
    node = graph.nodes[index]
    rule = rule_for(node.op)
    assert rule is not None
    return rule.macs(node, [graph.spec(ref) for ref in node.operands])


def block_areas(graph: Graph, how: Inlined, members: Sequence[int], edges: tuple[int, int]) -> dict[int, int]:
    """Pixels of each member's map of a block in the middle of the image."""
    spec = graph.nodes[members[-1]].outputs[0]
    middle = [
        Interval((size - min(edge, size)) // 2, (size + min(edge, size)) // 2)
        for size, edge in zip((spec.rows, spec.cols), edges, strict=True)
    ]
    rows, cols = (needs(graph, how, members, role, each)
                  for role, each in zip((Role.ROW, Role.COL), middle, strict=True))  # fmt: skip
    return {index: rows[index].size * cols[index].size for index in members}


def held(graph: Graph, members: Sequence[int], areas: Mapping[int, int]) -> int:
    """Bytes of a block's maps and gradients, about: a gradient takes the place of the map after its own."""
    sizes = [areas[index] * graph.nodes[index].outputs[0].pixel_bytes for index in members]
    return sum(sizes) + (max(sizes[-2:], default=0) if len(sizes) > 1 else sizes[-1])

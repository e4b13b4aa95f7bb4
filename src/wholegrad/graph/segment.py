"""Cut the graph into segments: which maps are kept, what each tile computes, and on which boxes.

Given the set of boundaries, the rest follows. Every boundary and every reduction is an *output* of exactly one
segment; a segment computes its outputs from the boundaries (and image, target, small tensors) that earlier segments
left, and whatever lies between is recomputed wherever it is needed. *Stages* number the segments: a value is
available at stage s if segments 0 .. s-1 suffice to compute it.

Boxes follow backwards from what a tile owns (rule 1), one axis at a time: :func:`spans`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import READERS, SOURCES, Graph, Kind, Node, Ref
from wholegrad.graph.layout import Role
from wholegrad.graph.rules import ReductionRule, rule_for

ORDER = attrgetter("node", "out")  # of Refs, as fast as can be


@dataclass(frozen=True)
class Segment:
    """What is computed tile by tile between boundaries.

    Attributes:
        outputs: boundary maps that this segment computes.
        reductions: indices of the reduction nodes that it sums.
        nodes: indices of the map nodes that a tile runs, in order.
        maps: what a tile reads by box: image, target, boundaries of earlier segments, small tensors that run along.
        smalls: the small tensors that a tile reads.
        base: the largest map that is owned here; tile sizes count its pixels.
    """

    outputs: tuple[Ref, ...]
    reductions: tuple[int, ...]
    nodes: tuple[int, ...]
    maps: tuple[Ref, ...]
    smalls: tuple[Ref, ...]
    base: Ref

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.outputs, self.reductions, self.nodes, self.maps))

    def owned(self, graph: Graph) -> tuple[Ref, ...]:
        """The maps whose elements the tiles share out: outputs, and what the reductions sum."""
        return tuple(dict.fromkeys([*self.outputs, *(graph.nodes[i].operands[0] for i in self.reductions)]))


def stages(
    graph: Graph, boundaries: frozenset[Ref], early: frozenset[int] = frozenset(), apart: bool = False
) -> list[int]:
    """For each node the number of segments that must have run before its value can be had.

    A boundary's or reduction's value is there one stage after the stage in which it is computed. A reduction that sums
    a boundary is taken in the pass that computes the boundary.

    Args:
        early: reductions to be finished before any other output of the same stage starts.
        apart: whether reductions over boundaries are taken later instead, from what was stored.
    """
    return Cutter(graph, apart).stages(boundaries, early)


def cut(
    graph: Graph, boundaries: frozenset[Ref], early: frozenset[int] = frozenset(), apart: bool = False
) -> tuple[Segment, ...]:
    """The segments that these boundaries make, in the order in which they run; see :func:`stages`."""
    return Cutter(graph, apart).cut(boundaries, early)


class Cutter:
    """Cuts one graph along many sets of boundaries: segments that several sets share are one object, made once."""

    def __init__(self, graph: Graph, apart: bool = False) -> None:
        self.graph, self.apart = graph, apart
        kinds = [node.kind for node in graph.nodes]
        self._steps = [
            (i, kinds[i] is Kind.REDUCTION, tuple({r.node for r in node.operands if kinds[r.node] not in SOURCES}))
            for i, node in enumerate(graph.nodes)
            if kinds[i] not in SOURCES
        ]
        self._leaves = {i for i, kind in enumerate(kinds) if kind in READERS or kind is Kind.SPREAD}
        self._reads = [self._apart(node.operands) for node in graph.nodes]
        self._known: dict[tuple[tuple[Ref, ...], tuple[int, ...]], list[_Walked]] = {}

    def stages(self, boundaries: frozenset[Ref], early: frozenset[int] = frozenset()) -> list[int]:
        """:func:`stages`"""
        kept = {ref.node for ref in boundaries}
        available = [0] * len(self.graph.nodes)
        for index, sums, operands in self._steps:
            start = 0
            for each in operands:
                there = available[each]
                if sums and not self.apart and each in kept:
                    there -= 1
                if there > start:
                    start = there
            if sums or index in kept:
                start += 2 if early and index not in early and start == 0 else 1
            available[index] = start
        return available

    def cut(self, boundaries: frozenset[Ref], early: frozenset[int] = frozenset()) -> tuple[Segment, ...]:
        """:func:`cut`"""
        available = self.stages(boundaries, early)
        kept: dict[int, list[Ref]] = {}
        for ref in sorted(boundaries):
            kept.setdefault(ref.node, []).append(ref)
        groups: dict[int, tuple[list[Ref], list[int]]] = {}
        made = {**dict.fromkeys(kept, False), **{i: True for i, sums, _ in self._steps if sums and i not in kept}}
        for index in sorted(made):
            outputs, reductions = groups.setdefault(available[index], ([], []))
            if made[index]:
                reductions.append(index)
            else:
                outputs.extend(kept[index])
        return tuple(self._segment(boundaries, *groups[stage]) for stage in sorted(groups))

    def _segment(self, boundaries: frozenset[Ref], outputs: list[Ref], reductions: list[int]) -> Segment:
        known = self._known.setdefault((tuple(outputs), tuple(reductions)), [])
        for walked in known:
            if walked.read <= boundaries and boundaries.isdisjoint(walked.passed):
                return walked.segment
        known.append(self._walk(boundaries, outputs, reductions))
        return known[-1].segment

    def _apart(self, refs: Sequence[Ref]) -> tuple[list[Ref], list[Ref]]:
        """What is read by box, and what is whole."""
        boxed = [ref for ref in refs if ref.node in self._leaves or self.graph.spec(ref).is_map]
        return boxed, [ref for ref in refs if ref not in boxed]

    def _walk(self, boundaries: frozenset[Ref], outputs: list[Ref], reductions: list[int]) -> _Walked:
        graph, leaves = self.graph, self._leaves
        own = {ref.node for ref in outputs}
        kept = {ref.node for ref in boundaries} - own
        owned = [*outputs, *(graph.nodes[i].operands[0] for i in reductions)]
        stack, whole = self._apart(owned)
        smalls = set(whole)
        inside: set[int] = set()
        maps: set[Ref] = set()
        read: set[Ref] = set()
        passed: set[Ref] = set()
        while stack:
            ref = stack.pop()
            index = ref.node
            if index in leaves:
                maps.add(ref)
            elif index in kept and ref in boundaries:
                maps.add(ref)
                read.add(ref)
            else:
                if index not in own:
                    passed.add(ref)
                if index not in inside:
                    inside.add(index)
                    boxed, whole = self._reads[index]
                    stack.extend(boxed)
                    smalls.update(whole)
        base = max(owned, key=lambda ref: graph.spec(ref).rows * graph.spec(ref).cols)
        boxed, whole = (sorted(refs, key=ORDER) for refs in (maps, smalls))
        segment = Segment(tuple(outputs), tuple(reductions), tuple(sorted(inside)), tuple(boxed), tuple(whole), base)
        return _Walked(segment, frozenset(read), frozenset(passed))


class _Walked(NamedTuple):
    """A segment, the boundaries that it reads, and the maps of others that it would have read if they were some."""

    segment: Segment
    read: frozenset[Ref]
    passed: frozenset[Ref]


def spans(
    graph: Graph,
    segment: Segment,
    role: Role,
    owned: Mapping[Ref, Interval],
) -> dict[int, Interval]:
    """The interval of every node that a tile must compute or read along one axis, by node index.

    Args:
        owned: the tile's own interval of each map in ``segment.owned``; one that is missing is not owned here.
    """
    need: dict[int, Interval] = {}
    known = graph.spans_known

    def ask(index: int, interval: Interval) -> None:
        need[index] = need[index].union(interval) if index in need else interval

    for ref, interval in owned.items():
        ask(ref.node, interval)
    for index in reversed(segment.nodes):
        if index not in need:
            continue
        key = (index, role, need[index])
        found = known.get(key)
        if found is None:
            found = known[key] = _operand_needs(graph, graph.nodes[index], role, need[index])
        for operand, interval in found:
            ask(operand, interval)
    return need


def _operand_needs(graph: Graph, node: Node, role: Role, out: Interval) -> list[tuple[int, Interval]]:
    """For each map that a node reads, its node index and the interval of it that ``out`` depends on."""
    specs = [graph.spec(ref) for ref in node.operands]
    rule = rule_for(node.op)
    assert rule is not None
    return [
        (ref.node, rule.needs(node, specs, position, role, out))
        for position, (ref, spec) in enumerate(zip(node.operands, specs, strict=True))
        if spec.is_map
    ]


def reduction_rule(graph: Graph, index: int) -> ReductionRule:
    rule = rule_for(graph.nodes[index].op)
    assert isinstance(rule, ReductionRule)
    return rule

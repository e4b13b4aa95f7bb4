"""The convolutions of a strip on a tile: which rows and columns each computes in each strip and panel of the tile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import ceil

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.inline import Inlined
from wholegrad.graph.layout import Role
from wholegrad.graph.programs import Reading
from wholegrad.graph.rules import rule_for
from wholegrad.graph.rules.window import Convolution
from wholegrad.graph.strips import Strip, needs
from wholegrad.kernels.calls import Schedule
from wholegrad.kernels.expression import MAP, Program
from wholegrad.kernels.strips import Layer, Lying, Span, Spans, Writer

LANES = 16  # panels are multiples of it


class Strips:
    """Runs the strip of a segment, tile after tile; threads share it.

    Args:
        small: a small value in the graph's dtype.
        store: what is made of the result as it is stored.
    """

    def __init__(
        self, graph: Graph, how: Inlined, small: Callable[[Ref], torch.Tensor], store: Program | None = None
    ) -> None:
        assert how.strip is not None
        self.graph, self.how = graph, how
        self.strip: Strip = how.strip
        self.leaves = self.strip.leaves(how)
        self.chain = Convolutions(graph, how, self.strip.nodes, self.leaves)
        self.writer = Writer(self.chain.layers(small), store)
        self._lock = threading.Lock()
        self._spans: dict[tuple[Role, Interval, tuple[int, ...]], Spans] = {}
        self._schedules: dict[tuple[Spans, Spans, tuple[Lying, ...]], Schedule] = {}

    def run(self, boxes: Mapping[int, Box], value: Callable[[Ref], torch.Tensor]) -> torch.Tensor:
        """The result on its box of a tile.

        Args:
            boxes: of every node on the tile.
            value: of a leaf, on its box.
        """
        box = boxes[self.strip.last]
        given = [as_read(self.graph, ref, value(ref)) for ref in self.leaves]
        with self._lock:
            schedule = self._schedule(boxes, box, tuple(lying(tensor) for tensor in given))
        channels = self.writer.layers[-1].outputs
        out = torch.empty((1, channels, box.height, box.width), dtype=self.writer.out_dtype)
        schedule.run(out, given)
        return out

    def _schedule(self, boxes: Mapping[int, Box], box: Box, given: tuple[Lying, ...]) -> Schedule:
        """The calls for a tile; tiles that differ in their place only share them."""
        starts = [boxes.get(ref.node, box) for ref in self.leaves]
        rows = self._axis(Role.ROW, box.rows, tuple(each.y0 for each in starts))
        cols = self._axis(Role.COL, box.cols, tuple(each.x0 for each in starts))
        key = (rows, cols, given)
        if key not in self._schedules:
            self._schedules[key] = self.writer.schedule(rows, cols, (box.height * box.width, box.width), given)
        return self._schedules[key]

    def _axis(self, role: Role, result: Interval, starts: tuple[int, ...]) -> Spans:
        """Along one axis of a tile: the spans of each layer in each strip or panel."""
        key = (role, result, starts)
        if key not in self._spans:
            found = self._rows(result, starts) if role is Role.ROW else self._cols(result, starts)
            # Equal tiles in other places share what they are the key of.
            self._spans[key] = next((each for each in self._spans.values() if each == found), found)
        return self._spans[key]

    def _rows(self, result: Interval, starts: tuple[int, ...]) -> Spans:
        edge, strips = self.strip.edges[0], []
        before: dict[int, Interval] = {}  # what each layer's buffer holds
        for lo in range(result.lo, result.hi, edge):
            mine = Interval(lo, min(lo + edge, result.hi))
            held = needs(self.graph, self.how, self.strip.nodes, Role.ROW, mine, before)
            strips.append(tuple(self.chain.span(Role.ROW, index, held, before, starts) for index in self.strip.nodes))
            before = held
        return tuple(strips)

    def _cols(self, result: Interval, starts: tuple[int, ...]) -> Spans:
        count = ceil(result.size / self.strip.edges[1])
        edge = LANES * ceil(result.size / count / LANES)
        cuts = [*range(result.lo, result.hi, edge), result.hi]
        panels = []
        for lo, hi in pairwise(cuts):
            held = needs(self.graph, self.how, self.strip.nodes, Role.COL, Interval(lo, hi))
            panels.append(tuple(self.chain.span(Role.COL, index, held, {}, starts) for index in self.strip.nodes))
        return tuple(panels)


class Convolutions:
    """Convolutions of a segment that read each other's maps, as :mod:`wholegrad.kernels` sees them.

    Args:
        nodes: their indices, in order.
        leaves: what comes from outside.
    """

    def __init__(self, graph: Graph, how: Inlined, nodes: Sequence[int], leaves: Sequence[Ref]) -> None:
        self.graph, self.how, self.nodes, self.leaves = graph, how, tuple(nodes), tuple(leaves)

    def layers(self, small: Callable[[Ref], torch.Tensor]) -> list[Layer]:
        """Each of them; ``small`` gives a small value in the graph's dtype."""
        return [self._layer(index, small) for index in self.nodes]

    def _layer(self, index: int, small: Callable[[Ref], torch.Tensor]) -> Layer:
        node, reading = self.graph.nodes[index], self.how.convolutions[index]
        weight, *bias = (small(ref).detach() for ref in node.operands[1:])
        stride, dilation = ((node.args[k][0], node.args[k][-1]) for k in (3, 5))
        bias_or_none = bias[0] if bias else None
        return Layer(weight, bias_or_none, stride, dilation, node.args[6], reading.parts, self.sources(reading))

    def sources(self, reading: Reading) -> tuple[int, ...]:
        """For each leaf the number of what comes from outside, or ``~k`` for the map of convolution k."""
        members = {each: ~k for k, each in enumerate(self.nodes)}
        return tuple(members[ref.node] if ref.node in members else self.leaves.index(ref) for ref in reading.leaves)

    def offsets(
        self, reading: Reading, read: Interval, held: Mapping[int, Interval], starts: Sequence[int]
    ) -> tuple[int, ...]:
        """For each leaf that is a map, where ``read`` starts in what there is of it."""
        kinds = [leaf.kind for part in reading.parts for leaf in part.program.leaves]
        origins = [
            held[ref.node].lo if ref.node in self.nodes else starts[self.leaves.index(ref)]
            for ref, kind in zip(reading.leaves, kinds, strict=True)
            if kind == MAP
        ]
        return tuple(read.lo - start for start in origins)

    def span(
        self,
        role: Role,
        index: int,
        held: Mapping[int, Interval],
        before: Mapping[int, Interval],
        starts: Sequence[int],
    ) -> Span:
        """One convolution's span where the buffers hold ``before``, and are to hold ``held``.

        Args:
            starts: where the tile's box of each leaf from outside starts.
        """
        node, mine, had = self.graph.nodes[index], held[index], before.get(index)
        lo = mine.lo if had is None else max(mine.lo, had.hi)
        fresh = Interval(min(lo, mine.hi), mine.hi)
        shift = 0 if had is None else mine.lo - had.lo
        if not fresh.size:
            return Span(0, fresh.lo - mine.lo, shift, 0, 0, ())
        rule, specs = rule_for(node.op), [self.graph.spec(ref) for ref in node.operands]
        assert isinstance(rule, Convolution)
        read = rule.needs(node, specs, 0, role, fresh)
        lead = rule.lead(node, specs, role, fresh, read)
        offsets = self.offsets(self.how.convolutions[index], read, held, starts)
        return Span(fresh.size, fresh.lo - mine.lo, shift, read.size, lead, offsets)


def as_read(graph: Graph, ref: Ref, value: torch.Tensor) -> torch.Tensor:
    """A leaf as the kernels read it: a map's columns next to each other, small values too."""
    rows = graph.spec(ref).is_map and (value.stride(3) == 1 or value.shape[3] == 1)
    return value if rows else value.contiguous()


def lying(tensor: torch.Tensor) -> Lying:
    """How a map lies; zeros for small values."""
    if tensor.dim() != 4:
        return 0, 0, tensor.element_size()
    return tensor.stride(1) if tensor.shape[1] > 1 else 0, tensor.stride(2), tensor.element_size()

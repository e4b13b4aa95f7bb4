"""Which tiles of a segment are computed alike: by the same ops on tensors of the same sizes, whatever their place.

Interior tiles of a grid are. What an op does on a tile follows from the sizes of its boxes, from where in an operand's
box its own lies, and for an op that pads from how far beyond its map's ends it reaches. Ops whose work depends on
absolute places (interpolation, random numbers, positions as values) make every tile one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Node, Ref
from wholegrad.graph.layout import Dim, Role
from wholegrad.graph.rules import channels, pad, pointwise, pool, rule_for, shape, variance, window
from wholegrad.graph.rules import reduction as sums
from wholegrad.graph.rules.normalize import NORMALIZE
from wholegrad.graph.segment import Segment, reduction_rule
from wholegrad.plan.tiles import Tile
from wholegrad.run.tile import operand_boxes

Edges = tuple[int, ...]
Beyond = Callable[[Graph, Node, Box, Box], Hashable]


def _within(have: Box, want: Box) -> Edges:
    return want.y0 - have.y0, have.y1 - want.y1, want.x0 - have.x0, have.x1 - want.x1


def _nothing(graph: Graph, node: Node, box: Box, have: Box) -> Hashable:
    return ()


def _convolved(graph: Graph, node: Node, box: Box, have: Box) -> Hashable:
    """Where the windows lie in the input: before it is padding, or (transposed) what is cropped."""
    rule, specs = rule_for(node.op), [graph.spec(ref) for ref in node.operands]
    assert isinstance(rule, window.Convolution)
    spans = ((Role.ROW, box.rows, have.rows), (Role.COL, box.cols, have.cols))
    return tuple(rule.lead(node, specs, role, out, got) for role, out, got in spans)


def _pooled(graph: Graph, node: Node, box: Box, have: Box) -> Hashable:
    """How far windows reach beyond the input, and how many pixels each counts."""
    rule, spec = rule_for(node.op), graph.spec(node.operands[0])
    assert isinstance(rule, pool.Pooling)
    found: list[Hashable] = []
    for role, out, got in ((Role.ROW, box.rows, have.rows), (Role.COL, box.cols, have.cols)):
        along = rule.along(node, role)
        read = window.window(out, *along)
        found.append((got.lo - read.lo, read.hi - got.hi))
        if isinstance(rule, pool.AveragePool):
            counted = bool(shape.arguments(node.op, node.args, node.kwargs)["count_include_pad"])
            found.append(tuple(pool.counts(out, along, shape.extent_of(spec, role), counted)))
    return tuple(found)


def _bordered(graph: Graph, node: Node, box: Box, have: Box) -> Hashable:
    """Where the box lies relative to the input's, and how much of it is padding on either side."""
    rule, spec = rule_for(node.op), graph.spec(node.operands[0])
    found: list[Hashable] = [box.y0 - have.y0, box.x0 - have.x0]
    if isinstance(rule, pad.BorderPad):
        left, _, top, _ = node.args[1]
        for before, out, got, role in ((top, box.rows, have.rows, Role.ROW), (left, box.cols, have.cols, Role.COL)):
            parts = pad.parts(shape.shifted(out, -before), shape.extent_of(spec, role))
            sources = rule.sources(node, shape.extent_of(spec, role), role, out)
            found.append(tuple((part.size, each.lo - got.lo) for part, each in zip(parts, sources, strict=True)))
    return tuple(found)


_ALIKE: tuple[tuple[type, Beyond], ...] = (
    (window.Convolution, _convolved),
    (pool.AveragePool, _pooled),
    (pool.MaxPool, _pooled),
    (pad.BorderPad, _bordered),
    (shape.ConstantPad, _bordered),
    (pointwise.Pointwise, _nothing),
    (shape.View, _nothing),
    (shape.Unsqueeze, _nothing),
    (shape.Permute, _nothing),
    (shape.Select, _nothing),
    (shape.Expand, _nothing),
    (channels.AlongChannels, _nothing),
    (channels.OverChannels, _nothing),
    (channels.ResizesChannels, _nothing),
    (channels.Unbind, _nothing),
    (channels.Stack, _nothing),
    (channels.LayerNorm, _nothing),
)
_SUMS = (sums.SumOrMean, sums.Extreme, sums.AnyOrAll, variance.Variance)


def _beyond(graph: Graph, node: Node) -> Beyond | None:
    """What besides boxes decides what a node does on a tile; None if its place does."""
    rule = rule_for(node.op)
    if node.draw >= 0:
        return None
    if node.op is NORMALIZE or isinstance(rule, sums.SumOrMean):  # over channels alone
        return _nothing
    if isinstance(rule, pool.MaxPool) and _read(graph, Ref(node.index, 1)):
        return None  # positions in the whole plane
    if isinstance(rule, channels.Concatenate):
        along = any(axis.role is not Role.PLAIN for axis in _joined(node))
        return None if along else _nothing
    return next((found for kind, found in _ALIKE if isinstance(rule, kind)), None)


def _read(graph: Graph, ref: Ref) -> bool:
    return any(ref in node.operands for node in graph.nodes)


def _joined(node: Node) -> Dim:
    layout = node.outputs[0].layout
    dim = shape.arguments(node.op, node.args, node.kwargs)["dim"]
    return layout[dim % len(layout)]


class Kinds:
    """Of the tiles of one segment."""

    def __init__(self, graph: Graph, segment: Segment, nodes: Iterable[int]) -> None:
        self.graph, self.segment, self.nodes = graph, segment, tuple(nodes)
        every = {index: _beyond(graph, graph.nodes[index]) for index in self.nodes}
        self._beyond = {index: found for index, found in every.items() if found is not None}
        self.alike = len(self._beyond) == len(every) and all(
            isinstance(reduction_rule(graph, index), _SUMS) for index in segment.reductions
        )

    def of(self, tile: Tile) -> Hashable | None:
        """Equal for tiles that are computed alike; None where each is one of its own."""
        if not self.alike:
            return None
        graph, found = self.graph, []
        for index in self.nodes:
            box = tile.boxes.get(index)
            if box is None:
                continue
            node = graph.nodes[index]
            wanted = operand_boxes(graph, node, box)
            inside = [
                None if want is None else _within(tile.boxes[ref.node], want)
                for ref, want in zip(node.operands, wanted, strict=True)
            ]
            first = next((want for want in wanted if want is not None), box)
            found.append((index, box.height, box.width, *inside, self._beyond[index](graph, node, box, first)))
        read = [(ref, _size(tile.boxes[ref.node])) for ref in self.segment.maps if ref.node in tile.boxes]
        owned = [(ref, _within(tile.boxes[ref.node], box)) for ref, box in tile.owned.items() if ref.node in tile.boxes]
        return tuple(found), tuple(read), tuple(owned)


def _size(box: Box) -> tuple[int, int]:
    return box.height, box.width

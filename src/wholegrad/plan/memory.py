"""Predict peak memory before anything runs: arithmetic over spans, no tensors.

Words as in the documentation: *reserved* is what interpreter, libraries and allocator hold whatever the plan;
*projected* is reserved plus boundaries, their gradients, parameters' gradients, readers' caches and the largest working
set of a tile. A tile's working set follows the order in which the executor runs and frees: in the forward sweep a
value dies after its last reader, in the backward sweep values stay until the pull-back has passed them.

``SLACK`` covers what the arithmetic does not see: the libraries' own scratch space, the narrow copy of a box on its way
from disk (at most half of the box), and the heap, which between tiles of unequal size comes apart into pieces that do
not fit the next request. It was set so that the measured peak stays below the projected one over the grid of
``tests/test_memory.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wholegrad.graph.graph import READERS, Graph, Kind, Node, Ref
from wholegrad.graph.rules import rule_for
from wholegrad.graph.rules.fill import FILLS
from wholegrad.graph.segment import Segment
from wholegrad.plan.tiles import AxisTiles

SLACK = 1.5
LIBRARIES = 188 << 20  # kernels (oneDNN's, our own and LLVM), thread stacks, autograd and decoders once they have run
LEFTOVER = 6 << 20  # what each further segment leaves in pieces of the heap that cannot be given back
DOUBLE = 8


@dataclass(frozen=True)
class Working:
    """Bytes that one tile of a segment needs at its largest."""

    forward: int
    backward: int


def leftover(segments: int) -> int:
    """Bytes that all but the first of so many segments leave behind in the heap."""
    return LEFTOVER * max(segments - 1, 0)


def node_bytes(graph: Graph, index: int, rows: AxisTiles, cols: AxisTiles) -> int:
    """The largest that a node's outputs get on one tile, in bytes."""
    area = rows.largest.get(index, 0) * cols.largest.get(index, 0)
    return area * sum(spec.pixel_bytes for spec in graph.nodes[index].outputs)


def working(graph: Graph, segment: Segment, rows: AxisTiles, cols: AxisTiles) -> Working:
    """What the largest tile of a segment needs, forward only and forward with pull-back."""
    sizes = {i: node_bytes(graph, i, rows, cols) for i in (*segment.nodes, *(ref.node for ref in segment.maps))}
    raw = sum(_raw(graph, ref, rows, cols) for ref in segment.maps)
    forward = raw + _forward(graph, segment, sizes)
    backward = raw + _backward(graph, segment, sizes)
    return Working(int(forward * SLACK), int(backward * SLACK))


def _raw(graph: Graph, ref: Ref, rows: AxisTiles, cols: AxisTiles) -> int:
    """The reader's own copy of a box, before it becomes a tensor."""
    if graph.nodes[ref.node].kind not in READERS:
        return 0
    spec = graph.spec(ref)
    return rows.largest.get(ref.node, 0) * cols.largest.get(ref.node, 0) * spec.pixel_bytes


def _copies(graph: Graph, index: int, sizes: Mapping[int, int]) -> int:
    """Padded or cropped copies that a rule makes of a node's input and output, and the library's rearranged ones."""
    node = graph.nodes[index]
    rule = rule_for(node.op)
    if rule is None or rule.copies == (0, 0):
        return 0
    transposed = node.op is torch.ops.aten.convolution.default and node.args[6]
    inputs, outputs = rule.copies
    return inputs * sizes[node.operands[0].node] + (outputs or transposed) * sizes[index]


def _forward(graph: Graph, segment: Segment, sizes: Mapping[int, int]) -> int:
    """Peak of a walk that frees every value after its last reader."""
    last: dict[int, int] = {}
    inside = set(segment.nodes)
    for index in segment.nodes:
        for ref in graph.nodes[index].operands:
            last[ref.node] = index
    live = sum(sizes[ref.node] for ref in segment.maps)
    peak = live
    for index in segment.nodes:
        live += sizes[index]
        peak = max(peak, live + _copies(graph, index, sizes))
        for ref in graph.nodes[index].operands:
            if last[ref.node] == index and (ref.node in inside or ref in segment.maps):
                live -= sizes[ref.node]
    return peak + DOUBLE * _widest(graph, segment, sizes)


def _widest(graph: Graph, segment: Segment, sizes: Mapping[int, int]) -> int:
    """Pixels of the largest map that a reduction sums: room for one temporary in float64."""
    found = [graph.nodes[i].operands[0] for i in segment.reductions]
    return max((sizes[ref.node] // max(graph.spec(ref).dtype.itemsize, 1) for ref in found), default=0)


def _backward(graph: Graph, segment: Segment, sizes: Mapping[int, int]) -> int:
    """Peak of forward with everything kept, then the walk back with gradients coming and going."""
    inside = set(segment.nodes)
    kept = {i: sizes[i] + _copies(graph, i, sizes) for i in segment.nodes if graph.nodes[i].needs_grad}
    inputs = sum(sizes[ref.node] for ref in segment.maps)
    free = sum(sizes[i] for i in segment.nodes if not graph.nodes[i].needs_grad)
    live = inputs + free + sum(kept.values())
    peak = live + DOUBLE * _widest(graph, segment, sizes)
    grads: dict[int, int] = {ref.node: sizes[ref.node] for ref in segment.owned(graph)}
    for index in reversed(segment.nodes):
        if index not in kept:
            continue
        grads.setdefault(index, sizes[index])
        fresh = 0
        for ref in graph.nodes[index].operands:
            if graph.nodes[ref.node].needs_grad and (ref.node in inside or ref in segment.maps):
                fresh += sizes[ref.node]  # a second contribution is a tensor of its own until it is added
                grads[ref.node] = sizes[ref.node]
        peak = max(peak, live + sum(grads.values()) + fresh + _copies(graph, index, sizes))
        live -= kept[index]
        del grads[index]
    return peak


def gradient_accumulators(graph: Graph) -> int:
    """Parameters' gradients in float64 and once more in their own dtype."""
    return sum(
        node.outputs[0].nbytes + node.outputs[0].nbytes // node.outputs[0].dtype.itemsize * DOUBLE
        for node in graph.of_kind(Kind.PARAMETER)
    )


def held_whole(graph: Graph) -> int:
    """Bytes of small values (those of dense regions above all, rule 10) and of their gradients, all held at once."""
    kinds = (Kind.SMALL, Kind.REDUCTION)
    values = sum(spec.held_bytes for node in graph.of_kind(*kinds) for spec in node.outputs if node.op not in FILLS)
    grads = sum(spec.held_bytes for node in graph.of_kind(*kinds) for spec in node.outputs if node.needs_grad)
    return values + (grads if graph.loss is not None else 0)


def largest_whole(graph: Graph) -> Node | None:
    """The node with the largest value that is held whole."""
    nodes = [node for node in graph.of_kind(Kind.SMALL, Kind.REDUCTION) if node.op not in FILLS]
    return max(nodes, key=lambda node: sum(spec.held_bytes for spec in node.outputs), default=None)


def whole_image(graph: Graph) -> int:
    """Bytes that autograd on the whole image would hold: every map that a gradient needs, and the largest gradient."""
    maps = [
        sum(spec.nbytes for spec in node.outputs)
        for node in graph.nodes
        if node.outputs[0].is_map and (node.needs_grad or node.kind in READERS) and not _is_view(node.op)
    ]
    return sum(maps) + 2 * max(maps, default=0) + gradient_accumulators(graph)


def _is_view(op: object) -> bool:
    schema = getattr(op, "_schema", None)
    return any(found.alias_info is not None for found in schema.returns) if schema else False

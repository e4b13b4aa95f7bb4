"""What the profile counts of a node on a tile: bytes and multiply-adds follow from boxes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from wholegrad import clock
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Node, Ref
from wholegrad.graph.inline import Inlined
from wholegrad.graph.rules import rule_for
from wholegrad.graph.strips import Strip

Boxes = Callable[[Graph, Node, Box], tuple[Box | None, ...]]


def node_span(graph: Graph, how: Inlined, node: Node, box: Box, operand_boxes: Boxes) -> clock.Off:
    """A span for a node that runs forward on ``box`` of its own map, and on those boxes of its operands."""
    if clock.recorder is None:
        return clock.OFF
    if how.strip is not None and node.index == how.strip.out.node:
        return _strip_span(clock.recorder, graph, how, how.strip, box)
    rule = rule_for(node.op)
    assert rule is not None
    macs = rule.macs(node, [graph.spec(ref) for ref in node.operands]) * box.height * box.width
    found = clock.Label(node.path or "model", macs, node.outputs[0].dtype == torch.float64)
    return clock.node_span(clock.recorder, op_name(node), found, _bytes(graph, how, node, box, operand_boxes))


def _strip_span(by: clock.Recorder, graph: Graph, how: Inlined, strip: Strip, box: Box) -> clock.Off:
    """A span of convolutions that run together: what they multiply, read and write without their halos."""
    last = graph.nodes[strip.last]
    share = box.area / (last.outputs[0].rows * last.outputs[0].cols)
    macs = 0.0
    for index in strip.nodes:
        node, spec = graph.nodes[index], graph.nodes[index].outputs[0]
        rule = rule_for(node.op)
        assert rule is not None
        macs += rule.macs(node, [graph.spec(ref) for ref in node.operands]) * spec.rows * spec.cols
    size = 0
    for ref in strip.leaves(how):
        spec = graph.spec(ref)
        size += spec.nbytes // (spec.dtype.itemsize if ref in how.raw else 1)
    found = clock.Label(last.path or "model", macs * share, last.outputs[0].dtype == torch.float64)
    return clock.node_span(by, "strips", found, int((size + last.outputs[0].nbytes) * share))


def op_name(node: Node) -> str:
    """``cat`` of ``aten.cat.default``."""
    name: str = node.op.__name__
    return name.split(".")[0]


def _bytes(graph: Graph, how: Inlined, node: Node, box: Box, operand_boxes: Boxes) -> int:
    """Bytes that a node reads and writes; none where the result is a view."""
    if node.index in how.chains:
        read = [(ref, box) for ref in how.chains[node.index].leaves]
        return _sum(graph, how, read) + _written(node, box)
    if any(value.alias_info is not None for value in node.op._schema.returns):
        return 0
    boxes = operand_boxes(graph, node, box)
    places = list(zip(node.operands, boxes, strict=True))
    if node.index in how.convolutions:
        places = [(ref, boxes[0]) for ref in how.convolutions[node.index].leaves] + places[1:]
    return _sum(graph, how, places) + _written(node, box)


def _written(node: Node, box: Box) -> int:
    return sum(spec.pixel_bytes for spec in node.outputs) * box.height * box.width


def _sum(graph: Graph, how: Inlined, places: Iterable[tuple[Ref, Box | None]]) -> int:
    total = 0
    for ref, box in places:
        spec = graph.spec(ref)
        if box is None or not spec.is_map:
            total += spec.nbytes
        else:
            each = spec.pixel_bytes // (spec.dtype.itemsize if ref in how.raw else 1)
            total += each * box.height * box.width
    return total

"""Predict time, up to a factor: multiply-adds and bytes over all tiles, recomputed halos included.

The rates are round estimates for PyTorch's own kernels on a CPU, not measurements; only their ratios matter to the
choice between plans.
"""

from __future__ import annotations

from wholegrad.graph.graph import Graph
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment
from wholegrad.plan.tiles import AxisTiles

SECONDS_PER_MAC = 5e-11
SECONDS_PER_BYTE = 4e-10
SECONDS_PER_CALL = 3e-5  # one op on one tile, whatever its size
BACKWARD = 2.5  # pulling back costs this many forwards


def node_macs(graph: Graph, index: int, area: float) -> float:
    """Multiply-adds of a node on ``area`` pixels of its own map."""
    node = graph.nodes[index]
    rule = rule_for(node.op)
    assert rule is not None
    return rule.macs(node, [graph.spec(ref) for ref in node.operands]) * area


def forward_macs(graph: Graph, segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Multiply-adds of one forward run over all tiles."""
    return sum(node_macs(graph, i, rows.total.get(i, 0) * cols.total.get(i, 0)) for i in segment.nodes)


def forward_seconds(graph: Graph, segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Predicted seconds of one forward run over all tiles."""
    tiles = rows.count * cols.count
    total = tiles * SECONDS_PER_CALL * (len(segment.nodes) + len(segment.maps) + len(segment.reductions))
    for index in (*segment.nodes, *(ref.node for ref in segment.maps)):
        area = float(rows.total.get(index, 0) * cols.total.get(index, 0))
        total += area * sum(spec.pixel_bytes for spec in graph.nodes[index].outputs) * SECONDS_PER_BYTE
        if index in segment.nodes:
            total += node_macs(graph, index, area) * SECONDS_PER_MAC
    return total


def whole_macs(graph: Graph) -> float:
    """Multiply-adds of one forward run on the whole image, nothing computed twice."""
    return sum(
        node_macs(graph, node.index, node.outputs[0].rows * node.outputs[0].cols)
        for node in graph.nodes
        if node.op is not None and node.outputs[0].is_map
    )

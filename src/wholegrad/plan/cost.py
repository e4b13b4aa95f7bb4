"""Predict time, up to a factor: multiply-adds and bytes over all tiles, recomputed halos included.

The rates are round estimates for PyTorch's own kernels on a CPU, not measurements; only their ratios matter to the
choice between plans.
"""

from __future__ import annotations

from collections.abc import Sequence

from wholegrad.graph.graph import Graph, Node
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment
from wholegrad.plan.tiles import AxisTiles

SECONDS_PER_MAC = 5e-11
SECONDS_PER_BYTE = 4e-10
SECONDS_PER_CALL = 3e-5  # one op on one tile, whatever its size
BACKWARD = 2.5  # pulling back costs this many forwards


def pixel_macs(graph: Graph) -> list[float]:
    """Multiply-adds of each node for one pixel of its own map."""

    def macs(node: Node) -> float:
        rule = None if node.op is None else rule_for(node.op)
        return 0.0 if rule is None else rule.macs(node, [graph.spec(ref) for ref in node.operands])

    return [macs(node) for node in graph.nodes]


def forward_macs(macs: Sequence[float], segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Multiply-adds of one forward run over all tiles, given those of a pixel."""
    return sum(macs[i] * rows.total.get(i, 0) * cols.total.get(i, 0) for i in segment.nodes)


def forward_seconds(graph: Graph, macs: Sequence[float], segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Predicted seconds of one forward run over all tiles."""
    tiles = rows.count * cols.count
    total = tiles * SECONDS_PER_CALL * (len(segment.nodes) + len(segment.maps) + len(segment.reductions))
    total += forward_macs(macs, segment, rows, cols) * SECONDS_PER_MAC
    for index in (*segment.nodes, *(ref.node for ref in segment.maps)):
        area = float(rows.total.get(index, 0) * cols.total.get(index, 0))
        total += area * sum(spec.pixel_bytes for spec in graph.nodes[index].outputs) * SECONDS_PER_BYTE
    return total


def whole_macs(graph: Graph) -> float:
    """Multiply-adds of one forward run on the whole image, nothing computed twice."""
    return sum(
        each * node.outputs[0].rows * node.outputs[0].cols
        for each, node in zip(pixel_macs(graph), graph.nodes, strict=True)
    )

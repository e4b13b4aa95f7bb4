"""Predict time, up to a factor: multiply-adds and bytes over all tiles, recomputed halos included.

The rates are round estimates for PyTorch's own kernels on a CPU, not measurements; only their ratios matter to the
choice between plans.
"""

from __future__ import annotations

from collections.abc import Sequence

from wholegrad.graph.graph import READERS, Graph, Node
from wholegrad.graph.inline import Inlined
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment
from wholegrad.plan.tiles import AxisTiles

SECONDS_PER_MAC = 5e-11
SECONDS_PER_BYTE = 4e-10
SECONDS_PER_CALL = 3e-5  # one op on one tile, whatever its size
# Of the project's own kernels, one thread (benchmarks/kernels): 75 GFLOP/s, and maps written and read once.
THIN_SECONDS_PER_MAC = 2.7e-11
THIN_SECONDS_PER_BYTE = 1e-10
SECONDS_PER_ROW = 8e-7  # of one channel of an image or target, one system call
KEPT = 32 << 20  # bytes of a tensor beyond which the C library does not keep its memory for the next tile
SECONDS_PER_FRESH_BYTE = 8e-10  # first touch
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


def forward_seconds(
    graph: Graph, macs: Sequence[float], segment: Segment, how: Inlined, rows: AxisTiles, cols: AxisTiles
) -> float:
    """Predicted seconds of one forward run over all tiles."""
    tiles = rows.count * cols.count
    total = tiles * SECONDS_PER_CALL * (len(how.nodes) + len(segment.maps) + len(segment.reductions))
    for index in how.nodes:
        own = index in how.convolutions or index in how.chains
        area = float(rows.total.get(index, 0) * cols.total.get(index, 0))
        total += area * macs[index] * (THIN_SECONDS_PER_MAC if own else SECONDS_PER_MAC)
        total += area * _pixel_bytes(graph, index) * (THIN_SECONDS_PER_BYTE if own else SECONDS_PER_BYTE)
        if rows.largest.get(index, 0) * cols.largest.get(index, 0) * _pixel_bytes(graph, index) > KEPT:
            total += area * _pixel_bytes(graph, index) * SECONDS_PER_FRESH_BYTE
    for ref in segment.maps:
        area = float(rows.total.get(ref.node, 0) * cols.total.get(ref.node, 0))
        size = graph.spec(ref).pixel_bytes
        if ref in how.raw:
            size //= graph.spec(ref).dtype.itemsize
        total += area * size * SECONDS_PER_BYTE
        if graph.nodes[ref.node].kind in READERS:
            channels = graph.spec(ref).pixel_bytes // graph.spec(ref).dtype.itemsize
            total += channels * rows.total.get(ref.node, 0) * cols.count * SECONDS_PER_ROW
    return total


def _pixel_bytes(graph: Graph, index: int) -> int:
    return sum(spec.pixel_bytes for spec in graph.nodes[index].outputs)


def whole_macs(graph: Graph) -> float:
    """Multiply-adds of one forward run on the whole image, nothing computed twice."""
    return sum(
        each * node.outputs[0].rows * node.outputs[0].cols
        for each, node in zip(pixel_macs(graph), graph.nodes, strict=True)
    )

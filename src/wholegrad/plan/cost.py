"""Predict time: multiply-adds and bytes over all tiles, recomputed halos included, in seconds of one thread.

The rates of convolutions and of fresh pages were measured on one core (AMD EPYC Zen 4 with AVX-512, torch 2.13.0,
float32; see ``benchmarks/wide``); those of bytes and of calls are estimates.
"""

from __future__ import annotations

from collections.abc import Sequence

from wholegrad.graph.graph import Graph, Node
from wholegrad.graph.recall import recallable
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment
from wholegrad.plan.tiles import AxisTiles

SECONDS_PER_MAC = 1.8e-11
SECONDS_PER_BYTE = 1.5e-10  # of what an op makes, or a tile reads
LARGE = 1 << 25  # bytes of a tensor from which on glibc takes fresh pages for each
SECONDS_PER_FRESH_BYTE = 1e-9
SECONDS_PER_CALL = 1e-5  # one op on one tile, whatever its size
MACS_BACKWARD = 2.2  # pulling back takes so many forwards: of a convolution
BYTES_BACKWARD = 2.5  # and of anything else


def pixel_macs(graph: Graph) -> list[float]:
    """Multiply-adds of each node for one pixel of its own map."""

    def macs(node: Node) -> float:
        rule = None if node.op is None else rule_for(node.op)
        return 0.0 if rule is None else rule.macs(node, [graph.spec(ref) for ref in node.operands])

    return [macs(node) for node in graph.nodes]


def forward_macs(macs: Sequence[float], segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Multiply-adds of one forward run over all tiles, given those of a pixel."""
    return sum(macs[i] * rows.total.get(i, 0) * cols.total.get(i, 0) for i in segment.nodes)


def again_macs(graph: Graph, macs: Sequence[float], segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Those of the forward run of the backward sweep, where a convolution may take its values from a store."""
    stored = recallable(graph, segment, set(segment.outputs))
    saved = sum(macs[ref.node] * rows.total.get(ref.node, 0) * cols.total.get(ref.node, 0) for ref in stored)
    return forward_macs(macs, segment, rows, cols) - saved


def forward_seconds(graph: Graph, macs: Sequence[float], segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Predicted seconds of one forward run over all tiles."""
    calls, moved = _calls(segment, rows, cols), _moved(graph, segment, rows, cols)
    return calls + forward_macs(macs, segment, rows, cols) * SECONDS_PER_MAC + moved * SECONDS_PER_BYTE


def backward_seconds(graph: Graph, macs: Sequence[float], segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Predicted seconds of running all tiles again and pulling them back."""
    work = again_macs(graph, macs, segment, rows, cols) + MACS_BACKWARD * forward_macs(macs, segment, rows, cols)
    moved = (1 + BYTES_BACKWARD) * _moved(graph, segment, rows, cols)
    return 3 * _calls(segment, rows, cols) + work * SECONDS_PER_MAC + moved * SECONDS_PER_BYTE


def _calls(segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Seconds of the calls themselves."""
    each = len(segment.nodes) + len(segment.maps) + len(segment.reductions)
    return rows.count * cols.count * SECONDS_PER_CALL * each


def _moved(graph: Graph, segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Bytes that all tiles read, write and keep, of every map that is read, made or summed; fresh ones count more."""
    touched = [*segment.nodes, *(ref.node for ref in segment.maps)]
    touched += [ref.node for ref in segment.outputs]
    touched += [graph.nodes[i].operands[0].node for i in segment.reductions]
    total = 0.0
    for i in touched:
        pixel = max(spec.pixel_bytes for spec in graph.nodes[i].outputs)
        large = rows.largest.get(i, 0) * cols.largest.get(i, 0) * pixel >= LARGE
        weight = 1 + SECONDS_PER_FRESH_BYTE / SECONDS_PER_BYTE if large else 1.0
        total += weight * pixel * rows.total.get(i, 0) * cols.total.get(i, 0)
    return total


def whole_macs(graph: Graph) -> float:
    """Multiply-adds of one forward run on the whole image, nothing computed twice."""
    return sum(
        each * node.outputs[0].rows * node.outputs[0].cols
        for each, node in zip(pixel_macs(graph), graph.nodes, strict=True)
    )

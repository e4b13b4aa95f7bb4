"""Predict time: multiply-adds and bytes over all tiles, recomputed halos included, in seconds of one thread.

The rates of convolutions and of fresh pages were measured on one core (AMD EPYC Zen 4 with AVX-512, torch 2.13.0,
float32; see ``benchmarks/wide``); those of bytes and of calls are estimates.
"""

from __future__ import annotations

from collections.abc import Sequence

from wholegrad.graph.graph import READERS, Graph, Node
from wholegrad.graph.inline import Inlined
from wholegrad.graph.recall import recallable
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment
from wholegrad.plan.tiles import AxisTiles

SECONDS_PER_MAC = 1.8e-11
SECONDS_PER_BYTE = 1.5e-10  # of what an op makes, or a tile reads
# Of the project's own kernels (benchmarks/kernels): 75 GFLOP/s, and maps written and read once.
THIN_SECONDS_PER_MAC = 2.7e-11
THIN_SECONDS_PER_BYTE = 1e-10
SECONDS_PER_ROW = 8e-7  # of one channel of an image or target, one system call
LARGE = 1 << 25  # bytes of a tensor from which on glibc takes fresh pages for each
SECONDS_PER_FRESH_BYTE = 1e-9
SECONDS_PER_DISK_BYTE = 1e-9  # of a boundary and of its gradient, written and read through the page cache
SECONDS_PER_CALL = 3e-5  # one op on one tile, whatever its size
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


def forward_seconds(
    graph: Graph, macs: Sequence[float], segment: Segment, how: Inlined, rows: AxisTiles, cols: AxisTiles
) -> float:
    """Predicted seconds of one forward run over all tiles."""
    work = sum(_multiplying(macs, how, rows, cols))
    moved = _making(graph, segment, how, rows, cols) + _reading(graph, segment, how, rows, cols)
    return _calls(segment, how, rows, cols) + work + moved


def backward_seconds(
    graph: Graph, macs: Sequence[float], segment: Segment, how: Inlined, rows: AxisTiles, cols: AxisTiles
) -> float:
    """Predicted seconds of running all tiles again and pulling them back."""
    wide, thin = _multiplying(macs, how, rows, cols)
    saved = forward_macs(macs, segment, rows, cols) - again_macs(graph, macs, segment, rows, cols)
    work = (1 + MACS_BACKWARD) * (wide + thin) - saved * SECONDS_PER_MAC
    moved = (1 + BYTES_BACKWARD) * _making(graph, segment, how, rows, cols)
    return 3 * _calls(segment, how, rows, cols) + work + moved + _reading(graph, segment, how, rows, cols)


def _multiplying(macs: Sequence[float], how: Inlined, rows: AxisTiles, cols: AxisTiles) -> tuple[float, float]:
    """Seconds of multiply-adds by the library and by the project's own kernels."""
    work = [0.0, 0.0]
    for index in how.nodes:
        for i in how.runs(index):
            work[_own(how, i)] += macs[i] * rows.total.get(i, 0) * cols.total.get(i, 0)
    return work[0] * SECONDS_PER_MAC, work[1] * THIN_SECONDS_PER_MAC


def _own(how: Inlined, index: int) -> bool:
    return index in how.convolutions or index in how.chains


def _calls(segment: Segment, how: Inlined, rows: AxisTiles, cols: AxisTiles) -> float:
    """Seconds of the calls themselves."""
    each = len(how.nodes) + len(segment.maps) + len(segment.reductions)
    return rows.count * cols.count * SECONDS_PER_CALL * each


def _making(graph: Graph, segment: Segment, how: Inlined, rows: AxisTiles, cols: AxisTiles) -> float:
    """Seconds of writing every map that is made, kept or summed; fresh pages take more."""
    summed = [graph.nodes[i].operands[0].node for i in segment.reductions if i not in how.sums]
    total = 0.0
    for i in (*how.nodes, *(ref.node for ref in segment.outputs), *summed):
        pixel = how.pixel_bytes(graph, i)
        rate = THIN_SECONDS_PER_BYTE if _own(how, i) else SECONDS_PER_BYTE
        if rows.largest.get(i, 0) * cols.largest.get(i, 0) * pixel >= LARGE:
            rate += SECONDS_PER_FRESH_BYTE
        total += rate * pixel * rows.total.get(i, 0) * cols.total.get(i, 0)
    return total


def _reading(graph: Graph, segment: Segment, how: Inlined, rows: AxisTiles, cols: AxisTiles) -> float:
    """Seconds of reading images, targets and boundaries."""
    total = 0.0
    for ref in segment.maps:
        pixel, item = graph.spec(ref).pixel_bytes, graph.spec(ref).dtype.itemsize
        size = pixel // item if ref in how.raw else pixel
        area = rows.largest.get(ref.node, 0) * cols.largest.get(ref.node, 0)
        fresh = ref in how.raw and area * size >= LARGE
        rate = SECONDS_PER_BYTE + (SECONDS_PER_FRESH_BYTE if fresh else 0.0)
        total += rows.total.get(ref.node, 0) * cols.total.get(ref.node, 0) * size * rate
        if graph.nodes[ref.node].kind in READERS:
            total += pixel // item * rows.total.get(ref.node, 0) * cols.count * SECONDS_PER_ROW
    return total


def whole_macs(graph: Graph) -> float:
    """Multiply-adds of one forward run on the whole image, nothing computed twice."""
    return sum(
        each * node.outputs[0].rows * node.outputs[0].cols
        for each, node in zip(pixel_macs(graph), graph.nodes, strict=True)
    )

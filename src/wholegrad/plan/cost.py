"""Predict time: work of all tiles, recomputed halos included, times the machine's rates (:mod:`wholegrad.plan.rates`).

With ``A_i`` the pixels of node ``i`` summed over all tiles (rows times columns, halos counted each time), a segment's

    forward  = sum_i A_i (macs_i f_i + made_i m_i) + reading + calls
    backward = that again, less what is recalled, + sum_i A_i (macs_i (x_i + w_i) + made_i m_i b) + boundaries'
             + tiles x parameters

``macs_i`` are multiply-adds of a pixel, ``f``, ``x`` and ``w`` the rates of the forward run and of the gradients of
input and weight (where they are wanted at all), ``made_i`` bytes of a pixel that an op makes, at the rate ``m`` of
whoever makes them, and ``b`` of the pull-back. Tensors of ``LARGE`` bytes or more come in fresh pages, which cost more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wholegrad.graph.graph import READERS, Graph, Node
from wholegrad.graph.inline import Inlined
from wholegrad.graph.recall import recallable
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment
from wholegrad.plan.rates import Rates
from wholegrad.plan.tiles import AxisTiles

ADDED, READ = 1.7, 0.7  # of what writing takes: adding to a boundary's gradient, and reading that
LARGE = 1 << 25  # bytes of a tensor from which on glibc takes fresh pages for each

Table = npt.NDArray[np.float64]


def pixel_macs(graph: Graph) -> list[float]:
    """Multiply-adds of each node for one pixel of its own map."""

    def macs(node: Node) -> float:
        rule = None if node.op is None else rule_for(node.op)
        return 0.0 if rule is None else rule.macs(node, [graph.spec(ref) for ref in node.operands])

    return [macs(node) for node in graph.nodes]


def whole_macs(graph: Graph, macs: Sequence[float]) -> float:
    """Multiply-adds of one forward run on the whole image, nothing computed twice."""
    return sum(each * n.outputs[0].rows * n.outputs[0].cols for each, n in zip(macs, graph.nodes, strict=True))


def forward_macs(macs: Sequence[float], segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Multiply-adds of one forward run over all tiles, given those of a pixel."""
    return sum(macs[i] * rows.total.get(i, 0) * cols.total.get(i, 0) for i in segment.nodes if macs[i])


def again_macs(graph: Graph, macs: Sequence[float], segment: Segment, rows: AxisTiles, cols: AxisTiles) -> float:
    """Those of the forward run of the backward sweep, where a convolution may take its values from a store."""
    stored = recallable(graph, segment, set(segment.outputs))
    saved = sum(macs[ref.node] * rows.total.get(ref.node, 0) * cols.total.get(ref.node, 0) for ref in stored)
    return forward_macs(macs, segment, rows, cols) - saved


@dataclass(frozen=True)
class Seconds:
    """Seconds of one thread for tiles of some heights (down) and widths (across): tables of one number each."""

    forward: Table
    backward: Table


class Bill:
    """What a segment costs for each pixel of each of its nodes, forward and backward, ready for any tiles."""

    def __init__(self, graph: Graph, macs: Sequence[float], segment: Segment, how: Inlined, rates: Rates) -> None:
        self.graph, self.macs, self.segment, self.how, self.rates = graph, macs, segment, how, rates
        summed = [graph.nodes[i].operands[0].node for i in segment.reductions if i not in how.sums]
        self.nodes = sorted({*segment.nodes, *(ref.node for ref in segment.maps), *summed})
        self.place = {index: k for k, index in enumerate(self.nodes)}
        count = len(self.nodes)
        self.forward, self.backward = np.zeros(count), np.zeros(count)
        self.pixel, self.rows = np.zeros(count), np.zeros(count)
        self.fresh_forward, self.fresh_backward = np.zeros(count), np.zeros(count)
        recalled = {ref.node for ref in recallable(graph, segment, set(segment.outputs))}
        for index in how.nodes:
            for i in how.runs(index):
                self._multiply(i, i in recalled)
        for index in how.nodes:
            self._make(index)
        for index in summed:
            size, at = graph.nodes[index].outputs[0].pixel_bytes, self.place[index]
            self.forward[at] += rates.summed * size
            self.backward[at] += (rates.summed + rates.backward * rates.made) * size
        self._move()
        self.each = len(how.nodes) + len(segment.maps) + len(segment.reductions)
        owned = [graph.nodes[ref.node] for ref in segment.smalls]
        self.merging = rates.parameter * sum(node.outputs[0].numel for node in owned if node.needs_grad)

    def _multiply(self, i: int, recalled: bool) -> None:
        if not self.macs[i]:
            return
        ahead, of_input, of_weight = self._rates_of(i)
        node, at = self.graph.nodes[i], self.place[i]
        wants = [self.graph.nodes[ref.node].needs_grad for ref in node.operands]
        back = of_input * wants[0] + of_weight * any(wants[1:2])
        self.forward[at] += self.macs[i] * ahead
        self.backward[at] += self.macs[i] * (back + (0.0 if recalled else ahead))

    def _rates_of(self, i: int) -> tuple[float, float, float]:
        """Seconds of a multiply-add of a node: forward, for its input's gradient and for its weight's."""
        node = self.graph.nodes[i]
        weight = self.graph.spec(node.operands[1]).shape
        if len(weight) != 4:
            return (self.rates.product,) * 3
        return self.rates.convolution(min(weight[:2]), i in self.how.convolutions)

    def _make(self, index: int) -> None:
        """Writing a map; with the project's own convolutions that is part of a multiply-add."""
        size, at = self.how.pixel_bytes(self.graph, index), self.place[index]
        rate = self.rates.passed if index in self.how.chains else self.rates.made
        if index in self.how.convolutions:
            rate = 0.0
        self.forward[at] += rate * size
        self.backward[at] += rate * size * (1 + self.rates.backward)
        self.pixel[at] = max(self.pixel[at], size)
        self.fresh_forward[at] += self.rates.fresh * size
        self.fresh_backward[at] += self.rates.fresh * size

    def _move(self) -> None:
        """Reading images, targets and boundaries, writing boundaries, and the same of boundaries' gradients."""
        graph, rates = self.graph, self.rates
        for ref in self.segment.maps:
            spec, at, node = graph.spec(ref), self.place[ref.node], graph.nodes[ref.node]
            pixel, item = spec.pixel_bytes, spec.dtype.itemsize
            if node.kind in READERS:
                size = pixel // item if ref in self.how.raw else pixel
                self.forward[at] += size * rates.pixels
                self.backward[at] += size * rates.pixels
                self.rows[at] = pixel // item * rates.row
                self.pixel[at] = size
                self.fresh_forward[at] += size * rates.fresh
                self.fresh_backward[at] += size * rates.fresh
            else:
                self.backward[at] += pixel * rates.stored * ADDED * node.needs_grad
        for ref in self.segment.outputs:
            spec, at = graph.spec(ref), self.place[ref.node]
            self.forward[at] += spec.pixel_bytes * rates.stored
            self.backward[at] += spec.pixel_bytes * rates.stored * READ

    def seconds(self, rows: Sequence[AxisTiles], cols: Sequence[AxisTiles]) -> Seconds:
        """Of all tiles, for each of these heights with each of these widths."""
        high, wide = ([[t.total.get(i, 0.0) for t in tiles] for i in self.nodes] for tiles in (rows, cols))
        down, across = np.array(high), np.array(wide)  # (nodes, heights), (nodes, widths)
        tiles = np.outer([t.count for t in rows], [t.count for t in cols])
        count = tiles * self.each * self.rates.call
        lines = np.outer(self.rows @ down, [t.count for t in cols])
        large_high, large_wide = (
            np.array([[t.largest.get(i, 0) for t in tiles] for i in self.nodes], np.float64) for tiles in (rows, cols)
        )
        ahead = down.T @ (self.forward[:, None] * across) + count + lines
        back = down.T @ (self.backward[:, None] * across) + 3 * count + lines + tiles * self.merging
        biggest = large_high.max(1) * large_wide.max(1) * self.pixel
        for k in np.flatnonzero(biggest >= LARGE):
            fresh = np.outer(large_high[k], large_wide[k]) * self.pixel[k] >= LARGE
            area = np.where(fresh, np.outer(down[k], across[k]), 0.0)
            ahead += area * self.fresh_forward[k]
            back += area * self.fresh_backward[k]
        return Seconds(ahead, back)


def disk_seconds(rates: Rates, stored: int, gradient: int) -> float:
    """What a boundary costs more on disk: written once, read twice, its gradient added to and read."""
    return rates.disk * (stored + gradient)

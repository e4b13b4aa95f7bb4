"""Predict time: work of all tiles, recomputed halos included, times the machine's rates (:mod:`wholegrad.plan.rates`).

With ``A_i`` the pixels of node ``i`` summed over all tiles (rows times columns, halos counted each time), a segment's

    forward  = sum_i A_i (macs_i f_i + made_i m_i) + reading + calls
    backward = that again, less what is recalled, + sum_i A_i (macs_i (x_i + w_i) + made_i m_i b) + boundaries'
             + tiles x parameters

``macs_i`` are multiply-adds of a pixel, ``f``, ``x`` and ``w`` the rates of the forward run and of the gradients of
input and weight (where they are wanted at all), ``made_i`` bytes of a pixel that an op makes, at the rate ``m`` of
whoever makes them, and ``b`` of the pull-back. Tensors of ``LARGE`` bytes or more come in fresh pages, which cost more;
so do all of a thread's first tile, since a step gives its memory back when it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wholegrad.graph.graph import READERS, Graph, Node, Ref
from wholegrad.graph.inline import Inlined
from wholegrad.graph.recall import recallable
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import Segment
from wholegrad.plan.extents import Extent
from wholegrad.plan.rates import Rates
from wholegrad.plan.tiles import AxisTiles

BLOCKS = 0.8  # of what kernels take by themselves: those that run block by block (``benchmarks/gigapixel_step``)
ADDED, READ = 1.7, 0.7  # of what writing takes: adding to a boundary's gradient, and reading that
AWAITED = 1.5  # bytes on their way for which tiles wait, of one that is kept on disk (``benchmarks/wide``)
FLOATS = 2  # passes of PyTorch's by which bytes of an image become fractions on a device
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
    """Seconds of one thread for tiles of some heights (down) and widths (across): tables of one number each.

    Attributes:
        once: of the pages that a thread's first tile touches, which later ones use again.
    """

    forward: Table
    backward: Table
    once: Table


class Price(NamedTuple):
    """Of a pixel of a node: seconds forward and backward, seconds of fresh pages, and bytes of its largest map."""

    forward: float
    backward: float
    fresh: float
    pixel: int


class Prices:
    """What running a node costs, looked up once for all segments of a graph.

    Attributes:
        macs: multiply-adds of each node for a pixel.
        borders: of nodes that make nothing but at their map's ends, at how many of these along rows and columns.
    """

    def __init__(self, graph: Graph, rates: Rates) -> None:
        self.graph, self.rates, self.macs = graph, rates, pixel_macs(graph)
        rules = {node.index: rule_for(node.op) for node in graph.nodes if node.op is not None}
        ends = {index: rule.borders(graph.nodes[index]) for index, rule in rules.items() if rule is not None}
        self.borders = {index: found for index, found in ends.items() if found is not None}
        self._known: dict[tuple[int, bool, bool, bool], Price] = {}

    def of(self, index: int, thin: bool, chained: bool, recalled: bool) -> Price:
        """Of a node that runs by itself.

        Args:
            thin: whether it is a convolution of the thin kernels.
            chained: whether it is a pass of the project's kernels.
            recalled: whether the backward sweep has its values already.
        """
        key = (index, thin, chained, recalled)
        if key not in self._known:
            size = max(spec.pixel_bytes for spec in self.graph.nodes[index].outputs)
            rule = rule_for(self.graph.nodes[index].op)
            size = 0 if rule is not None and rule.view else size
            (forward, backward), made = self.multiplied(index, thin, recalled), self.made(size, thin, chained)
            self._known[key] = made._replace(forward=forward + made.forward, backward=backward + made.backward)
        return self._known[key]

    def multiplied(self, index: int, thin: bool, recalled: bool) -> tuple[float, float]:
        """Seconds forward and backward of a node's multiply-adds."""
        if not self.macs[index]:
            return 0.0, 0.0
        operands = self.graph.nodes[index].operands
        weight, wants = self.graph.spec(operands[1]).shape, [self.graph.nodes[ref.node].needs_grad for ref in operands]
        rates = self.rates.convolution(min(weight[:2]), thin) if len(weight) == 4 else (self.rates.product,) * 3
        ahead, of_input, of_weight = rates
        back = of_input * wants[0] + of_weight * any(wants[1:2])
        return self.macs[index] * ahead, self.macs[index] * (back + (0.0 if recalled else ahead))

    def made(self, size: int, thin: bool, chained: bool) -> Price:
        """Of writing so many bytes; with the project's own convolutions that is part of a multiply-add."""
        rate = self.rates.passed if chained else self.rates.made
        if thin:
            rate = 0.0
        return Price(rate * size, rate * size * (1 + self.rates.backward), self.rates.fresh * size, size)


class Bill:
    """What a segment costs for each pixel of each of its nodes, forward and backward, ready for any tiles.

    Args:
        sent: images that travel to a device as the bytes that they are, whatever becomes of them there.
    """

    def __init__(self, prices: Prices, segment: Segment, how: Inlined, sent: frozenset[Ref] = frozenset()) -> None:
        self.graph, self.segment, self.how, self.rates = prices.graph, segment, how, prices.rates
        self.sent = sent
        graph, rates = self.graph, self.rates
        summed = [graph.nodes[i].operands[0].node for i in segment.reductions if i not in how.summed]
        self.nodes = sorted({*segment.nodes, *(ref.node for ref in segment.maps), *summed})
        self.place = {index: k for k, index in enumerate(self.nodes)}
        self._borders: list[tuple[int, Price, int, int]] = []  # of what makes nothing but at its map's ends
        self._columns: list[list[float]] = [[0.0] * len(self.nodes) for _ in range(5)]  # lists: filled one by one
        forward, backward, fresh, pixel, _ = self._columns
        recalled = {ref.node for ref in recallable(graph, segment, set(segment.outputs))}
        for index in how.nodes:
            thin, at = index in how.convolutions, self.place[index]
            chained = index in how.chains
            if how.strip is not None and how.strip.out.node == index:
                price = prices.made(how.pixel_bytes(graph, index), thin, chained)
                for i in how.strip.nodes:
                    ahead, back = prices.multiplied(i, i in how.convolutions, i in recalled)
                    forward[self.place[i]] += ahead
                    backward[self.place[i]] += back
            else:
                price = prices.of(index, thin, chained, index in recalled)
            if index in prices.borders:
                self._borders.append((at, price, *prices.borders[index]))
            forward[at] += price.forward
            backward[at] += price.backward
            fresh[at] += price.fresh
            pixel[at] = price.pixel
        if how.tail is not None:
            for index, again in zip(how.tail.nodes, how.tail.again, strict=True):
                ahead, back = prices.multiplied(index, True, False)
                forward[self.place[index]] += ahead * again * BLOCKS
                backward[self.place[index]] += back * again * BLOCKS
        for index in summed:
            size, at = graph.nodes[index].outputs[0].pixel_bytes, self.place[index]
            forward[at] += rates.summed * size
            backward[at] += (rates.summed + rates.backward * rates.made) * size
        self._move()
        self.forward, self.backward, self.fresh, self.pixel, self.rows = np.array(self._columns)
        self.each = len(how.nodes) + len(segment.maps) + len(segment.reductions)
        owned = [graph.nodes[ref.node] for ref in segment.smalls]
        self.merging = rates.parameter * sum(node.outputs[0].numel for node in owned if node.needs_grad)

    def _move(self) -> None:
        """Reading images, targets and boundaries, writing boundaries, and the same of boundaries' gradients."""
        graph, rates = self.graph, self.rates
        forward, backward, fresh, pixel, rows = self._columns
        for ref in self.segment.maps:
            spec, at, node = graph.spec(ref), self.place[ref.node], graph.nodes[ref.node]
            if node.kind in READERS:
                elements = spec.pixel_bytes // spec.dtype.itemsize
                size = elements if ref in self.how.raw else spec.pixel_bytes
                read = rates.pixels * (elements if ref in self.sent else size)
                if ref in self.sent and (ref not in self.how.raw or ref in self.how.floats):
                    read += FLOATS * spec.pixel_bytes * rates.made
                forward[at] += read
                backward[at] += read
                fresh[at] += size * rates.fresh
                pixel[at] = size
                rows[at] = elements * rates.row
            else:
                backward[at] += spec.pixel_bytes * rates.stored * ADDED * node.needs_grad
        for ref in self.segment.outputs:
            spec, at = graph.spec(ref), self.place[ref.node]
            forward[at] += spec.pixel_bytes * rates.stored
            backward[at] += spec.pixel_bytes * rates.stored * READ

    def seconds(self, rows: Extent, cols: Extent) -> Seconds:
        """Of all tiles, for each of these heights with each of these widths."""
        down, across = rows.total, cols.total  # (nodes, heights), (nodes, widths)
        tiles = np.outer(rows.counts, cols.counts)
        count = tiles * self.each * self.rates.call
        lines = np.outer(self.rows @ down, cols.counts)
        ahead: Table = down.T @ (self.forward[:, None] * across) + count + lines
        back: Table = down.T @ (self.backward[:, None] * across) + 3 * count + lines + tiles * self.merging
        for at, price, top, side in self._borders:
            inside = np.outer(down[at] * _inside(rows, top), across[at] * _inside(cols, side))
            ahead -= inside * price.forward
            back -= inside * price.backward
        first = rows.largest.T @ (self.pixel[:, None] * cols.largest)
        large = np.flatnonzero(rows.largest.max(1) * cols.largest.max(1) * self.pixel >= LARGE)
        if not large.size:
            return Seconds(ahead, back, first * self.rates.fresh)
        high, wide = rows.largest[large, :, None], cols.largest[large, None, :]  # (nodes, heights or 1, widths or 1)
        fresh = high * wide * self.pixel[large, None, None] >= LARGE
        area = np.where(fresh, down[large, :, None] * across[large, None, :], 0.0)
        more = area * self.fresh[large, None, None]
        first -= np.where(fresh, high * wide * self.pixel[large, None, None], 0.0).sum(0)
        once = np.maximum(first, 0.0) * self.rates.fresh
        return Seconds(np.concatenate(([ahead], more)).sum(0), np.concatenate(([back], more)).sum(0), once)


def _inside(tiles: Extent, ends: int) -> Table:
    """What share of tiles along an axis meets none of its ends where something happens."""
    met = min(ends, tiles.ends)
    found: Table = np.array([max(count - met, 0) / count for count in tiles.counts])
    return found


def disk_seconds(rates: Rates, stored: int, gradient: int) -> float:
    """What a boundary costs more on disk: written once, read twice, its gradient added to and read.

    About three bytes are moved for each that is kept; reading, writing and tiles go on side by side, so that half of
    that is waited for.
    """
    return AWAITED * rates.disk * (stored + gradient)

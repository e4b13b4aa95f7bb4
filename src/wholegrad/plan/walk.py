"""Bytes that the largest tile of a segment needs, by walking through what it makes and frees; for many tiles at once.

A tile's working set follows the order in which the executor runs and frees: in the forward sweep a value dies after its
last reader, in the backward sweep values stay until the pull-back has passed them. That order is the same whatever the
tile, so a step is a few maps that come and go, and its bytes are sums of columns, one for each tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from wholegrad.graph.graph import READERS, Graph, Kind, Ref
from wholegrad.graph.inline import Inlined
from wholegrad.graph.rules import rule_for
from wholegrad.graph.rules.random import is_random
from wholegrad.graph.segment import Segment
from wholegrad.plan.memory import DOUBLE, LIBRARY_SLACK, NEW_SLACK, PAGED, SLACK, by_library

BLOCKS = 1 << 20  # bytes that a thread takes beside the maps of a block: calls written down, totals, what is staged
Bytes = npt.NDArray[np.int64]  # a row for each map or step, a column for each tile
Share = npt.NDArray[np.float64]


class Upkeep:
    """What nodes of a graph take, for each pixel of their maps.

    Attributes:
        pixel: bytes of all outputs; ``item`` of an element of the first.
        inputs, outputs: padded or cropped copies of its first operand and of its output that a rule makes.
        view: whether its output lies in the memory of its first operand; ``pads`` whether it does so but at the ends.
        library: whether PyTorch's convolutions or products of matrices run it.
        drawing: bytes for each element while random numbers are drawn: a counter, a shifted copy and the result.
        grad: whether a gradient flows through it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.pixel = [sum(spec.pixel_bytes for spec in node.outputs) for node in graph.nodes]
        self.item = [node.outputs[0].dtype.itemsize for node in graph.nodes]
        self.library = [by_library(graph, node) for node in graph.nodes]
        self.drawing = [3 * DOUBLE * (node.op is not None and is_random(node.op)) for node in graph.nodes]
        self.grad = [node.needs_grad for node in graph.nodes]
        self.inputs, self.outputs, self.view, self.pads = [], [], [], []
        for node in graph.nodes:
            rule = None if node.op is None else rule_for(node.op)
            inputs, outputs = (0, 0) if rule is None else rule.copies
            transposed = node.op is torch.ops.aten.convolution.default and node.args[6]
            self.view.append(rule is not None and rule.view)
            self.pads.append(rule is not None and rule.borders(node) is not None)
            self.inputs.append(inputs)
            self.outputs.append(int(outputs or (inputs and transposed)))


class Walk:
    """One segment's tiles, run as ``how`` says.

    Args:
        slack: of a device with memory of its own, where what a reader reads lies elsewhere; None for the host.
        new: whether hardly anything has run before, so that the heap is in one piece.
        inside: whether the tiles meet none of the ends where padding makes anything: it passes its input on.
    """

    def __init__(
        self,
        upkeep: Upkeep,
        segment: Segment,
        how: Inlined,
        slack: float | None = None,
        new: bool = False,
        inside: bool = False,
    ) -> None:
        self.upkeep, self.segment, self.how, self.apart = upkeep, segment, how, slack is not None
        graph = upkeep.graph
        self.nodes = list(dict.fromkeys([*how.nodes, *(ref.node for ref in segment.maps)]))  # what runs comes first
        place = self.place = {index: k for k, index in enumerate(self.nodes)}
        self.readers = [[place[ref.node] for ref in how.reads(graph, i) if ref.node in place] for i in how.nodes]
        alien = any(upkeep.library[i] and i not in how.convolutions for i in how.nodes)
        self.slack = slack or (LIBRARY_SLACK if alien else SLACK)
        self.new = new and not self.apart and not alien
        self.late = [ref for reading in how.sums.values() for ref in reading.leaves]  # read after all that runs
        self.late += [] if how.tail is None else how.tail.leaves(how)
        self.beside = 0 if how.tail is None else how.tail.bytes + BLOCKS
        summed = (graph.nodes[i].operands[0] for i in segment.reductions if i not in how.summed)
        owned = {*segment.outputs, *summed, *self.late}  # a tile keeps these until it is done
        self.lasting = [place[ref.node] for ref in owned if ref.node in place]
        self.roots = list(range(len(self.nodes)))  # whose memory each lies in
        self.first: list[int] = []  # where the first operand of what runs is; where it runs itself if that is nowhere
        times: list[tuple[int, int, int, int]] = []
        for k, index in enumerate(how.nodes):
            own, operands = index in how.convolutions, graph.nodes[index].operands
            at = None if own or not operands else place.get(operands[0].node)
            self.first.append(k if at is None else at)
            if (upkeep.view[index] or (inside and upkeep.pads[index])) and at is not None:
                self.roots[k] = self.roots[at]
            again = int(at is not None and upkeep.library[index])
            copies = (0, 0) if own else (upkeep.inputs[index], upkeep.outputs[index])
            times.append((*copies, again, upkeep.drawing[index]))
        self.makes = np.array([[root == k] for k, root in enumerate(self.roots[: len(how.nodes)])], np.int64)
        # Copies of the first operand and of the output, whether both gradients are laid out anew, bytes while drawing.
        self.times = np.array(times, np.int64).reshape(-1, 4).T[:, :, None]

    def bytes(self, areas: Bytes, wear: Share | None = None) -> tuple[Bytes, Bytes]:
        """What each tile needs forward only, and forward with pull-back.

        Args:
            areas: pixels of the largest box of each of ``nodes``.
            wear: of the heap, between 0 and 1 for each tile (:func:`~wholegrad.plan.memory.wear`); without it nothing
                is added for what is not seen.
        """
        tiles = self._sized(areas, wear)
        raw, beside = tiles.raw * (not self.apart), int(self.beside * (1.0 if wear is None else self.slack))
        return raw + tiles.forward() + tiles.made(), raw + tiles.backward() + tiles.pulled() + beside

    def handed_on(self, areas: Bytes) -> Bytes:
        """What each tile hands on, in either sweep."""
        tiles = self._sized(areas)
        most: Bytes = np.maximum(tiles.made(), tiles.pulled())
        return most

    def arriving(self, areas: Bytes, raw: Set[Ref]) -> Bytes:
        """Bytes of images and targets that each tile reads, on their way to a device; ``raw`` ones go as bytes."""
        graph, total = self.upkeep.graph, np.zeros(areas.shape[1], np.int64)
        for ref in self.segment.maps:
            if graph.nodes[ref.node].kind in READERS:
                pixel = self.upkeep.pixel[ref.node] // (self.upkeep.item[ref.node] if ref in raw else 1)
                total += areas[self.place[ref.node]] * pixel
        return total

    def fetched(self, areas: Bytes) -> Bytes:
        """Bytes of boundaries that each tile reads, and of gradients of those that it makes, if all lay elsewhere."""
        graph, place = self.upkeep.graph, self.place
        made = [ref.node for ref in self.segment.maps if graph.nodes[ref.node].kind is Kind.MAP]
        made += [ref.node for ref in self.segment.outputs if self.upkeep.grad[ref.node]]
        found = [areas[place[index]] * self.upkeep.pixel[index] for index in made if index in place]
        return sum(found, np.zeros(areas.shape[1], np.int64))

    def largest(self, areas: Bytes) -> Bytes:
        """Bytes of the largest tensor of each tile."""
        tiles = self._sized(areas)
        most: Bytes = np.maximum(tiles.sizes.max(0, initial=0), DOUBLE * tiles._widest())
        return most

    def _sized(self, areas: Bytes, wear: Share | None = None) -> _Tiles:
        sizes = areas * np.array(self._pixels())[:, None]
        if wear is not None:
            sizes = np.ceil(sizes * self.slacks(sizes, wear)).astype(np.int64)
        return _Tiles(self, sizes)

    def slacks(self, sizes: Bytes, wear: Share) -> Share:
        """The factor for what is not seen of each of these blocks."""
        if not self.new:
            return np.full(sizes.shape, self.slack)
        found: Share = NEW_SLACK + (SLACK - NEW_SLACK) * np.where(sizes >= PAGED, 0.0, wear)
        return found

    def _pixels(self) -> list[int]:
        """Bytes of a pixel of what exists of each of ``nodes``."""
        upkeep, how, graph = self.upkeep, self.how, self.upkeep.graph
        found = [upkeep.pixel[i] for i in self.nodes]
        if how.strip is not None:
            out = how.strip.out.node
            found[self.place[out]] = how.pixel_bytes(graph, out)
        for ref in how.raw:
            if ref.node in self.place:
                floats = found[self.place[ref.node]]
                found[self.place[ref.node]] = floats // upkeep.item[ref.node] + (floats if ref in how.floats else 0)
        return found


class _Tiles:
    """The walk of several tiles: ``sizes`` are bytes of what exists of each of ``walk.nodes``."""

    def __init__(self, walk: Walk, sizes: Bytes) -> None:
        self.walk, self.sizes = walk, sizes
        upkeep, how, graph, place = walk.upkeep, walk.how, walk.upkeep.graph, walk.place
        maps = [place[ref.node] for ref in walk.segment.maps]
        self.inputs = sizes[maps].sum(0)
        # The reader's own copies of boxes, before they become tensors.
        self.raw = sizes[[k for k in maps if graph.nodes[walk.nodes[k]].kind in READERS]].sum(0)
        self.ran, read = sizes[: len(how.nodes)], sizes[walk.first]
        self.values = self.ran * walk.makes.reshape(-1, 1)
        into, out, again, drawing = walk.times
        # Padded or cropped copies that a rule makes of a node's input and output, and the library's own.
        self.copies = into * read + out * self.ran
        # Gradients of a library convolution's output and input, laid out anew for it and for its neighbour.
        self.rearranged = again * (read + self.ran)
        self.drawing = drawing * (self.ran // np.array([[upkeep.item[i]] for i in how.nodes], np.int64).reshape(-1, 1))

    def made(self) -> Bytes:
        """What a tile hands on in the forward sweep, which may wait while its worker runs another."""
        return self._all(self.walk.segment.outputs)

    def pulled(self) -> Bytes:
        """The same in the backward sweep: gradients of the boundaries that it read."""
        return self._all(ref for ref in self.walk.segment.maps if self.walk.upkeep.grad[ref.node])

    def _all(self, refs: Iterable[Ref]) -> Bytes:
        """Bytes of these, as far as they exist."""
        place = self.walk.place
        total: Bytes = self.sizes[[place[ref.node] for ref in refs if ref.node in place]].sum(0)
        return total

    def _each(self, steps: Sequence[Sequence[int]]) -> Bytes:
        """Bytes of the maps of each step."""
        counts = np.array([len(step) for step in steps], np.int64)
        ends, sizes = counts.cumsum(), self.sizes[list(chain.from_iterable(steps))]
        before: Bytes = np.concatenate((np.zeros((1, sizes.shape[1]), np.int64), sizes.cumsum(0)))
        found: Bytes = before[ends] - before[ends - counts]
        return found

    def forward(self) -> Bytes:
        """Peak of a walk that frees every value after its last reader, and the last of what lies in its memory."""
        walk, roots = self.walk, self.walk.roots
        last = {roots[k]: step for step, read in enumerate(walk.readers) for k in read}
        for k in walk.lasting:
            last.pop(roots[k], None)
        dead = [
            [k for k in dict.fromkeys(roots[each] for each in read) if last.get(k) == step]
            for step, read in enumerate(walk.readers)
        ]
        freed = self._each(dead)
        live = self.inputs + self.values.cumsum(0) - (freed.cumsum(0) - freed)
        peak: Bytes = np.maximum((live + self.copies + self.drawing).max(0, initial=0), self.inputs)
        return peak + DOUBLE * self._widest()

    def _widest(self) -> Bytes:
        """Pixels of the largest map that a reduction sums: room for one temporary in float64."""
        walk, graph, sums = self.walk, self.walk.upkeep.graph, self.walk.how.summed
        found = [graph.nodes[i].operands[0] for i in walk.segment.reductions if i not in sums]
        pixels = [self.sizes[walk.place[ref.node]] // graph.spec(ref).dtype.itemsize for ref in found]
        widest: Bytes = np.max([np.zeros_like(self.inputs), *pixels], 0)
        return widest

    def backward(self) -> Bytes:
        """Peak of forward with everything kept, then the walk back with gradients coming and going."""
        walk, ran = self.walk, self.ran
        grad = [walk.upkeep.grad[i] for i in walk.nodes]
        back = [k for k in reversed(range(len(ran))) if grad[k]]
        kept = self.values[back] + self.copies[back]
        live = self.inputs + self.values.sum(0) + self.copies[back].sum(0)
        peak = live + np.maximum(DOUBLE * self._widest(), self.drawing.max(0, initial=0))
        there = {walk.place[ref.node] for ref in walk.segment.owned(walk.upkeep.graph) if ref.node in walk.place}
        leaves = (walk.place.get(ref.node) for ref in walk.late)
        there.update(k for k in leaves if k is not None and grad[k])
        grads = self.sizes[list(there)].sum(0)
        come: list[list[int]] = []
        twice: list[list[int]] = []  # a second contribution is a tensor of its own until it is added
        for k in back:
            new: list[int] = [] if k in there else [k]
            again: list[int] = []
            for each in walk.readers[k]:
                if grad[each]:
                    (again if each in there else new).append(each)
                    there.add(each)
            come.append(new)
            twice.append(again)
            there.discard(k)
        sums, gone = self._each([*come, *twice]), kept + ran[back]
        held = live + grads + sums[: len(back)].cumsum(0) - (gone.cumsum(0) - gone)
        moments = held + sums[len(back) :] + self.copies[back] + self.rearranged[back]
        highest: Bytes = np.maximum(peak, moments.max(0, initial=0))
        return highest

"""A block of pixels forward through several convolutions, through the sums of a loss, and back through all of them.

The kernel calls of each kind of block are written down once (:mod:`wholegrad.kernels.calls`). What a block leaves is
added up across blocks: sums and gradients of weights and biases in float64, by the kernels that make them; gradients of
maps from outside in these maps' own precision, a block's share by a pass of its own where neighbours overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from wholegrad import clock
from wholegrad.kernels import correlate, pointwise, slide
from wholegrad.kernels.calls import BUFFERS, GIVEN, NOWHERE, SCRATCH, Calls, Placed, Schedule
from wholegrad.kernels.expression import EACH, IDENTITY, MAP, ONE, Leaf, Program, Step, slope_follows
from wholegrad.kernels.stage import LEAF, Part
from wholegrad.kernels.strips import Buffer, Layer, Lying, Span, buffered, leaf_entries, pitch, stored_as_read
from wholegrad.kernels.thin import (
    REAL,
    ChannelSums,
    Pair,
    beyond,
    correlate_kernel,
    correlate_plan,
    correlated_directly,
    directly,
    kernel_parts,
    lanes,
    packed_weight,
    slide_kernel,
    slide_plan,
    zeros,
)  # fmt: skip

ADD = Program((Leaf(), Leaf()), (Step("add", (0, 1)),))
NULL = (NOWHERE, 0)
ADDING = clock.Key("merging", "gradients", "")


class Wants(NamedTuple):
    """Which gradients of a layer are wanted: of its output at all, of its weight, of its bias."""

    output: bool
    weight: bool
    bias: bool


class Terms(NamedTuple):
    """A sum over the last map's pixels.

    Attributes:
        name: of the op and the module, for the profile.
        part: how its terms are had.
        sources: as a layer's.
        share: the number of the gradient of the sum among what is given; None if none is wanted.
    """

    name: tuple[str, str]
    part: Part
    sources: tuple[int, ...]
    share: int | None


class Places(NamedTuple):
    """Numbers of what is given to a schedule and written by it.

    Attributes:
        maps: of the gradient of each map from outside that is wanted, by the number of the map.
        weights, biases: of the totals of each layer.
        sums: of the totals of each sum.
        given: how many tensors there are, with the maps from outside and the gradients of sums.
    """

    maps: dict[int, int]
    weights: dict[int, int]
    biases: dict[int, int]
    sums: tuple[int, ...]
    given: int


class Axis(NamedTuple):
    """One block's part along one axis: of each layer, and for each sum where its leaves that are maps start."""

    spans: tuple[Span, ...]
    terms: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Writer:
    """Writes schedules.

    Attributes:
        layers: the convolutions; each but the last is read by one that follows.
        wants: of each of them.
        names: module paths of layers, for the profile.
        stage: what the profile calls the forward run.
    """

    layers: Sequence[Layer]
    wants: Sequence[Wants]
    terms: Sequence[Terms]
    places: Places
    names: Sequence[str]
    stage: str = "forward"

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[-1].weight.dtype

    def schedule(self, row: Axis, col: Axis, given: Sequence[Lying]) -> Schedule:
        """The calls for a block; ``given`` says how the tensors lie of which places are parts."""
        return _Scheduling(self, row, col, given).run()


def total_shape(layer: Layer) -> tuple[int, ...]:
    """Of the float64 totals of a weight's gradient, which are to be summed over the last dimension."""
    return (*layer.weight.shape, lanes(REAL[layer.weight.dtype]))


def channel_shape(channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of the float64 totals of so many channels' sums, which are to be summed over the last dimension."""
    return channels, lanes(REAL[dtype])


class _Life(NamedTuple):
    """Bytes that are there from step ``first`` to step ``last`` of a block."""

    size: int
    first: int
    last: int


def arranged(lives: Sequence[_Life]) -> tuple[list[int], int]:
    """Where each may start so that none overlaps another while both are there, and bytes of all."""
    starts: list[int] = [0] * len(lives)
    done: list[int] = []
    for number in sorted(range(len(lives)), key=lambda k: -lives[k].size):
        mine = lives[number]
        others = [k for k in done if lives[k].first <= mine.last and mine.first <= lives[k].last]
        start = 0
        for k in sorted(others, key=lambda k: starts[k]):
            if starts[k] < start + mine.size and start < starts[k] + lives[k].size:
                start = starts[k] + lives[k].size
        starts[number] = start
        done.append(number)
    return starts, max((start + each.size for start, each in zip(starts, lives, strict=True)), default=0)


class _Scheduling:
    def __init__(self, writer: Writer, row: Axis, col: Axis, given: Sequence[Lying]) -> None:
        self.writer, self.row, self.col, self.given = writer, row, col, given
        self.layers, self.places = writer.layers, writer.places
        # What a kernel multiplies by, a program's derivative, is then computed of the program's value.
        self.reads, self.stored = stored_as_read(writer.layers, slope_follows)
        self.item, self.real = writer.dtype.itemsize, REAL[writer.dtype]
        self.calls = Calls()
        self.pulled: set[int] = set()  # layers whose maps' gradients there are
        self._weights: dict[tuple[int, int, slide.Shape], torch.Tensor] = {}
        self.maps: list[Buffer] = []
        self.grads: list[Buffer] = []
        self._arrange()

    def _arrange(self) -> None:
        """Buffers for maps, their gradients, and what is added to something."""
        layers, last = self.layers, len(self.layers) - 1
        reader = {~source: k for k, layer in enumerate(layers) for source in layer.sources if source < 0}
        lives, shapes = [], []
        for number, layer in enumerate(layers):
            high, wide = self.row.spans[number].fresh, pitch(self.col.spans[number].fresh)
            size = -(-layer.outputs * high * wide * self.item // 64) * 64
            read = self._back(reader[number]) if number < last else last + 1
            came = read if number < last else last + 1
            shapes.append((high * wide, wide))
            lives += [_Life(size, number, read), _Life(size, came, self._back(number))]
        high, wide = (max(span.read for span in axis.spans) for axis in (self.row, self.col))
        high, wide = max(high, shapes[last][0] // shapes[last][1]), max(pitch(wide), shapes[last][1])
        channels = max(layers[-1].outputs, *(part.channels for layer in layers for part in layer.parts))
        lives.append(_Life(channels * high * wide * self.item, last + 1, 2 * last + 2))
        starts, end = arranged(lives)
        self.end = end + max(beyond(each[1], self.writer.dtype) for each in shapes)
        self.maps = [Buffer(start, *each) for start, each in zip(starts[:-1:2], shapes, strict=True)]
        self.grads = [Buffer(start, *each) for start, each in zip(starts[1::2], shapes, strict=True)]
        self.spare = Buffer(starts[-1], high * wide, wide)

    def _back(self, number: int) -> int:
        """The step at which a layer is pulled back."""
        return 2 * len(self.layers) - number

    def run(self) -> Schedule:
        spans = list(zip(self.row.spans, self.col.spans, strict=True))
        for number, (row, col) in enumerate(spans):
            if row.fresh and col.fresh:
                self._forward(number, row, col)
        self.pulled = {len(self.layers) - 1} if self._sums() else set()
        for number, (row, col) in reversed(list(enumerate(spans))):
            if number in self.pulled and row.fresh and col.fresh:
                self._backward(number, row, col)
        self.calls.kept += [self.writer, self._weights]
        return self.calls.schedule(self.end)

    # Calls.

    def _map(self, buffer: Buffer) -> Placed:
        return BUFFERS, buffer.start

    def _whole(self, buffer: Buffer) -> list[Placed]:
        """A buffer's map as kernels are told."""
        return [self._map(buffer), (NOWHERE, buffer.channel), (NOWHERE, buffer.row)]

    def _leaves(self, number: int, row: Span, col: Span) -> list[Placed]:
        return leaf_entries(self.layers[number], row, col, self.given, self.maps, self.item)

    def _slide(
        self,
        shape: slide.Shape,
        leaves: list[Placed],
        weight: tuple[int, int, torch.Tensor],
        bias: torch.Tensor | None,
        sizes: tuple[Pair, Pair, Pair],
        to: Buffer,
        factor: list[Placed] | None = None,
        label: clock.Work | None = None,
    ) -> None:
        """A call of the kernel of convolutions.

        Args:
            weight: which it is (a layer's forward, 0, or of a part of its input, 1 onwards), and itself.
            sizes: of the input and the output, and the padding before.
        """
        kernel = slide_kernel(shape)
        key = (weight[0], weight[1], shape)
        if key not in self._weights:
            self._weights[key] = packed_weight(weight[2], kernel.block)
        plan = slide_plan(shape, *sizes, (to.channel, to.row))
        self.calls.memory = max(self.calls.memory, plan.bytes)
        added = zeros(shape.outputs, weight[2].dtype) if bias is None else bias
        self.calls.kept.append(added)
        pointers = [
            self.calls.fixed(plan.sizes), self.calls.table(leaves), (NOWHERE, self._weights[key].data_ptr()),
            (NOWHERE, added.data_ptr()), self._map(to), NULL if factor is None else self.calls.table(factor),
            (SCRATCH, plan.starts[0]), (SCRATCH, 0),
        ]  # fmt: skip
        self.calls.add(kernel.call, pointers, label)

    def _forward_shape(self, number: int, row: Span, col: Span) -> tuple[slide.Shape, tuple[Pair, Pair, Pair]]:
        layer, lead = self.layers[number], (row.lead, col.lead)
        inputs, outputs = layer.weight.shape[:2] if layer.transposed else layer.weight.shape[1::-1]
        kernel = layer.weight.shape[2:]
        residue = _residue(layer, lead) if layer.transposed else (0, 0)
        shape = slide.Shape(
            inputs, outputs, (kernel[0], kernel[1]), layer.stride, layer.dilation, layer.transposed, residue, self.real,
            kernel_parts(self.reads[number]), None, self.stored[number],
        )  # fmt: skip
        sizes = (row.read, col.read), (row.fresh, col.fresh), lead
        return directly(shape, buffered(layer), *sizes), sizes

    def _forward(self, number: int, row: Span, col: Span) -> None:
        layer = self.layers[number]
        shape, sizes = self._forward_shape(number, row, col)
        weight = layer.weight.transpose(0, 1) if layer.transposed else layer.weight
        bias = None if layer.bias is None else layer.bias.contiguous()
        leaves, to = self._leaves(number, row, col), self.maps[number]
        label = self._work(self.writer.stage, "slide", number, row, col)
        self._slide(shape, leaves, (number, 0, weight), bias, sizes, to, label=label)

    def _work(self, stage: str, op: str, number: int, row: Span, col: Span, share: float = 1.0) -> clock.Work:
        """What a call counts that makes a layer's map or a gradient, of that share of the input's channels."""
        layer, fresh, read = self.layers[number], row.fresh * col.fresh, row.read * col.read
        macs = prod(layer.weight.shape) * fresh / (prod(layer.stride) if layer.transposed else 1)
        size = sum(
            part.channels * (leaf.bytes or self.item) for part in layer.parts for leaf in part.program.leaves
        )  # fmt: skip
        moved = read * size * share + fresh * layer.outputs * self.item
        key = clock.Key(stage, op, self.writer.names[number])
        return clock.Work(key, macs * share, self.real == "double", moved)

    def _walk(
        self,
        shape: pointwise.Shape,
        size: tuple[int, int, int],
        leaves: list[Placed],
        outputs: list[Placed],
        grad: list[Placed] | None = None,
        totals: Placed = NULL,
        key: clock.Key = ADDING,
    ) -> None:
        """A pass over maps of ``size`` channels, rows and columns, which the profile counts as ``key``."""
        pointers = [
            self.calls.fixed(pointwise.sizes(*size)), self.calls.table(leaves),
            self.calls.table(outputs) if outputs else NULL, NULL if grad is None else self.calls.table(grad), totals,
        ]  # fmt: skip
        maps = (len(leaves) + len(outputs)) // LEAF
        label = clock.Work(key, 0.0, False, float(prod(size) * maps * self.item))
        self.calls.add(pointwise.kernel(shape), pointers, label)

    def _sums(self) -> bool:
        """Every sum's terms; the gradient of the last map from all that have one."""
        last, there, row, col = len(self.layers) - 1, False, self.row, self.col
        high, wide = row.spans[last].fresh, col.spans[last].fresh
        for number, terms in enumerate(self.writer.terms):
            program = terms.part.program
            pulled = terms.share is not None and self.writer.wants[last].output and bool(program.wanted)
            bare = program._replace(leaves=tuple(leaf._replace(grad=False) for leaf in program.leaves))
            shape = pointwise.Shape(
                bare, self.real, False, program.wanted if pulled else (), Leaf(ONE) if pulled else None, True
            )
            to = self.spare if there else self.grads[last]
            given = [(GIVEN + terms.share, 0), NULL, NULL] if pulled and terms.share is not None else None
            leaves = self._term_leaves(terms, row.terms[number], col.terms[number])
            totals = (GIVEN + self.places.sums[number], 0)
            size = (terms.part.channels, high, wide)
            key = clock.Key("sums", *terms.name)
            self._walk(shape, size, leaves, self._whole(to) if pulled else [], given, totals, key)
            if pulled and there:
                self._add(self._whole(to), self._whole(self.grads[last]), size)
            there = there or pulled
        return there

    def _term_leaves(self, terms: Terms, tops: tuple[int, ...], lefts: tuple[int, ...]) -> list[Placed]:
        found: list[Placed] = []
        places = iter(zip(tops, lefts, strict=True))
        for leaf, source in zip(terms.part.program.leaves, terms.sources, strict=True):
            if leaf.kind != MAP:
                found += [(GIVEN + source, 0), (NOWHERE, int(leaf.kind == EACH)), NULL]
                continue
            y, x = next(places)
            if source < 0:
                found += self._whole(self.maps[~source])
            else:
                channel, step, size = self.given[source]
                found += [(GIVEN + source, (y * step + x) * size), (NOWHERE, channel), (NOWHERE, step)]
        return found

    def _add(self, what: list[Placed], to: list[Placed], size: tuple[int, int, int]) -> None:
        shape = pointwise.Shape(ADD, self.real, True, (), None, False)
        self._walk(shape, size, [*what, *to], to)

    def _backward(self, number: int, row: Span, col: Span) -> None:
        leaves = self._leaves(number, row, col)
        if self.writer.wants[number].weight or self.writer.wants[number].bias:
            self._of_weight(number, row, col, leaves)
        layer, first, before = self.layers[number], 0, 0
        maps = iter(zip(row.offsets, col.offsets, strict=True))
        for order, part in enumerate(layer.parts):
            mine = layer.sources[first : first + len(part.program.leaves)]
            offsets = [next(maps) if leaf.kind == MAP else (0, 0) for leaf in part.program.leaves]
            for leaf in part.program.wanted:
                table = leaves[LEAF * first : LEAF * (first + len(mine))]
                self._of_input(number, (order, before), (row, col), table, mine[leaf], offsets[leaf])
            first += len(mine)
            before += part.channels

    def _of_input(
        self,
        number: int,
        part: tuple[int, int],
        spans: tuple[Span, Span],
        leaves: list[Placed],
        source: int,
        offset: tuple[int, int],
    ) -> None:
        """The gradient of a part of a layer's input: the one of another layer's map, or a share of one from outside."""
        layer, (row, col) = self.layers[number], spans
        order, before = part
        program, channels = layer.parts[order].program, layer.parts[order].channels
        if not (row.read and col.read) or (source < 0 and not self.writer.wants[~source].output):
            return
        to = self.grads[~source] if source < 0 else self.spare
        mine = slice(before, before + channels)
        weight = layer.weight[mine] if layer.transposed else layer.weight[:, mine].transpose(0, 1)
        lead = (row.lead, col.lead)
        kernel = (layer.weight.shape[2], layer.weight.shape[3])
        shape = slide.Shape(
            layer.outputs, channels, kernel, layer.stride, layer.dilation, not layer.transposed,
            (0, 0) if layer.transposed else _residue(layer, lead), self.real, (), program if program.steps else None,
        )  # fmt: skip
        sizes = (row.fresh, col.fresh), (row.read, col.read), lead
        factor = leaves if program.steps else None
        inputs = sum(each.channels for each in layer.parts)
        label = self._work("input gradient", "slide", number, row, col, channels / inputs)
        own = self._whole(self.grads[number])
        self._slide(shape, own, (number, 1 + order, weight), None, sizes, to, factor, label=label)
        if source < 0:
            self.pulled.add(~source)
        else:
            (y, x), place = offset, self.places.maps[source]
            channel, step, size = self.given[place]
            there = [(GIVEN + place, (y * step + x) * size), (NOWHERE, channel), (NOWHERE, step)]
            self._add(self._whole(to), there, (channels, row.read, col.read))

    def _of_weight(self, number: int, row: Span, col: Span, leaves: list[Placed]) -> None:
        """The gradients of a layer's weight and bias, added to their totals."""
        layer, wants, lead = self.layers[number], self.writer.wants[number], (row.lead, col.lead)
        kernel = (layer.weight.shape[2], layer.weight.shape[3])
        read, fresh, grad = (row.read, col.read), (row.fresh, col.fresh), self._whole(self.grads[number])
        bias = (GIVEN + self.places.biases[number], 0) if wants.bias else NULL
        done = wants.weight and wants.bias
        around = (lead[0], 0, lead[1], 0)
        if layer.transposed:
            done = done and ChannelSums.all_read(fresh, read, kernel, layer.stride, around, layer.dilation)
        if wants.weight:
            first, second = layer.weight.shape[:2]
            parts = kernel_parts(self.reads[number])
            of = "" if not done else "x" if layer.transposed else "g"
            shape = correlate.Shape(
                second, first, kernel, layer.stride, layer.dilation, self.real,
                () if layer.transposed else parts, parts if layer.transposed else (), of,
            )  # fmt: skip
            given, sat = (fresh, read) if layer.transposed else (read, fresh)
            if not layer.transposed:
                shape = correlated_directly(shape, buffered(layer), given, sat, around)
            plan = correlate_plan(shape, given, sat, around)
            self.calls.memory = max(self.calls.memory, plan.bytes)
            tables = [self.calls.table(grad), self.calls.table(leaves)]
            pointers = [
                self.calls.fixed(plan.sizes), *(tables if layer.transposed else reversed(tables)),
                (GIVEN + self.places.weights[number], 0), bias,
                (SCRATCH, plan.starts[0]), (SCRATCH, plan.starts[1]), (SCRATCH, 0),
            ]  # fmt: skip
            label = self._work("weight gradient", "correlate", number, row, col)
            self.calls.add(correlate_kernel(shape).call, pointers, label)
        if wants.bias and not done:
            summed = pointwise.Shape(IDENTITY, self.real, False, (), None, True)
            key = clock.Key("bias gradient", "sum", self.writer.names[number])
            self._walk(summed, (layer.outputs, *fresh), grad, [], None, bias, key)


def _residue(layer: Layer, lead: Pair) -> Pair:
    return lead[0] % layer.stride[0], lead[1] % layer.stride[1]

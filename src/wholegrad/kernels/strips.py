"""Several convolutions in a row, a strip of rows at a time, so that maps between them stay in the core's own cache.

Each layer has a buffer as tall as one strip needs. Rows that the next strip needs again move to its top, the others are
computed into what follows, so that nothing is computed twice along rows; panels of columns overlap by their halo. ::

    strip k      [ kept | fresh ........ ]        of each layer, whose readers then read [kept + fresh]
    strip k + 1            [ kept | fresh ........ ]

All calls of a tile are written down once (:func:`schedule`), as numbers relative to where buffers, inputs and weights
lie; :meth:`Schedule.run` adds these places up and lets one function make all calls, without Python in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from wholegrad.kernels import slide
from wholegrad.kernels.calls import BUFFERS, GIVEN, NOWHERE, OUT, SCRATCH, Calls, Placed, Schedule
from wholegrad.kernels.compile import function
from wholegrad.kernels.emit import Code
from wholegrad.kernels.expression import EACH, IDENTITY, MAP, Program
from wholegrad.kernels.stage import Part
from wholegrad.kernels.thin import (
    REAL,
    Pair,
    beyond,
    directly,
    kernel_parts,
    packed_weight,
    slide_kernel,
    slide_plan,
    zeros,
)  # fmt: skip

ALIGN = 16  # elements of a buffer's row, a multiple; an odd multiple so that rows do not share cache sets


class Layer(NamedTuple):
    """One convolution, transposed or not, on one image.

    Attributes:
        weight: ``(outputs, inputs, k, l)``, of a transposed one ``(inputs, outputs, k, l)``.
        parts: how its input's channels are had.
        sources: for each leaf of these, the number of what is given, or ``~k`` for the map of layer k.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: Pair
    dilation: Pair
    transposed: bool
    parts: tuple[Part, ...]
    sources: tuple[int, ...]

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[self.transposed])


class Span(NamedTuple):
    """One layer's part of a strip or panel, along one axis.

    Attributes:
        fresh: elements that are computed.
        kept: elements before them that the buffer holds already.
        shift: by how many elements the buffer's start moves on from the strip before.
        read: elements of the input that the fresh ones depend on.
        lead: padding before these.
        offsets: for each leaf that is a map, where they start in its tensor or in a layer's buffer.
    """

    fresh: int
    kept: int
    shift: int
    read: int
    lead: int
    offsets: tuple[int, ...]


Spans = tuple[tuple[Span, ...], ...]  # of each strip or panel: of each layer
Lying = tuple[int, int, int]  # a tensor's elements from channel to channel and from row to row, bytes of one


def stored_as_read(
    layers: Sequence[Layer], may: Callable[[Program], bool]
) -> tuple[list[tuple[Part, ...]], list[Program | None]]:
    """What each layer reads, and what of each layer's outputs is stored.

    Where all readers of a layer's map compute the same program of it alone, the program is computed as the map is
    stored, and readers take it as it is.

    Args:
        may: whether such a program may be computed so.
    """
    reads = [list(layer.parts) for layer in layers]
    stored: list[Program | None] = [None] * len(layers)
    for number in range(len(layers) - 1):
        found = [
            (k, order)
            for k, layer in enumerate(layers)
            for order, sources in enumerate(_by_part(layer))
            if ~number in sources
        ]
        programs = {kernel_parts((layers[k].parts[order],)) for k, order in found}
        if len(programs) != 1 or not (parts := programs.pop()):
            continue
        program = parts[0].program
        if len(program.leaves) == 1 and not program.leaves[0].bytes and not program.mask and may(program):
            stored[number] = program
            for k, order in found:
                reads[k][order] = Part(IDENTITY, reads[k][order].channels)
    return [tuple(parts) for parts in reads], stored


def _by_part(layer: Layer) -> list[tuple[int, ...]]:
    """The sources of each part's leaves."""
    found, first = [], 0
    for part in layer.parts:
        found.append(layer.sources[first : first + len(part.program.leaves)])
        first += len(part.program.leaves)
    return found


def buffered(layer: Layer) -> tuple[bool, ...]:
    """Which parts are another layer's map."""
    return tuple(sources[0] < 0 for sources in _by_part(layer))


class _Kernel(NamedTuple):
    """A layer's kernel for one residue, with its weight packed."""

    shape: slide.Shape
    call: Callable[..., None]
    weight: torch.Tensor


class Writer:
    """Writes schedules for some layers, of which the last one's map is the result.

    Args:
        store: what is made of the result's values.
    """

    def __init__(self, layers: Sequence[Layer], store: Program | None) -> None:
        self.layers, self.store = layers, store
        self.dtype = layers[-1].weight.dtype
        self.reads, self.stored = stored_as_read(layers, lambda program: True)
        self._kernels: dict[tuple[int, slide.Shape], _Kernel] = {}
        self._biases = [
            zeros(each.outputs, each.weight.dtype) if each.bias is None else each.bias.contiguous() for each in layers
        ]

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.uint8 if self.store is not None and self.store.mask else self.dtype

    def kernel(self, number: int, row: Span, col: Span) -> _Kernel:
        """A layer's kernel for such a span; compiled if it was not yet."""
        layer, lead = self.layers[number], (row.lead, col.lead)
        weight = layer.weight.transpose(0, 1) if layer.transposed else layer.weight
        outputs, inputs, k, l = weight.shape  # noqa: E741
        residue = (lead[0] % layer.stride[0], lead[1] % layer.stride[1]) if layer.transposed else (0, 0)
        store = self.store if number == len(self.layers) - 1 else self.stored[number]
        shape = slide.Shape(
            inputs, outputs, (k, l), layer.stride, layer.dilation, layer.transposed, residue, REAL[weight.dtype],
            kernel_parts(self.reads[number]), None, store,
        )  # fmt: skip
        shape = directly(shape, buffered(layer), (row.read, col.read), (row.fresh, col.fresh), lead)
        key = number, shape
        if key not in self._kernels:
            found = slide_kernel(shape)
            self._kernels[key] = _Kernel(shape, found.call, packed_weight(weight, found.block))
        return self._kernels[key]

    def schedule(self, rows: Spans, cols: Spans, out: Pair, given: Sequence[Lying]) -> Schedule:
        """The calls that compute a tile.

        Args:
            rows, cols: of each strip, of each panel.
            out: elements from channel to channel of the result, and from row to row.
            given: the same of every tensor given, and bytes of an element.
        """
        return _Scheduling(self, rows, cols, out, given).run()


class Buffer(NamedTuple):
    """Where a layer's rows are: bytes after the start of all buffers, elements to the next channel and row."""

    start: int
    channel: int
    row: int


def pitch(wide: int) -> int:
    """Elements from row to row of a buffer for so many columns."""
    vectors = -(-wide // ALIGN)
    return (vectors + 1 - vectors % 2) * ALIGN


class _Scheduling:
    def __init__(self, writer: Writer, rows: Spans, cols: Spans, out: Pair, given: Sequence[Lying]) -> None:
        self.writer, self.rows, self.cols, self.out, self.given = writer, rows, cols, out, given
        self.item = writer.dtype.itemsize
        self.calls = Calls()
        self.buffers: list[Buffer] = []
        end = 0
        for number, layer in enumerate(writer.layers[:-1]):
            high = max(strip[number].kept + strip[number].fresh for strip in rows)
            wide = pitch(max(panel[number].fresh for panel in cols))
            self.buffers.append(Buffer(end, high * wide, wide))
            end += layer.outputs * high * wide * self.item
        self.end = end + max((beyond(buffer.row, writer.dtype) for buffer in self.buffers), default=0)

    def run(self) -> Schedule:
        last = len(self.writer.layers) - 1
        left = 0
        for panel in self.cols:
            top = 0
            for strip in self.rows:
                for number in range(last + 1):
                    span = strip[number]
                    if number < last and span.shift and span.kept:
                        self._move(number, span)
                    if span.fresh and panel[number].fresh:
                        to = (OUT, (top * self.out[1] + left) * self.writer.out_dtype.itemsize)
                        self._call(number, span, panel[number], to)
                top += strip[last].fresh
            left += panel[last].fresh
        self.calls.kept.append(self.writer)
        return self.calls.schedule(self.end)

    def _move(self, number: int, span: Span) -> None:
        """Rows that are needed again go to the top of a layer's buffer."""
        to = self.buffers[number]
        row, channel = to.row * self.item, to.channel * self.item
        sizes = (ctypes.c_int64 * 3)(self.writer.layers[number].outputs, channel, span.kept * row)
        places = [(BUFFERS, to.start + span.shift * row), (BUFFERS, to.start)]
        self.calls.add(_mover(), [self.calls.fixed(sizes), *places])

    def _call(self, number: int, row: Span, col: Span, result: tuple[int, int]) -> None:
        layer, last = self.writer.layers[number], number == len(self.writer.layers) - 1
        kernel = self.writer.kernel(number, row, col)
        steps = self.out if last else self.buffers[number][1:]
        plan = slide_plan(kernel.shape, (row.read, col.read), (row.fresh, col.fresh), (row.lead, col.lead), steps)
        self.calls.memory = max(self.calls.memory, plan.bytes)
        to = result
        if not last:
            buffer = self.buffers[number]
            to = (BUFFERS, buffer.start + row.kept * buffer.row * self.item)
        pointers = [
            self.calls.fixed(plan.sizes), self._leaves(layer, row, col),
            (NOWHERE, kernel.weight.data_ptr()), (NOWHERE, self.writer._biases[number].data_ptr()),
            to, (NOWHERE, 0), (SCRATCH, plan.starts[0]), (SCRATCH, 0),
        ]  # fmt: skip
        self.calls.add(kernel.call, pointers)

    def _leaves(self, layer: Layer, row: Span, col: Span) -> Placed:
        return self.calls.table(leaf_entries(layer, row, col, self.given, self.buffers, self.item))


def leaf_entries(
    layer: Layer, row: Span, col: Span, given: Sequence[Lying], buffers: Sequence[Buffer], item: int
) -> list[Placed]:
    """Where what a layer reads lies, as kernels are told: three numbers for each leaf.

    Args:
        given: how the tensors given lie.
        buffers: of the layers, whose elements have ``item`` bytes.
    """
    found: list[Placed] = []
    maps = iter(zip(row.offsets, col.offsets, strict=True))
    leaves = [leaf for part in layer.parts for leaf in part.program.leaves]
    for leaf, source in zip(leaves, layer.sources, strict=True):
        if leaf.kind != MAP:
            found += [(GIVEN + source, 0), (NOWHERE, int(leaf.kind == EACH)), (NOWHERE, 0)]
            continue
        y, x = next(maps)
        if source < 0:
            start, channel, pitch = buffers[~source]
            place, size = BUFFERS, item
        else:
            (channel, pitch, size), place, start = given[source], GIVEN + source, 0
        found += [(place, start + (y * pitch + x) * size), (NOWHERE, channel), (NOWHERE, pitch)]
    return found


@cache
def _mover() -> Callable[..., None]:
    """``move(sizes, from, to)``: so many bytes of each of some channels, which may overlap."""
    code = Code("double", 1)
    channels, step, size = (code.integer("%sizes", k) for k in range(3))
    with code.loop(0, channels) as each:
        offset = code.mul(each.index, step)
        to, origin = code.at("%to", offset, "i8"), code.at("%from", offset, "i8")
        code.set(f"call ptr @memmove(ptr {to}, ptr {origin}, i64 {size})")
    unused = ", ".join(f"ptr %unused{k}" for k in range(slide.POINTERS - 3))
    text = "declare ptr @memmove(ptr, ptr, i64)\n" + code.function("move", f"ptr %sizes, ptr %from, ptr %to, {unused}")
    return function(text, "move", slide.POINTERS)

"""Convolutions of few channels on planar tensors: outputs, input gradients and weight gradients.

Padding is ``(top, bottom, left, right)``, zeros that the map is taken to have around it; a negative number crops. It is
never copied into a tensor. Tensors are ``(N, C, H, W)``, in float32 or float64, with columns next to each other in
memory; rows and channels may lie apart, as in a crop. An input may also be :class:`Mixed`: computed from several
tensors by programs as it is read, and its gradient then that of one of them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from math import ceil, prod
from typing import NamedTuple

import torch

from wholegrad import clock
from wholegrad.kernels import correlate, slide
from wholegrad.kernels.compile import function
from wholegrad.kernels.expression import EACH, IDENTITY, MAP, Leaf, Program
from wholegrad.kernels.host import Host, host
from wholegrad.kernels.stage import NOTE, PLACE, Part, parts_of
from wholegrad.kernels.taps import Axis

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]
REAL = {torch.float32: "float", torch.float64: "double"}
BAND_BYTES = 1 << 18  # of scratch memory, to stay in a core's own cache
MOST_BYTES = 1 << 21  # where wide rows would leave a band few of them, and most would be staged again for the next:
ROWS = 6  # then up to so many for each that is
RUN = 128  # vectors that a lane sums before the sum is added to a float64 total, or one row if that is longer
_own = threading.local()


class Mixed(NamedTuple):
    """A map that is computed as it is read, channel after channel of each part.

    Attributes:
        parts: programs and how many channels each yields.
        leaves: the tensors of all programs in order: maps ``(N, C, H, W)`` with C the part's channels, in the kernel's
            precision or unsigned 8-bit; contiguous values for each channel; single values.
    """

    parts: tuple[Part, ...]
    leaves: tuple[torch.Tensor, ...]

    @property
    def first(self) -> torch.Tensor:
        """A leaf that is a map."""
        kinds = [leaf.kind for part in self.parts for leaf in part.program.leaves]
        return self.leaves[kinds.index(MAP)]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, _, h, w = self.first.shape
        return n, sum(part.channels for part in self.parts), h, w

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the leaves have; unsigned 8-bit where all are bytes."""
        return next((leaf.dtype for leaf in self.leaves if leaf.dtype in REAL), torch.uint8)

    @property
    def table(self) -> Table:
        return Table([leaf for part in self.parts for leaf in part.program.leaves], self.leaves)

    def part(self, number: int) -> Mixed:
        """One part as an input of its own."""
        start = sum(len(part.program.leaves) for part in self.parts[:number])
        return Mixed((self.parts[number],), self.leaves[start : start + len(self.parts[number].program.leaves)])


def _mixed(x: torch.Tensor | Mixed) -> Mixed:
    return x if isinstance(x, Mixed) else Mixed((Part(IDENTITY, x.shape[1]),), (x,))


def kernel_parts(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts as a kernel is compiled for them: none where a tensor is taken as it is."""
    if len(parts) == 1 and parts[0].program.plain:
        return ()
    return tuple(Part(_without_grad(part.program), part.channels) for part in parts)


def _without_grad(program: Program) -> Program:
    """The same kernel serves whatever derivatives are wanted elsewhere."""
    return program._replace(leaves=tuple(leaf._replace(grad=False) for leaf in program.leaves))


def forward(
    x: torch.Tensor | Mixed,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    factor: Mixed | None = None,
) -> torch.Tensor:
    """The convolution of ``x`` ``(N, I, H, W)`` with ``weight`` ``(O, I, k, l)``: ``(N, O, h, w)``.

    Args:
        factor: a map of the output's shape by whose derivative, with respect to its one wanted leaf, the output is
            multiplied.
    """
    outputs, inputs, k, l = weight.shape  # noqa: E741
    x = _mixed(x)
    height, width = x.shape[2:]
    high = (height + padding[0] + padding[1] - dilation[0] * (k - 1) - 1) // stride[0] + 1
    wide = (width + padding[2] + padding[3] - dilation[1] * (l - 1) - 1) // stride[1] + 1
    real = REAL[weight.dtype]
    shape = slide.Shape(inputs, outputs, (k, l), stride, dilation, False, (0, 0), real, kernel_parts(x.parts))
    return _slide(shape, x, weight, bias, (high, wide), (padding[0], padding[2]), factor)


def input_gradient(
    grad: torch.Tensor | Mixed,
    weight: torch.Tensor,
    input_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    bias: torch.Tensor | None = None,
    factor: Mixed | None = None,
) -> torch.Tensor:
    """The gradient ``(N, I, *input_size)`` of :func:`forward`'s input from ``grad`` ``(N, O, h, w)``.

    It is also a transposed convolution of ``grad``, to which ``bias`` ``(I,)`` may be added; then padding crops.
    """
    outputs, inputs, k, l = weight.shape  # noqa: E741
    grad = _mixed(grad)
    residue = (padding[0] % stride[0], padding[2] % stride[1])
    real = REAL[weight.dtype]
    shape = slide.Shape(outputs, inputs, (k, l), stride, dilation, True, residue, real, kernel_parts(grad.parts))
    return _slide(shape, grad, weight.transpose(0, 1), bias, input_size, (padding[0], padding[2]), factor)


def weight_gradient(
    grad: torch.Tensor | Mixed,
    x: torch.Tensor | Mixed,
    kernel: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    sums: ChannelSums | None = None,
) -> torch.Tensor:
    """The gradient ``(O, I, *kernel)`` of :func:`forward`'s weight, in float64.

    Args:
        grad: ``(N, O, h, w)``, of the output.
        x: ``(N, I, H, W)``, the input.
        sums: sums to take on the way.
    """
    dtype = grad.dtype if grad.dtype in REAL else x.dtype
    grad, x = _mixed(grad), _mixed(x)
    outputs, inputs = grad.shape[1], x.shape[1]
    shape = correlate.Shape(
        inputs, outputs, kernel, stride, dilation, REAL[dtype], kernel_parts(x.parts), kernel_parts(grad.parts),
        "" if sums is None else sums.of,
    )  # fmt: skip
    kernel_found = correlate_kernel(shape)
    totals = torch.zeros((outputs, inputs, *kernel, kernel_found.lanes), dtype=torch.float64)
    added = torch.zeros((max(outputs, inputs), kernel_found.lanes), dtype=torch.float64)
    if prod(grad.shape) and prod(x.shape):
        plan = correlate_plan(shape, x.shape[2:], grad.shape[2:], padding)
        memory = scratch(plan.bytes)
        of_x, of_grad = x.table, grad.table
        for n in range(x.shape[0]):
            kernel_found.call(
                plan.sizes, of_x.of(n), of_grad.of(n), totals.data_ptr(), added.data_ptr(),
                memory + plan.starts[0], memory + plan.starts[1], memory,
            )  # fmt: skip
    if sums is not None:
        sums.found = added[: inputs if sums.of == "x" else outputs].sum(-1)
    return totals.sum(-1)


class ChannelSums:
    """Sums over each channel of the output's gradient (``of`` g) or of the input (x), float64, once ``found``.

    The gradient of a bias: :func:`weight_gradient` reads that map anyway. Of the input only where :meth:`all_read`.
    """

    def __init__(self, of: str) -> None:
        self.of = of
        self.found: torch.Tensor | None = None

    @staticmethod
    def all_read(x: Pair, grad: Pair, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> bool:
        """Whether the windows that sit on a map of size ``grad`` reach every row and column of ``x``."""
        ends = [(grad[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] for i in (0, 1)]
        return min(padding[0], padding[2]) >= 0 and ends[0] >= x[0] and ends[1] >= x[1]


class Table:
    """Where a kernel finds tensors, one image of the batch at a time."""

    def __init__(self, leaves: Sequence[Leaf], tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = []  # kept alive
        self.values: list[tuple[int, int, int, int]] = []
        for leaf, tensor in zip(leaves, tensors, strict=True):
            if leaf.kind == MAP:
                tensor, steps = self._lying(tensor)
                self.values.append((tensor.data_ptr(), *steps, tensor.stride(0) * tensor.element_size()))
            else:
                tensor = tensor.contiguous()
                self.values.append((tensor.data_ptr(), int(leaf.kind == EACH), 0, 0))
            self.tensors.append(tensor)

    def _lying(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Pair]:
        """A map as kernels read it, and its elements from channel to channel and from row to row."""
        tensor = _columns_adjacent(tensor)
        return tensor, (tensor.stride(1) if tensor.shape[1] > 1 else 0, tensor.stride(2))

    def of(self, n: int) -> ctypes.Array[ctypes.c_int64]:
        flat = [each for start, *steps, jump in self.values for each in (start + n * jump, *steps)]
        return (ctypes.c_int64 * len(flat))(*flat)


def _slide(
    shape: slide.Shape,
    x: Mixed,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    size: Pair,
    lead: Pair,
    factor: Mixed | None,
) -> torch.Tensor:
    """``weight`` is ``(outputs, inputs, k, l)`` whichever way the window slides; ``lead`` is the padding before."""
    if factor is not None:
        shape = shape._replace(factor=factor.parts[0].program)
    kernel = slide_kernel(shape)
    out = torch.empty((x.shape[0], shape.outputs, *size), dtype=weight.dtype)
    if out.numel() == 0:
        return out
    packed = packed_weight(weight, kernel.block)
    added = zeros(shape.outputs, weight.dtype) if bias is None else bias.contiguous()
    plan = slide_plan(shape, x.shape[2:], size, lead, (size[0] * size[1], size[1]))
    memory = scratch(plan.bytes)
    given, scaled = x.table, None if factor is None else factor.table
    for n in range(x.shape[0]):
        to = out.data_ptr() + n * out.stride(0) * out.element_size()
        by = None if scaled is None else scaled.of(n)
        kernel.call(
            plan.sizes, given.of(n), packed.data_ptr(), added.data_ptr(), to, by, memory + plan.starts[0], memory
        )
    return out


def packed_weight(weight: torch.Tensor, block: slide.Block) -> torch.Tensor:
    """``(outputs, inputs, k, l)`` as the kernel reads it: for each group of output channels, these last."""
    parts = [weight[g : g + block.channels].permute(1, 2, 3, 0) for g in block.groups(weight.shape[0])]
    return (torch.stack(parts) if len(parts) > 1 else parts[0]).contiguous()


class _SlideKernel(NamedTuple):
    call: Callable[..., None]
    block: slide.Block
    lanes: int


class _CorrelateKernel(NamedTuple):
    call: Callable[..., None]
    lanes: int


@cache
@clock.timed("preparing", "machine code")
def slide_kernel(shape: slide.Shape) -> _SlideKernel:
    machine = _machine()
    call = function(slide.write(shape, machine), "slide", slide.POINTERS)
    return _SlideKernel(call, slide.block(shape, machine), machine.lanes(shape.real))


@cache
@clock.timed("preparing", "machine code")
def correlate_kernel(shape: correlate.Shape) -> _CorrelateKernel:
    machine = _machine()
    call = function(correlate.write(shape, machine), "correlate", correlate.POINTERS)
    return _CorrelateKernel(call, machine.lanes(shape.real))


def lanes(real: str) -> int:
    """Elements of a vector of ``float`` or ``double`` on this machine."""
    return _machine().lanes(real)


def _machine() -> Host:
    found = host()
    if found is None:
        raise RuntimeError("kernels need llvmlite and a processor with fused multiply-add")
    return found


class _Plan(NamedTuple):
    """What a kernel is told about one size of map, the scratch bytes that it needs, and where in it maps start."""

    sizes: ctypes.Array[ctypes.c_int64]
    bytes: int
    starts: tuple[int, ...]


def _notes(channels: int) -> int:
    """Bytes for notes and places of so many channels, at the start of scratch memory."""
    return -(-(NOTE + PLACE) * 8 * channels // 64) * 64


@lru_cache(maxsize=4096)
def slide_plan(shape: slide.Shape, given: Pair, size: Pair, lead: Pair, steps: Pair) -> _Plan:
    """What the kernel is told of an input of size ``given`` and an output of ``size``.

    Args:
        lead: the padding before the input, rows and columns.
        steps: elements from channel to channel of the output, and from row to row.
    """
    kernel, (rows, cols) = slide_kernel(shape), shape.axes()
    item = 4 if shape.real == "float" else 8
    starts = [_start(shape, each, lead[i], i) for i, each in enumerate((rows, cols))]
    many, wide = (ceil(size[i] / each.targets) for i, each in enumerate((rows, cols)))
    places = _places(wide + cols.reach + kernel.block.vectors * kernel.lanes, kernel.lanes)
    row_bytes = shape.staged * rows.sources * cols.sources * places * item
    step = kernel.block.rows
    band = min(ceil(_band(row_bytes, rows.reach) / step), ceil(many / step)) * step
    channel = (band + rows.reach) * rows.sources * cols.sources * places
    values = (*given, *size, *steps, *starts, many, wide, band, places, channel)
    first = _notes(shape.inputs)
    sizes = (ctypes.c_int64 * len(slide.SIZES))(*values)
    return _Plan(sizes, first + shape.staged * channel * item, (first,))


def directly(shape: slide.Shape, there: Sequence[bool], given: Pair, size: Pair, lead: Pair) -> slide.Shape:
    """The shape that reads where they lie those parts of its input that are ``there``, as far as it can.

    Args:
        there: which of the parts may be read so, if they are maps as they are: memory after them may be read too.
        given, size, lead: as :func:`slide_plan` has them.
    """
    axes = shape.axes()
    if any(each.sources > 1 for each in axes):
        return shape
    for i, each in enumerate(axes):
        start, many = _start(shape, each, lead[i], i), ceil(size[i] / each.targets)
        if start < 0 or start + many + each.reach > given[i]:
            return shape
    parts = parts_of(shape.parts, shape.inputs)
    direct = tuple(may and part.program.plain for may, part in zip(there, parts, strict=True))
    return shape._replace(direct=direct) if any(direct) else shape


def correlated_directly(
    shape: correlate.Shape, there: Sequence[bool], given: Pair, size: Pair, padding: Padding
) -> correlate.Shape:
    """The shape that reads where they lie those parts of its input that are ``there``, as far as it can.

    Args:
        given, size, padding: as :func:`correlate_plan` has them.
    """
    if shape.summed == "x" or size[1] % lanes(shape.real) or any(each.sources > 1 for each in shape.axes()):
        return shape
    for i, each in enumerate(shape.axes()):
        if padding[2 * i] > 0 or size[i] + each.reach - padding[2 * i] > given[i]:
            return shape
    parts = parts_of(shape.parts, shape.inputs)
    direct = tuple(may and part.program.plain for may, part in zip(there, parts, strict=True))
    return shape._replace(direct=direct) if any(direct) else shape


def beyond(wide: int, dtype: torch.dtype) -> int:
    """Bytes after a map with rows of ``wide`` elements that kernels may read which read it where it lies."""
    return slide.MOST * (wide + lanes(REAL[dtype])) * dtype.itemsize


def _start(shape: slide.Shape, each: Axis, lead: int, number: int) -> int:
    """The place of the input that the first output's first tap reads, along one axis."""
    return lead // shape.stride[number] + each.lead if shape.transposed else -lead


@lru_cache(maxsize=4096)
def correlate_plan(shape: correlate.Shape, given: Pair, size: Pair, padding: Padding) -> _Plan:
    lanes, (rows, cols) = correlate_kernel(shape).lanes, shape.axes()
    item = 4 if shape.real == "float" else 8
    high, wide = size
    # What no window reads is left out: a product of zero and infinity is not zero.
    read = [
        min(given[i], (size[i] - 1) * shape.stride[i] + shape.dilation[i] * (shape.kernel[i] - 1) + 1 - padding[2 * i])
        for i in (0, 1)
    ]
    places, grad_places = _places(wide + lanes + cols.reach, lanes), _places(wide, lanes)
    row_bytes = (shape.staged * rows.sources * cols.sources * places + shape.outputs * grad_places) * item
    band = min(max(2 * rows.reach, _band(row_bytes, rows.reach)), high + rows.reach)
    channel = band * rows.sources * cols.sources * places
    grad_channel = (band + rows.reach) * grad_places
    values = (
        *read, -padding[0], -padding[2], high, wide, high + rows.reach, band, max(1, RUN * lanes // wide),
        places, channel, grad_places, grad_channel,
    )  # fmt: skip
    first = _notes(shape.inputs)
    second = first + shape.staged * channel * item
    sizes = (ctypes.c_int64 * len(correlate.SIZES))(*values)
    return _Plan(sizes, second + shape.outputs * grad_channel * item, (first, second))


def _band(row_bytes: int, reach: int) -> int:
    """Rows of a band, beside ``reach`` that the next one stages again."""
    many, most = (size // max(1, row_bytes) - reach for size in (BAND_BYTES, MOST_BYTES))
    return max(1, many, min(ROWS * reach, most))


def _places(count: int, lanes: int) -> int:
    """Elements of a scratch row for so many: whole vectors, an odd number so that rows do not share cache sets."""
    vectors = ceil(count / lanes)
    return (vectors + 1 - vectors % 2) * lanes


def _columns_adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


@cache
def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype)


def scratch(size: int) -> int:
    """The address of ``size`` bytes of this thread's own, at a multiple of 64, valid until the thread asks again."""
    memory: torch.Tensor | None = getattr(_own, "memory", None)
    if memory is None or memory.numel() < size + 64:
        memory = _own.memory = torch.empty(size + 64, dtype=torch.uint8)
    return -(-memory.data_ptr() // 64) * 64

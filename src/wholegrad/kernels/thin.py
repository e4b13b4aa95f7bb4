"""Convolutions of few channels on planar tensors: outputs, input gradients and weight gradients.

Padding is ``(top, bottom, left, right)``, zeros that the map is taken to have around it; a negative number crops. It is
never copied into a tensor. Tensors are ``(N, C, H, W)``, in float32 or float64, with columns next to each other in
memory; rows and channels may lie apart, as in a crop.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from math import ceil
from typing import NamedTuple

import torch

from wholegrad.kernels import correlate, slide
from wholegrad.kernels.compile import function
from wholegrad.kernels.host import Host, host

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]
REAL = {torch.float32: "float", torch.float64: "double"}
BAND_BYTES = 1 << 18  # of scratch memory, to stay in a core's own cache
RUN = 128  # vectors that a lane sums before the sum is added to a float64 total, or one row if that is longer
_own = threading.local()


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Pair, padding: Padding, dilation: Pair
) -> torch.Tensor:
    """The convolution of ``x`` ``(N, I, H, W)`` with ``weight`` ``(O, I, k, l)``: ``(N, O, h, w)``."""
    outputs, inputs, k, l = weight.shape  # noqa: E741
    high = (x.shape[2] + padding[0] + padding[1] - dilation[0] * (k - 1) - 1) // stride[0] + 1
    wide = (x.shape[3] + padding[2] + padding[3] - dilation[1] * (l - 1) - 1) // stride[1] + 1
    shape = slide.Shape(inputs, outputs, (k, l), stride, dilation, False, (0, 0), REAL[x.dtype])
    return _slide(shape, x, weight, bias, (high, wide), (padding[0], padding[2]))


def input_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    input_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient ``(N, I, *input_size)`` of :func:`forward`'s input from ``grad`` ``(N, O, h, w)``.

    It is also a transposed convolution of ``grad``, to which ``bias`` ``(I,)`` may be added; then padding crops.
    """
    outputs, inputs, k, l = weight.shape  # noqa: E741
    residue = (padding[0] % stride[0], padding[2] % stride[1])
    shape = slide.Shape(outputs, inputs, (k, l), stride, dilation, True, residue, REAL[grad.dtype])
    return _slide(shape, grad, weight.transpose(0, 1), bias, input_size, (padding[0], padding[2]))


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair
) -> torch.Tensor:
    """The gradient ``(O, I, *kernel)`` of :func:`forward`'s weight, in float64.

    Args:
        grad: ``(N, O, h, w)``, of the output.
        x: ``(N, I, H, W)``, the input.
    """
    shape = correlate.Shape(x.shape[1], grad.shape[1], kernel, stride, dilation, REAL[x.dtype])
    kernel_found = _correlate_kernel(shape)
    totals = torch.zeros((shape.outputs, shape.inputs, *kernel, kernel_found.lanes), dtype=torch.float64)
    if grad.numel() and x.numel():
        grad, x = _columns_adjacent(grad), _columns_adjacent(x)
        plan = _correlate_plan(
            shape,
            (x.shape[2], x.shape[3]),
            (grad.shape[2], grad.shape[3]),
            padding,
            x.stride()[1:3],
            grad.stride()[1:3],
        )
        memory = _scratch(plan.bytes)
        first, second = x.data_ptr(), grad.data_ptr()
        for n in range(x.shape[0]):
            at, of = first + n * x.stride(0) * x.element_size(), second + n * grad.stride(0) * x.element_size()
            kernel_found.call(plan.sizes, at, of, totals.data_ptr(), memory, memory + plan.second)
    return totals.sum(-1)


def _slide(
    shape: slide.Shape, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: Pair, lead: Pair
) -> torch.Tensor:
    """``weight`` is ``(outputs, inputs, k, l)`` whichever way the window slides; ``lead`` is the padding before."""
    kernel = _slide_kernel(shape)
    x = _columns_adjacent(x)
    out = x.new_empty((x.shape[0], shape.outputs, *size))
    if out.numel() == 0:
        return out
    parts = [weight[g : g + kernel.block.channels].permute(1, 2, 3, 0) for g in kernel.block.groups(shape.outputs)]
    packed = (torch.stack(parts) if len(parts) > 1 else parts[0]).contiguous()
    added = _zeros(shape.outputs, x.dtype) if bias is None else bias.contiguous()
    plan = _slide_plan(shape, (x.shape[2], x.shape[3]), size, lead, x.stride()[1:3])
    memory = _scratch(plan.bytes)
    at, to = x.data_ptr(), out.data_ptr()
    for n in range(x.shape[0]):
        skip, jump = n * x.stride(0) * x.element_size(), n * out.stride(0) * x.element_size()
        kernel.call(plan.sizes, at + skip, packed.data_ptr(), added.data_ptr(), to + jump, memory)
    return out


class _SlideKernel(NamedTuple):
    call: Callable[..., None]
    block: slide.Block
    lanes: int


class _CorrelateKernel(NamedTuple):
    call: Callable[..., None]
    lanes: int


@cache
def _slide_kernel(shape: slide.Shape) -> _SlideKernel:
    machine = _machine()
    call = function(slide.write(shape, machine), "slide", slide.POINTERS)
    return _SlideKernel(call, slide.block(shape, machine), machine.lanes(shape.real))


@cache
def _correlate_kernel(shape: correlate.Shape) -> _CorrelateKernel:
    machine = _machine()
    call = function(correlate.write(shape, machine), "correlate", correlate.POINTERS)
    return _CorrelateKernel(call, machine.lanes(shape.real))


def _machine() -> Host:
    found = host()
    if found is None:
        raise RuntimeError("kernels need llvmlite and a processor with fused multiply-add")
    return found


class _Plan(NamedTuple):
    """What a kernel is told about one size of map, and the scratch bytes that it needs; a second map's start there."""

    sizes: ctypes.Array[ctypes.c_int64]
    bytes: int
    second: int = 0


@lru_cache(maxsize=4096)
def _slide_plan(shape: slide.Shape, given: Pair, size: Pair, lead: Pair, strides: Pair) -> _Plan:
    kernel, (rows, cols) = _slide_kernel(shape), shape.axes()
    item = 4 if shape.real == "float" else 8
    starts = [
        lead[i] // shape.stride[i] + each.lead if shape.transposed else -lead[i] for i, each in enumerate((rows, cols))
    ]
    many, wide = (ceil(size[i] / each.targets) for i, each in enumerate((rows, cols)))
    places = _places(wide + cols.reach + kernel.block.vectors * kernel.lanes, kernel.lanes)
    row_bytes = shape.inputs * rows.sources * cols.sources * places * item
    step = kernel.block.rows
    band = min(ceil(max(1, BAND_BYTES // row_bytes - rows.reach) / step), ceil(many / step)) * step
    channel = (band + rows.reach) * rows.sources * cols.sources * places
    values = (*given, *strides, *size, size[0] * size[1], size[1], *starts, many, wide, band, places, channel)
    return _Plan((ctypes.c_int64 * len(slide.SIZES))(*values), shape.inputs * channel * item)


@lru_cache(maxsize=4096)
def _correlate_plan(
    shape: correlate.Shape, given: Pair, size: Pair, padding: Padding, strides: Pair, grad_strides: Pair
) -> _Plan:
    lanes, (rows, cols) = _correlate_kernel(shape).lanes, shape.axes()
    item = 4 if shape.real == "float" else 8
    high, wide = size
    # What no window reads is left out: a product of zero and infinity is not zero.
    read = [
        min(given[i], (size[i] - 1) * shape.stride[i] + shape.dilation[i] * (shape.kernel[i] - 1) + 1 - padding[2 * i])
        for i in (0, 1)
    ]
    places, grad_places = _places(wide + lanes + cols.reach, lanes), _places(wide, lanes)
    row_bytes = (shape.inputs * rows.sources * cols.sources * places + shape.outputs * grad_places) * item
    band = max(1, 2 * rows.reach, BAND_BYTES // row_bytes - rows.reach)
    band = min(band, high + rows.reach)
    channel = band * rows.sources * cols.sources * places
    grad_channel = (band + rows.reach) * grad_places
    values = (
        *read, *strides, -padding[0], -padding[2], high, wide, *grad_strides, high + rows.reach, band,
        max(1, RUN * lanes // wide), places, channel, grad_places, grad_channel,
    )  # fmt: skip
    second = shape.inputs * channel * item
    sizes = (ctypes.c_int64 * len(correlate.SIZES))(*values)
    return _Plan(sizes, second + shape.outputs * grad_channel * item, second)


def _places(count: int, lanes: int) -> int:
    """Elements of a scratch row for so many: whole vectors, an odd number so that rows do not share cache sets."""
    vectors = ceil(count / lanes)
    return (vectors + 1 - vectors % 2) * lanes


def _columns_adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


@cache
def _zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype)


def _scratch(size: int) -> int:
    """The address of ``size`` bytes of this thread's own, at a multiple of 64, valid until the thread asks again."""
    memory: torch.Tensor | None = getattr(_own, "memory", None)
    if memory is None or memory.numel() < size + 64:
        memory = _own.memory = torch.empty(size + 64, dtype=torch.uint8)
    return -(-memory.data_ptr() // 64) * 64

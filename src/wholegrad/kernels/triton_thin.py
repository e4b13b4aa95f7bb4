# mypy: ignore-errors
"""Thin convolutions on a GPU in Triton: forward, the input's gradient, the weight's gradient.

With few channels a convolution is a handful of multiply-adds for each element that is read, and libraries' kernels,
which are made for products of large matrices, leave most of the machine idle. Here a program computes a stretch of a
row for all output channels: columns lie along the lanes, windows are unrolled, and what neighbouring taps read comes
from the cache. Maps are planar, ``(N, C, H, W)``, contiguous.

The weight's gradient is summed in two stages, so that the order never changes: a program adds up some rows of one input
channel and one row of the window, for all output channels, in the maps' own precision; programs are added in float64.

Written and tested in Triton's interpreter; never run on a GPU yet, and off unless asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LANES = 512  # columns of a program
ROWS = 32  # rows whose products one program of the weight's gradient adds up


class Window(NamedTuple):
    """``padding`` is above, below, left and right; negative numbers crop."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]


def outputs(size: tuple[int, int], kernel: tuple[int, int], window: Window) -> tuple[int, int]:
    """Rows and columns of a convolution's output."""
    found = [
        (size[i] + sum(window.padding[2 * i : 2 * i + 2]) - window.dilation[i] * (kernel[i] - 1) - 1)
        // window.stride[i]
        + 1
        for i in (0, 1)
    ]
    return found[0], found[1]


@triton.jit
def _finish(
    total, bias, out, sample, row, rows, col, columns,
    OUT: tl.constexpr, OUT_PADDED: tl.constexpr, BIAS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Add the bias of every channel to a stretch of a row, and store it."""
    channel = tl.arange(0, OUT_PADDED)
    inside = channel < OUT
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(REAL)[:, None]
    place = out + ((sample * OUT + channel[:, None]) * rows + row) * columns + col[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside[:, None] & (col < columns)[None, :])


@triton.jit
def _slide(
    x, weight, bias, out, columns, height, width, rows, top, left,
    CHANNELS: tl.constexpr, OUT: tl.constexpr, OUT_PADDED: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, BIAS: tl.constexpr,
    REAL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A stretch of a row of the output ``(N, OUT, rows, columns)`` of ``x`` ``(N, CHANNELS, height, width)``."""
    row, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    col = tl.program_id(1) * LANES + tl.arange(0, LANES)
    channel = tl.arange(0, OUT_PADDED)
    inside = channel < OUT
    total = tl.zeros([OUT_PADDED, LANES], REAL)
    for c in range(CHANNELS):
        for i in range(KH):
            y = row * SY - top + i * DY
            start = x + ((sample * CHANNELS + c) * height + y) * width
            for j in tl.static_range(KW):
                at = col * SX - left + j * DX
                good = (y >= 0) & (y < height) & (at >= 0) & (at < width) & (col < columns)
                value = tl.load(start + at, mask=good, other=0.0).to(REAL)
                factor = tl.load(weight + ((channel * CHANNELS + c) * KH + i) * KW + j, mask=inside, other=0.0).to(REAL)
                total += factor[:, None] * value[None, :]
    _finish(total, bias, out, sample, row, rows, col, columns, OUT, OUT_PADDED, BIAS, REAL)


@triton.jit
def _spread(
    grad, weight, bias, out, columns, height, width, rows, top, left,
    CHANNELS: tl.constexpr, OUT: tl.constexpr, OUT_PADDED: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, BIAS: tl.constexpr,
    REAL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A stretch of a row of ``out`` ``(N, OUT, rows, columns)``, which windows that sit on ``grad`` write into.

    ``grad`` is ``(N, CHANNELS, height, width)``, ``weight`` ``(CHANNELS, OUT, KH, KW)``.
    """
    row, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    col = tl.program_id(1) * LANES + tl.arange(0, LANES)
    channel = tl.arange(0, OUT_PADDED)
    inside = channel < OUT
    total = tl.zeros([OUT_PADDED, LANES], REAL)
    for c in range(CHANNELS):
        for i in range(KH):
            up = row + top - i * DY
            y = up // SY
            start = grad + ((sample * CHANNELS + c) * height + y) * width
            for j in tl.static_range(KW):
                across = col + left - j * DX
                at = across // SX
                good = (up >= 0) & (up % SY == 0) & (y < height) & (col < columns)
                good = good & (across >= 0) & (across % SX == 0) & (at < width)
                value = tl.load(start + at, mask=good, other=0.0).to(REAL)
                factor = tl.load(weight + ((c * OUT + channel) * KH + i) * KW + j, mask=inside, other=0.0).to(REAL)
                total += factor[:, None] * value[None, :]
    _finish(total, bias, out, sample, row, rows, col, columns, OUT, OUT_PADDED, BIAS, REAL)


@triton.jit
def _correlate(
    sat, read, parts, height, width, rows, columns, blocks, top, left,
    CHANNELS: tl.constexpr, OUT: tl.constexpr, OUT_PADDED: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    KW_PADDED: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    ROWS: tl.constexpr, REAL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Products of a block of ``sat`` ``(N, OUT, rows, columns)`` with one channel of ``read``, for one row of taps.

    Programs that read the same block follow each other, so that it comes from the cache. ``blocks`` lie along a row.
    """
    which, number = tl.program_id(0) % (CHANNELS * KH), tl.program_id(0) // (CHANNELS * KH)
    sample = tl.program_id(2).to(tl.int64)
    c, i = which // KH, which % KH
    band, col = number // blocks, (number % blocks) * LANES + tl.arange(0, LANES)
    channel, tap = tl.arange(0, OUT_PADDED), tl.arange(0, KW_PADDED)
    at = col[None, :] * SX - left + tap[:, None] * DX
    across = (at >= 0) & (at < width) & (tap < KW)[:, None]
    total = tl.zeros([KW_PADDED, OUT_PADDED, LANES], REAL)
    for each in range(ROWS):
        row = band * ROWS + each
        y = row * SY - top + i * DY
        here = (row < rows) & (col < columns)
        good = here[None, :] & across & (y >= 0) & (y < height)
        value = tl.load(read + ((sample * CHANNELS + c) * height + y) * width + at, mask=good, other=0.0).to(REAL)
        place = sat + ((sample * OUT + channel[:, None]) * rows + row) * columns + col[None, :]
        factor = tl.load(place, mask=(channel < OUT)[:, None] & here[None, :], other=0.0).to(REAL)
        total += value[:, None, :] * factor[None, :, :]
    found = tl.sum(total.to(tl.float64), 2)
    part = sample * (tl.num_programs(0) // (CHANNELS * KH)) + number
    place = parts + (((part * OUT + channel[None, :]) * CHANNELS + c) * KH + i) * KW + tap[:, None]
    tl.store(place, found, mask=(channel < OUT)[None, :] & (tap < KW)[:, None])


def _real(dtype: torch.dtype) -> object:
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """The convolution of ``x`` ``(N, I, H, W)`` with ``weight`` ``(O, I, kh, kw)``, and ``bias`` ``(O,)`` added."""
    kernel = (weight.shape[2], weight.shape[3])
    size = outputs((x.shape[2], x.shape[3]), kernel, window)
    return _launched(_slide, x, weight, bias, weight.shape[0], kernel, size, window)


def input_gradient(
    grad: torch.Tensor, weight: torch.Tensor, size: tuple[int, int], window: Window, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the input ``(N, I, *size)`` from that of the output ``(N, O, h, w)``: a transposed convolution.

    Args:
        bias: ``(I,)`` to add, for a layer that is one.
    """
    kernel = (weight.shape[2], weight.shape[3])
    return _launched(_spread, grad, weight, bias, weight.shape[1], kernel, size, window)


def _launched(
    kernel_of: object,
    given: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: int,
    kernel: tuple[int, int],
    size: tuple[int, int],
    window: Window,
) -> torch.Tensor:
    given, weight = given.contiguous(), weight.contiguous()
    n, channels, height, width = given.shape
    made = given.new_empty((n, out, *size))
    if made.numel():
        kernel_of[(size[0], triton.cdiv(size[1], LANES), n)](  # rows first: a grid's others have fewer than 65536
            given, weight, weight if bias is None else bias.contiguous(), made,
            size[1], height, width, size[0], window.padding[0], window.padding[2],
            CHANNELS=channels, OUT=out, OUT_PADDED=triton.next_power_of_2(out), KH=kernel[0], KW=kernel[1],
            SY=window.stride[0], SX=window.stride[1], DY=window.dilation[0], DX=window.dilation[1],
            BIAS=bias is not None, REAL=_real(given.dtype), LANES=LANES,
        )  # fmt: skip
    return made


def weight_gradient(sat: torch.Tensor, read: torch.Tensor, kernel: tuple[int, int], window: Window) -> torch.Tensor:
    """The gradient of the weight ``(O, I, *kernel)`` in float64.

    Args:
        sat: ``(N, O, h, w)``, the map on which windows sit: the output's gradient (transposed: the input).
        read: ``(N, I, H, W)``, the map that windows read: the input (transposed: the output's gradient).
    """
    sat, read = sat.contiguous(), read.contiguous()
    n, out, rows, columns = sat.shape
    channels, height, width = read.shape[1:]
    blocks = triton.cdiv(columns, LANES)
    count = triton.cdiv(rows, ROWS) * blocks
    parts = torch.zeros((n * count, out, channels, *kernel), dtype=torch.float64, device=sat.device)
    if sat.numel():
        _correlate[(channels * kernel[0] * count, 1, n)](
            sat, read, parts, height, width, rows, columns, blocks, window.padding[0], window.padding[2],
            CHANNELS=channels, OUT=out, OUT_PADDED=triton.next_power_of_2(out), KH=kernel[0], KW=kernel[1],
            KW_PADDED=triton.next_power_of_2(kernel[1]), SY=window.stride[0], SX=window.stride[1],
            DY=window.dilation[0], DX=window.dilation[1], ROWS=ROWS, REAL=_real(sat.dtype), LANES=LANES,
        )  # fmt: skip
    return parts.sum(0)

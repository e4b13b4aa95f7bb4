"""Convolution on a tile, with the gradients of weight and bias summed more carefully than PyTorch does.

Both sum over every pixel of a tile, terms of both signs, and PyTorch sums in float32: on a slide that is the largest
error of a float32 step. Here the bias's gradient is summed in float64, and the weight's gradient band by band of rows,
the bands in float64. Bands are short enough to stay in the cache, which also makes them faster. Everything else is
``aten.convolution`` and ``aten.convolution_backward``; convolutions of few channels go to :mod:`wholegrad.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from wholegrad import clock
from wholegrad.graph.rules import thin
from wholegrad.graph.rules.cropping import cropped
from wholegrad.graph.rules.reduction import wide
from wholegrad.kernels.choice import serves, triton_serves
from wholegrad.kernels.thin import Mixed

aten = torch.ops.aten
BAND_PIXELS = 1 << 13  # of the map on which windows sit, in one band
DEVICE_BAND_PIXELS = 1 << 22  # the same on an accelerator, where small ops are lost time; not measured


class Settings(NamedTuple):
    """``stride``, ``padding`` and ``dilation`` along rows and columns, and whether the convolution is transposed."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """``x`` of shape ``(N, C, H, W)`` with channels last in memory, and strides that say so even where C is 1.

    One planar operand makes PyTorch run a thin convolution's backward planar, several times slower. On an accelerator a
    map stays as it lies.
    """
    if x.device.type != "cpu":
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    return x.as_strided((n, c, h, w), (h * w * c, 1, w * c, c)) if c == 1 else x


def _rows_of_band(x: torch.Tensor) -> int:
    most = BAND_PIXELS if x.device.type == "cpu" else DEVICE_BAND_PIXELS
    return max(1, most // (x.shape[0] * x.shape[3]))


def weight_gradient(sat: torch.Tensor, read: torch.Tensor, weight: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The gradient of a convolution's weight, in float64 where it takes several bands.

    Args:
        sat: ``(N, O, h, w)``, the map on which windows sit: the output's gradient (transposed: the input).
        read: ``(N, I, H, W)``, the map that windows read: the input (transposed: the output's gradient).
    """
    height, kernel = sat.shape[2], weight.shape[2]
    band = _rows_of_band(sat)
    plain = settings._replace(transposed=False)
    if band >= height:
        return _weight_gradient(sat, read, weight, plain)
    total = torch.zeros(weight.shape, dtype=wide(weight.dtype, weight.device), device=weight.device)
    stride, pad, reach = settings.stride[0], settings.padding[0], settings.dilation[0] * (kernel - 1) + 1
    for top in range(0, height, band):
        end = min(top + band, height)
        first, last = top * stride - pad, (end - 1) * stride - pad + reach
        lo, hi = (min(max(edge, 0), read.shape[2]) for edge in (first, last))
        rows = read[:, :, lo:hi]
        missing = (lo - first, last - hi) if lo < hi else (0, last - first)
        rows = F.pad(rows, (0, 0, *missing)) if any(missing) else rows
        inner = plain._replace(padding=[0, settings.padding[1]])
        total += _weight_gradient(sat[:, :, top:end], rows, weight, inner)
    return total


def _weight_gradient(sat: torch.Tensor, read: torch.Tensor, weight: torch.Tensor, settings: Settings) -> torch.Tensor:
    mask = [False, True, False]
    _, found, _ = aten.convolution_backward(interleaved(sat), interleaved(read), weight, None, *settings, mask)
    result: torch.Tensor = found
    return result


def _channel_sums(grad: torch.Tensor) -> torch.Tensor:
    """Sums of ``(N, C, H, W)`` over all but channels: bands in their own precision, which is fast, bands in float64."""
    if grad.device.type != "cpu":
        return grad.sum((0, 2, 3), dtype=wide(grad.dtype, grad.device))
    band = _rows_of_band(grad)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(grad.shape[1], dtype=torch.float64)
    for rows in torch.split(grad, band, 2):
        total += rows.sum((0, 2, 3), dtype=dtype)
    return total


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: Settings) -> torch.Tensor:
    """``aten.convolution``, a strided transposed one as the input gradient that it is: oneDNN's own is slower."""
    if not settings.transposed or max(settings.stride) == 1 or x.dtype != torch.float32 or x.device.type != "cpu":
        result: torch.Tensor = aten.convolution(x, weight, bias, *settings)
        return result
    size = [
        (x.shape[2 + i] - 1) * settings.stride[i] + settings.dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)
    ]
    channels = weight.shape[1] * settings.groups
    shaped = torch.empty((x.shape[0], channels, *size), dtype=x.dtype, memory_format=torch.channels_last)  # unread
    plain, mask = settings._replace(transposed=False), [True, False, False]
    found: torch.Tensor = aten.convolution_backward(x, shaped, weight, None, *plain, mask)[0]
    return found if bias is None else found.add_(bias.view(1, -1, 1, 1))


class Convolve(torch.autograd.Function):
    """``apply(x, weight, bias, settings, known)`` with bias possibly None; ``known`` is the output, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        settings: Settings,
        known: torch.Tensor | None,
    ) -> torch.Tensor:
        x = interleaved(x)
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.label = settings, clock.label("PyTorch convolution")
        ctx.bias_dtype = None if bias is None else bias.dtype
        return interleaved(_forward(x, weight, bias, settings)) if known is None else known

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        settings: Settings = ctx.settings
        grad = interleaved(grad)
        of_x, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            with clock.gradient_span(ctx.label, "input gradient", "PyTorch convolution", 1.0) as span:
                of_x, _, _ = aten.convolution_backward(grad, x, weight, None, *settings, mask)
                span.moved(grad, of_x)
        if ctx.needs_input_grad[1]:
            sat, read = (x, grad) if settings.transposed else (grad, x)
            with clock.gradient_span(ctx.label, "weight gradient", "PyTorch convolution", 1.0) as span:
                span.moved(x, grad)
                of_weight = weight_gradient(sat, read, weight, settings).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            with clock.gradient_span(ctx.label, "bias gradient", "sum") as span:
                span.moved(grad)
                of_bias = _channel_sums(grad).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None, None


def convolve(
    x: torch.Tensor | Mixed,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: tuple[int, int, int, int],
    dilation: list[int],
    transposed: bool,
    groups: int,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """``aten.convolution`` with padding of its own for each side, differentiable once.

    Args:
        x: computed as it is read where the thin kernels serve the convolution.
        padding: rows of zeros above and below ``x``, columns left and right of it; negative numbers crop. Transposed:
            what is cropped off the output; negative numbers add pixels that no input reaches.
        known: the output, if it need not be computed.
    """
    steps, gaps = _pair(stride), _pair(dilation)
    if not isinstance(x, Mixed) and triton_serves(x, weight, groups):
        return _in_triton(x, weight, bias, (steps, padding, gaps), transposed)
    if isinstance(x, Mixed) or serves(x, weight, steps, groups):
        size = None
        if transposed:
            size = tuple(
                (x.shape[2 + i] - 1) * steps[i]
                + gaps[i] * (weight.shape[2 + i] - 1)
                + 1
                - sum(padding[2 * i : 2 * i + 2])
                for i in (0, 1)
            )
        return thin.convolve(x, weight, bias, thin.Window(steps, padding, gaps, size))  # type: ignore[arg-type]
    top, bottom, left, right = padding
    if transposed:
        inside = min(padding) >= 0
        settings = Settings(steps, (0, 0), gaps, True, (0, 0), groups)
        given = None if known is None or not inside else padded(known, padding)  # what is cropped off again
        whole = _convolve(x, weight, bias if inside else None, settings, given)
        if inside:
            return cropped(whole, padding)
        whole = padded(whole, (-top, -bottom, -left, -right))
        return whole if bias is None else whole + bias.view(1, -1, 1, 1)
    around = (top, left)
    if not (top == bottom >= 0 and left == right >= 0):
        x, around = padded(x, padding), (0, 0)
    return _convolve(x, weight, bias, Settings(steps, around, gaps, False, (0, 0), groups), known)


class TritonConvolve(torch.autograd.Function):
    """``apply(x, weight, bias, window, size)``, bias possibly None; transposed to ``size`` pixels if that is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        window: Any,
        size: tuple[int, int] | None,
    ) -> torch.Tensor:
        from wholegrad.kernels import triton_thin as kernels

        ctx.save_for_backward(x, weight)
        ctx.window, ctx.size = window, size
        ctx.bias_dtype = None if bias is None else bias.dtype
        if size is None:
            return kernels.forward(x, weight, bias, window)
        return kernels.input_gradient(x, weight, size, window, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        from wholegrad.kernels import triton_thin as kernels

        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = None, None, None
        plain = ctx.size is None
        if ctx.needs_input_grad[0] and plain:
            of_x = kernels.input_gradient(grad, weight, (x.shape[2], x.shape[3]), ctx.window)
        elif ctx.needs_input_grad[0]:
            of_x = kernels.forward(grad, weight, None, ctx.window)
        if ctx.needs_input_grad[1]:
            sat, read = (grad, x) if plain else (x, grad)
            of_weight = kernels.weight_gradient(sat, read, (weight.shape[2], weight.shape[3]), ctx.window)
            of_weight = of_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = _channel_sums(grad).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None, None


def _in_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: tuple[Any, ...], transposed: bool
) -> torch.Tensor:
    """:func:`convolve` by Triton's kernels; what of a transposed output no window reaches is computed as zero."""
    from wholegrad.kernels.triton_thin import Window

    steps, padding, gaps = window
    size = None
    if transposed:
        reached = [(x.shape[2 + i] - 1) * steps[i] + gaps[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
        size = (reached[0] - padding[0] - padding[1], reached[1] - padding[2] - padding[3])
    found: torch.Tensor = TritonConvolve.apply(x, weight, bias, Window(*window), size)  # type: ignore[no-untyped-call]
    return found


def padded(x: torch.Tensor, edges: tuple[int, int, int, int]) -> torch.Tensor:
    """Zeros above, below, left and right of ``x``; negative numbers crop, zeros too where ``x`` is not enough."""
    top, bottom, left, right = edges
    kept = [x.shape[2] + min(top, 0) + min(bottom, 0), x.shape[3] + min(left, 0) + min(right, 0)]
    if min(kept) >= 0:
        return F.pad(x, (left, right, top, bottom))
    x = F.pad(x, [max(edge, 0) for edge in (left, right, top, bottom)])
    return F.pad(x, [min(edge, 0) for edge in (left, right, top, bottom)])


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[-1]


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    settings: Settings,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    result: torch.Tensor = Convolve.apply(x, weight, bias, settings, known)  # type: ignore[no-untyped-call]
    return result

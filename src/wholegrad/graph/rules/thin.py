"""Convolution on a tile by the thin kernels, differentiable: few channels, planar tensors, padding without copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from wholegrad.kernels import thin


class Window(NamedTuple):
    """``padding`` is that of :mod:`wholegrad.kernels.thin`; a transposed convolution's output has ``size`` pixels."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    size: tuple[int, int] | None


class ThinConvolve(torch.autograd.Function):
    """``apply(x, weight, bias, window)`` with bias possibly None; transposed where ``window`` has a size."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: Window
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.window = window
        stride, padding, dilation, size = window
        if size is None:
            return thin.forward(x, weight, bias, stride, padding, dilation)
        return thin.input_gradient(x, weight, size, stride, padding, dilation, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, size = ctx.window
        of_x, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0] and size is None:
            of_x = thin.input_gradient(grad, weight, x.shape[2:], stride, padding, dilation)
        elif ctx.needs_input_grad[0]:
            of_x = thin.forward(grad, weight, None, stride, padding, dilation)
        if ctx.needs_input_grad[1]:
            sat, read = (grad, x) if size is None else (x, grad)
            kernel = (weight.shape[2], weight.shape[3])
            of_weight = thin.weight_gradient(sat, read, kernel, stride, padding, dilation).to(weight.dtype)
        if ctx.needs_input_grad[2]:  # a row in the map's own precision, rows in float64, as the kernels do
            of_bias = grad.sum(3).sum((0, 2), dtype=torch.float64).to(grad.dtype)
        return of_x, of_weight, of_bias, None


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """The convolution, or with a size the transposed convolution, that ``window`` describes."""
    result: torch.Tensor = ThinConvolve.apply(x, weight, bias, window)  # type: ignore[no-untyped-call]
    return result

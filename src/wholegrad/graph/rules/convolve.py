"""Convolution on a tile, with the bias's gradient summed in float64.

PyTorch sums a bias's gradient over the whole tile in float32: a sum of a million terms of both signs, and the largest
error of a float32 step. Everything else is ``aten.convolution`` and ``aten.convolution_backward``.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


class Convolve(torch.autograd.Function):
    """``apply(x, weight, bias, stride, padding, dilation, transposed, groups)`` with bias possibly None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        groups: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = (stride, padding, dilation, transposed, [0, 0], groups)
        ctx.bias_dtype = None if bias is None else bias.dtype
        result: torch.Tensor = aten.convolution(x, weight, bias, *ctx.settings)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        of_x, of_weight, of_bias = None, None, None
        if want_x or want_weight:
            mask = [want_x, want_weight, False]
            of_x, of_weight, _ = aten.convolution_backward(grad, x, weight, None, *ctx.settings, mask)
        if want_bias:
            of_bias = grad.sum((0, 2, 3), dtype=torch.float64).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None, None, None, None, None


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    groups: int,
) -> torch.Tensor:
    """``aten.convolution`` without output padding, differentiable once."""
    settings = (list(stride), list(padding), list(dilation), transposed, groups)
    result: torch.Tensor = Convolve.apply(x, weight, bias, *settings)  # type: ignore[no-untyped-call]
    return result

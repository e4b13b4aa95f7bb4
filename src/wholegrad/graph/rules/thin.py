"""What the kernels compute, differentiable: thin convolutions of maps computed as they are read, pointwise chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from wholegrad import clock
from wholegrad.kernels import pointwise, thin
from wholegrad.kernels.choice import triton_runs
from wholegrad.kernels.expression import IDENTITY, Leaf, Program
from wholegrad.kernels.stage import Part
from wholegrad.kernels.thin import Mixed


class Window(NamedTuple):
    """``padding`` is that of :mod:`wholegrad.kernels.thin`; a transposed convolution's output has ``size`` pixels."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    size: tuple[int, int] | None


class Convolutions(Protocol):
    """What kernels for thin convolutions offer: the CPU's (:mod:`wholegrad.kernels.thin`), or Triton's."""

    forward: Callable[..., torch.Tensor]
    input_gradient: Callable[..., torch.Tensor]
    weight_gradient: Callable[..., torch.Tensor]


class Passes(Protocol):
    """What kernels for pointwise passes offer: the CPU's (:mod:`wholegrad.kernels.pointwise`), or Triton's."""

    values: Callable[..., torch.Tensor]
    pull: Callable[..., dict[int, torch.Tensor]]
    total: Callable[..., pointwise.Walked]
    aligned: Callable[..., Mixed]


def convolutions(leaf: torch.Tensor) -> Convolutions:
    """What computes convolutions where this tensor lies."""
    if not triton_runs(leaf):
        return thin
    from wholegrad.kernels import triton_mixed

    return triton_mixed


def passes(leaf: torch.Tensor) -> Passes:
    """What computes pointwise passes and sums where this tensor lies."""
    if not triton_runs(leaf):
        return pointwise
    from wholegrad.kernels import triton_mixed

    return triton_mixed


class ThinConvolve(torch.autograd.Function):
    """``apply(weight, bias, window, parts, *leaves)``, bias possibly None; transposed where ``window`` has a size."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        window: Window,
        parts: tuple[Part, ...],
        *leaves: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, *leaves)
        ctx.window, ctx.parts, ctx.label = window, parts, clock.label("slide")
        x = Mixed(parts, leaves)
        stride, padding, dilation, size = window
        kernels = convolutions(weight)
        if size is None:
            return kernels.forward(x, weight, bias, stride, padding, dilation)
        return kernels.input_gradient(x, weight, size, stride, padding, dilation, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        weight, *leaves = ctx.saved_tensors
        x = Mixed(ctx.parts, tuple(leaves))
        stride, padding, dilation, size = ctx.window
        of_weight, of_bias = None, None
        if ctx.needs_input_grad[0]:
            sat, read = (grad, x) if size is None else (x, grad)
            kernel = (weight.shape[2], weight.shape[3])
            sums = None
            if ctx.needs_input_grad[1] and (size is None or _all_read(grad, x, kernel, ctx.window)):
                sums = thin.ChannelSums("g" if size is None else "x")
            with clock.gradient_span(ctx.label, "weight gradient", "correlate", 1.0) as span:
                span.moved(*leaves, grad)
                found = convolutions(grad).weight_gradient(sat, read, kernel, stride, padding, dilation, sums)
                of_weight = found.to(weight.dtype)
            of_bias = sums.found.to(grad.dtype) if sums is not None and sums.found is not None else None
        if ctx.needs_input_grad[1] and of_bias is None:
            with clock.gradient_span(ctx.label, "bias gradient", "sum") as span:
                span.moved(grad)
                of_bias = _channel_sums(grad).to(grad.dtype)
        return of_weight, of_bias, None, None, *_leaf_gradients(ctx, x, grad, weight)


def _all_read(grad: torch.Tensor, x: Mixed, kernel: tuple[int, int], window: Window) -> bool:
    read, sat = (grad.shape[2], grad.shape[3]), (x.shape[2], x.shape[3])
    return thin.ChannelSums.all_read(read, sat, kernel, window.stride, window.padding, window.dilation)


def _channel_sums(grad: torch.Tensor) -> torch.Tensor:
    """Sums over rows, columns and batch, a row in the map's own precision, rows in float64."""
    whole = Mixed((Part(IDENTITY, grad.shape[1]),), (grad,))
    found = passes(grad).total(whole, grad.dtype, None).total
    assert found is not None
    return found.sum(0)


def _leaf_gradients(ctx: Any, x: Mixed, grad: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradient of every leaf: of the one map of each part whose derivative is wanted."""
    stride, padding, dilation, size = ctx.window
    result: list[torch.Tensor | None] = []
    kernels, before = convolutions(grad), 0
    for number, part in enumerate(x.parts):
        wanted = part.program.wanted
        given: torch.Tensor | None = None
        if wanted and ctx.needs_input_grad[4 + len(result) + wanted[0]]:
            factor = x.part(number) if part.program.steps else None
            mine = slice(before, before + part.channels)
            with clock.gradient_span(ctx.label, "input gradient", "slide", part.channels / x.shape[1]) as span:
                if size is None:
                    given = kernels.input_gradient(
                        grad, weight[:, mine], x.shape[2:], stride, padding, dilation, factor=factor
                    )
                else:
                    given = kernels.forward(grad, weight[mine], None, stride, padding, dilation, factor=factor)
                span.moved(grad, given, *(factor.leaves if factor else ()))
        result.extend(given if i in wanted else None for i in range(len(part.program.leaves)))
        before += part.channels
    return result


def convolve(x: torch.Tensor | Mixed, weight: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """The convolution, or with a size the transposed convolution, that ``window`` describes."""
    if isinstance(x, torch.Tensor):
        x = Mixed((Part(Program((Leaf(grad=x.requires_grad),)), x.shape[1]),), (x,))
    result: torch.Tensor = ThinConvolve.apply(weight, bias, window, x.parts, *x.leaves)  # type: ignore[no-untyped-call]
    return result


class Chain(torch.autograd.Function):
    """``apply(part, dtype, *leaves)``: the map that a program makes of its leaves."""

    @staticmethod
    def forward(ctx: Any, part: Part, dtype: torch.dtype, *leaves: torch.Tensor) -> torch.Tensor:
        kernels = passes(leaves[0])
        x = kernels.aligned(Mixed((part,), leaves))
        ctx.save_for_backward(*x.leaves)
        ctx.part, ctx.label = part, clock.label("chain")
        return kernels.values(x, dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        leaves = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[2 + i] and leaf.grad for i, leaf in enumerate(ctx.part.program.leaves)]
        marked = tuple(leaf._replace(grad=want) for leaf, want in zip(ctx.part.program.leaves, wanted, strict=True))
        part = ctx.part._replace(program=ctx.part.program._replace(leaves=marked))
        with clock.gradient_span(ctx.label, "backward", "chain") as span:
            found = passes(grad).pull(Mixed((part,), leaves), grad) if any(wanted) else {}
            span.moved(*leaves, grad, *found.values())
        grads = [found[i].reshape(leaf.shape).to(leaf.dtype) if i in found else None for i, leaf in enumerate(leaves)]
        return None, None, *grads


def chain(x: Mixed, dtype: torch.dtype) -> torch.Tensor:
    """The map that ``x``, of one part, stands for."""
    result: torch.Tensor = Chain.apply(x.parts[0], dtype, *x.leaves)  # type: ignore[no-untyped-call]
    return result

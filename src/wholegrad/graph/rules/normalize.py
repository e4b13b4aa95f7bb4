"""``(x - mean) * scale + shift`` in one pass: what every norm becomes once its statistics are known.

The statistics are small tensors, one number for each sample and channel, or for each channel; whether they are running
statistics or come from the map itself is not seen here. Gradients, with g that of the output:

    of x: g scale,   of mean: -scale sum g,   of scale: sum g (x - mean),   of shift: sum g

PyTorch's batch norm in evaluation mode with variance 1 computes exactly this, and sums over pixels in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wholegrad.graph.graph import Node
from wholegrad.graph.layout import Layout, map_layout
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, register

aten = torch.ops.aten


@torch.library.custom_op("wholegrad::normalize", mutates_args=())
def normalize(x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``(x - mean) * scale + shift`` with ``x`` ``(N, C, ...)`` and the others ``(1 or N, C, 1, ...)``."""
    return (x - mean) * scale + shift


@normalize.register_fake
def _(x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, mean, scale, shift = ctx.saved_tensors
    return (
        grad * scale,
        (-grad * scale).sum_to_size(mean.shape),
        (grad * (x - mean)).sum_to_size(scale.shape),
        grad.sum_to_size(shift.shape),
    )


normalize.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
NORMALIZE = torch.ops.wholegrad.normalize.default


def _vector(value: torch.Tensor, sample: int) -> torch.Tensor:
    """One number a channel, of one sample."""
    return value[sample if value.shape[0] > 1 else 0].reshape(-1).contiguous()


def _native(x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    one = torch.ones_like(mean)
    result: torch.Tensor = aten.native_batch_norm(x, scale, shift, mean, one, False, 0.0, 0.0)[0]
    return result


class _Normalize(torch.autograd.Function):
    """On a tile ``(N, C, h, w)``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, mean, scale, shift)
        if max(t.shape[0] for t in (mean, scale, shift)) == 1:
            return _native(x, *(_vector(t, 0) for t in (mean, scale, shift)))
        parts = [_native(x[i : i + 1], *(_vector(t, i) for t in (mean, scale, shift))) for i in range(x.shape[0])]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mean, scale, shift = ctx.saved_tensors
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        grad = grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        one = max(t.shape[0] for t in (mean, scale, shift)) == 1
        samples = [(x, grad, 0)] if one else [(x[i : i + 1], grad[i : i + 1], i) for i in range(x.shape[0])]
        mask = [ctx.needs_input_grad[0], True, True]
        found = []
        for part, part_grad, i in samples:
            m, s = _vector(mean, i), _vector(scale, i)
            unit = torch.ones_like(m)
            found.append(aten.native_batch_norm_backward(part_grad, part, s, m, unit, m, unit, False, 0.0, mask))
        shape = (len(samples), -1, *[1] * (x.dim() - 2))
        slopes = torch.stack([each[1] for each in found]).view(shape)
        sums = torch.stack([each[2] for each in found]).view(shape)
        of_x = None if found[0][0] is None else torch.cat([each[0] for each in found])
        return (
            of_x,
            (-scale * sums).sum_to_size(mean.shape),
            slopes.sum_to_size(scale.shape),
            sums.sum_to_size(shift.shape),
        )


@register(NORMALIZE)
class Normalize(MapRule):
    """Statistics are small; the map keeps its layout."""

    copies = (1, 1)

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        if any(request.specs[ref].is_map for ref in request.args[1:]):
            raise request.refuse("has statistics that are maps")
        return (request.layout(request.args[0]),)

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        table = dict(zip(node.operands, tensors, strict=True))
        values = [table[ref] for ref in node.args]
        if node.outputs[0].layout != map_layout(node.outputs[0].shape) or values[0].dim() != 4:
            return (normalize(*values),)
        result: torch.Tensor = _Normalize.apply(*values)  # type: ignore[no-untyped-call]
        return (result,)

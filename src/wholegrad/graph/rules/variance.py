"""Variance and mean over rows and columns in one pass: the statistics of batch, instance and group norm (rule 3).

A tile gives its count, mean and sum of squared distances from that mean; two such states merge by Chan's formula (Chan,
Golub and LeVeque, "Algorithms for computing the sample variance", 1983):

    n = na + nb,  d = mean_b - mean_a,  mean = mean_a + d nb / n,  m2 = m2_a + m2_b + d^2 na nb / n

The gradient of an element x is ``g_mean / n + g_var 2 (x - mean) / (n - correction)``: the variance's dependence on x
through the mean vanishes, because the distances sum to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.rules.base import State, bind, register
from wholegrad.graph.rules.reduction import OverDims, node_dims, unsqueezed

aten = torch.ops.aten
BAND = 1 << 17  # elements that are looked at at once: they stay in the cache, and temporaries stay small


def _summed(band: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """A band's sum in float64, of sums in its own precision, which is a tenth of the time of float64 throughout.

    PyTorch sums in cascades, so that over a band they lose next to nothing.
    """
    half = band.dtype in (torch.bfloat16, torch.float16)
    return band.sum(dims, keepdim=True, dtype=torch.float32 if half else None).double()


def _state(band: torch.Tensor, dims: list[int]) -> State:
    """Count, mean and sum of squared distances over ``dims``, which are kept with size one; in float64."""
    count = prod(band.shape[dim] for dim in dims)
    near = band.mean(dims, keepdim=True)  # in the band's dtype; its rounding is made good below
    apart = band - near
    rest = _summed(apart, dims) / count
    m2 = _summed(apart * apart, dims) - count * rest * rest
    return torch.tensor(float(count), dtype=torch.float64), near + rest, m2


def _merged(a: State, b: State) -> State:
    (na, mean_a, m2_a), (nb, mean_b, m2_b) = a, b
    n, apart = na + nb, mean_b - mean_a
    return n, mean_a + apart * (nb / n), m2_a + m2_b + apart * apart * (na * nb / n)


@register(aten.var_mean.correction, aten.var.correction, aten.std.correction)
class Variance(OverDims):
    """Variance (or its square root) and, for ``var_mean``, the mean."""

    linear = False

    def partial(self, node: Node, tile: torch.Tensor) -> State:
        dims = node_dims(node, tile.dim())
        along = max(dims, key=lambda dim: tile.shape[dim])
        bands: tuple[torch.Tensor, ...] = torch.split(
            tile, max(1, BAND * tile.shape[along] // max(tile.numel(), 1)), along
        )
        total = _state(bands[0], dims)
        for band in bands[1:]:
            total = _merged(total, _state(band, dims))
        shape = node.outputs[0].shape
        return total[0], total[1].reshape(shape), total[2].reshape(shape)

    def merge(self, node: Node, spec: Spec, total: State | None, part: State, box: Box) -> State:
        return part if total is None else _merged(total, part)

    def _free(self, node: Node, spec: Spec) -> float:
        """What the squared distances are divided by."""
        correction = bind(node.op, node.args, node.kwargs)["correction"]
        count = prod(spec.shape[dim] for dim in node_dims(node, len(spec.shape)))
        return max(count - (1 if correction is None else correction), 0)

    def finish(self, node: Node, spec: Spec, total: State) -> tuple[torch.Tensor, ...]:
        _, mean, m2 = total
        var = m2 / self._free(node, spec)
        if node.op is aten.var_mean.correction:
            return var, mean
        return (var.sqrt() if node.op is aten.std.correction else var,)

    def pull(
        self, node: Node, spec: Spec, tile: torch.Tensor, box: Box, total: State, grads: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        count, mean, m2 = total
        of_var = torch.zeros_like(mean) if grads[0] is None else grads[0]
        if node.op is aten.std.correction:
            of_var = of_var / (2 * (m2 / self._free(node, spec)).sqrt())
        of_mean = grads[1] if len(grads) > 1 else None
        slope = unsqueezed(node, spec, 2 * of_var / self._free(node, spec)).to(tile.dtype)
        grad = (tile - unsqueezed(node, spec, mean).to(tile.dtype)) * slope
        return grad if of_mean is None else grad.add_(unsqueezed(node, spec, of_mean / count).to(tile.dtype))

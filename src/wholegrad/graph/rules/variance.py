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
from wholegrad.graph.rules.reduction import OverDims, node_dims, unsqueezed, wide
from wholegrad.kernels import pointwise
from wholegrad.kernels.expression import EACH, MAP, Leaf, Program, Step
from wholegrad.kernels.host import host
from wholegrad.kernels.stage import Part
from wholegrad.kernels.thin import REAL, Mixed

aten = torch.ops.aten
BAND = 1 << 17  # elements that are looked at at once: they stay in the cache, and temporaries stay small
DEVICE_BAND = 1 << 25  # the same on an accelerator, where small ops are lost time; not measured


def _summed(band: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """A band's sum in float64, of sums in its own precision, which is a tenth of the time of float64 throughout.

    PyTorch sums in cascades, so that over a band they lose next to nothing.
    """
    if band.device.type != "cpu":
        return band.sum(dims, keepdim=True, dtype=wide(band.dtype, band.device))
    half = band.dtype in (torch.bfloat16, torch.float16)
    return band.sum(dims, keepdim=True, dtype=torch.float32 if half else None).double()


def _state(band: torch.Tensor, dims: list[int]) -> State:
    """Count, mean and sum of squared distances over ``dims``, which are kept with size one; in float64."""
    count = prod(band.shape[dim] for dim in dims)
    near = band.mean(dims, keepdim=True)  # in the band's dtype; its rounding is made good below
    apart = band - near
    rest = _summed(apart, dims) / count
    m2 = _summed(apart * apart, dims) - count * rest * rest
    return rest.new_full((), count), near + rest, m2


def merged(a: State, b: State) -> State:
    """The state of what two states are of, together."""
    (na, mean_a, m2_a), (nb, mean_b, m2_b) = a, b
    n, apart = na + nb, mean_b - mean_a
    return n, mean_a + apart * (nb / n), m2_a + m2_b + apart * apart * (na * nb / n)


# What one pass sums: squared distances from a number a channel, and as that number's gradient -2 times the distances.
_APART = Program((Leaf(MAP), Leaf(EACH, grad=True)), (Step("sub", (0, 1)), Step("square", (2,))))
# (x - mean) * slope + shift, and the same added to another gradient.
_PULL = Program((Leaf(MAP), *[Leaf(EACH)] * 3), (Step("sub", (0, 1)), Step("mul", (4, 2)), Step("add", (5, 3))))
_PULL_ONTO = Program(
    (Leaf(MAP), *[Leaf(EACH)] * 3, Leaf(MAP)),
    (Step("sub", (0, 1)), Step("mul", (5, 2)), Step("add", (6, 3)), Step("add", (7, 4))),
)
SAMPLE = 16  # rows whose mean is near that of all


def _one_pass(tile: torch.Tensor, dims: list[int]) -> bool:
    """Whether the kernels can do it: maps ``(1, C, h, w)``, or a batch that is summed too."""
    lone = tile.dim() == 4 and (dims == [0, 2, 3] or (tile.shape[0] == 1 and dims == [2, 3]))
    return lone and tile.dtype in REAL and tile.device.type == "cpu" and host() is not None and tile.numel() > 0


def _passed(tile: torch.Tensor, shape: Sequence[int]) -> State:
    """What :func:`_state` gives for each channel, in one pass and a look at some rows."""
    n, channels, height, width = tile.shape
    near = tile[:, :, :: -(-height // SAMPLE)].mean((0, 2, 3))
    share = torch.tensor(-0.5, dtype=tile.dtype)
    given = Mixed((Part(_APART, channels),), (tile, near))
    found = pointwise.total(given, tile.dtype, share)
    assert found.total is not None
    squares, apart = found.total, found.grads[1]
    count = n * height * width
    rest = apart / count
    mean, m2 = near.double() + rest, squares.sum(0) - count * rest * rest
    return torch.tensor(float(count), dtype=torch.float64), mean.reshape(shape), m2.reshape(shape)


def _pulled(tile: torch.Tensor, more: torch.Tensor | None, *small: torch.Tensor) -> torch.Tensor:
    program, leaves = (_PULL, (tile, *small)) if more is None else (_PULL_ONTO, (tile, *small, more))
    return pointwise.values(Mixed((Part(program, tile.shape[1]),), leaves), tile.dtype)


@register(aten.var_mean.correction, aten.var.correction, aten.std.correction)
class Variance(OverDims):
    """Variance (or its square root) and, for ``var_mean``, the mean."""

    linear = False

    def partial(self, node: Node, tile: torch.Tensor) -> State:
        dims = node_dims(node, tile.dim())
        if _one_pass(tile, dims):
            return _passed(tile, node.outputs[0].shape)
        along = max(dims, key=lambda dim: tile.shape[dim])
        most = BAND if tile.device.type == "cpu" else DEVICE_BAND
        bands: tuple[torch.Tensor, ...] = torch.split(
            tile, max(1, most * tile.shape[along] // max(tile.numel(), 1)), along
        )
        total = _state(bands[0], dims)
        for band in bands[1:]:
            total = merged(total, _state(band, dims))
        shape = node.outputs[0].shape
        return total[0], total[1].reshape(shape), total[2].reshape(shape)

    def merge(self, node: Node, spec: Spec, total: State | None, part: State, box: Box) -> State:
        return part if total is None else merged(total, part)

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
        return self.pull_onto(None, node, spec, tile, box, total, grads)

    def pull_onto(
        self,
        more: torch.Tensor | None,
        node: Node,
        spec: Spec,
        tile: torch.Tensor,
        box: Box,
        total: State,
        grads: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        count, mean, m2 = total
        of_var = torch.zeros_like(mean) if grads[0] is None else grads[0]
        if node.op is aten.std.correction:
            of_var = of_var / (2 * (m2 / self._free(node, spec)).sqrt())
        of_mean = grads[1] if len(grads) > 1 else None
        slope = unsqueezed(node, spec, 2 * of_var / self._free(node, spec)).to(tile.dtype)
        centre = unsqueezed(node, spec, mean).to(tile.dtype)
        shift = None if of_mean is None else unsqueezed(node, spec, of_mean / count).to(tile.dtype)
        if _one_pass(tile, node_dims(node, tile.dim())):
            added = torch.zeros_like(centre) if shift is None else shift
            return _pulled(tile, more, *(each.reshape(-1) for each in (centre, slope, added)))
        grad = (tile - centre) * slope
        grad = grad if shift is None else grad.add_(shift)
        return grad if more is None else grad.add_(more)

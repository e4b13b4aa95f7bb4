"""Adaptive pooling of a large map to few bins, as a reduction: an output depends on more than a tile could hold.

Each tile adds to the bins that its elements lie in: to their averages, or to their maxima with the position of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Layout, plain
from wholegrad.graph.rules.adaptive import AdaptiveAverage, AdaptiveMax, averaging, bins
from wholegrad.graph.rules.base import LayoutRequest, MapRule, ReductionRule, State, register
from wholegrad.graph.rules.reduction import wide

aten = torch.ops.aten
FEW_BINS = 1024
LARGE_BINS = 64  # inputs a bin, from which on it is not computed from one tile


class Binned(ReductionRule, MapRule):
    """A reduction where bins are few and large, a map where they are many or small."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layouts = super().layouts(request)
        spec, shape = request.specs[request.args[0]], request.shapes[0]
        count = shape[-2] * shape[-1]
        few = count <= FEW_BINS and spec.rows * spec.cols >= LARGE_BINS * count
        return tuple(plain(each) for each in request.shapes) if few else layouts

    def partial(self, node: Node, tile: torch.Tensor) -> State:
        return (tile,)


def _matrices(node: Node, spec: Spec, box: Box, tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares ``(bins, inputs)`` of the tile's rows and columns in the averages, in the widest dtype."""
    count = node.outputs[0].shape[-2:]
    axes = [(spec.rows, count[0], box.rows), (spec.cols, count[1], box.cols)]
    like = wide(tile.dtype, tile.device), tile.device
    rows, cols = (averaging(*bins(Interval(0, k), size, k), have, *like) for size, k, have in axes)
    return rows, cols


@register(aten._adaptive_avg_pool2d.default)
class BinnedAverage(Binned, AdaptiveAverage):
    """``_adaptive_avg_pool2d``."""

    def merge(self, node: Node, spec: Spec, total: State | None, part: State, box: Box) -> State:
        rows, cols = _matrices(node, spec, box, part[0])
        found = rows @ part[0].to(rows.dtype) @ cols.T
        return (found if total is None else total[0] + found,)

    def join(self, node: Node, spec: Spec, total: State | None, other: State, box: Box) -> State:
        return (other[0] if total is None else total[0] + other[0],)

    def pull(
        self, node: Node, spec: Spec, tile: torch.Tensor, box: Box, total: State, grads: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        grad = grads[0]
        assert grad is not None
        rows, cols = _matrices(node, spec, box, tile)
        return (rows.T @ grad.to(rows.dtype) @ cols).to(tile.dtype)


def _found(elements: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest element of the last dimension and its index: of equals the first, of NaNs the last, as PyTorch pools."""
    value, at = elements.max(-1)
    nan = value.isnan()
    if nan.any():
        last = elements.shape[-1] - 1 - elements.isnan().flip(-1).to(torch.uint8).argmax(-1)
        at = torch.where(nan, last, at)
    return value, at


Found = tuple[torch.Tensor, torch.Tensor]


def _better(old: Found, new: Found) -> Found:
    """Of two maxima and their places the larger, as :func:`_found` would choose."""
    better = (new[0] > old[0]) | ((new[0] == old[0]) & (new[1] < old[1]))
    better |= new[0].isnan() & (~old[0].isnan() | (new[1] > old[1]))
    return torch.where(better, new[0], old[0]), torch.where(better, new[1], old[1])


@register(aten.adaptive_max_pool2d.default)
class BinnedMax(Binned, AdaptiveMax):
    """``adaptive_max_pool2d``: the largest element of each bin and its flat position in the whole plane."""

    linear = False
    sums = False

    def merge(self, node: Node, spec: Spec, total: State | None, part: State, box: Box) -> State:
        shape = node.outputs[0].shape
        if total is None:
            best = torch.full(shape, -torch.inf, dtype=part[0].dtype, device=part[0].device)
            total = best, torch.full_like(best, spec.rows * spec.cols, dtype=torch.int64)
        best, where = total
        row_bins = list(zip(*bins(Interval(0, shape[-2]), spec.rows, shape[-2]), strict=True))
        col_bins = list(zip(*bins(Interval(0, shape[-1]), spec.cols, shape[-1]), strict=True))
        for i, (y0, y1) in enumerate(row_bins):
            for j, (x0, x1) in enumerate(col_bins):
                mine = Box(max(int(y0), box.y0), min(int(y1), box.y1), max(int(x0), box.x0), min(int(x1), box.x1))
                if mine.height > 0 and mine.width > 0:
                    rows, cols = mine.slices(box)
                    value, at = _found(part[0][..., rows, cols].flatten(-2))
                    place = (at // mine.width + mine.y0) * spec.cols + at % mine.width + mine.x0
                    best[..., i, j], where[..., i, j] = _better((best[..., i, j], where[..., i, j]), (value, place))
        return best, where

    def join(self, node: Node, spec: Spec, total: State | None, other: State, box: Box) -> State:
        return (other[0], other[1]) if total is None else _better((total[0], total[1]), (other[0], other[1]))

    def pull(
        self, node: Node, spec: Spec, tile: torch.Tensor, box: Box, total: State, grads: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        grad = grads[0]
        assert grad is not None
        where = total[1].flatten(-2)
        y, x = where // spec.cols - box.y0, where % spec.cols - box.x0
        inside = (y >= 0) & (y < box.height) & (x >= 0) & (x < box.width)
        flat = torch.where(inside, y * box.width + x, 0)
        given = torch.where(inside, grad.flatten(-2), 0).to(tile.dtype)
        result = tile.new_zeros(*tile.shape[:-2], box.area)
        return result.scatter_add_(-1, flat, given).reshape(tile.shape)

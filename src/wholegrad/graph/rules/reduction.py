"""Ops that sum a map away: cut points of the graph (rule 3).

A tile's partial result is taken in float64 over the elements that it owns, partial results are added in tile order,
and what the op returns is computed from the total. Since totals are plain sums, the gradient of the total is the
gradient of every partial result: the backward sweep needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Layout, plain, spatial_dims
from wholegrad.graph.rules.base import LayoutRequest, MapRule, ReductionRule, Tile, checked, register

aten = torch.ops.aten


def _dims(args: Sequence[Any], rank: int) -> list[int]:
    """The dimensions that ``op(x, dim, ...)`` sums over; all for ``op(x)``, ``dim=None`` or ``dim=[]``."""
    dims = args[1] if len(args) > 1 else None
    return [dim % rank for dim in dims] if dims else list(range(rank))


def _keeps(args: Sequence[Any]) -> bool:
    return bool(args[2]) if len(args) > 2 else False


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: float64 for floats, int64 for the rest."""
    return torch.float64 if dtype.is_floating_point else torch.int64


@register(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
class SumOrMean(ReductionRule, MapRule):
    """Sum or mean over rows and columns (a reduction), or over other dimensions alone (one pixel at a time)."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        dims = _dims(request.args, len(layout))
        spatial = spatial_dims(layout)
        if spatial <= set(dims):
            return (plain(request.shapes[0]),)
        if spatial & set(dims):
            raise request.refuse("sums over rows or columns but not both")
        one = plain([1])
        kept = [one if i in dims else (dim,) for i, dim in enumerate(layout) if i not in dims or _keeps(request.args)]
        return (checked(request, tuple(part[0] for part in kept)),)

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        return node.call(lambda ref: tensors[0])

    def partial(self, node: Node, tile: torch.Tensor) -> torch.Tensor:
        dims = _dims(node.args, tile.dim())
        return tile.sum(dims, keepdim=_keeps(node.args), dtype=wide(node.outputs[0].dtype))

    def finish(self, node: Node, spec: Spec, total: torch.Tensor) -> torch.Tensor:
        if node.op in (aten.sum.default, aten.sum.dim_IntList):
            return total
        return total / prod(spec.shape[dim] for dim in _dims(node.args, len(spec.shape)))

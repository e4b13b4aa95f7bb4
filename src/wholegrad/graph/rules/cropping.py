"""Crop a tile's map so that its gradient comes back lying as the gradient of the crop lies.

PyTorch pads a slice's gradient with zeros once for rows and once for columns, into maps whose columns are next to each
other: a gradient whose channels were is turned round, and must be turned again. That costs ten copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

Edges = tuple[int, int, int, int]


class _Crop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, edges: Edges) -> torch.Tensor:
        ctx.edges = edges
        return _inner(x, edges)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        top, bottom, left, right = ctx.edges
        return F.pad(grad, (left, right, top, bottom)), None


def _inner(x: torch.Tensor, edges: Edges) -> torch.Tensor:
    top, bottom, left, right = edges
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


def cropped(x: torch.Tensor, edges: Edges) -> torch.Tensor:
    """A view of ``x`` ``(N, C, H, W)`` without so many rows above and below, and columns left and right."""
    if not any(edges):
        return x
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _inner(x, edges)
    result: torch.Tensor = _Crop.apply(x, edges)  # type: ignore[no-untyped-call]
    return result

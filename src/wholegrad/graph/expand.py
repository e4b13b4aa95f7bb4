"""Calls that mix pixels but come down to sums over the map: pooling by attention, without holding the map whole.

* ``softmax`` over all pixels is ``exp(x - max)`` over its sum: two reductions and pointwise ops.
* A matrix product that sums over pixels, with a result of few elements, is a product a pixel and a sum.

Both are what gated attention pooling (Ilse et al., "Attention-based deep multiple instance learning", 2018) is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from wholegrad.graph.graph import Ref, Spec
from wholegrad.graph.layout import roles, spatial_dims

if TYPE_CHECKING:
    from wholegrad.graph.builder import Builder

aten = torch.ops.aten
FEW = 64  # products a pixel, up to which a product over pixels is summed rather than held whole
Expansion = Callable[["Builder", str, tuple[Any, ...], tuple[torch.Tensor, ...], str, bool], tuple[Ref, ...]]


def expansion_of(op: Any, args: tuple[Any, ...], spec: Callable[[Ref], Spec]) -> Expansion | None:
    """How to expand this call, if it is one of those above."""
    if op in (aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default):
        found = spec(args[0])
        if found.is_map and spatial_dims(found.layout) == {args[1] % len(found.shape)}:
            return _log_softmax if op is aten._log_softmax.default else _softmax
    if op in (aten.mm.default, aten.bmm.default):
        left, right = spec(args[0]), spec(args[1])
        over = left.is_map and right.is_map and roles(left.layout[-1]) and left.layout[-1] == right.layout[-2]
        if over and not roles(left.layout[-2]) and left.shape[-2] * right.shape[-1] <= max(FEW, right.shape[-1]):
            return _product
    return None


def _softmax_parts(build: Builder, name: str, x: Ref, dim: int, path: str, grad: bool) -> tuple[Ref, Ref, Ref]:
    """``x - max``, its exponential, and the sum of that."""
    best = build.derived(name, aten.amax.default, x, [dim], True, path=path, grad=False)
    apart = build.derived(name, aten.sub.Tensor, x, best, path=path, grad=grad)
    power = build.derived(name, aten.exp.default, apart, path=path, grad=grad)
    return apart, power, build.derived(name, aten.sum.dim_IntList, power, [dim], True, path=path, grad=grad)


def _softmax(
    build: Builder, name: str, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...], path: str, grad: bool
) -> tuple[Ref, ...]:
    _, power, total = _softmax_parts(build, name, args[0], args[1], path, grad)
    return (build.derived(name, aten.div.Tensor, power, total, path=path, grad=grad),)


def _log_softmax(
    build: Builder, name: str, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...], path: str, grad: bool
) -> tuple[Ref, ...]:
    apart, _, total = _softmax_parts(build, name, args[0], args[1], path, grad)
    log = build.derived(name, aten.log.default, total, path=path, grad=grad)
    return (build.derived(name, aten.sub.Tensor, apart, log, path=path, grad=grad),)


def _product(
    build: Builder, name: str, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...], path: str, grad: bool
) -> tuple[Ref, ...]:
    """``(..., M, P) @ (..., P, K)`` as a sum over P of ``(..., M, P, K)``."""
    rank = outputs[0].dim()
    left = build.derived(name, aten.unsqueeze.default, args[0], rank, path=path, grad=grad)
    right = build.derived(name, aten.unsqueeze.default, args[1], rank - 2, path=path, grad=grad)
    each = build.derived(name, aten.mul.Tensor, left, right, path=path, grad=grad)
    return (build.derived(name, aten.sum.dim_IntList, each, [rank - 1], path=path, grad=grad),)

"""Calls that mix pixels but come down to local ops and sums over the map, without holding the map whole.

* ``softmax`` over all pixels is ``exp(x - max)`` over its sum: two reductions and pointwise ops.
* A matrix product that sums over pixels, with a result of few elements, is a product a pixel and a sum.
* ``roll`` along rows or columns is a concatenation of the map with a strip of itself.
* ``x[mask] = number`` is a choice pixel by pixel.

The first two are what gated attention pooling (Ilse et al., "Attention-based deep multiple instance learning", 2018) is
made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from wholegrad.graph.graph import Ref, Spec
from wholegrad.graph.layout import Role, roles, spatial_dims
from wholegrad.graph.rules.strip import STRIP

if TYPE_CHECKING:
    from wholegrad.graph.builder import Builder

aten = torch.ops.aten
STRIP_ELEMENTS = 2**31  # rule 8
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
    if op is aten.roll.default and spec(args[0]).is_map and _rolled(args, spec(args[0])) is not None:
        return _roll
    if op is aten.index_put.default and _chosen(args, spec) is not None:
        return _choice
    return None


def _rolled(args: tuple[Any, ...], x: Spec) -> list[tuple[int, int]] | None:
    """Dimensions and shifts of a roll that moves rows or columns by a strip that a tensor can hold; None if not so."""
    dims = args[2] if len(args) > 2 else []
    if not any(roles(x.layout[dim]) for dim in dims):
        return None
    table = []
    for shift, dim in zip(args[1], dims, strict=True):
        if roles(x.layout[dim]) and len(x.layout[dim]) > 1:
            return None
        size = x.shape[dim]
        thin = min(shift % size, -shift % size)
        if roles(x.layout[dim]) and x.numel // size * thin >= STRIP_ELEMENTS:
            return None
        table.append((dim % len(x.shape), shift % size))
    return table


def _roll(
    build: Builder, name: str, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...], path: str, grad: bool
) -> tuple[Ref, ...]:
    """The thinner of both parts as a strip, the other as a slice."""
    x = args[0]
    rank = len(build.spec(x).shape)
    for dim, shift in _rolled(args, build.spec(x)) or []:
        layout = build.spec(x).layout
        size = build.spec(x).shape[dim]
        if shift == 0:
            continue
        if not roles(layout[dim]):
            x = build.derived(name, aten.roll.default, x, [shift], [dim], path=path, grad=grad)
            continue
        order = [i for i in range(rank) if not roles(layout[i])]
        order += [i for role in (Role.ROW, Role.COL) for i in range(rank) if roles(layout[i]) == {role}]
        back, at = [order.index(i) for i in range(rank)], order.index(dim) - rank
        still = order == list(range(rank))
        moved = x if still else build.derived(name, aten.permute.default, x, order, path=path, grad=grad)
        cut = size - shift
        if shift <= cut:
            first = build.derived(name, STRIP, moved, at, cut, shift, path=path, grad=grad)
            second = build.derived(name, aten.slice.Tensor, moved, at + rank, 0, cut, path=path, grad=grad)
        else:
            first = build.derived(name, aten.slice.Tensor, moved, at + rank, cut, size, path=path, grad=grad)
            second = build.derived(name, STRIP, moved, at, 0, cut, path=path, grad=grad)
        x = build.derived(name, aten.cat.default, [first, second], at + rank, path=path, grad=grad)
        x = x if still else build.derived(name, aten.permute.default, x, back, path=path, grad=grad)
    return (x,)


def _chosen(args: tuple[Any, ...], spec: Callable[[Ref], Spec]) -> tuple[Ref, int] | None:
    """The map of booleans that ``x[mask] = number`` chooses by, and the dimension where it begins."""
    found = [(dim, ref) for dim, ref in enumerate(args[1]) if ref is not None]
    if len(found) != 1 or (len(args) > 3 and args[3]) or spec(args[2]).numel != 1:
        return None
    (dim, ref), x = found[0], spec(args[0])
    fits = spec(ref).shape == x.shape[dim : dim + len(spec(ref).shape)]
    return (ref, dim) if fits and spec(ref).dtype is torch.bool and spec(ref).is_map else None


def _choice(
    build: Builder, name: str, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...], path: str, grad: bool
) -> tuple[Ref, ...]:
    mask, dim = _chosen(args, build.spec) or (args[0], 0)
    for _ in range(outputs[0].dim() - dim - len(build.spec(mask).shape)):
        mask = build.derived(name, aten.unsqueeze.default, mask, len(build.spec(mask).shape), path=path, grad=False)
    number = build.derived(name, aten.view.default, args[2], [], path=path, grad=grad)
    return (build.derived(name, aten.where.self, mask, number, args[0], path=path, grad=grad),)


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

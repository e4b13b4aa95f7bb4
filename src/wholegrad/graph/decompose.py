"""Ops that capture takes apart, so that rule 3 can cut inside them.

* A loss with ``reduction="mean"`` or ``"sum"`` becomes a loss per pixel and a reduction.
* ``nll_loss`` (cross-entropy) becomes a pick of one channel a pixel, class weights looked up by label, and two sums.
* Batch, instance and group norm become ``var_mean`` over the map, a handful of small tensors, and
  ``wholegrad::normalize``; running statistics are written with ``copy_``, as PyTorch's kernels write them: the mean as
  it is, the variance with n / (n - 1). In evaluation mode only ``normalize`` is left.
* A layer norm over rows and columns too becomes ``var_mean`` and arithmetic.
* Attention in one call becomes two products and a softmax, which are exact on maps held whole; ``aminmax`` both of its
  extremes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from wholegrad.graph.rules.base import bind
from wholegrad.graph.rules.normalize import normalize
from wholegrad.graph.rules.pointwise import PIXEL_LOSSES

aten = torch.ops.aten
Tensors = tuple[torch.Tensor, ...]
MEAN, SUM = 1, 2  # PyTorch's numbers for reduction="mean" and "sum"


def _split_reduction(op: Any) -> Callable[..., Any]:
    def decomposed(*args: Any, **kwargs: Any) -> Any:
        bound = bind(op, args, kwargs)
        if bound["reduction"] not in (MEAN, SUM):
            return NotImplemented
        kind, bound["reduction"] = bound["reduction"], 0
        names = [argument.name for argument in op._schema.arguments]
        where = names.index("reduction")
        result = op(*(bound[name] for name in names[: where + 1]), **{k: bound[k] for k in names[where + 1 :]})
        return result.mean() if kind == MEAN else result.sum()

    return decomposed


def _nll(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nll_loss`` of log-probabilities ``(N, C, ...)`` (or ``(C)``): the loss and the sum of weights."""
    classes = min(1, x.dim() - 1)
    counts = target != ignore_index
    label = torch.where(counts, target, 0)
    picked = x.gather(classes, label.unsqueeze(classes)).squeeze(classes)
    weights = counts.to(x.dtype) if weight is None else torch.where(counts, weight[label], 0)
    each = torch.where(counts, -picked * weights, 0)
    total = weights.sum()
    if reduction == MEAN:
        return each.sum() / total, total
    return (each.sum() if reduction == SUM else each), total


def _small_dims(x: torch.Tensor, value: torch.Tensor | None, fallback: float, lead: int = 1) -> torch.Tensor:
    """A number a channel as ``(lead, C, 1, ...)`` of the dtype of ``x``; ``fallback`` for all where there is none."""
    shape = (lead, -1, *[1] * (x.dim() - 2))
    if value is None:
        return torch.full((x.shape[1],), fallback, dtype=x.dtype, device=x.device).view(shape)
    return value.view(shape).to(x.dtype)


def _full(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32 where it has fewer bits: statistics are not taken in bfloat16."""
    return x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensors:
    full = _full(x)
    dims = [0, *range(2, x.dim())]
    if training:
        var, mean = torch.var_mean(full, dims, correction=0)
        with torch.no_grad():
            count = x.numel() // max(x.shape[1], 1)
            if running_mean is not None:
                running_mean.copy_(running_mean * (1 - momentum) + mean * momentum)
            if running_var is not None:
                unbiased = var * (count / max(count - 1, 1))
                running_var.copy_(running_var * (1 - momentum) + unbiased * momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = _full(running_mean), _full(running_var)
    invstd = torch.rsqrt(var + eps)
    scale = invstd if weight is None else invstd * weight
    shift = _small_dims(full, bias, 0.0)
    result = normalize(full, _small_dims(full, mean, 0.0), _small_dims(full, scale, 1.0), shift)
    return result.to(x.dtype), mean, invstd


def _group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> Tensors:
    full = _full(x)
    grouped = full.reshape(n, groups, channels // groups, *x.shape[2:])
    var, mean = torch.var_mean(grouped, list(range(2, grouped.dim())), correction=0)
    invstd = torch.rsqrt(var + eps)

    def each_channel(value: torch.Tensor) -> torch.Tensor:
        return value.unsqueeze(2).expand(n, groups, channels // groups).reshape(n, channels, *[1] * (x.dim() - 2))

    scale = each_channel(invstd)
    if weight is not None:
        scale = scale * _small_dims(full, weight, 1.0)
    return normalize(full, each_channel(mean), scale, _small_dims(full, bias, 0.0)).to(x.dtype), mean, invstd


def _layer_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> Any:
    if len(shape) == 1:
        return NotImplemented  # over channels alone: one pixel at a time
    dims = list(range(x.dim() - len(shape), x.dim()))
    var, mean = torch.var_mean(_full(x), dims, correction=0, keepdim=True)
    invstd = torch.rsqrt(var + eps)
    result = (_full(x) - mean) * invstd
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    return result.to(x.dtype), mean, invstd


def _vector_norm(x: torch.Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = list(range(x.dim())) if dim is None else [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)]
    if len(dims) == 1 or ord not in (1, 2):
        return NotImplemented
    x = x if dtype is None else x.to(dtype)
    total = (x.abs() if ord == 1 else x * x).sum(dims, keepdim=keepdim)
    if ord == 1:
        return total
    some = total > 0  # the root has no slope at zero; a norm's is taken to be zero
    return torch.where(some, torch.where(some, total, 1).sqrt(), 0)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """Attention as it is defined, in float32 where its operands have fewer bits, as PyTorch's kernel sums it."""
    if dropout_p > 0:
        return NotImplemented
    scores = _full(query) @ _full(key).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~ones.tril(), float("-inf"))
    if attn_mask is not None:
        scores = scores + attn_mask
    return (torch.softmax(scores, -1) @ _full(value)).to(query.dtype), torch.logsumexp(scores, -1)


def _extremes(x: torch.Tensor, *, dim: int | None = None, keepdim: bool = False) -> Tensors:
    dims = list(range(x.dim())) if dim is None else [dim]
    return x.amin(dims, keepdim), x.amax(dims, keepdim)


def table() -> dict[Any, Callable[..., Any]]:
    """Decompositions by ATen overload, for ``make_fx``."""
    return {
        **{op: _split_reduction(op) for op in PIXEL_LOSSES},
        aten.nll_loss_forward.default: _nll,
        aten.nll_loss2d_forward.default: _nll,
        aten.native_batch_norm.default: _batch_norm,
        aten.native_group_norm.default: _group_norm,
        aten.native_layer_norm.default: _layer_norm,
        aten.linalg_vector_norm.default: _vector_norm,
        aten.aminmax.default: _extremes,
        aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    }

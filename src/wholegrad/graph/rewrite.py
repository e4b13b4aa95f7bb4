"""Calls that are rewritten while a model is traced, because their trace would hide what they do; a few are refused.

* Circular padding: PyTorch writes it into views of an empty tensor; it is a concatenation of the map with strips of
  its own far sides.
* ``torch.tensor(values, device=x.device)``: while tracing, ``x`` lies on a device without memory, where the values
  would be lost; the tensor is made on the CPU. So are the index tensors of ``x[:, [2, 0, 1]]``.
* ``F.cosine_similarity`` and ``F.gaussian_nll_loss`` clamp in place where autograd does not look, the latter after a
  look at values; here the clamped value meets the gradient of the other, as there.
* What changes gradients behind autograd's back (hooks on tensors, ``detach_``, gradients taken inside of a model)
  leaves no trace, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from wholegrad.errors import CaptureError
from wholegrad.graph.rules.strip import strip
from wholegrad.graph.tracing import is_ghost, place

_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)


def circular(x: torch.Tensor, pads: Sequence[int]) -> torch.Tensor:
    """``F.pad(x, pads, mode="circular")``, for pads that do not crop, as strips and concatenations."""
    for i in range(len(pads) // 2):
        before, after = pads[2 * i : 2 * i + 2]
        dim, size = -1 - i, x.shape[-1 - i]
        parts = [strip(x, dim, size - before, before)] if before else []
        parts += [x] + ([strip(x, dim, 0, after)] if after else [])
        x = torch.cat(parts, x.dim() + dim) if len(parts) > 1 else x
    return x


class Rewritten(TorchFunctionMode):
    """While on, the calls above are rewritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch._C._nn.pad, torch.nn.functional.pad):
            return _pad(func, args, kwargs)
        if func in _FROM_VALUES and not isinstance(args[0] if args else None, torch.Tensor):
            return func(*args, **_without_device(kwargs))
        if func is torch.Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **_without_device(kwargs)})
        if func is torch.Tensor.new and len(args) == 2 and isinstance(args[1], list | tuple):
            return torch.tensor(args[1], dtype=args[0].dtype)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return func(args[0], _index(args[1]), *args[2:], **kwargs)
        if func in _REWRITTEN:
            return _REWRITTEN[func](*args, **kwargs)
        if func in _REFUSED:
            raise CaptureError(place(_REFUSED[func][0]), *_REFUSED[func][1:])
        return func(*args, **kwargs)


def _index(index: Any) -> Any:
    """An index with tensors in place of lists, and positions in place of flags."""
    if isinstance(index, tuple):
        return tuple(_index(each) for each in index)
    if isinstance(index, list) and not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(index)):
        index = torch.tensor(index, dtype=None if index else torch.long)
    flags = isinstance(index, torch.Tensor) and index.dtype is torch.bool and index.dim() == 1
    return index.nonzero().flatten() if flags and not is_ghost(index) else index


def _clamped(x: torch.Tensor, least: float) -> torch.Tensor:
    """``x`` of at least ``least``, with the gradient of ``x``."""
    return x + (x.clamp_min(least) - x).detach()


def _cosine(x1: torch.Tensor, x2: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    x1, x2 = torch.broadcast_tensors(x1, x2)  # type: ignore[no-untyped-call]
    units = [x / _clamped(torch.linalg.vector_norm(x, 2, dim, keepdim=True), eps) for x in (x1, x2)]
    return (units[0] * units[1]).sum(dim)


def _gaussian(
    input: torch.Tensor,
    target: torch.Tensor,
    var: torch.Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    var = torch.as_tensor(var, dtype=input.dtype)
    if var.dim() == input.dim() - 1 and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    var = _clamped(var, eps)
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    loss = loss + 0.5 * math.log(2 * math.pi) if full else loss
    return loss.mean() if reduction == "mean" else (loss.sum() if reduction == "sum" else loss)


_REWRITTEN: dict[Any, Callable[..., torch.Tensor]] = {
    torch.nn.functional.cosine_similarity: _cosine,
    torch.cosine_similarity: _cosine,
    torch.nn.functional.gaussian_nll_loss: _gaussian,
}
_REFUSED: dict[Any, tuple[str, str, str]] = {
    torch.Tensor.register_hook: (
        "Tensor.register_hook",
        "changes a gradient where no trace shows it",
        "make it a torch.library.custom_op with register_autograd, or hook a parameter",
    ),
    torch.Tensor.detach_: ("Tensor.detach_", "detaches in place, which no trace shows", "write y = y.detach()"),
    torch.Tensor.backward: ("Tensor.backward", "runs backward inside of the model", "return the loss instead"),
    torch.autograd.grad: (
        "torch.autograd.grad",
        "takes gradients inside of the model or loss, which would have to be differentiated twice",
        "write the derivative out, or leave the penalty away",
    ),
}


def _without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "device"}


def _pad(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    bound = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    x, pads = bound["input"], list(bound["pad"])
    fits = len(pads) == 2 * (x.dim() - 2) and min(pads) >= 0
    if bound.get("mode") == "circular" and fits:
        wraps = [max(pads[2 * i : 2 * i + 2]) <= x.shape[-1 - i] for i in range(len(pads) // 2)]
        if all(wraps):  # otherwise PyTorch says what is wrong
            return circular(x, pads)
    return func(*args, **kwargs)

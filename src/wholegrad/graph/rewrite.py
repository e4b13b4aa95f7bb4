"""Calls that are rewritten while a model is traced, because their trace would hide what they do.

* Circular padding: PyTorch writes it into views of an empty tensor; it is a concatenation of the map with strips of
  its own far sides.
* ``torch.tensor(values, device=x.device)``: while tracing, ``x`` lies on a device without memory, where the values
  would be lost; the tensor is made on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from wholegrad.graph.rules.strip import strip

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
        return func(*args, **kwargs)


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

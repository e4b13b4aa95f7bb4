"""The oracle: the same loss and gradients by whole-image autograd, nothing tiled, in any dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Reference:
    """What whole-image autograd gives.

    Attributes:
        loss: 0-dimensional.
        output: the model's output (the first, if there are several).
        grads: each trained parameter's gradient by its name in the model.
    """

    loss: torch.Tensor
    output: torch.Tensor
    grads: dict[str, torch.Tensor]


def whole_image(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor],
    image: torch.Tensor,
    target: Any,
    dtype: torch.dtype,
) -> Reference:
    """``loss_fn(model(image), target).backward()`` on copies of model and loss in ``dtype``.

    Args:
        image: ``(N, C, H, W)`` as the model sees it.
        target: as the loss sees it; floating-point targets are cast to ``dtype``.
    """
    model, loss_fn = copy.deepcopy((model, loss_fn))
    model.zero_grad(set_to_none=True)
    model.to(dtype)
    if isinstance(loss_fn, nn.Module):
        loss_fn.to(dtype)
    if isinstance(target, torch.Tensor) and target.is_floating_point():
        target = target.to(dtype)
    output = model(image.to(dtype))
    loss = loss_fn(output, target)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Reference(loss.detach(), output.detach(), grads)

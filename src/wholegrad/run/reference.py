"""The oracle: the same loss and gradients by whole-image autograd, nothing tiled, in any dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wholegrad.graph.geometry import Box
from wholegrad.graph.layout import plain
from wholegrad.graph.rules.random import FUNCTIONAL, NUMBERS, drawn, is_random

aten = torch.ops.aten


@dataclass(frozen=True)
class Reference:
    """What whole-image autograd gives.

    Attributes:
        loss: 0-dimensional.
        outputs: every tensor that the model returned, in order.
        grads: each trained parameter's gradient, those of the model and of a loss that is a module, by name.
        buffers: the buffers of both after the step.
    """

    loss: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    grads: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by one name each."""
        return named(self.loss, self.outputs, self.grads, self.buffers)


def named(
    loss: torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    grads: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Loss, outputs, gradients and buffers in one dictionary."""
    first = {"loss": loss} | {f"output {i}" if i else "output": value for i, value in enumerate(outputs)}
    return first | dict(grads) | {f"buffer {name}": value for name, value in buffers.items()}


class DrawnByCoordinate(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers random calls with the numbers that tiles draw (:mod:`wholegrad.graph.draws`)."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed, self.calls = seed, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        call, self.calls = self.calls, self.calls + 1
        if func is aten.native_dropout.default:  # which a GPU takes for what a CPU does by an op that is drawn
            return self._dropped(call, *args)
        if func not in FUNCTIONAL and func not in NUMBERS:
            return func(*args, **kwargs)
        like: torch.Tensor = args[0] if func in FUNCTIONAL else func(*args, **kwargs)
        shape, dtype = tuple(like.shape), like.dtype
        numbers = drawn(func, args, kwargs, dtype, self.seed, call, plain(shape), Box(0, 1, 0, 1), like.device)
        return args[0].copy_(numbers) if func in FUNCTIONAL else numbers

    def _dropped(self, call: int, x: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What dropout leaves, and where: the result of an op that the device has for it."""
        if train is False:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        op, shape = aten.bernoulli_.float, plain(tuple(x.shape))
        kept = drawn(op, (x, 1 - p), {}, x.dtype, self.seed, call, shape, Box(0, 1, 0, 1), x.device)
        return x * kept / (1 - p), kept.bool()


def parts(model: nn.Module, loss_fn: Any) -> list[tuple[str, nn.Module]]:
    """The modules that hold parameters and buffers, with the prefix of their names."""
    return [(prefix, part) for prefix, part in (("", model), ("loss.", loss_fn)) if isinstance(part, nn.Module)]


def gradients(model: nn.Module, loss_fn: Any) -> dict[str, torch.Tensor]:
    """Gradients of model and loss by name."""
    found = ((prefix + name, p.grad) for prefix, part in parts(model, loss_fn) for name, p in part.named_parameters())
    return {name: grad.detach().clone() for name, grad in found if grad is not None}


def buffers(model: nn.Module, loss_fn: Any) -> dict[str, torch.Tensor]:
    """Buffers of model and loss by name."""
    return {
        prefix + name: buffer.detach().clone()
        for prefix, part in parts(model, loss_fn)
        for name, buffer in part.named_buffers()
    }


def whole_image(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: Any,
    dtype: torch.dtype,
    seed: int = 0,
) -> Reference:
    """``loss_fn(model(*args, **kwargs), target).backward()`` on copies of model and loss in ``dtype``.

    Args:
        args, kwargs: the model's arguments; floating-point tensors are cast to ``dtype``.
        target: as the loss sees it; likewise.
        seed: of random ops.
    """

    def cast(value: Any) -> Any:
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value
        )

    model, loss_fn = copy.deepcopy((model, loss_fn))
    for _, part in parts(model, loss_fn):
        part.zero_grad(set_to_none=True)
        part.to(dtype)
    with DrawnByCoordinate(seed):
        output = model(*cast(args), **cast(kwargs))
        loss = loss_fn(output, cast(target))
    loss.backward()  # type: ignore[no-untyped-call]
    outputs = tuple(leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return Reference(loss.detach(), outputs, gradients(model, loss_fn), buffers(model, loss_fn))

"""One step by whole-image autograd of the user's own model and loss: maps whole, as plain PyTorch holds them.

Model and loss run on stand-ins for their parameters and buffers, so that nothing of theirs changes before the step is
known to be good: gradients and written buffers are handed back by name, as the graph has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wholegrad.run.reference import DrawnByCoordinate


@dataclass(frozen=True)
class Outcome:
    """What a step gives.

    Attributes:
        loss: 0-dimensional.
        grads: of each trained parameter that the loss depends on, by name.
        updates: what written buffers hold afterwards, by name.
        metrics: by name.
    """

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    updates: dict[str, torch.Tensor]
    metrics: dict[str, torch.Tensor]

    def copied(self) -> Outcome:
        """The same in memory of its own."""
        named = [
            {name: each.clone() for name, each in held.items()} for held in (self.grads, self.updates, self.metrics)
        ]
        return Outcome(self.loss.clone(), *named)


@dataclass(frozen=True)
class Parts:
    """Model, loss and metrics as the user has them."""

    model: nn.Module
    loss_fn: Callable[..., torch.Tensor]
    metrics: Mapping[str, Callable[..., torch.Tensor]]

    @property
    def buffers(self) -> list[str]:
        """The joint names of all buffers."""
        named: list[tuple[str, Any]] = [("model", self.model), ("loss", self.loss_fn)]
        named += [(f"metrics.m{i}", fn) for i, fn in enumerate(self.metrics.values())]
        return [
            f"{key}.{name}" for key, part in named if isinstance(part, nn.Module) for name, _ in part.named_buffers()
        ]


class StandIns:
    """A leaf for each parameter and a copy of each buffer; what is one tensor under several names stays one.

    Args:
        tensors: parameters and buffers by joint name.
        make: the stand-in of a tensor, without gradient; its second argument says whether it is a buffer.

    Attributes:
        named: by joint name.
    """

    def __init__(
        self, parts: Parts, tensors: Mapping[str, torch.Tensor], make: Callable[[torch.Tensor, bool], torch.Tensor]
    ) -> None:
        buffers = set(parts.buffers)
        self._of: dict[int, torch.Tensor] = {}
        self.named: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in self._of:
                made = make(tensor, name in buffers)
                self._of[id(tensor)] = made if name in buffers else made.requires_grad_(tensor.requires_grad)
            self.named[name] = self._of[id(tensor)]

    def call(self, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function or module, the module with stand-ins for all that it holds, wherever it holds it."""
        if not isinstance(part, nn.Module):
            return part(*args, **kwargs)
        own = {}
        for path, module in part.named_modules():  # each module once: functional_call does not undo a second swap
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) in self._of:
                    own[f"{path}.{name}" if path else name] = self._of[id(tensor)]
        before = dict(own)
        result = torch.func.functional_call(part, own, args, kwargs, tie_weights=False)
        for name, tensor in own.items():  # which the call has brought up to date
            if tensor is not before[name]:
                self._rebind(before[name], tensor.detach())
        return result

    def _rebind(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """A buffer that the code bound anew in place of writing into it."""
        self._of = {key: new if tensor is old else tensor for key, tensor in self._of.items()}
        self.named = {name: new if tensor is old else tensor for name, tensor in self.named.items()}


def copied(tensor: torch.Tensor, buffer: bool) -> torch.Tensor:
    """The stand-in with which a step runs: a parameter's own memory, a copy of a buffer's."""
    return tensor.detach().clone() if buffer else tensor.detach()


def whole_step(
    parts: Parts,
    leaves: StandIns,
    given: tuple[tuple[Any, ...], dict[str, Any], Any],
    seed: int | None = None,
    keeping: AbstractContextManager[Any] | None = None,
) -> Outcome:
    """``loss_fn(model(*args, **kwargs), target)`` and its gradients.

    Args:
        leaves: what stands in for parameters and buffers.
        given: the model's positional and keyword arguments, and the target.
        seed: of random ops, drawn by coordinate as tiles draw them; None to draw as PyTorch does.
        keeping: open while what the backward pass needs is saved: hooks that put it elsewhere.
    """
    args, kwargs, target = given
    del given
    random: AbstractContextManager[Any] = nullcontext() if seed is None else DrawnByCoordinate(seed)
    with torch.enable_grad(), random:
        with keeping or nullcontext():
            output = leaves.call(parts.model, args, kwargs)
            loss = leaves.call(parts.loss_fn, (output, target), {})
        with torch.no_grad():
            metrics = {name: leaves.call(fn, (output, target), {}) for name, fn in parts.metrics.items()}
    del output, args, kwargs, target
    trained = {name: leaf for name, leaf in leaves.named.items() if leaf.requires_grad}
    unique = {id(leaf): leaf for leaf in trained.values()}
    found = torch.autograd.grad(loss, list(unique.values()), allow_unused=True) if unique else ()
    grads, taken = dict(zip(unique, found, strict=True)), set()
    named = {}
    for name, leaf in trained.items():  # a tensor of two names has one gradient
        if (grad := grads[id(leaf)]) is not None and id(leaf) not in taken:
            taken.add(id(leaf))
            named[name] = grad
    return Outcome(loss.detach(), named, {name: leaves.named[name] for name in parts.buffers}, metrics)

"""One step on the whole image with every module watched: what it returned, and where autograd meets code of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from wholegrad.run.reference import DrawnByCoordinate


@dataclass(frozen=True)
class Seen:
    """A tensor that went into a module or came out of one.

    Attributes:
        path: the module that computed it: the one that it came out of, or whose code called the one that it went into.
        within: the module whose ops the value must be among.
        what: in words.
    """

    path: str
    within: str
    what: str
    tensor: torch.Tensor


class Watched:
    """Runs ``loss_fn(model(*args, **kwargs), target)`` and notes what passes between modules, in execution order.

    Args:
        against: an earlier run of the same; tensors are then compared with it instead of kept.

    Attributes:
        seen: what passed; empty if there is a run to compare with.
        different: the first tensor that differs from the earlier run.
        own_backward: module paths that call a ``torch.autograd.Function`` or a custom op, and its name.
        output, loss: of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Any,
        seed: int,
        against: Watched | None = None,
    ) -> None:
        self.against = against
        self.seen: list[Seen] = []
        self.different: Seen | None = None
        self.own_backward: list[tuple[str, str]] = []
        self._walked: set[Any] = set()
        self._stack: list[str] = []
        self._last: tuple[torch.Tensor, int] | None = None
        self._count = 0
        with DrawnByCoordinate(seed), self._hooks(model):
            self.output = model(*args, **kwargs)
            self.loss = loss_fn(self.output, target)
        self._walk(self.loss, "loss")
        self._note(Seen("loss", "loss", "the loss", self.loss))

    def forget_graph(self) -> None:
        """Let go of what autograd keeps for a backward."""
        self.output, self.loss = tree_map_only(torch.Tensor, torch.Tensor.detach, (self.output, self.loss))
        self._walked.clear()
        self._last = None

    @contextmanager
    def _hooks(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._stack:
                for tensor in _tensors((args, kwargs)):
                    self._walk(tensor, self._stack[-1])
                    self._note(Seen(self._stack[-1], "", f"the input of {name}", tensor))
            self._stack.append(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()
            for tensor in _tensors(output):
                self._walk(tensor, name)
                self._note(Seen(name, name, "its output", tensor))

        return hook

    def _note(self, seen: Seen) -> None:
        tensor = seen.tensor.detach()
        if self._last is not None and self._last[0] is seen.tensor and self._last[1] == seen.tensor._version:
            return  # what one module returned goes straight into the next
        self._last = (seen.tensor, seen.tensor._version)
        if self.against is None:
            self.seen.append(Seen(seen.path, seen.within, seen.what, tensor.clone()))
            return
        earlier = self.against.seen[self._count] if self._count < len(self.against.seen) else None
        self._count += 1
        if self.different is None and (earlier is None or not _equal(earlier.tensor, tensor)):
            self.different = seen

    def _walk(self, tensor: torch.Tensor, path: str) -> None:
        """Look for autograd functions written in Python among what led to ``tensor`` and was not walked before."""
        stack = [tensor.grad_fn]
        while stack:
            function = stack.pop()
            if function is None or function in self._walked:
                continue
            self._walked.add(function)
            name = type(function).__name__
            if isinstance(function, torch.autograd.function.BackwardCFunction):
                own = name.removesuffix("Backward").removeprefix("GeneratedBackwardFor_").removesuffix("_default")
                self.own_backward.append((path, own))
            stack.extend(other for other, _ in function.next_functions)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())

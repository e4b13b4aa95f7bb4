"""What is arranged around a trace: module paths for messages, autograd functions refused, modules' attributes kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback
from torch.utils._pytree import tree_leaves

from wholegrad.errors import CaptureError

_outside: ContextVar[bool | None] = ContextVar("gradients outside of an autograd.Function", default=None)
_path: ContextVar[str] = ContextVar("path of the module that runs", default="model or loss")


def is_ghost(value: Any) -> bool:
    """Whether a value is a tensor without memory."""
    return isinstance(value, torch.Tensor) and (value.is_meta or isinstance(value, FakeTensor))


def outside_gradients() -> bool | None:
    """Inside an ``autograd.Function``: whether gradients are on outside of it; None elsewhere."""
    return _outside.get()


def place(what: Any) -> str:
    """The module that runs now, and a call in it, for messages."""
    return f"{_path.get() or 'model'} ({what})"


@contextmanager
def at(name: str) -> Iterator[None]:
    """While open, calls carry this path."""
    token = _path.set(name)
    try:
        with traceback.annotate({"path": name}):
            yield
    finally:
        _path.reset(token)


@contextmanager
def own_functions() -> Iterator[None]:
    """While open, ``autograd.Function`` is watched: it runs its forward with gradients off, whatever is on outside.

    One that belongs to a ``torch.library`` op is a single node, with gradients as outside. Any other defines a gradient
    that a trace of its forward does not show, and is refused.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ != "torch._library.autograd" and torch.is_grad_enabled() and _outside.get() is None:
            raise CaptureError(
                place(f"{cls.__module__}.{cls.__qualname__}"),
                "is an autograd.Function, whose gradient no trace shows",
                "make it a torch.library.custom_op with register_autograd, and register a rule for it",
            )
        token = _outside.set(torch.is_grad_enabled() if _outside.get() is None else _outside.get())
        try:
            return original.__func__(cls, *args, **kwargs)
        finally:
            _outside.reset(token)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@contextmanager
def unchanged(joint: nn.Module) -> Iterator[None]:
    """Puts back attributes in which modules keep what they computed: these would be ghosts.

    Whatever else code sets up on its first run stays. A number that it counts is refused, since no step would count it.
    """
    before = [(name, module, dict(vars(module))) for name, module in joint.named_modules()]
    inside = [
        (value, value.copy()) for _, _, held in before for value in held.values() if isinstance(value, list | dict)
    ]
    try:
        yield
    finally:
        for value, content in inside:
            if isinstance(value, list) and _haunted(value):
                value[:] = content
            elif isinstance(value, dict) and _haunted(value):
                value.clear()
                value.update(content)
        for _, module, held in before:
            for key in [key for key, value in vars(module).items() if value is not held.get(key) and _haunted(value)]:
                if key in held:
                    vars(module)[key] = held[key]
                else:
                    del vars(module)[key]
    for name, module, held in before:
        for key, value in held.items():
            now = vars(module).get(key)
            if type(value) in (int, float) and type(now) in (int, float) and now != value:
                vars(module)[key] = value
                raise CaptureError(
                    f"{name.removeprefix('model.')}.{key}",
                    f"is a number that changes while the model runs, from {value} to {now}; a graph's does not",
                    "keep it in a buffer, or set it outside of forward",
                )


def _haunted(value: Any) -> bool:
    return any(is_ghost(leaf) for leaf in tree_leaves(value))


@contextmanager
def as_written(joint: nn.Module) -> Iterator[None]:
    """While open, compiled modules run the code that they were compiled from."""
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in joint.modules())
    if not compiled:
        yield
        return
    from torch._dynamo import config  # which takes a second to import

    with torch.compiler.set_stance("force_eager"), config.patch(error_on_nested_fx_trace=False):
        yield


@contextmanager
def module_paths(model: nn.Module) -> Iterator[None]:
    """While open, every traced call carries the path of the module that made it."""
    stack: list[Any] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            context = at(name)
            context.__enter__()
            stack.append(context)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                name or "model", "is a TorchScript module, whose code no trace shows", "give the Python module"
            )
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                name or "model", "has a backward hook, which would see no gradient", "remove it, or hook its parameters"
            )
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def failing_module(model: nn.Module, trace: TracebackType | None) -> str | None:
    """The path of the innermost module of ``model`` in whose code an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = names[id(owner)]
        trace = trace.tb_next
    return found

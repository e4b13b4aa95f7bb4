"""Trace model, loss and metrics at the true image shape on the ``meta`` device: no pixel, no memory, one graph.

``make_fx`` with ``tracing_mode="real"`` on meta tensors sees every ATen call below autograd, takes what
``torch.export`` refuses (losses that call ``.tolist()`` on constants), and costs about a second. It leaves in-place
ops as they are: those on tensors of their own are renamed here (``relu_`` becomes ``relu`` and later readers see
its result); a model that writes into views is traced again through ``torch.func.functionalize``, which turns them
into copies. Norms and losses are taken apart on the way (:mod:`wholegrad.graph.decompose`), so that rule 3 can cut
inside them.

Under ``torch.autocast`` the inputs are fake CPU tensors instead of meta tensors, which autocast does not know; its
casts then become nodes of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from wholegrad.errors import CaptureError, WholegradError
from wholegrad.graph import decompose
from wholegrad.graph.convert import Converter, WritesIntoViewError, buffer_written
from wholegrad.graph.graph import Graph, Kind
from wholegrad.graph.inputs import Inputs
from wholegrad.graph.rewrite import Rewritten
from wholegrad.graph.rules.fill import FILLS
from wholegrad.graph.rules.random import is_random

aten = torch.ops.aten
LossFn = Callable[..., torch.Tensor]
LARGE = 1 << 20  # elements from which a tensor made from nothing is made without memory


class _Joint(nn.Module):
    """Model, loss and metrics as one module, so that their parameters can be swapped for meta tensors at once."""

    def __init__(self, model: nn.Module, loss: Any, metrics: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        modules = {f"m{i}": fn for i, fn in enumerate(metrics.values()) if isinstance(fn, nn.Module)}
        self.metrics = nn.ModuleDict(modules)
        self._metric_fns = dict(metrics)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[Any, ...]:
        """Outputs, loss (or None), metrics, and the buffers that were given another tensor."""
        before = {name: id(buffer) for name, buffer in self.named_buffers()}
        output = self.model(*args, **kwargs)
        loss, values = None, []
        if self.loss is not None:
            with traceback.annotate({"path": "loss"}):
                loss = _one_tensor(self.loss(output, target), "loss")
            values = [_metric(fn, name, output, target) for name, fn in self._metric_fns.items()]
        changed = {name: buffer for name, buffer in self.named_buffers() if id(buffer) != before.get(name)}
        if any(name not in before for name in changed):
            raise buffer_written(next(name for name in changed if name not in before))
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if not outputs:
            raise CaptureError("model", f"returns {type(output).__name__} without a tensor", "return one or more")
        return outputs, loss, values, changed


def _one_tensor(value: Any, name: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CaptureError(name, f"returns {type(value).__name__}", "return one tensor")
    return value


def _metric(fn: Callable[..., torch.Tensor], name: str, output: Any, target: Any) -> torch.Tensor:
    with traceback.annotate({"path": f"metric {name}"}), torch.no_grad():
        return _one_tensor(fn(output, target), f"metric {name}")


class _Meta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes at each call whether gradients are on, and the number of a random one; keeps real tensors apart.

    Tensors that lie in the user's code meet the image's as ghosts, without memory of their own; so do constants that
    are made from nothing (``torch.zeros(shape)``), which may be as large as the image and may be written into. Index
    tensors (``arange``) stay real, since code may look at their values.

    Args:
        fake: makes ghosts that seem to lie on the CPU; None for those of the meta device.
        fills: whether constants made from nothing are ghosts; if not, only large ones are.
    """

    def __init__(self, fake: FakeTensorMode | None, fills: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake, self.fills = fake, fills
        self.draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for t in tensors:
            if t.requires_grad and not self._ghost(t):
                raise CaptureError(
                    "model or loss",
                    f"uses a trained tensor of shape {tuple(t.shape)} that is no parameter of either",
                    "make it an nn.Parameter of the model, or of a loss that is an nn.Module",
                )
        if any(self._ghost(t) for t in tensors):
            self._refuse_write(func, args)
            args, kwargs = tree_map_only(torch.Tensor, self._as_ghost, (args, kwargs))
        outside = _outside.get()
        note: dict[str, Any] = {"grad": torch.is_grad_enabled() if outside is None else outside}
        if is_random(func):
            note["draw"] = self.draws
            self.draws += 1
        with traceback.annotate(note):
            if not tensors and func in FILLS and (self.fills or _elements(args) > LARGE):
                if self.fake is None:
                    return func(*args, **{**kwargs, "device": "meta"})
                with self.fake:
                    return func(*args, **kwargs)
            return func(*args, **kwargs)

    def _refuse_write(self, func: Any, args: tuple[Any, ...]) -> None:
        """Refuse to write pixels into a real tensor: it would be its ghost that changes."""
        for given, argument in zip(args, func._schema.arguments, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(given, torch.Tensor) and not self._ghost(given):
                raise CaptureError(
                    f"model or loss ({func})",
                    f"writes into a tensor of shape {tuple(given.shape)} that is none of its inputs",
                    "make it with torch.zeros or zeros_like inside of forward",
                )

    def _ghost(self, t: torch.Tensor) -> bool:
        return t.is_meta or isinstance(t, FakeTensor)

    def _as_ghost(self, t: torch.Tensor) -> torch.Tensor:
        if self._ghost(t):
            return t
        return t.to("meta") if self.fake is None else self.fake.from_tensor(t)


def _elements(args: tuple[Any, ...]) -> int:
    """Elements of a tensor that is made from a shape, the first argument."""
    shape = args[0] if args and isinstance(args[0], list | tuple) else ()
    return torch.Size(shape).numel() if all(isinstance(size, int) for size in shape) else 0


_outside: ContextVar[bool | None] = ContextVar("gradients outside of an autograd.Function", default=None)


@contextmanager
def _functions() -> Iterator[None]:
    """While open, ``autograd.Function`` is watched: it runs its forward with gradients off, whatever is on outside.

    One that belongs to a ``torch.library`` op is a single node, with gradients as outside. Any other defines a gradient
    that a trace of its forward does not show, and is refused.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ != "torch._library.autograd" and torch.is_grad_enabled() and _outside.get() is None:
            raise CaptureError(
                f"{cls.__module__}.{cls.__qualname__}",
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
def _unchanged(joint: nn.Module) -> Iterator[None]:
    """Puts back what tracing leaves in modules' attributes: outputs that a model keeps for itself would be ghosts."""
    before = [(module, dict(vars(module))) for module in joint.modules()]
    inside = [(value, copy.copy(value)) for _, held in before for value in held.values() if type(value) in (list, dict)]
    try:
        yield
    finally:
        for module, held in before:
            vars(module).clear()
            vars(module).update(held)
        for value, content in inside:
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)


@contextmanager
def _module_paths(model: nn.Module) -> Iterator[None]:
    """While open, every traced call carries the path of the module that made it."""
    stack: list[Any] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            context = traceback.annotate({"path": name})
            context.__enter__()
            stack.append(context)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _places(joint: nn.Module) -> dict[str, str]:
    """Every place that holds a parameter or buffer, each module once, and the name that the tensor is known by.

    A module may be used under several names, and a tensor be held by several modules; swapping a module's tensors
    twice would leave the wrong ones behind.
    """
    known = {id(t): name for name, t in (*joint.named_parameters(), *joint.named_buffers())}
    return {
        f"{prefix}.{name}" if prefix else name: known[id(tensor)]
        for prefix, module in joint.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _trace(
    joint: _Joint, state: dict[str, torch.Tensor], inputs: Inputs, functional: bool, fills: bool
) -> tuple[torch.fx.GraphModule, list[str]]:
    """The traced graph, and the names of the buffers whose new tensors it returns last."""
    names, places = list(state), _places(joint)
    changed: list[str] = []
    fake = FakeTensorMode(allow_non_fake_inputs=True) if torch.is_autocast_enabled("cpu") else None

    def ghost(tensor: torch.Tensor) -> torch.Tensor:
        """A tensor without memory, on the meta device or, for autocast, as if on the CPU."""
        if fake is None:
            return tensor
        with fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)

    def run(tensors: list[torch.Tensor], given: list[torch.Tensor]) -> Any:
        args, kwargs, target = inputs.nested(given)
        with Rewritten(), _Meta(fake, fills):
            table = dict(zip(names, tensors, strict=True))
            swapped = {place: table[name] for place, name in places.items()}
            *found, new = torch.func.functional_call(joint, swapped, (args, kwargs, target), tie_weights=False)
        changed[:] = list(new)
        return (*found, list(new.values()))

    function = torch.func.functionalize(run, remove="mutations") if functional else run
    given = [torch.empty(each.shape, dtype=each.dtype, device="meta") for each in inputs.tensors]
    leaves = [ghost(t) for t in state.values()], [ghost(t) for t in given]
    watched = _unchanged(joint), _module_paths(joint.model), _functions()
    with traceback.preserve_node_meta(), watched[0], watched[1], watched[2], torch.enable_grad():
        traced = make_fx(function, decomposition_table=decompose.table(), tracing_mode="real")(*leaves)
    return traced, changed


def capture(
    model: nn.Module,
    loss_fn: LossFn | None,
    inputs: Inputs,
    *,
    metrics: Mapping[str, Callable[..., torch.Tensor]] | None = None,
) -> Graph:
    """Capture ``loss_fn(model(image), target)`` at the true shape.

    Args:
        model: any module; untouched, and left in the mode that it is in.
        loss_fn: ``loss_fn(output, target)`` to a scalar; None to capture the model alone.
        inputs: shapes and dtypes of images and targets.
        metrics: functions ``fn(output, target)`` to a small tensor, computed in the same pass without gradient.

    Raises:
        CaptureError: the code cannot be traced (control flow on pixel values, wrong shapes).
        UnsupportedOpError: an op has no rule, and its maps are too large to be held whole.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError("model", f"is {type(model).__name__}", "give an nn.Module")
    joint = _Joint(model, loss_fn, metrics or {})
    joint.training = model.training
    state = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        for name, tensor in (*joint.named_parameters(), *joint.named_buffers())
    }
    sources = [(Kind.PARAMETER, name) for name, _ in joint.named_parameters()]
    sources += [(Kind.BUFFER, name) for name, _ in joint.named_buffers()]
    sources += [(each.kind, each.name) for each in inputs.tensors]
    trained = {name for name, parameter in joint.named_parameters() if parameter.requires_grad}
    names = list(metrics or {}) if loss_fn is not None else []
    for functional in (False, True):
        traced, changed = _traced(joint, state, inputs, functional)
        try:
            return Converter(traced, sources, loss_fn is not None, names, changed, model.training, trained).convert()
        except WritesIntoViewError:
            continue
    raise CaptureError("model", "writes into views in a way that cannot be untangled", "avoid in-place writes there")


def _traced(
    joint: _Joint, state: dict[str, torch.Tensor], inputs: Inputs, functional: bool
) -> tuple[torch.fx.GraphModule, list[str]]:
    try:
        return _trace(joint, state, inputs, functional, fills=True)
    except WholegradError:
        raise
    except Exception as first:
        error = first
    try:
        return _trace(joint, state, inputs, functional, fills=False)  # where code looks at a constant's values
    except WholegradError:
        raise
    except Exception:
        reason = " ".join(str(error).split())[:300]
        shapes = ", ".join(str(each.shape) for each in inputs.tensors)
        raise CaptureError(
            _failing_module(joint),
            f"cannot be traced on {shapes}: {type(error).__name__}: {reason}",
            "check that model and loss accept these shapes and do not branch on pixel values",
        ) from error


def _failing_module(joint: _Joint) -> str:
    return f"{type(joint.model).__name__} with {getattr(joint.loss, '__name__', type(joint.loss).__name__)}"

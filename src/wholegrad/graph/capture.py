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

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from wholegrad.errors import CaptureError, WholegradError
from wholegrad.graph import decompose
from wholegrad.graph.convert import Converter, WritesIntoViewError, buffer_written
from wholegrad.graph.graph import Graph, Kind
from wholegrad.graph.inputs import Inputs
from wholegrad.graph.known import Known
from wholegrad.graph.rewrite import Rewritten
from wholegrad.graph.rules.fill import FILLS
from wholegrad.graph.rules.random import is_random
from wholegrad.graph.tracing import (
    as_written,
    at,
    failing_module,
    is_ghost,
    module_paths,
    outside_gradients,
    own_functions,
    place,
    unchanged,
)

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
            with at("loss"):
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
    with at(f"metric {name}"), torch.no_grad():
        return _one_tensor(fn(output, target), f"metric {name}")


class _Meta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes at each call whether gradients are on, and the number of a random one; keeps real tensors apart.

    Tensors that lie in the user's code meet the image's as ghosts, without memory of their own; so do constants that
    are made from nothing (``torch.zeros(shape)``), which may be as large as the image and may be written into. Index
    tensors (``arange``) stay real, since code may look at their values.

    Args:
        fake: makes ghosts that seem to lie on the CPU; None for those of the meta device.
        fills: whether constants made from nothing are ghosts; if not, only large ones are.
        known: answers where code looks at a value.
    """

    def __init__(self, fake: FakeTensorMode | None, fills: bool, known: Known) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake, self.fills, self.known = fake, fills, known
        self.draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for t in tensors:
            if t.requires_grad and not is_ghost(t):
                raise CaptureError(
                    place(func),
                    f"uses a trained tensor of shape {tuple(t.shape)} that is no parameter of either",
                    "make it an nn.Parameter of the model, or of a loss that is an nn.Module",
                )
        if any(is_ghost(t) for t in tensors):
            self._refuse_write(func, args)
            _refuse_selection(func, args)
            number = self.known.number(tensors[0]) if func is aten._local_scalar_dense.default else None
            if number is not None:
                return number
            args, kwargs = tree_map_only(torch.Tensor, self._as_ghost, (args, kwargs))
        outside = outside_gradients()
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
            if writes and isinstance(given, torch.Tensor) and not is_ghost(given):
                raise CaptureError(
                    place(func),
                    f"writes into a tensor of shape {tuple(given.shape)} that is none of its inputs",
                    "make it with torch.zeros or zeros_like inside of forward",
                )

    def _as_ghost(self, t: torch.Tensor) -> torch.Tensor:
        """A real tensor on the ghosts' device; fake CPU tensors meet real ones as they are."""
        return t if is_ghost(t) or self.fake is not None else t.to("meta")


def _refuse_selection(func: Any, args: tuple[Any, ...]) -> None:
    """Refuse to pick elements by a mask of pixels: how many there are depends on the pixels."""
    indices = args[1] if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) else ()
    masks = [i for i in indices if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
    picks = func in (aten.nonzero.default, aten.masked_select.default) or (func is aten.index.Tensor and masks)
    if picks:
        raise CaptureError(
            place(func),
            "picks elements by a mask, so that shapes depend on pixels",
            "multiply by the mask instead: (x * mask).sum() / mask.sum()",
        )


def _elements(args: tuple[Any, ...]) -> int:
    """Elements of a tensor that is made from a shape, the first argument."""
    shape = args[0] if args and isinstance(args[0], list | tuple) else ()
    return torch.Size(shape).numel() if all(isinstance(size, int) for size in shape) else 0


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
    joint: _Joint, state: dict[str, torch.Tensor], inputs: Inputs, functional: bool, fills: bool, known: Known
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
        with Rewritten(), _Meta(fake, fills, known):
            table = dict(zip(names, tensors, strict=True))
            swapped = {place: table[name] for place, name in places.items()}
            *found, new = torch.func.functional_call(joint, swapped, (args, kwargs, target), tie_weights=False)
        changed[:] = list(new)
        return (*found, list(new.values()))

    function = torch.func.functionalize(run, remove="mutations") if functional else run
    given = [torch.empty(each.shape, dtype=each.dtype, device="meta") for each in inputs.tensors]
    leaves = [ghost(t) for t in state.values()], [ghost(t) for t in given]
    watched = unchanged(joint), module_paths(joint.model), own_functions(), as_written(joint)
    with ExitStack() as stack:
        for context in (traceback.preserve_node_meta(), *watched, torch.enable_grad()):
            stack.enter_context(context)
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
    buffers = dict(joint.named_buffers())
    for functional in (False, True):
        known = Known({i: (name, buffers[name]) for i, name in enumerate(state) if name in buffers})
        traced, changed = _traced(joint, state, inputs, functional, known)
        try:
            made = Converter(traced, sources, loss_fn is not None, names, changed, model.training, trained).convert()
            return replace(made, looked_at=known.looked_at)
        except WritesIntoViewError as error:
            where = str(error)
    raise CaptureError(where, "writes into views in a way that cannot be untangled", "avoid in-place writes there")


def _traced(
    joint: _Joint, state: dict[str, torch.Tensor], inputs: Inputs, functional: bool, known: Known
) -> tuple[torch.fx.GraphModule, list[str]]:
    try:
        return _trace(joint, state, inputs, functional, True, known)
    except WholegradError:
        raise
    except Exception as first:
        error = first
    try:
        return _trace(joint, state, inputs, functional, False, known)  # where code looks at a constant's values
    except WholegradError:
        raise
    except Exception:
        reason = " ".join(str(error).split())
        for advice in ("You may have run into this message", "It's likely that this is caused", "Use Tensor.cpu()"):
            reason = reason.partition(f" {advice}")[0]  # which is about other uses of tracing
        shapes = ", ".join(str(each.shape) for each in inputs.tensors)
        raise CaptureError(
            _failing(joint, error),
            f"cannot be traced on {shapes}: {type(error).__name__}: {reason[:300]}",
            _remedy(str(error)),
        ) from error


def _failing(joint: _Joint, error: Exception) -> str:
    """The innermost module in whose code an error was raised; the loss, or the names of both, if there is none."""
    path = failing_module(joint.model, error.__traceback__)
    if (
        path is None
        and isinstance(joint.loss, nn.Module)
        and failing_module(joint.loss, error.__traceback__) is not None
    ):
        return f"loss {type(joint.loss).__name__}"
    if path:
        return f"{path} ({type(joint.model.get_submodule(path)).__name__})"
    name = type(joint.model).__name__
    return name if joint.loss is None else f"{name} with {getattr(joint.loss, '__name__', type(joint.loss).__name__)}"


_VALUES = ("tracing tensor", "meta tensor", "meta device", "Meta tensors", "data-dependent", "DataDependent")


def _remedy(reason: str) -> str:
    if any(words in reason for words in _VALUES):
        return "code must not look at pixel values: use torch.where and masks instead of branches"
    return "check that model and loss accept these shapes and dtypes"

"""Trace model, loss and metrics at the true image shape on the ``meta`` device: no pixel, no memory, one graph.

``make_fx`` with ``tracing_mode="real"`` on meta tensors sees every ATen call below autograd, takes what
``torch.export`` refuses (losses that call ``.tolist()`` on constants), and costs about a second. It leaves in-place
ops as they are: those on tensors of their own are renamed here (``relu_`` becomes ``relu`` and later readers see
its result); a model that writes into views is traced again through ``torch.func.functionalize``, which turns them
into copies. Losses with ``reduction="mean"`` or ``"sum"`` are split into a per-pixel part and a reduction, so that
rule 3 can cut between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from wholegrad.errors import CaptureError, WholegradError
from wholegrad.graph.convert import Converter, WritesIntoViewError, buffer_written
from wholegrad.graph.graph import Graph, Kind
from wholegrad.graph.rules.pointwise import PIXEL_LOSSES

aten = torch.ops.aten
LossFn = Callable[..., torch.Tensor]


class _Joint(nn.Module):
    """Model, loss and metrics as one module, so that their parameters can be swapped for meta tensors at once."""

    def __init__(self, model: nn.Module, loss: Any, metrics: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        modules = {f"m{i}": fn for i, fn in enumerate(metrics.values()) if isinstance(fn, nn.Module)}
        self.metrics = nn.ModuleDict(modules)
        self._metric_fns = dict(metrics)

    def forward(self, image: torch.Tensor, target: torch.Tensor | None) -> tuple[Any, ...]:
        before = {name: id(buffer) for name, buffer in self.named_buffers()}
        output = self.model(image)
        if self.loss is None:
            first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
            return ([_one_tensor(first, "model")],)
        with traceback.annotate({"path": "loss"}):
            loss = _one_tensor(self.loss(output, target), "loss")
        values = [_metric(fn, name, output, target) for name, fn in self._metric_fns.items()]
        changed = [name for name, buffer in self.named_buffers() if id(buffer) != before.get(name)]
        if changed:
            raise buffer_written(changed[0])
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        return (outputs, loss, *values)


def _one_tensor(value: Any, name: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CaptureError(name, f"returns {type(value).__name__}", "return one tensor")
    return value


def _metric(fn: Callable[..., torch.Tensor], name: str, output: Any, target: Any) -> torch.Tensor:
    with traceback.annotate({"path": f"metric {name}"}), torch.no_grad():
        return _one_tensor(fn(output, target), f"metric {name}")


class _Meta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether gradients are on at each call, and lets tensors that lie in the user's code meet meta tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for t in tensors:
            if t.requires_grad and not t.is_meta:
                raise CaptureError(
                    "model or loss",
                    f"uses a trained tensor of shape {tuple(t.shape)} that is no parameter of either",
                    "make it an nn.Parameter of the model, or of a loss that is an nn.Module",
                )
        if any(t.is_meta for t in tensors):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs))
        with traceback.annotate({"grad": torch.is_grad_enabled()}):
            return func(*args, **kwargs)


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


def _split_reduction(op: Any) -> Callable[..., Any]:
    """Decomposition of a loss op with a reduction into the op per pixel and a mean or sum of that."""
    names = [argument.name for argument in op._schema.arguments]
    where = names.index("reduction")

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        bound = {argument.name: argument.default_value for argument in op._schema.arguments}
        bound.update(zip(names, args, strict=False))
        bound.update(kwargs)
        if bound["reduction"] == 0:
            return NotImplemented
        kind, bound["reduction"] = bound["reduction"], 0
        result = op(*(bound[name] for name in names[: where + 1]), **{k: bound[k] for k in names[where + 1 :]})
        return result.mean() if kind == 1 else result.sum()

    return decomposed


def _trace(joint: _Joint, state: dict[str, torch.Tensor], inputs: list[Any], functional: bool) -> torch.fx.GraphModule:
    names = list(state)

    def run(tensors: list[torch.Tensor], image: torch.Tensor, target: torch.Tensor | None) -> Any:
        with _Meta():  # type: ignore[no-untyped-call]
            return torch.func.functional_call(joint, dict(zip(names, tensors, strict=True)), (image, target))

    function = torch.func.functionalize(run, remove="mutations") if functional else run
    table = {op: _split_reduction(op) for op in PIXEL_LOSSES}
    with traceback.preserve_node_meta(), _module_paths(joint.model), torch.enable_grad():
        return make_fx(function, decomposition_table=table, tracing_mode="real")(list(state.values()), *inputs)


def capture(
    model: nn.Module,
    loss_fn: LossFn | None,
    image_shape: tuple[int, ...],
    target: tuple[tuple[int, ...], torch.dtype] | None,
    *,
    dtype: torch.dtype,
    metrics: Mapping[str, Callable[..., torch.Tensor]] | None = None,
) -> Graph:
    """Capture ``loss_fn(model(image), target)`` at the true shape.

    Args:
        model: any module; untouched, and left in the mode that it is in.
        loss_fn: ``loss_fn(output, target)`` to a scalar; None to capture the model alone.
        image_shape: ``(N, C, H, W)`` in pixels.
        target: shape and dtype of the target, the last two dimensions rows and columns; None without one.
        dtype: of the image as the model sees it.
        metrics: functions ``fn(output, target)`` to a small tensor, computed in the same pass without gradient.

    Raises:
        CaptureError: the code cannot be traced (control flow on pixel values, wrong shapes).
        UnsupportedOpError: an op has no rule.
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
    inputs: list[Any] = [torch.empty(image_shape, dtype=dtype, device="meta")]
    inputs.append(None if target is None else torch.empty(target[0], dtype=target[1], device="meta"))
    trained = {name for name, parameter in joint.named_parameters() if parameter.requires_grad}
    names = list(metrics or {})
    for functional in (False, True):
        traced = _traced(joint, state, inputs, functional)
        try:
            return Converter(traced, sources, loss_fn is not None, names, model.training, trained).convert()
        except WritesIntoViewError:
            continue
    raise CaptureError("model", "writes into views in a way that cannot be untangled", "avoid in-place writes there")


def _traced(joint: _Joint, state: dict[str, torch.Tensor], inputs: list[Any], functional: bool) -> torch.fx.GraphModule:
    try:
        return _trace(joint, state, inputs, functional)
    except WholegradError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs if x is not None)
        raise CaptureError(
            _failing_module(joint),
            f"cannot be traced on {shapes}: {type(error).__name__}: {reason}",
            "check that model and loss accept these shapes and do not branch on pixel values",
        ) from error


def _failing_module(joint: _Joint) -> str:
    return f"{type(joint.model).__name__} with {getattr(joint.loss, '__name__', type(joint.loss).__name__)}"

"""The public calls: ``plan``, ``backward`` and ``measure``. Everything else is behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from wholegrad import clock
from wholegrad.cache import cached
from wholegrad.errors import CaptureError, NumericsError, PlanError, ShapeError
from wholegrad.given import Given, given
from wholegrad.graph.capture import capture
from wholegrad.graph.graph import Graph, Kind, Ref
from wholegrad.graph.inputs import Input, Leaf
from wholegrad.looks import Looks, difference, looks
from wholegrad.plan import memory
from wholegrad.plan.boundaries import storable
from wholegrad.plan.plan import Placement, Plan, Room, parse_bytes
from wholegrad.plan.planner import Request, check_elements, make_plan
from wholegrad.plan.rates import Rates
from wholegrad.plan.storage import NARROW
from wholegrad.run import calibrate, process
from wholegrad.run.blocks import drop_blocks
from wholegrad.run.executor import Executor, ProgressFn
from wholegrad.run.sink import Sink
from wholegrad.run.sources import model_dtype, raw_images
from wholegrad.run.store import check_space
from wholegrad.run.workers import default_workers

LossFn = Callable[..., torch.Tensor]
SHARE = 0.6  # of the memory that is free, where nobody names a budget


def joint_tensors(model: nn.Module, loss_fn: Any, metrics: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
    """Parameters and buffers of model, loss and metrics by the names that the captured graph has for them."""
    parts: list[tuple[str, Any]] = [("model", model), ("loss", loss_fn)]
    parts += [(f"metrics.m{i}", fn) for i, fn in enumerate((metrics or {}).values())]
    return {
        f"{prefix}.{name}": tensor
        for prefix, part in parts
        if isinstance(part, nn.Module)
        for name, tensor in (*part.named_parameters(), *part.named_buffers())
    }


def budget_bytes(budget: str | int | None) -> int:
    """Bytes of a budget; without one, a safe share of what is free, on top of what this process has already.

    Raises:
        PlanError: the budget cannot be read.
    """
    if budget is None:
        return process.resident() + int(SHARE * process.available())
    try:
        return parse_bytes(budget)
    except (ValueError, AttributeError) as error:
        raise PlanError("budget", str(error), 'write for example "1.5GiB"') from error


def _request(
    graph: Graph,
    inputs: Given,
    budget: str | int | None,
    backward: bool,
    sinks: tuple[Ref, ...] = (),
    rates: Rates | None = None,
) -> Request:
    drop_blocks()
    still_to_load = memory.LIBRARIES // (4 if process.has_run() else 1)
    reserved = process.resident() + still_to_load + inputs.cache_bytes
    raw = raw_images(graph, inputs.sources)
    limit = reserved + budget if isinstance(budget, Room) else budget_bytes(budget)
    return Request(limit, reserved, backward, default_workers(), sinks, raw=raw, rates=rates or calibrate.rates())


def _check_tile(tile: Any) -> None:
    good = tile is None or (
        isinstance(tile, tuple | list) and len(tile) == 2 and all(isinstance(edge, int) and edge > 0 for edge in tile)
    )
    if not good:
        raise PlanError("tile", f"is {tile!r}", "give a height and a width of at least 1 pixel, such as (512, 512)")


def _placement(name: str | None) -> Placement | None:
    if name is None:
        return None
    try:
        return Placement(name)
    except ValueError as error:
        raise PlanError("placement", f"{name!r} is unknown", f"choose from {[str(p) for p in Placement]}") from error


def _check_boundary_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in NARROW.values():
        raise PlanError("boundary_dtype", f"is {dtype!r}", f"choose {' or '.join(map(str, NARROW.values()))}, or None")


def _boundary_refs(graph: Graph, names: Sequence[str] | None) -> frozenset[Ref] | None:
    """Boundaries named by module path (the last map that the module computes) or node name."""
    if names is None:
        return None
    if isinstance(names, str):
        raise PlanError("boundaries", f"is the text {names!r}", f"give a list: [{names!r}]")
    found = set()
    for name in names:
        nodes = [n for n in graph.of_kind(Kind.MAP) if name in (n.path, n.name) and storable(n.outputs[0])]
        if not nodes:
            known = ", ".join(dict.fromkeys(n.path for n in graph.of_kind(Kind.MAP) if n.path))
            raise PlanError(f"boundary {name!r}", "is no module that computes a map", f"choose from: {known}")
        found.add(Ref(nodes[-1].index))
    return frozenset(found)


def plan(
    model: nn.Module,
    loss_fn: LossFn | None,
    image: Any,
    target: Any = None,
    *,
    budget: str | int | None = None,
    metrics: Mapping[str, Callable[..., torch.Tensor]] | None = None,
    tile: tuple[int, int] | None = None,
    boundaries: Sequence[str] | None = None,
    placement: str | None = None,
    spill_dir: str | Path | None = None,
    boundary_dtype: torch.dtype | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Plan one training step; nothing is read or run.

    Args:
        model: any module, in the mode (train or eval) in which it will run.
        loss_fn: ``loss_fn(output, target)`` to one number.
        image: ``(C, H, W)`` pixels (or ``(N, C, H, W)``): a slide, array, memmap or CPU tensor; a tuple of such for
            ``model(*images)``, a dictionary for ``model(**images)``. Only shapes matter here.
        target: the loss's second argument: a map, a small tensor such as a slide's label, or several, nested.
        budget: the whole process's peak, such as ``"1.5GiB"`` or bytes; without one, a safe share of what is free.
        metrics: functions ``fn(output, target)`` to a small tensor, computed in the same pass without gradient.
        tile: height and width of every tile in pixels of the largest map that a segment owns.
        boundaries: module paths (or node names) whose outputs are kept, instead of the planner's choice.
        placement: ``"host"`` or ``"disk"`` for all boundaries.
        spill_dir: folder for boundaries on disk; default the system's temporary folder.
        boundary_dtype: ``torch.bfloat16`` or ``torch.float16`` to store wider boundaries rounded, in fewer bytes.
            Off by default. Gradients are then those of a model that rounds these maps, with one for the rounding's
            own gradient. Arithmetic and boundaries' gradients keep their dtype.
        rates: of the machine, for predicted times; default what ``wholegrad plan --calibrate`` kept, else built in.

    Raises:
        ShapeError: image and target do not fit together.
        CaptureError, UnsupportedOpError: model or loss cannot be captured.
        BudgetError: no plan fits; says the smallest budget that would do.
    """
    _check_tile(tile)
    _check_boundary_dtype(boundary_dtype)
    inputs = given(image, target, model_dtype(model))
    graph = _capture(model, loss_fn, inputs, metrics)
    request = replace(
        _request(graph, inputs, budget, loss_fn is not None, rates=rates),
        tile=None if tile is None else (tile[0], tile[1]),
        boundaries=_boundary_refs(graph, boundaries),
        placement=_placement(placement),
        spill_dir=None if spill_dir is None else Path(spill_dir),
        boundary_dtype=boundary_dtype,
    )
    made = replace(make_plan(graph, request), made_for=_signature(model, loss_fn, inputs, metrics))
    check_elements(made)
    return made


@dataclass(frozen=True)
class _Signature:
    """What a captured graph depends on: a graph and its plans are used only where all of it is the same."""

    image: tuple[Any, ...]
    target: tuple[Any, ...]
    modes: tuple[bool, ...]
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype, bool], ...]
    metrics: tuple[str, ...]
    autocast: torch.dtype | None
    bytes: tuple[bool, ...]
    looks: Looks

    def difference(self, other: _Signature) -> str | None:
        """What differs first, in words."""
        words = {
            "image": "an image of {}",
            "target": "a target of {}",
            "modes": "other modules in training or evaluation mode",
            "tensors": "other parameters (names, shapes, dtypes, or which are trained)",
            "metrics": "the metrics {}",
            "autocast": "autocast to {}",
            "bytes": "images of 8-bit pixels or not: {}",
        }
        for name, text in words.items():
            mine = getattr(self, name)
            if mine != getattr(other, name):
                return text.format(mine)
        return difference(self.looks, other.looks)


def _signature(model: nn.Module, loss_fn: Any, inputs: Given, metrics: Mapping[str, Any] | None) -> _Signature:
    def leaf(each: Leaf) -> Any:
        return (*each.shape, each.dtype) if isinstance(each, Input) else each.value

    parts = [part for part in (model, loss_fn, *(metrics or {}).values()) if isinstance(part, nn.Module)]
    tensors = joint_tensors(model, loss_fn, metrics)
    nested = inputs.inputs
    return _Signature(
        image=(*(leaf(each) for each in nested.images), *([nested.image_tree] if len(nested.images) > 1 else [])),
        target=(*(leaf(each) for each in nested.targets), *([nested.target_tree] if len(nested.targets) > 1 else [])),
        modes=tuple(module.training for part in parts for module in part.modules()),
        tensors=tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors.items()),
        metrics=tuple(metrics or {}),
        autocast=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        bytes=tuple(source.raw for source in inputs.sources.values()),
        looks=looks(model=model, loss=loss_fn, metrics=dict(metrics or {})),
    )


def _capture(model: nn.Module, loss_fn: LossFn | None, inputs: Given, metrics: Mapping[str, Any] | None) -> Graph:
    def make() -> Graph:
        try:
            return capture(model, loss_fn, inputs.inputs, metrics=metrics)
        except (CaptureError, ShapeError):
            inputs.check_sizes()
            raise

    if not isinstance(model, nn.Module):
        return make()  # which refuses
    tensors = joint_tensors(model, loss_fn, metrics)
    return cached(
        model,
        lambda: _signature(model, loss_fn, inputs, metrics),
        lambda graph: _another_buffer(graph, tensors) is None,
        make,
    )


def _another_buffer(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A buffer at whose values the code looked while it was traced, and which holds others now."""
    for name, value in graph.looked_at.items():
        if name not in tensors or not torch.equal(tensors[name], value):
            return name
    return None


def _check_plan(made: Plan, wanted: _Signature, tensors: Mapping[str, torch.Tensor]) -> None:
    known = made.made_for
    apart = known.difference(wanted) if isinstance(known, _Signature) else "nothing that is known"
    if apart is None and (buffer := _another_buffer(made.graph, tensors)) is not None:
        apart = f"other values of {buffer}, at which the code looks"
    if apart is not None:
        raise PlanError("plan", f"was made for {apart}", "plan again for what is to be run")


@overload
def backward(
    model: nn.Module, loss_fn: LossFn, image: Any, target: Any = ..., *, plan: Plan | None = ...,
    budget: str | int | None = ..., metrics: None = ..., progress: ProgressFn | None = ...,
    seed: int | None = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def backward(
    model: nn.Module, loss_fn: LossFn, image: Any, target: Any = ..., *, plan: Plan | None = ...,
    budget: str | int | None = ..., metrics: Mapping[str, Callable[..., torch.Tensor]],
    progress: ProgressFn | None = ..., seed: int | None = ...,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...  # fmt: skip
def backward(
    model: nn.Module,
    loss_fn: LossFn,
    image: Any,
    target: Any = None,
    *,
    plan: Plan | None = None,
    budget: str | int | None = None,
    metrics: Mapping[str, Callable[..., torch.Tensor]] | None = None,
    progress: ProgressFn | None = None,
    seed: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Add to every ``param.grad`` what ``loss_fn(model(image), target).backward()`` would add, and return the loss.

    Buffers that the model writes (running statistics) are updated as PyTorch would. Under ``torch.autocast("cpu")`` the
    model runs with its casts.

    Args:
        image, target: as for :func:`plan`.
        plan: from :func:`plan` for the same model, loss, shapes and metrics; made here if missing.
        progress: called after each tile.
        seed: of random ops (dropout); without one, drawn from PyTorch's generator.

    Returns:
        The loss, 0-dimensional in float64; with ``metrics`` also their values by name.

    Raises:
        NumericsError: loss or a gradient is not finite, or a boundary too large for the plan's ``boundary_dtype``; no
            ``param.grad`` was touched.
        PlanError: the plan belongs to other shapes or metrics.
        SlideError: pixels cannot be read.
    """
    inputs = given(image, target, model_dtype(model))
    made = plan if plan is not None else _plan(model, loss_fn, image, target, budget=budget, metrics=metrics)
    tensors = joint_tensors(model, loss_fn, metrics)
    with clock.span("preparing", "checks of the plan"):
        _check_plan(made, _signature(model, loss_fn, inputs, metrics), tensors)
    executor = _executor(made, tensors, inputs, progress=progress, seed=seed)
    try:
        with _as_captured(), torch.enable_grad():
            executor.forward()
            executor.backward()
    finally:
        executor.close()
    assert made.graph.loss is not None
    loss = executor.small.values[made.graph.loss].detach().to(torch.float64).reshape(())
    if not torch.isfinite(loss):
        raise NumericsError("loss", f"is {loss.item()}", "lower the learning rate, or check weights and pixels")
    _leave_gradients(made.graph, executor, tensors)
    _leave_buffers(executor, tensors)
    if metrics is None:
        return loss
    return loss, {name: executor.small.values[ref] for name, ref in made.graph.metrics.items()}


_plan = plan


def _executor(
    made: Plan, tensors: Mapping[str, torch.Tensor], inputs: Given, *, seed: int | None = None, **options: Any
) -> Executor:
    """An executor with a seed of its own if the graph draws random numbers and the caller names none."""
    spilled = sum(made.stored_bytes(ref) for ref, place in made.placements.items() if place is Placement.DISK)
    check_space(spilled, made.spill_dir)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()).item()) if made.graph.random else 0
    return Executor(made, {**tensors, **inputs.values}, inputs.sources, seed=seed, **options)


@contextmanager
def _as_captured() -> Iterator[None]:
    """Run the graph as it stands: autocast's casts are nodes of it, and memory is kept between tiles."""
    with process.reuse_memory(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        yield


def _leave_buffers(executor: Executor, tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in executor.updates().items():
            tensors[name].copy_(value)


def _leave_gradients(graph: Graph, executor: Executor, tensors: Mapping[str, torch.Tensor]) -> None:
    found = []
    for node in graph.of_kind(Kind.PARAMETER):
        grad = executor.small.grads.get(Ref(node.index))
        if grad is None or not node.needs_grad:
            continue
        if not torch.isfinite(grad).all():
            raise NumericsError(node.name, "has a gradient that is not finite", "lower the learning rate")
        found.append((tensors[node.name], grad))
    for parameter, grad in found:
        _accumulate(parameter, grad.to(parameter.dtype).reshape(parameter.shape))


def _accumulate(parameter: torch.Tensor, grad: torch.Tensor) -> None:
    """Add to ``parameter.grad`` as autograd would, the parameter's own hooks included."""
    for hook in (getattr(parameter, "_backward_hooks", None) or {}).values():
        changed = hook(grad)
        grad = grad if changed is None else changed
    with torch.no_grad():
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad.add_(grad)
    for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(parameter)


def measure(
    model: nn.Module,
    image: Any,
    target: Any,
    *,
    metrics: Mapping[str, Callable[..., torch.Tensor]],
    budget: str | int | None = None,
    progress: ProgressFn | None = None,
    rates: Rates | None = None,
) -> dict[str, torch.Tensor]:
    """Metrics of one image, forward only.

    Args:
        metrics: functions ``fn(output, target)`` to a small tensor; ``rates`` as for :func:`plan`.

    Returns:
        Their values by name, floating-point ones in float64.
    """
    inputs = given(image, target, model_dtype(model))
    graph = _capture(model, _no_loss, inputs, metrics)
    made = make_plan(graph, _request(graph, inputs, budget, False, rates=rates))
    check_elements(made)
    tensors = joint_tensors(model, None, metrics)
    executor = _executor(made, tensors, inputs, progress=progress)
    try:
        with _as_captured(), torch.no_grad():
            executor.forward()
    finally:
        executor.close()
    _leave_buffers(executor, tensors)
    return {name: executor.small.values[ref] for name, ref in graph.metrics.items()}


def _no_loss(output: Any, target: Any) -> torch.Tensor:
    return torch.zeros(())


def run_outputs(
    model: nn.Module,
    image: Any,
    sinks: Callable[[Graph], Mapping[Ref, Sink]],
    budget: str | int | None,
    tile: tuple[int, int] | None = None,
    progress: ProgressFn | None = None,
    sink_bytes: Callable[[], tuple[int, int]] = lambda: (0, 0),
    seed: int | None = None,
) -> dict[Ref, torch.Tensor]:
    """Run the model forward and hand each box of its output maps to a sink; outputs that are small are returned.

    Args:
        sink_bytes: of sinks, once made: bytes held for each pixel of one row of tiles, and whatever the tiles.
    """
    inputs = given(image, None, model_dtype(model))
    graph = _capture(model, None, inputs, None)
    taken = dict(sinks(graph))
    request, held = _request(graph, inputs, budget, False, tuple(taken)), sink_bytes()
    masks = frozenset(ref for ref, sink in taken.items() if sink.masks)
    made = make_plan(graph, replace(request, tile=tile, sink_bytes=held[0], sink_held=held[1], as_bytes=masks))
    check_elements(made)
    tensors = joint_tensors(model, None, None)
    executor = _executor(made, tensors, inputs, sinks=taken, progress=progress, seed=seed)
    try:
        with _as_captured(), torch.no_grad():
            executor.forward()
    finally:
        executor.close()
    _leave_buffers(executor, tensors)
    return {ref: executor.small.leaf(ref) for ref in graph.outputs if not graph.spec(ref).is_map}

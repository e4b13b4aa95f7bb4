"""The public calls: ``plan``, ``backward`` and ``measure``. Everything else is behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from wholegrad import clock
from wholegrad.asked import boundary_refs, check_boundary_dtype, check_device, check_tile, placement_of, request_of
from wholegrad.cache import cached
from wholegrad.errors import CaptureError, NumericsError, PlanError, ShapeError
from wholegrad.given import Given, given
from wholegrad.graph.capture import capture
from wholegrad.graph.graph import WIDE_ELEMENTS, Graph, Kind, Ref
from wholegrad.plan.plan import Plan
from wholegrad.plan.planner import Request, check_elements, make_plan
from wholegrad.plan.rates import Rates
from wholegrad.plan.strategies import WHOLE, Strategy, WholePlan, check_strategy
from wholegrad.ranked import RanksLike, Together, exchanged, of_batch, of_one_image, shared_request, sharing
from wholegrad.run import process
from wholegrad.run.budget import check_limit
from wholegrad.run.device import Device, device_of
from wholegrad.run.distributed.executor import RankExecutor
from wholegrad.run.distributed.norms import BatchNorms
from wholegrad.run.distributed.ranks import Ranks
from wholegrad.run.distributed.wire import Wire
from wholegrad.run.executor import Executor, ProgressFn
from wholegrad.run.sink import Sink
from wholegrad.run.sources import model_dtype
from wholegrad.run.whole_image import Outcome, Parts
from wholegrad.signature import another_buffer, check_plan, joint_tensors, signature
from wholegrad.whole_step import Job, fastest_whole, plan_whole, run_whole

LossFn = Callable[..., torch.Tensor]
DeviceLike = str | torch.device | Device | None


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
    strategy: str = "auto",
    rates: Rates | None = None,
    device: DeviceLike = None,
    host_budget: str | int | None = None,
    ranks: RanksLike = None,
) -> Plan:
    """Plan one training step; nothing is read or run.

    Args:
        model: any module, in the mode (train or eval) in which it will run.
        loss_fn: ``loss_fn(output, target)`` to one number.
        image: ``(C, H, W)`` pixels (or ``(N, C, H, W)``): a slide, array, memmap or tensor; a tuple of such for
            ``model(*images)``, a dictionary for ``model(**images)``. Only shapes matter here.
        target: the loss's second argument: a map, a small tensor such as a slide's label, or several, nested.
        budget: the whole process's peak, such as ``"1.5GiB"`` or bytes; without one or with ``"auto"``, a safe share
            of what is free under the limits of the machine and of its control groups.
        metrics: functions ``fn(output, target)`` to a small tensor, computed in the same pass without gradient.
        tile: height and width of every tile in pixels of the largest map that a segment owns.
        boundaries: module paths (or node names) whose outputs are kept, instead of the planner's choice.
        placement: ``"host"`` or ``"disk"`` (or ``"device"``) for all boundaries.
        spill_dir: folder for boundaries on disk; default the system's temporary folder.
        boundary_dtype: ``torch.bfloat16`` or ``torch.float16`` to store wider boundaries rounded, in fewer bytes.
            Off by default. Gradients are then those of a model that rounds these maps, with one for the rounding's
            own gradient. Arithmetic and boundaries' gradients keep their dtype.
        strategy: how activations are held: ``"stream"`` (in tiles), ``"in-core"`` (whole-image autograd of the model as
            it is), ``"recompute"`` (whole maps, of which most are computed twice), ``"offload"`` (whole maps that wait
            in a file of ``spill_dir``), ``"managed"`` (of an NVIDIA GPU: whole maps in memory that its driver pages
            between the GPU and the host), or ``"auto"``: tiles, or whole maps where these fit into the budget and are
            predicted to save a fifth of more than a second. Tiles, boundaries, placement and ``boundary_dtype`` are of
            ``"stream"``.
        rates: of the machine or device, for predicted times; default what ``wholegrad plan --calibrate`` kept.
        device: where tiles run: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"auto"`` or a
            :class:`wholegrad.Device` with options; default where the model's parameters are. On a device with memory of
            its own, ``budget`` is for what tensors take there (default: a safe share of what is free), and boundaries
            may live in ``"device"``, ``"host"`` or ``"disk"``.
        host_budget: then, the whole process's peak in the host's memory.
        ranks: the processes that share the image, each with a budget of its own: a group as for :func:`backward`, all
            of whose ranks plan at once; or their number, or ``(rows, columns)`` of blocks, to plan for some that need
            not exist yet.

    Raises:
        ShapeError: image and target do not fit together.
        CaptureError, UnsupportedOpError: model or loss cannot be captured.
        BudgetError: no plan fits; says the smallest budget that would do.
    """
    check_tile(tile)
    check_boundary_dtype(boundary_dtype)
    how, everyone, ranks = check_strategy(strategy), ranks, sharing(ranks)
    given_by_name = {"tile": tile, "boundaries": boundaries, "placement": placement, "ranks": ranks}
    given_by_name["boundary_dtype"] = boundary_dtype
    fixed = [name for name, value in given_by_name.items() if value is not None]
    if how in WHOLE and (fixed or loss_fn is None):
        cause = f"holds maps whole and takes no {fixed[0]}" if fixed else "is for training steps, and there is no loss"
        raise PlanError(f"strategy {how}", cause, "use strategy stream")
    inputs, where = given(image, target, model_dtype(model)), device_of(model, device)
    if how is Strategy.MANAGED:
        where.check_managed()
    graph = _capture(model, loss_fn, inputs, metrics)
    tensors = joint_tensors(model, loss_fn, metrics)
    asked: dict[str, Any] = {"rates": rates, "device": where, "host_budget": host_budget}
    asked["exchange"] = exchanged(everyone, graph)
    request = replace(
        request_of(graph, inputs, tensors, budget, loss_fn is not None, **asked),
        tile=None if tile is None else (tile[0], tile[1]),
        boundaries=boundary_refs(graph, boundaries),
        placement=placement_of(placement, where),
        spill_dir=None if spill_dir is None else Path(spill_dir),
        boundary_dtype=boundary_dtype,
    )
    request = request if ranks is None else shared_request(ranks, graph, request)
    job = Job(Parts(model, loss_fn or _no_loss, metrics or {}), inputs, graph, tensors)
    whole_too = (
        how is Strategy.AUTO and not fixed and loss_fn is not None and not where.apart and not of_batch(everyone)
    )
    made = plan_whole(job, how, request) if how in WHOLE else _tiles_or_whole(job, request, whole_too)
    return replace(made, made_for=signature(model, loss_fn, inputs, metrics), made_on=where)


def _tiles_or_whole(job: Job, request: Request, whole_too: bool) -> Plan:
    """The plan of tiles, or one on whole maps if that may be and is predicted to be faster."""
    made = make_plan(job.graph, request)
    check_elements(made)
    return (fastest_whole(job, request, made.seconds) if whole_too else None) or made


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
        lambda: signature(model, loss_fn, inputs, metrics),
        lambda graph: another_buffer(graph, tensors) is None,
        make,
    )


@overload
def backward(
    model: nn.Module, loss_fn: LossFn, image: Any, target: Any = ..., *, plan: Plan | None = ...,
    budget: str | int | None = ..., metrics: None = ..., progress: ProgressFn | None = ...,
    seed: int | None = ..., strategy: str = ..., device: DeviceLike = ..., host_budget: str | int | None = ...,
    group: RanksLike = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def backward(
    model: nn.Module, loss_fn: LossFn, image: Any, target: Any = ..., *, plan: Plan | None = ...,
    budget: str | int | None = ..., metrics: Mapping[str, Callable[..., torch.Tensor]],
    progress: ProgressFn | None = ..., seed: int | None = ..., strategy: str = ..., device: DeviceLike = ...,
    host_budget: str | int | None = ..., group: RanksLike = ...,
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
    strategy: str = "auto",
    device: DeviceLike = None,
    host_budget: str | int | None = None,
    group: RanksLike = None,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Add to every ``param.grad`` what ``loss_fn(model(image), target).backward()`` would add, and return the loss.

    Buffers that the model writes (running statistics) are updated as PyTorch would. Under ``torch.autocast("cpu")`` the
    model runs with its casts.

    Args:
        image, target: as for :func:`plan`.
        plan: from :func:`plan` for the same model, loss, shapes and metrics; made here if missing.
        progress: called after each tile.
        seed: of random ops (dropout); without one, drawn from PyTorch's generator.
        strategy: of the plan that is made here, and ``host_budget``; see :func:`plan`.
        device: where tiles run, as for :func:`plan`; default the plan's, if one is given.
        group: processes that take the step together, each with this call: a ``ProcessGroup`` whose ranks share this
            image, a ``DeviceMesh`` with dimensions ``"tiles"`` (these) and ``"slides"`` (ranks with an image each, over
            which loss and gradients are averaged), or :func:`wholegrad.open_ranks` with options.

    Returns:
        The loss, 0-dimensional in float64; with ``metrics`` also their values by name.

    Raises:
        NumericsError: loss or a gradient is not finite, or a boundary too large for the plan's ``boundary_dtype``; no
            ``param.grad`` was touched.
        PlanError: the plan belongs to other shapes or metrics.
        SlideError: pixels cannot be read.
        RankError: ranks do not mean the same step, or one does not answer in time.
    """
    inputs = given(image, target, model_dtype(model))
    if plan is None:
        options: dict[str, Any] = {"strategy": strategy, "device": device, "host_budget": host_budget, "ranks": group}
        plan = _plan(model, loss_fn, image, target, budget=budget, metrics=metrics, **options)
    made, where = plan, _device_of_plan(plan, model, device)
    tensors = joint_tensors(model, loss_fn, metrics)
    with clock.span("preparing", "checks of the plan"):
        check_plan(made, signature(model, loss_fn, inputs, metrics), tensors)
    with (together := Together.of(group, made)).step():
        norms = together.norms(model, made)
        seed = together.checked(made, tensors, inputs, seed, lambda: _seed(made, seed), norms)
        shared = BatchNorms(together.slides, made, norms) if norms and together.slides is not None else None
        if isinstance(made, WholePlan):
            job = Job(Parts(model, loss_fn, metrics or {}), inputs, made.graph, tensors)
            with torch.inference_mode(False):
                outcome = run_whole(made, job, seed, progress, where)
        else:
            outcome = _in_tiles(
                made, tensors, inputs, where, progress=progress, seed=seed, wire=together.tiles, norms=shared
            )
            updates = outcome.updates if shared is None else shared.corrected(model, outcome.updates, tensors)
            outcome = replace(outcome, updates=updates)
        outcome = together.combined(outcome, made.graph, tensors)
        loss = outcome.loss.to("cpu", torch.float64).reshape(())
        if not torch.isfinite(loss):
            raise NumericsError("loss", f"is {loss.item()}", "lower the learning rate, or check weights and pixels")
    _leave_gradients(outcome.grads, tensors)
    _leave_buffers(outcome.updates, tensors)
    if metrics is None:
        return loss
    return loss, {name: _wide(value) for name, value in outcome.metrics.items()}


_plan = plan


def _device_of_plan(made: Plan, model: nn.Module, device: DeviceLike) -> Device:
    """Where a plan runs: where it was made for, unless the caller names a device."""
    where = made.made_on if device is None and isinstance(made.made_on, Device) else device_of(model, device)
    check_device(made, where)
    return where


def _in_tiles(
    made: Plan, tensors: Mapping[str, torch.Tensor], inputs: Given, device: Device, **options: Any
) -> Outcome:
    """One step tile by tile."""
    executor = _executor(made, tensors, inputs, device=device, **options)
    try:
        with _as_captured(device, made), torch.enable_grad():
            executor.forward()
            executor.backward()
    finally:
        executor.close()
    graph, small = made.graph, executor.small
    assert graph.loss is not None
    trained = [
        (node.name, small.grads.get(Ref(node.index))) for node in graph.of_kind(Kind.PARAMETER) if node.needs_grad
    ]
    return Outcome(
        small.values[graph.loss].detach(),
        {name: grad for name, grad in trained if grad is not None},
        executor.updates(),
        {name: small.values[ref] for name, ref in graph.metrics.items()},
    )


def _wide(value: torch.Tensor) -> torch.Tensor:
    """A metric as small values are held: in float64, in the host's memory."""
    value = value.to("cpu")
    small = value.is_floating_point() and value.numel() <= WIDE_ELEMENTS
    return value.detach().to(torch.float64) if small else value.detach()


def _seed(made: Plan, seed: int | None) -> int:
    """The caller's, or a new one if the graph draws random numbers."""
    if seed is None:
        return int(torch.randint(2**63 - 1, ()).item()) if made.graph.random else 0
    return seed


def _executor(
    made: Plan,
    tensors: Mapping[str, torch.Tensor],
    inputs: Given,
    *,
    seed: int | None = None,
    wire: Wire | None = None,
    **options: Any,
) -> Executor:
    """An executor with a seed of its own if the graph draws random numbers and the caller names none."""
    check_limit(made.host_peak)
    kind = Executor if wire is None else partial(RankExecutor, wire=wire)
    return kind(made, {**tensors, **inputs.values}, inputs.sources, seed=_seed(made, seed), **options)


@contextmanager
def _as_captured(device: Device, made: Plan) -> Iterator[None]:
    """Run the graph as it stands: autocast's casts are nodes of it, and memory is kept between tiles."""
    kind = device.torch.type
    if kind in ("cuda", "mps") and torch.is_autocast_enabled(kind):
        raise PlanError(f"torch.autocast({kind!r})", "is not seen by the trace", "use torch.autocast('cpu', dtype)")
    reused = process.reuse_memory(made.keeps_heap)
    with reused, torch.inference_mode(False), torch.autocast("cpu", enabled=False), device.running(made.apart):
        yield


def _leave_buffers(updates: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in updates.items():
            tensors[name].copy_(value)


def _leave_gradients(grads: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, grad in grads.items():
        if not torch.isfinite(grad).all():
            raise NumericsError(name, "has a gradient that is not finite", "lower the learning rate")
    for name, grad in grads.items():
        wanted = tensors[name]
        _accumulate(wanted, grad.to(wanted.device, wanted.dtype).reshape(wanted.shape))


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
    device: DeviceLike = None,
    host_budget: str | int | None = None,
    group: RanksLike = None,
) -> dict[str, torch.Tensor]:
    """Metrics of one image, forward only.

    Args:
        metrics: functions ``fn(output, target)`` to a small tensor.
        budget, rates, device, host_budget: as for :func:`plan`.
        group: processes that share the image, each with this call, as for :func:`backward`; all get the same values.

    Returns:
        Their values by name, floating-point ones in float64.
    """
    inputs, where = given(image, target, model_dtype(model)), device_of(model, device)
    graph, tensors = _capture(model, _no_loss, inputs, metrics), joint_tensors(model, None, metrics)
    request = request_of(graph, inputs, tensors, budget, False, rates=rates, device=where, host_budget=host_budget)
    ranks = of_one_image(group)
    made = make_plan(graph, request if ranks is None else shared_request(ranks, graph, request))
    executor = _run_forward(made, tensors, inputs, where, ranks, progress=progress)
    return {name: executor.small.values[ref].to("cpu") for name, ref in graph.metrics.items()}


def _run_forward(
    made: Plan,
    tensors: Mapping[str, torch.Tensor],
    inputs: Given,
    device: Device,
    ranks: Ranks | None,
    seed: int | None = None,
    then: Callable[[], None] = lambda: None,
    **options: Any,
) -> Executor:
    """Run a plan without a backward sweep, and ``then`` something; returns what ran it, closed."""
    check_elements(made)
    with (together := Together.of(ranks, made)).step():
        seed = together.checked(made, tensors, inputs, seed, lambda: _seed(made, seed))
        executor = _executor(made, tensors, inputs, device=device, seed=seed, wire=together.tiles, **options)
        try:
            with _as_captured(device, made), torch.no_grad():
                executor.forward()
        finally:
            executor.close()
        then()
        together.meet()
    _leave_buffers(executor.updates(), tensors)
    return executor


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
    device: DeviceLike = None,
    host_budget: str | int | None = None,
    ranks: Ranks | None = None,
    then: Callable[[], None] = lambda: None,
) -> dict[Ref, torch.Tensor]:
    """Run the model forward and hand each box of its output maps to a sink; outputs that are small are returned.

    Args:
        ranks: that share the image; rank 0's sinks get all boxes, a row of tiles after the other.
        then: what follows when all is done, and must not fail on a rank without the others' knowing.
        sink_bytes: of sinks, once made: bytes held for each pixel of one row of tiles, and whatever the tiles.
    """
    inputs, where = given(image, None, model_dtype(model)), device_of(model, device)
    graph, tensors = _capture(model, None, inputs, None), joint_tensors(model, None, None)
    taken = dict(sinks(graph))
    asked: dict[str, Any] = {"sinks": tuple(taken), "device": where, "host_budget": host_budget}
    request, held = request_of(graph, inputs, tensors, budget, False, **asked), sink_bytes()
    masks = frozenset(ref for ref, sink in taken.items() if sink.masks)
    request = replace(request, tile=tile, sink_bytes=held[0], sink_held=held[1], as_bytes=masks)
    made = make_plan(graph, request if ranks is None else shared_request(ranks, graph, request, columns=True))
    executor = _run_forward(made, tensors, inputs, where, ranks, seed, then, sinks=taken, progress=progress)
    return {ref: executor.small.leaf(ref).to("cpu") for ref in graph.outputs if not graph.spec(ref).is_map}

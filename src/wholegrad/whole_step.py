"""Plan and run one step on whole maps: strategies ``in-core``, ``recompute``, ``offload`` and ``managed``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from wholegrad import clock
from wholegrad.errors import BudgetError, PlanError
from wholegrad.given import Given
from wholegrad.graph.graph import READERS, Graph
from wholegrad.plan import devices, memory, strategies
from wholegrad.plan.devices import Host
from wholegrad.plan.planner import Request
from wholegrad.plan.strategies import (
    WHOLE,
    Footprint,
    Strategy,
    WholePlan,
    check_whole,
    choices_of_chunks,
    recomputed,
    whole_seconds,
)
from wholegrad.run import process
from wholegrad.run.blocks import drop_all
from wholegrad.run.device import Device
from wholegrad.run.executor import Progress, ProgressFn
from wholegrad.run.offload import Spill
from wholegrad.run.recompute import Recompute
from wholegrad.run.rehearse import rehearse_chunks, rehearse_whole
from wholegrad.run.spill_file import check_space, spill_folder
from wholegrad.run.whole_image import Outcome, Parts, StandIns, copied, whole_step

aten = torch.ops.aten
FASTER = 0.8  # of the tiles' predicted time that a step on whole maps must take for "auto" to choose it
SHORT = 1.0  # predicted seconds of a step in tiles below which "auto" looks at nothing else
SCRATCH = 1.1  # of the bytes that a rehearsal counts: what kernels take for themselves
UNFOLDED = 1.4  # the same in float64, where convolutions unfold their input
HEAP = 320 << 20  # bytes that the heap may hold in pieces: blocks of up to 32 MiB come from it, larger ones do not
_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Job:
    """What a step is asked for: the user's parts, its inputs, its graph, and all parameters and buffers."""

    parts: Parts
    inputs: Given
    graph: Graph
    tensors: Mapping[str, torch.Tensor]


def fastest_whole(job: Job, request: Request, than: float) -> WholePlan | None:
    """The plan on whole maps that is predicted to take at most ``FASTER`` of ``than`` seconds, if one fits."""
    ahead, back = whole_seconds(job.graph, request.workers, request.rates, request.apart)
    if than < SHORT or ahead + back > FASTER * than:
        return None
    for strategy in (Strategy.IN_CORE, Strategy.RECOMPUTE):
        try:
            made = plan_whole(job, strategy, request)
        except (BudgetError, PlanError):
            continue
        if made.seconds <= FASTER * than:
            return made
    return None


def plan_whole(job: Job, strategy: Strategy, request: Request) -> WholePlan:
    """The plan of this strategy; of chunks, those that need the least memory.

    Raises:
        BudgetError: it does not fit; carries the smallest budget that would do.
        PlanError: it cannot run, whatever the budget.
    """
    made = planned(job, strategy, request)
    check_whole(made)
    return made


def planned(job: Job, strategy: Strategy, request: Request) -> WholePlan:
    """The same plan whether or not it fits or can run."""
    assert strategy in WHOLE
    graph, threads, apart = job.graph, request.workers, request.apart
    if apart is not None and strategy is Strategy.OFFLOAD and apart.name.startswith("mps"):
        raise PlanError(f"strategy {strategy}", "has nowhere to go: the device's memory is the host's", "use in-core")
    interleaved = _may_interleave(graph)
    ahead, back = whole_seconds(graph, threads, request.rates, apart)

    def made(foot: Footprint, seconds: float, work: float, chunks: tuple[tuple[int, int], ...] = ()) -> WholePlan:
        scratch = UNFOLDED if _double(graph) else SCRATCH
        own, host, beyond = 2 * sum(tensor.nbytes for tensor in job.tensors.values()), None, 0
        if apart is None:
            needed = int(foot.peak * scratch) + min(foot.peak, HEAP) + own
            needed += memory.LIBRARIES - memory.libraries(graph) + memory.HEAP  # PyTorch runs all of it
        else:
            needed = int(foot.peak * devices.SLACK) + own
            away = sum(node.outputs[0].nbytes for node in graph.of_kind(*READERS)) + int(foot.moved * devices.PINNED)
            if strategy is Strategy.MANAGED:
                beyond = max(int(request.reserved + needed * devices.PIECES) - apart.safe, 0)
            host = Host(apart.host_budget, apart.host_reserved, apart.host_reserved + 2 * own + away + beyond)
        return WholePlan(
            graph=graph,
            segments=(),
            placements={},
            budget=request.budget,
            reserved=request.reserved,
            projected=request.reserved + needed,
            whole_image=memory.whole_image(graph),
            recompute=work,
            seconds=seconds + 2 * apart.across * beyond if apart else seconds,
            backward=True,
            workers=threads,
            apart=apart,
            host=host,
            beyond=beyond,
            spill_dir=request.spill_dir,
            strategy=strategy,
            footprint=foot,
            chunks=chunks,
            interleaved=interleaved,
        )

    if strategy is not Strategy.RECOMPUTE:
        away = strategy is Strategy.OFFLOAD
        rehearsal = partial(rehearse_whole, job.parts, job.tensors, job.inputs.inputs, away, interleaved)
        foot = _counted(graph, away, rehearsal)
        moving = foot.moved * (strategies.SECONDS_PER_MOVED_BYTE if apart is None else 2 * apart.across)
        return made(foot, ahead + back + moving, 1.0)
    found = []
    for chunks in choices_of_chunks(graph):
        work, twice = recomputed(graph, chunks)
        foot = _counted(
            graph, False, partial(rehearse_chunks, graph, chunks, job.tensors, job.inputs.inputs, interleaved)
        )
        found.append(made(foot, ahead * (1 + twice) + back, work, chunks))
    return min(found, key=lambda plan: plan.projected)


def _counted(graph: Graph, away: bool, rehearsal: Callable[[], Footprint]) -> Footprint:
    """What a rehearsal counts; where code cannot run without memory, what the graph's maps take."""
    try:
        return rehearsal()
    except Exception:  # whatever the user's code, or an op of it, raises on tensors without values
        whole = memory.whole_image(graph)
        largest = max(graph.nodes, key=lambda node: max(spec.numel for spec in node.outputs))
        elements = max(spec.numel for spec in largest.outputs)
        return Footprint(whole, whole, whole if away else 0, elements, largest.place)


def _double(graph: Graph) -> bool:
    return any(node.needs_grad and node.outputs[0].dtype == torch.float64 for node in graph.nodes)


def _may_interleave(graph: Graph) -> bool:
    """Whether images may have their channels last, which is faster: not where code views maps as rows of numbers."""
    return not any(node.op in _VIEWS and graph.spec(node.operands[0]).is_map for node in graph.nodes)


def run_whole(made: WholePlan, job: Job, seed: int, progress: ProgressFn | None, device: Device) -> Outcome:
    """One step of the plan, on the device that it was made for."""
    drop_all()  # what tiles of another plan left
    total = max(2 * len(made.chunks) - 1, 1)
    done = [0]

    def tick(sweep: str) -> None:
        done[0] += 1
        if progress is not None:
            progress(Progress(sweep, done[0], total))

    with clock.span("between ops", "whole maps"), device.running(made.apart):
        if made.strategy == Strategy.RECOMPUTE:
            with torch.autocast("cpu", enabled=False):
                outcome = _in_chunks(made, job, seed, tick, device)
        elif made.strategy == Strategy.MANAGED:
            with torch.autograd.set_multithreading_enabled(False):  # of this thread's tensors alone it is known
                outcome = device.managed(partial(_in_one, made, job, seed, device), Outcome.copied)
            tick("backward")
        else:
            outcome = _in_one(made, job, seed, device)
            tick("backward")
        device.finish()
    process.mark_run()
    return outcome


def _images(made: WholePlan, job: Job, device: Device) -> list[torch.Tensor]:
    """Images and targets whole, in the order of the inputs, where the step runs."""
    found = []
    for each in job.inputs.inputs.tensors:
        if each.name not in job.inputs.sources:
            found.append(job.inputs.values[each.name].to(device.torch))
            continue
        whole = job.inputs.sources[each.name].whole()
        interleave = made.interleaved and each.name.startswith("image")
        found.append((whole if interleave else whole.contiguous()).to(device.torch))
    return found


def _in_chunks(made: WholePlan, job: Job, seed: int, tick: Callable[[str], None], device: Device) -> Outcome:
    names = [each.name for each in job.inputs.inputs.tensors]
    values = dict(zip(names, _images(made, job, device), strict=True))
    values |= {name: tensor.detach().to(device.torch) for name, tensor in job.tensors.items()}
    return Recompute(job.graph, made.chunks, values, seed, tick, device=device.torch).step()


def _in_one(made: WholePlan, job: Job, seed: int, device: Device) -> Outcome:
    def moved(tensor: torch.Tensor, buffer: bool) -> torch.Tensor:
        return copied(tensor, buffer and tensor.device == device.torch).to(device.torch)

    leaves = StandIns(job.parts, job.tensors, moved)
    given = job.inputs.inputs.nested(_images(made, job, device))
    numbers = seed if job.graph.random else None
    if made.strategy != Strategy.OFFLOAD:
        return whole_step(job.parts, leaves, given, numbers)
    if made.footprint.moved and not device.apart:
        check_space(made.footprint.moved, spill_folder(made.spill_dir))
    spill = Spill(made.spill_dir, tuple(leaves.named.values()))
    try:
        return whole_step(job.parts, leaves, given, numbers, spill.saving())
    finally:
        spill.close()

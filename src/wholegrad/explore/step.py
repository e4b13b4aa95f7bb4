"""One cell, in a process of its own: plan, warm up on a small image, measure steps, and say so line by line.

Started by :mod:`wholegrad.explore.run` with a cell and settings as JSON; each line of output is one JSON object: what
is known so far, so that a process that is killed has said what it planned.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import wholegrad as wg
from wholegrad.errors import BudgetError, PlanError, TooLargeError, WholegradError
from wholegrad.explore.cells import DONE, IMPOSSIBLE, KILLED, REFUSED, SLOW, Cell, Settings
from wholegrad.explore.pixels import EDGE, Repeated, stained
from wholegrad.plan.strategies import WHOLE, WholePlan
from wholegrad.run.device import Device, open_device
from wholegrad.run.process import peak_resident
from wholegrad.train.made_up import blobs, model_and_loss, target_of

TRIED = 1.5  # times the limit: plans on whole maps of up to this are run all the same, and seen to fail
SHORT = 5.0  # seconds of a step, up to which more are measured
STEPS = 3
WARM = (256, 1024)  # pixels of the image to warm up on
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")


def main() -> None:
    """Measure the cell that the first argument describes."""
    asked = json.loads(sys.argv[1])
    cell, settings = Cell(**asked["cell"]), Settings(**asked["settings"])
    _die_first()
    try:
        _measure(cell, settings)
    except MemoryError:
        _say(outcome=KILLED, said="Python had no memory left")
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_MEMORY):
            raise
        _say(outcome=KILLED, said=" ".join(str(error).split())[:200])


def _say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def _die_first() -> None:
    """Where the system runs out of memory in spite of the limit, this process is the one to go."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):
        if score.exists():
            score.write_text("1000")


def _measure(cell: Cell, settings: Settings) -> None:
    model, loss_fn = model_and_loss(settings.network, settings.loss)
    labels = blobs(EDGE, EDGE)
    image = Repeated(stained(labels), cell.height, cell.width)
    target: Any = Repeated(labels, cell.height, cell.width)
    if settings.target != "labels":
        target = target_of(settings.target, (cell.height, cell.width))
    device = open_device(cell.device)
    options: dict[str, Any] = {"strategy": cell.strategy, "device": device}
    options |= {"host_budget": settings.limit} if device.apart else {"budget": settings.limit}
    try:
        plan = wg.plan(model, loss_fn, image, target, **options)
    except BudgetError as error:
        whole = cell.strategy in WHOLE and error.smallest is not None and error.smallest <= TRIED * settings.limit
        if not whole or device.apart:
            _say(outcome=REFUSED, said=str(error), projected=error.smallest)
            return
        plan = wg.plan(model, loss_fn, image, target, **{**options, "budget": error.smallest})
    except TooLargeError as error:
        _say(outcome=IMPOSSIBLE, said=str(error), projected=error.needed)
        return
    except PlanError as error:
        _say(outcome=IMPOSSIBLE, said=str(error))
        return
    saved = plan.footprint.saved if isinstance(plan, WholePlan) else None
    pieces = max(len(plan.chunks), 1) if isinstance(plan, WholePlan) else plan.tiles
    known = {"projected": plan.projected, "predicted": plan.seconds, "saved": saved, "recompute": plan.recompute}
    _say(**known, pieces=pieces)
    if plan.seconds > settings.seconds:
        _say(outcome=SLOW, said=f"predicted to take {plan.seconds:.0f} s a step")
        return
    height, width = min(cell.height, WARM[0]), min(cell.width, WARM[1])
    if settings.target == "labels":  # libraries load, kernels are made
        warm = np.ascontiguousarray(image.pattern[:, :height, :width])
        small = np.ascontiguousarray(labels[:, :height, :width])
        wg.backward(model, loss_fn, warm, small, strategy=cell.strategy, device=device)
        model.zero_grad()
    _measured(device, model, lambda: wg.backward(model, loss_fn, image, target, plan=plan))


def _measured(device: Device, model: nn.Module, step: Any) -> None:
    """Steps, each with the optimiser's; one where it is long. A device's peak is that of its own memory."""
    device.forget_peak()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    seconds: list[float] = []
    used: list[float] = []
    while not seconds or (len(seconds) < STEPS and seconds[-1] < SHORT):
        optimizer.zero_grad()
        started, computed = time.perf_counter(), time.process_time()
        loss = step()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        used.append(time.process_time() - computed)
        if not np.isfinite(float(loss)):
            raise WholegradError("loss", f"is {float(loss)}", "check the network")
    counted = seconds[1:] or seconds
    shared = device.torch.type in ("cpu", "mps")  # with the host: the process has it all
    peak = peak_resident() if shared else device.peak()
    middle = sorted(counted)[(len(counted) - 1) // 2]
    _say(outcome=DONE, seconds=middle, steps=seconds, cpu_seconds=used[seconds.index(middle)], peak=peak)


if __name__ == "__main__":
    main()

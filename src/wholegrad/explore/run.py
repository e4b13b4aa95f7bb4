"""Measure every cell that has no result yet, each in a process of its own, and keep what came of it."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from wholegrad.explore.cells import DONE, FAILED, KILLED, SLOW, UNTIMELY, Cell, Result, Settings, Store, stamped
from wholegrad.explore.watch import Ended, python, run_limited
from wholegrad.plan.plan import show_bytes
from wholegrad.plan.strategies import Strategy

STEP = "wholegrad.explore.step"
PATIENCE = 3.0  # times the seconds of a step that a whole process may take, beside
STARTING = 90.0  # seconds for imports, capture, planning and warming up
SIGKILL = -9
LEAST = 8.0  # seconds that the smallest cell takes on a machine that does little else

Told = Callable[[Cell, Result | None], None]


def devices() -> list[str]:
    """The CPU, and what accelerators PyTorch finds."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        found.append("mps")
    return found


def kinds(strategies: Sequence[str], on: Sequence[str]) -> list[tuple[str, str]]:
    """Strategies with the devices that they run on: all, but no ``offload`` where a device's memory is the host's.

    ``managed`` is CUDA's alone.
    """
    unknown = {("mps", Strategy.OFFLOAD), ("mps", Strategy.MANAGED), ("cpu", Strategy.MANAGED)}
    return [(name, device) for device in on for name in strategies if (device, name) not in unknown]


def explore(
    cells: Sequence[Cell],
    settings: Settings,
    store: Store,
    told: Told = lambda cell, result: None,
    seconds: float = float("inf"),
) -> list[Result]:
    """The result of every cell, those that are there already and those measured now.

    Args:
        told: called before a cell is measured, without result, and with its result once there is one.
        seconds: after which nothing is measured any more; such cells have no result that is kept, so that another run
            goes on with them.
    """
    found, until = [], time.monotonic() + seconds
    for cell in cells:
        result = store.find(cell)
        if result is None:
            told(cell, None)
            left = until - time.monotonic()
            result = measured(cell, settings, left) if left >= LEAST else Result(cell, SLOW, UNTIMELY)
            if result.said != UNTIMELY:
                store.keep(result)
        told(cell, result)
        found.append(result)
    return found


def measured(cell: Cell, settings: Settings, seconds: float = float("inf")) -> Result:
    """Run one cell, for at most so many seconds."""
    asked = json.dumps({"cell": asdict(cell), "settings": asdict(settings)})
    patience = STARTING + PATIENCE * settings.seconds
    ended = run_limited(python(STEP, asked), settings.limit, min(patience, seconds))
    date = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    result = _result(cell, settings, ended)
    if ended.over == "time" and seconds < patience:
        result = replace(result, said=UNTIMELY)
    return stamped(result, date, ended.others)


def _result(cell: Cell, settings: Settings, ended: Ended) -> Result:
    known: dict[str, Any] = {}
    for line in ended.lines:
        try:
            known.update(json.loads(line))
        except ValueError:  # the user's code prints too
            continue
    known["steps"] = tuple(known.get("steps", ()))
    if ended.over == "memory":
        said = f"held {show_bytes(ended.highest)} when it passed the limit of {show_bytes(settings.limit)}"
        return Result(cell, **{**known, "outcome": KILLED, "said": said, "peak": ended.highest})
    if ended.over == "time":
        said = f"was not done after {STARTING + PATIENCE * settings.seconds:.0f} s"
        return Result(cell, **{**known, "outcome": SLOW, "said": said})
    if "outcome" in known and (ended.code == 0 or known["outcome"] == DONE):
        return Result(cell, **known)
    if ended.code == SIGKILL:
        said = f"ended by the system at {show_bytes(ended.highest)}"
        return Result(cell, **{**known, "outcome": KILLED, "said": said, "peak": ended.highest})
    last = next((line for line in reversed(ended.errors) if line.strip()), f"exit status {ended.code}")
    return Result(cell, **{**known, "outcome": FAILED, "said": last[:300]})

"""Measure every cell that has no result yet, each in a process of its own, and keep what came of it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from wholegrad.explore.cells import DONE, FAILED, KILLED, SLOW, Cell, Result, Settings, Store, stamped
from wholegrad.explore.watch import Ended, python, run_limited
from wholegrad.plan.plan import show_bytes
from wholegrad.plan.strategies import Strategy

STEP = "wholegrad.explore.step"
PATIENCE = 3.0  # times the seconds of a step that a whole process may take, beside
STARTING = 90.0  # seconds for imports, capture, planning and warming up
SIGKILL = -9

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
    """Strategies with the devices that they run on: of accelerators whole maps only, ``offload`` on CUDA alone."""
    able = {"cpu": set(Strategy), "cuda": {Strategy.IN_CORE, Strategy.OFFLOAD}, "mps": {Strategy.IN_CORE}}
    return [(name, device) for device in on for name in strategies if Strategy(name) in able[device]]


def explore(
    cells: Sequence[Cell], settings: Settings, store: Store, told: Told = lambda cell, result: None
) -> list[Result]:
    """The result of every cell, those that are there already and those measured now.

    Args:
        told: called before a cell is measured, without result, and with its result once there is one.
    """
    found = []
    for cell in cells:
        result = store.find(cell)
        if result is None:
            told(cell, None)
            result = measured(cell, settings)
            store.keep(result)
        told(cell, result)
        found.append(result)
    return found


def measured(cell: Cell, settings: Settings) -> Result:
    """Run one cell."""
    asked = json.dumps({"cell": asdict(cell), "settings": asdict(settings)})
    ended = run_limited(python(STEP, asked), settings.limit, STARTING + PATIENCE * settings.seconds)
    date = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    return stamped(_result(cell, settings, ended), date, ended.others)


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

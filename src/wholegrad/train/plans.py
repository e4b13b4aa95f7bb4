"""The plans of a run, one for each size of image, and the same ones when the run is resumed.

A plan depends on the memory that is left, and with it the order in which sums are rounded. So that a resumed run ends
with the bits of an unbroken one, what is left is decided once, at the run's start: budget, threads and what the process
held then are saved in ``run.json``, and plans are made for the room that follows from them, in whole steps of ``STEP``.

Only where the budget is automatic and other processes take the memory that it counted on, plans are made anew, for
less; and for more again once memory is back. The run says so: its sums are rounded in another order from there on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import wholegrad as wg
from wholegrad.asked import room_there
from wholegrad.errors import BudgetError, ConfigError
from wholegrad.losses import Loss
from wholegrad.plan.devices import DeviceRates
from wholegrad.plan.memory import LIBRARIES, of_readers
from wholegrad.plan.plan import Room
from wholegrad.plan.rates import BUILT_IN, Rates
from wholegrad.plan.storage import NARROW
from wholegrad.run import calibrate, calibrate_device
from wholegrad.run.budget import budget_bytes, is_automatic
from wholegrad.run.device import Device, open_device
from wholegrad.run.limits import available
from wholegrad.run.pressure import SHARE, Governor, Look
from wholegrad.run.process import has_run, resident
from wholegrad.train.cases import Readers
from wholegrad.train.events import Replan
from wholegrad.train.exchange import held_bytes
from wholegrad.train.metrics import METRICS
from wholegrad.train.tables import TrainConfig
from wholegrad.train.team import Place, Team

STEP = 64 << 20  # bytes in which room is counted
GROWTH = 64 << 20  # bytes by which a process may come to hold more than at the start of its run
LOOK_EVERY = 1.0  # seconds between looks at the memory that is free within a step


class SqueezedError(Exception):
    """A step was given up, since its plan counts on memory that others have taken."""


@dataclass(frozen=True)
class Conditions:
    """What a run decided at its start.

    Attributes:
        budget: bytes of the process's peak; of a device with memory of its own, those beyond what is held there.
        held: bytes that the process held, and libraries will.
        threads: of PyTorch.
        rates: of the machine or of the device, for predicted times, on which plans depend.
        ranks: that share a machine.
    """

    budget: int
    held: int
    threads: int
    rates: Rates = BUILT_IN
    ranks: int = 1

    @staticmethod
    def now(train: TrainConfig, place: Place, before: Conditions | None = None) -> Conditions:
        """Of a run that starts, or goes on from those that it had ``before``.

        An automatic budget is shared between a machine's ranks, so it changes with their number.
        """
        if before is not None and before.ranks == place.local_size:
            return before
        held = resident() + LIBRARIES // (4 if has_run() else 1)
        device, ranks, threads = device_of_run(train, place), place.local_size, threads_of_rank(place)
        if device is not None and device.apart:
            of_device = calibrate_device.rates(device)
            return before or Conditions(room_there(device, train.budget), held, threads, of_device, ranks)
        budget = budget_bytes(train.budget) if before is None else before.budget
        if is_automatic(train.budget):
            mine, shared = (held, 1) if before is None else (before.held, before.ranks)
            budget = mine + max(budget - mine, 0) * shared // ranks
        if before is not None:
            return replace(before, budget=budget, threads=threads, ranks=ranks)
        return Conditions(budget, held, threads, calibrate.rates(), ranks)

    @staticmethod
    def agreed(ranks: Sequence[Conditions]) -> Conditions:
        """Those under which each rank can run, so that all plan alike."""
        least = min(each.budget for each in ranks), max(each.held for each in ranks)
        threads, most = min(each.threads for each in ranks), max(each.ranks for each in ranks)
        return replace(ranks[0], budget=least[0], held=least[1], threads=threads, ranks=most)

    def room(self, cache_bytes: int) -> int:
        """Bytes for a plan beside readers that keep so many, in whole steps; less than one step where it is tight."""
        left = self.budget - self.held - GROWTH - of_readers(cache_bytes)
        return left // STEP * STEP if left >= STEP else left

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def read(path: Path) -> Conditions:
        """Those that ``to_json`` wrote.

        Raises:
            ConfigError: something else is in the file.
        """
        try:
            values = json.loads(path.read_text())
            rates = values.pop("rates", None)
            kept = BUILT_IN if rates is None else (DeviceRates if "across" in rates else Rates).of(rates)
            return Conditions(**{k: int(v) for k, v in values.items()}, rates=kept)
        except (OSError, ValueError, TypeError, AttributeError):
            raise ConfigError(str(path), "is not what a run saved", "restore it, or start the run anew") from None


def threads_of_rank(place: Place) -> int:
    """PyTorch's threads: as it decides; where ranks share a machine, their share of its cores.

    torchrun sets ``OMP_NUM_THREADS`` to 1 where nobody did, whatever the machine has.
    """
    if place.local_size == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // place.local_size)


def device_of_run(train: TrainConfig, place: Place) -> Device | None:
    """Where tiles run; None for the CPU.

    Raises:
        PlanError: there is no such device, or it does not take an option.
    """
    how = {name: getattr(train, name) for name in ("tf32", "deterministic", "triton", "graphs")}
    name = device_name(train.device, place)
    found = open_device(name or "cpu", **how)
    return None if name is None else found


def device_name(name: str | None, place: Place) -> str | None:
    """A device by name; ``cuda`` of a rank that shares a machine is a GPU of its own."""
    if place.local_size > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        return f"cuda:{place.local_rank}"
    return name


def share_of_budget(budget: str | int | None, ranks: int) -> str | int | None:
    """A budget for each of so many processes on this machine: as asked for, or an equal share of what is safe."""
    return int(SHARE * available() / ranks) if ranks > 1 and is_automatic(budget) else budget


class Plans:
    """Plans by size of image and readers' memory; each is made once, since capture and planning take seconds."""

    def __init__(self, train: TrainConfig, conditions: Conditions, team: Team) -> None:
        self.train, self.conditions, self.team = train, conditions, team
        self.group = None if team.shared is None else cast(Any, wg).open_ranks(team.shared, timeout=team.timeout)
        self.made: dict[tuple[tuple[int, ...], int], wg.Plan] = {}
        self.device = device_of_run(train, team.place)
        self.apart = self.device is not None and self.device.apart
        self.where: dict[str, Any] = {"device": self.device, "host_budget": train.host_budget}
        automatic = is_automatic(train.budget)
        self.of_process = not automatic and not self.apart  # whether the budget is the process's, by its name
        self.driven = automatic and train.strategy == "managed"  # whose driver takes what is free, budget or not
        adapts = automatic and not self.apart and self.group is None  # ranks that share a slide share its plan
        self.governor = Governor(conditions.budget) if adapts else None
        self._looked = 0.0

    def react(self, step: int) -> Replan | None:
        """Before a step: adapt an automatic budget to what is free; returns what changed, if anything."""
        if self.governor is None:
            return None
        before = self.governor.budget
        found = self.governor.changed(max((plan.projected for plan in self.made.values()), default=None))
        return None if found is None else self._replanned(step, before, found)

    def _replanned(self, step: int, before: int, found: Look) -> Replan:
        assert self.governor is not None
        self.made.clear()
        self.conditions = replace(self.conditions, budget=self.governor.budget)
        return Replan(step, before, self.governor.budget, found.held, found.free, found.stalled)

    def check(self, plan: wg.Plan) -> None:
        """Within a step, now and then: give it up where the system would soon kill it.

        Raises:
            SqueezedError: the memory that is free does not suffice for what the plan may still take.
        """
        now = time.monotonic()
        if self.governor is None or now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        if self.governor.squeezed(plan.projected):
            raise SqueezedError

    def budget(self, readers: Readers) -> int:
        """What to hand to ``plan`` or ``measure`` for these readers."""
        if self.apart:
            return Room(self.conditions.budget)
        held = resident() + LIBRARIES // (4 if has_run() else 1)
        caches = readers.slide.cache_bytes + readers.mask.cache_bytes
        room = self.conditions.room(caches)
        left = self.conditions.budget - held - of_readers(caches)
        return Room(room) if 0 < room <= left else self.conditions.budget  # grown beyond what was allowed for

    def of(self, model: nn.Module, loss_fn: Loss, readers: Readers) -> tuple[wg.Plan, bool]:
        """The plan for a step on these readers, and whether it is new.

        Raises:
            BudgetError: none fits.
        """
        key = (readers.slide.shape, readers.slide.cache_bytes + readers.mask.cache_bytes)
        if key in self.made:
            return self.made[key], False
        dtype = NARROW.get(self.train.boundary_dtype or "")
        slide, mask = readers
        options: dict[str, Any] = {"metrics": METRICS, "boundary_dtype": dtype, "strategy": self.train.strategy}
        options |= {"rates": self.conditions.rates, **self.where}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        beside = held_bytes(trained, self.team.alone, self.train.accumulate)
        options["ranks"] = replace(self.group or wg.Ranks(), held=beside)
        if self.apart:
            budget = None if self.driven else self.budget(readers)
            self.made[key] = wg.plan(model, loss_fn, slide, mask, budget=budget, **options)
            return self.made[key], True
        try:
            made = wg.plan(model, loss_fn, slide, mask, budget=self.budget(readers), **options)
        except BudgetError as error:  # tight: without the allowance for growth
            budget = self.conditions.budget
            if self.governor is not None and self.governor.budget < self.governor.most and error.smallest:
                budget = max(budget, error.smallest)  # as little as will do, under pressure
            made = wg.plan(model, loss_fn, slide, mask, budget=budget, **options)
        self.made[key] = made
        return made, True

"""One slide of a run: what is drawn for it, the plan it runs by, and the gradient that it leaves.

What a slide's step draws is a function of the seed and the step's number alone (``draws``): whoever takes it, on
whatever rank, leaves the same gradient.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

import wholegrad as wg
from wholegrad.errors import NumericsError, SlideError
from wholegrad.losses import LOSSES, Loss, dice_from_counts
from wholegrad.run.process import peak_resident, resident
from wholegrad.run.profile import Profile
from wholegrad.train.cases import Case, Readers
from wholegrad.train.draws import draw_change, draw_region, draw_seed, pick, seed_everything
from wholegrad.train.events import Skip, Step, Watch
from wholegrad.train.metrics import METRICS
from wholegrad.train.plans import Plans, SqueezedError
from wholegrad.train.tables import Config, TrainConfig

SQUEEZED_AT_MOST = 3  # times that one step is given up for want of memory

Progress = Callable[[wg.Progress], None]
Check = Callable[[], None]


def build_loss(train: TrainConfig) -> Loss:
    """The loss that the configuration names, with its class weights."""
    loss = LOSSES[train.loss]
    return loss if train.weights == (1.0, 1.0) else functools.partial(loss, weights=train.weights)


class SlideSteps:
    """What a step on one slide needs.

    Args:
        progress: makes a callback for tiles that also calls a check.
        react: adapts the budget, for a step that is given up for want of memory.
        checkpoint: its path, for errors.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        cases: list[Case],
        plans: Plans,
        watch: Watch,
        progress: Callable[[Check], Progress],
        react: Check,
        checkpoint: Path,
        profile: Profile | None = None,
    ) -> None:
        self.config, self.model, self.cases, self.plans, self.watch = config, model, cases, plans, watch
        self.progress, self.react, self.checkpoint, self.profile = progress, react, checkpoint, profile
        self.loss_fn = build_loss(config.train)

    def take(self, step: int, rate: float) -> Step | Skip:
        """Add the gradient of a step's slide to the parameters'; nothing if it cannot be read and may be skipped.

        Raises:
            SlideError: it cannot be read.
            NumericsError: its loss or gradients are not finite.
        """
        settings = self.config.train
        case = draw_region(self.cases[pick(settings.seed, step, len(self.cases))], self.config, step)
        seed_everything(settings.seed, step)
        start = time.perf_counter()
        try:
            with case.open() as readers:
                loss, dice, projected = self._gradient(step, case.name, readers)
        except SlideError as error:
            if settings.on_error == "stop":
                raise
            return Skip(step, case.name, str(error))
        seconds = round(time.perf_counter() - start, 3)
        return Step(step, case.name, loss, dice, seconds, resident(), peak_resident(), projected, rate)

    def _gradient(self, step: int, name: str, readers: Readers) -> tuple[float, float, int]:
        """Loss, Dice and projected bytes of a case; its gradients are added to the parameters'.

        A step that is given up for want of memory has changed nothing yet, and is taken again by a smaller plan.
        """
        for _ in range(SQUEEZED_AT_MOST):
            try:
                return self._planned(step, name, readers, self.plans.check)
            except SqueezedError:
                self.react()
        return self._planned(step, name, readers, lambda plan: None)

    def _planned(
        self, step: int, name: str, readers: Readers, check: Callable[[wg.Plan], None]
    ) -> tuple[float, float, int]:
        seed, augment = self.config.train.seed, self.config.augment
        change = draw_change(augment, seed, step)
        fullest = change.fullest(augment).apply(readers)
        plan, new = self.plans.of(self.model, self.loss_fn, fullest)
        if new:
            self.watch.on_plan(name, plan)
        changed = change.apply(readers)
        shared: dict[str, Any] = {} if self.plans.group is None else {"group": self.plans.group}
        try:
            with nullcontext() if self.profile is None else self.profile.step():
                loss, values = wg.backward(
                    self.model,
                    self.loss_fn,
                    changed.slide,
                    changed.mask,
                    plan=plan,
                    metrics=METRICS,
                    progress=self.progress(functools.partial(check, plan)),
                    seed=draw_seed(seed, step),
                    **shared,
                )
        except NumericsError as error:
            raise self.ruined(step, name, f"{error.where} {error.cause}") from error
        return float(loss), dice_from_counts(values["counts"]), plan.host_peak

    def ruined(self, step: int, slide: str, cause: str) -> NumericsError:
        """The refusal of an update that would ruin the weights."""
        remedy = f"lower train.lr or look at that slide; the weights before are in {self.checkpoint}"
        return NumericsError(slide, f"{cause} at step {step}", remedy)

"""The training loop: whole slides one at a time, exact gradients, and a run that can be killed at any moment.

What a step sees and draws is a function of the seed and the step's number alone (``draws``), and the plans it runs by
are fixed at the run's start (``plans``). A checkpoint holds the rest in one file that appears whole or not at all. So a
run that is killed and resumed ends with the bits of an unbroken one (rule 11).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import nn

import wholegrad as wg
from wholegrad.errors import NumericsError, SlideError, WholegradError
from wholegrad.losses import LOSSES, Loss, dice_from_counts
from wholegrad.run.budget import limit_note
from wholegrad.run.process import peak_resident, resident
from wholegrad.run.profile import Profile
from wholegrad.train.cases import Case, Readers, open_cases
from wholegrad.train.draws import draw_change, draw_region, draw_seed, pick, seed_everything
from wholegrad.train.events import Event, Judged, Outcome, Skip, Step, Validation, Watch, as_line
from wholegrad.train.folder import Folder
from wholegrad.train.interrupt import Interrupt
from wholegrad.train.metrics import METRICS, Score, evaluate, mean_dice
from wholegrad.train.networks import Normalized, build_network, normalized, without_normalization
from wholegrad.train.optim import Mover
from wholegrad.train.page import write_report
from wholegrad.train.plans import Conditions, Plans, SqueezedError
from wholegrad.train.report import caption, report_case
from wholegrad.train.split import of_part
from wholegrad.train.state import (
    Card,
    count_parameters,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_weights,
    versions,
    write_whole,
)
from wholegrad.train.tables import Config, TrainConfig
from wholegrad.train.track import Tracking

SQUEEZED_AT_MOST = 3  # times that one step is given up for want of memory

__all__ = ["Outcome", "Step", "Watch", "train"]


def train(
    config: Config,
    watch: Watch | None = None,
    resume: bool = False,
    enough: Callable[[Step], bool] = lambda step: False,
    profile: Profile | None = None,
) -> Outcome:
    """Train as ``config`` says, then score the test slides; everything goes into ``config.out``.

    ``enough`` is asked after each step and may end the training early; ``profile`` records where steps' time goes.

    Writes ``split.json`` (which slides are for what), ``log.jsonl`` (a line a step), ``checkpoint.safetensors`` (now
    and then, at the end, on Ctrl-C and before an error), ``best.safetensors`` (best on validation slides, if there are
    any), ``weights.safetensors`` with ``weights.json`` (the best, else the last), ``test.json``, ``report.html``, and
    ``profile.json`` if there is a profile.

    Raises:
        ConfigError: the configuration does not fit its files, or ``config.out`` holds another run.
        SlideError: a slide cannot be read; every file is tried before the first step.
        BudgetError: a slide does not fit the budget.
        NumericsError: loss or gradients are not finite; the checkpoint before is kept.
        WholegradError: a file cannot be written; the one before it is kept.
    """
    run = Run(config, watch or Watch(), profile)
    try:
        run.open(resume)
        with Interrupt() as interrupt:
            try:
                try:
                    run.learn(interrupt, enough)
                finally:
                    run.write_profile()
                scores = run.test(interrupt)
                pictures = run.draw(scores, interrupt)
            except KeyboardInterrupt:
                return Outcome(run.step, run.checkpoint(), (), (), interrupted=True)
            except WholegradError:
                if run.step:  # what was learned until here is worth keeping
                    with suppress(WholegradError):
                        run.checkpoint()
                raise
        return run.finish(scores, pictures)
    finally:
        run.close()


def build_loss(train: TrainConfig) -> Loss:
    """The loss that the configuration names, with its class weights."""
    loss = LOSSES[train.loss]
    return loss if train.weights == (1.0, 1.0) else functools.partial(loss, weights=train.weights)


class Run:
    """A run's moving parts; ``train`` is its only caller."""

    def __init__(self, config: Config, watch: Watch, profile: Profile | None = None) -> None:
        self.config, self.watch, self.profile = config, watch, profile
        self.folder = Folder(config)
        self.step, self.total = 0, 0
        self.best: float | None = None
        self.best_step = self.stale = 0
        self.validated = -1  # the step after which the last validation was
        self.stopped = False  # by lack of progress
        self.sound = True  # whether weights, step and log belong together, so that a checkpoint may be written
        self.chosen = False  # whether the model holds the weights to use, and no longer the last ones
        self.saved = time.monotonic()
        self.tracking = Tracking(config, self.watch.on_note)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.model = self._network()
        self.loss_fn = build_loss(config.train)

    # Before and after.

    def open(self, resume: bool) -> None:
        """Open every slide, then the run's folder: nothing is written if a slide is bad."""
        config, folder = self.config, self.folder
        folder.check(resume)
        entries = folder.entries(resume)
        self.watch.on_split(entries)
        skip = config.train.on_error == "skip"
        self.cases = open_cases(of_part(entries, "train"), config.data, skip)
        self.val_cases = open_cases(of_part(entries, "val"), config.data, skip)
        self.test_cases = open_cases(of_part(entries, "test"), config.data, skip)
        broken = [case for case in (*self.cases, *self.val_cases, *self.test_cases) if case.broken]
        for case in broken:
            self.watch.on_note(f"{case.name} is skipped: {case.broken}")
        if broken and all(case.broken for case in self.cases):
            assert broken[0].broken is not None
            raise broken[0].broken
        folder.check_validation(len(self.val_cases))
        self.total = config.steps_of(len(self.cases))
        self.mover = Mover(self.model, config.train, math.ceil(self.total / config.train.accumulate))
        conditions = folder.conditions(resume) or Conditions.now(config.train)
        if not config.train.threads:
            torch.set_num_threads(conditions.threads)
        self.plans = Plans(config.train, conditions)
        if self.plans.of_process and (said := limit_note(conditions.budget)):
            self.watch.on_note(said)
        kept = self._load() if resume and folder.checkpoint.exists() else 0
        if self.total <= self.step:
            asked = f"{self.step} steps are done and {self.total} are asked for"
            self.watch.on_note(f"nothing is left to train: {asked}; ask for more with --steps or --epochs")
        folder.write(entries, conditions)
        self.log = folder.open_log(kept)
        self.tracking.start(config, self.step)
        if not folder.checkpoint.exists():
            self.checkpoint()

    def _load(self) -> int:
        """Continue from the checkpoint; returns how many bytes of the log belong to it."""
        card, state = load_checkpoint(self.folder.checkpoint, self.model, self.mover)
        for change in self.folder.changes(card.config):
            self.watch.on_note(f"resumed with {change}")
        self.step = card.step
        self.best, self.best_step, self.stale = state["best"], state["best_step"], state["stale"]
        self.validated, self.stopped = state["validated"], state["stopped"] and not self._more_patient()
        return int(state["log"])

    def _more_patient(self) -> bool:
        patience = self.config.validation.patience
        return patience is None or self.stale < patience

    def close(self) -> None:
        """Give back what is open."""
        self.folder.close()
        self.tracking.close()

    def checkpoint(self) -> Path:
        """Write the checkpoint, if what is in memory belongs together; returns its path."""
        path = self.folder.checkpoint
        if not self.sound or self.chosen:
            return path
        state = {
            "log": self.log.sync(),
            "best": self.best,
            "best_step": self.best_step,
            "stale": self.stale,
            "validated": self.validated,
            "stopped": self.stopped,
        }
        save_checkpoint(path, self.model, self.mover, self._card([], self.step), state)
        self.saved = time.monotonic()
        return path

    def write_profile(self) -> None:
        """Write where the time of the steps that were taken went."""
        if self.profile is not None and self.profile.steps:
            text = json.dumps(self.profile.as_dict(), indent=2) + "\n"
            write_whole(self.config.out / "profile.json", text.encode())

    # Learning.

    def learn(self, interrupt: Interrupt, enough: Callable[[Step], bool]) -> None:
        """All steps that are left, or until ``enough`` or a lack of progress says so."""
        self.model.train()
        self.watch.on_start(self.step, self.total)
        self._validate_if_due(interrupt)  # an interrupt may have come between a step and its validation
        while self.step < self.total and not self.stopped:
            interrupt.check()
            self._react()
            event = self._step(interrupt)
            self._note(event)
            self.sound = True
            if isinstance(event, Step):
                self.watch.on_step(event)
                if enough(event):
                    break
            else:
                self.watch.on_skip(event)
            self._validate_if_due(interrupt)
            if time.monotonic() - self.saved > 60 * self.config.train.checkpoint_minutes:
                self.checkpoint()
        if self.val_cases and self.validated != self.step and self.step:
            self._validate(interrupt)

    def _react(self) -> None:
        """Adapt an automatic budget to the memory that is free."""
        event = self.plans.react(self.step)
        if event is not None:
            self._note(event)
            self.watch.on_note(str(event))

    def _note(self, event: Event) -> None:
        line = as_line(event)
        self.log.write(line)
        self.tracking.note(line)

    def _step(self, interrupt: Interrupt) -> Step | Skip:
        settings, step = self.config.train, self.step
        case = draw_region(self.cases[pick(settings.seed, step, len(self.cases))], self.config, step)
        seed_everything(settings.seed, step)
        rate, start = self.mover.rate, time.perf_counter()
        try:
            with case.open() as readers:
                loss, dice, projected = self._gradient(case.name, readers, interrupt)
        except SlideError as error:
            if settings.on_error == "stop":
                raise
            self.sound = False
            self._move()
            self.step += 1
            return Skip(step, case.name, str(error))
        self.sound = False
        self.mover.add()
        norm = self._move(case.name)
        self.step += 1
        seconds = round(time.perf_counter() - start, 3)
        return Step(step, case.name, loss, dice, seconds, resident(), peak_resident(), projected, rate, norm)

    def _move(self, name: str = "") -> float | None:
        """An update if this step ends one."""
        if (self.step + 1) % self.config.train.accumulate and self.step + 1 < self.total:
            return None
        norm = self.mover.move()
        if norm is not None and not math.isfinite(norm):
            raise self._ruined(name, "gradient is not finite")
        return norm

    def _gradient(self, name: str, readers: Readers, interrupt: Interrupt) -> tuple[float, float, int]:
        """Loss, Dice and projected bytes of a case; its gradients are added to the parameters'.

        A step that is given up for want of memory has changed nothing yet, and is taken again by a smaller plan.
        """
        for _ in range(SQUEEZED_AT_MOST):
            try:
                return self._planned_gradient(name, readers, interrupt, self.plans.check)
            except SqueezedError:
                self._react()
        return self._planned_gradient(name, readers, interrupt, lambda plan: None)

    def _planned_gradient(
        self, name: str, readers: Readers, interrupt: Interrupt, check: Callable[[wg.Plan], None]
    ) -> tuple[float, float, int]:
        seed, augment = self.config.train.seed, self.config.augment
        change = draw_change(augment, seed, self.step)
        fullest = change.fullest(augment).apply(readers)
        plan, new = self.plans.of(self.model, self.loss_fn, fullest)
        if new:
            self.watch.on_plan(name, plan)
        changed = change.apply(readers)
        try:
            with nullcontext() if self.profile is None else self.profile.step():
                loss, values = wg.backward(
                    self.model,
                    self.loss_fn,
                    changed.slide,
                    changed.mask,
                    plan=plan,
                    metrics=METRICS,
                    progress=self._progress(interrupt, functools.partial(check, plan)),
                    seed=draw_seed(seed, self.step),
                )
        except NumericsError as error:
            raise self._ruined(name, f"{error.where} {error.cause}") from error
        return float(loss), dice_from_counts(values["counts"]), plan.host_peak

    def _ruined(self, slide: str, cause: str) -> NumericsError:
        """The refusal of an update that would ruin the weights; those before it are written first."""
        path = self.checkpoint()
        remedy = f"lower train.lr or look at that slide; the weights before are in {path}"
        return NumericsError(slide, f"{cause} at step {self.step}", remedy)

    # Judging.

    def _validate_if_due(self, interrupt: Interrupt) -> None:
        validation = self.config.validation
        every = validation.steps or (validation.epochs or 0) * len(self.cases)
        if every and self.step and self.step % every == 0 and self.validated != self.step:
            self._validate(interrupt)

    def _validate(self, interrupt: Interrupt) -> None:
        """Score the validation slides with the weights to use, and keep those if they are the best so far."""
        self.mover.swap()
        try:
            scores = self._scores(self.val_cases, interrupt)
            dice = mean_dice(scores)
            better = self.best is None or dice > self.best + self.config.validation.delta
            if better:
                save_weights(self.folder.best, self.model, self._card(scores, self.step))
            progress = self._progress(interrupt)
            judged = Judged(self.model, self.val_cases, self.step, self.plans.budget, progress, self.plans.where)
            self.watch.on_judged(judged)
        finally:
            self.mover.swap()
        self.sound = False
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best, self.best_step = dice, self.step
        self.validated, self.stopped = self.step, not self._more_patient()
        self.mover.scored(dice)
        event = Validation(self.step, dice, {score.name: score.dice for score in scores}, better, self.stale)
        self._note(event)
        self.sound = True
        self.watch.on_validation(event)

    def _scores(
        self, cases: list[Case], interrupt: Interrupt, on_case: Callable[[Score], None] | None = None
    ) -> list[Score]:
        """Scores on whole slides, those left out that cannot be read if the configuration wants that."""
        seed_everything(self.config.train.seed, self.step)
        errors: list[SlideError] = []

        def leave_out(case: Case, error: SlideError) -> None:
            errors.append(error)
            self.watch.on_note(f"{case.name} is skipped: {error}")

        skip = leave_out if self.config.train.on_error == "skip" else None
        more = {"rates": self.plans.conditions.rates, **self.plans.where}
        scores = evaluate(self.model, cases, self.plans.budget, self._progress(interrupt), on_case, skip, **more)
        if errors and not scores:
            raise errors[0]
        return scores

    def test(self, interrupt: Interrupt) -> list[Score]:
        """Scores on the test slides, after a checkpoint, so that nothing here can lose the training."""
        self.checkpoint()
        self.chosen = True
        if self.best is not None:
            load_model(self.folder.best, without_normalization(self.model))
        else:
            self.mover.swap()
        return self._scores(self.test_cases, interrupt, self.watch.on_score)

    def draw(self, scores: list[Score], interrupt: Interrupt) -> list[Path]:
        """A mask and a picture of each test slide, if the configuration wants them."""
        if not self.config.train.panels:
            return []
        folder, progress, where = self.config.out / "predictions", self._progress(interrupt), self.plans.where
        self.model.eval()
        of_name = {score.name: score for score in scores}
        drawn = []
        for case in (case for case in self.test_cases if case.name in of_name):
            said = caption(of_name[case.name], self.step)
            try:
                drawn.append(report_case(self.model, case, folder, said, self.plans.budget, progress, **where))
            except SlideError as error:  # it was there when it was scored
                if self.config.train.on_error == "stop":
                    raise
                self.watch.on_note(f"{case.name} is not drawn: {error}")
        return drawn

    def finish(self, scores: list[Score], pictures: list[Path]) -> Outcome:
        """Write weights, card, test table and report."""
        step = self.step if self.best is None else self.best_step
        weights, card = self.config.out / "weights.safetensors", self._card(scores, step)
        save_weights(weights, self.model, card)
        table = json.dumps([dataclasses.asdict(score) for score in scores], indent=2) + "\n"
        write_whole(self.config.out / "test.json", table.encode())
        plans = [(size, plan) for (size, _), plan in self.plans.made.items()]
        report = write_report(self.config, card, scores, pictures, plans)
        self.tracking.finish(card, report)
        return Outcome(self.step, weights, tuple(scores), tuple(pictures), interrupted=False, report=report)

    def _progress(
        self, interrupt: Interrupt, check: Callable[[], None] = lambda: None
    ) -> Callable[[wg.Progress], None]:
        def progress(event: wg.Progress) -> None:
            interrupt.check()
            check()
            self.watch.on_tile(event)

        return progress

    def _network(self) -> nn.Module:
        network = self.config.network
        model = build_network(network.name, network.args)
        if network.weights:
            model = load_model(self.config.path(network.weights), model)
        if network.mean and network.std:
            model = normalized(without_normalization(model), network.mean, network.std)
        return model

    def _card(self, scores: list[Score], step: int) -> Card:
        dice = {score.name: score.dice for score in scores}
        front = self.model if isinstance(self.model, Normalized) else None
        return Card(
            network=self.config.network.name,
            args=self.config.network.args,
            parameters=count_parameters(self.model),
            step=step,
            dice={**dice, "mean": mean_dice(scores)} if scores else {},
            config=self.config.as_dict(),
            versions=versions(),
            mean=None if front is None else front.given[0],
            std=None if front is None else front.given[1],
        )

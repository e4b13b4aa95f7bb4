"""The training loop: whole slides one at a time, exact gradients, and a run that can be killed at any moment.

What a step sees and draws is a function of the seed and the step's number alone (``draws``), and the plans it runs by
are fixed at the run's start (``plans``). A checkpoint holds the rest in one file that appears whole or not at all. So a
run that is killed and resumed ends with the bits of an unbroken one (rule 11), on as many ranks as there then are
(``batch``): all hold the same state, and rank 0 writes it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn

import wholegrad as wg
from wholegrad.errors import SlideError, WholegradError
from wholegrad.run.budget import limit_note
from wholegrad.run.profile import Profile
from wholegrad.train.batch import Batch, Told, check_alike, check_mesh
from wholegrad.train.cases import Case, open_cases
from wholegrad.train.draws import seed_everything
from wholegrad.train.events import Event, Judged, Outcome, Replan, Skip, Step, Validation, Watch, as_line
from wholegrad.train.folder import Folder
from wholegrad.train.interrupt import Interrupt
from wholegrad.train.judge import Skipped, judged
from wholegrad.train.metrics import Score, evaluate, mean_dice
from wholegrad.train.networks import Normalized, build_network, normalized, without_normalization
from wholegrad.train.optim import Mover
from wholegrad.train.page import write_report
from wholegrad.train.plans import Conditions, Plans
from wholegrad.train.report import caption, report_case
from wholegrad.train.slide_step import Check, Progress, SlideSteps, build_loss
from wholegrad.train.split import Entry, of_part
from wholegrad.train.state import (
    Card,
    count_parameters,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_weights,
    share_state,
    versions,
    write_whole,
)
from wholegrad.train.tables import PARTS, Config
from wholegrad.train.team import Team
from wholegrad.train.track import Tracking

SAVING_AT_MOST = 0.02  # of the time, with several ranks, goes into checkpoints that are written early

__all__ = ["Outcome", "Step", "Watch", "build_loss", "train"]


def train(
    config: Config,
    watch: Watch | None = None,
    resume: bool = False,
    enough: Callable[[Step], bool] | None = None,
    profile: Profile | None = None,
    team: Team | None = None,
) -> Outcome:
    """Train as ``config`` says, then score the test slides; everything goes into ``config.out``.

    ``enough`` is asked after each step and may end the training early; ``profile`` records where steps' time goes.
    ``team`` has the ranks that share the work, all of which call this; rank 0 alone tells ``watch`` and writes files.

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
    team = team or Team()
    run = Run(config, watch if watch and team.first else Watch(), profile, team)
    try:
        run.open(resume)
        with Interrupt(team.place.launched) as interrupt:
            team.look = interrupt.check
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


class Run:
    """A run's moving parts; ``train`` is its only caller."""

    def __init__(self, config: Config, watch: Watch, profile: Profile | None, team: Team) -> None:
        self.config, self.watch, self.profile, self.team = config, watch, profile, team
        self.folder = Folder(config)
        self.step, self.total = 0, 0
        self.best: float | None = None
        self.best_step = self.stale = 0
        self.validated = -1  # the step after which the last validation was
        self.stopped = False  # by lack of progress
        self.sound = True  # whether weights, step and log belong together, so that a checkpoint may be written
        self.chosen = False  # whether the model holds the weights to use, and no longer the last ones
        self.saved, self.saving = time.monotonic(), 0.0
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        check_alike(config, team)
        with team.together("the start"):
            check_mesh(config, team)
            self.tracking = Tracking(config if team.first else None, self.watch.on_note)
            self.model = self._network()

    # Before and after.

    def open(self, resume: bool) -> None:
        """Open every slide, then the run's folder: nothing is written if a slide is bad."""
        config, folder, team = self.config, self.folder, self.team
        entries, conditions = list[Entry](), None
        with team.together("the run's folder"):
            if team.first:
                folder.check(resume)
                team.claim(str(folder.path.absolute()))
                entries, conditions = folder.entries(resume), folder.conditions(resume)
        entries, conditions = team.share((entries, conditions), "the run's folder")
        self.watch.on_split(entries)
        skip = config.train.on_error == "skip"
        with team.together("the slides"):
            self.cases, self.val_cases, self.test_cases = (
                open_cases(of_part(entries, part), config.data, skip, team.beat) for part in PARTS
            )
            broken = [case for case in (*self.cases, *self.val_cases, *self.test_cases) if case.broken]
            for case in broken:
                self.watch.on_note(f"{case.name} is skipped: {case.broken}")
            if broken and all(case.broken for case in self.cases):
                assert broken[0].broken is not None
                raise broken[0].broken
            folder.check_validation(len(self.val_cases))
            self.total = config.steps_of(len(self.cases))
            self.mover = Mover(self.model, config.train, math.ceil(self.total / config.train.accumulate))
            conditions = Conditions.now(config.train, team.place, conditions)
        conditions = Conditions.agreed(team.gather(conditions, "the budget"))
        if not config.train.threads:
            torch.set_num_threads(conditions.threads)
        self.plans = Plans(config.train, conditions, team)
        if self.plans.of_process and (said := limit_note(conditions.budget)):
            self.watch.on_note(said)
        kept = self._load(resume)
        if self.total <= self.step:
            asked = f"{self.step} steps are done and {self.total} are asked for"
            self.watch.on_note(f"nothing is left to train: {asked}; ask for more with --steps or --epochs")
        with team.together("the run's folder"):
            if team.first:
                folder.write(entries, conditions)
                self.log = folder.open_log(kept)
                self.tracking.start(config, self.step)
                if not folder.checkpoint.exists():
                    self.checkpoint()

    def _load(self, resume: bool) -> int:
        """Continue from the checkpoint, if there is one; returns how many bytes of the log belong to it."""
        team, found = self.team, None
        with team.together("the checkpoint"):
            if team.first and resume and self.folder.checkpoint.exists():
                found = load_checkpoint(self.folder.checkpoint, self.model, self.mover)
                for change in self.folder.changes(found[0].config):
                    self.watch.on_note(f"resumed with {change}")
        state = team.share(None if found is None else {**found[1], "step": found[0].step}, "the checkpoint")
        if state is None:
            return 0
        share_state(team, self.model, self.mover)
        self.step = state["step"]
        self.best, self.best_step, self.stale = state["best"], state["best_step"], state["stale"]
        self.validated, self.stopped = state["validated"], state["stopped"] and not self._more_patient()
        return int(state["log"])

    def _more_patient(self) -> bool:
        return (patience := self.config.validation.patience) is None or self.stale < patience

    def close(self) -> None:
        """Give back what is open."""
        self.folder.close()
        self.tracking.close()

    def checkpoint(self) -> Path:
        """Write the checkpoint, if what is in memory belongs together; returns its path."""
        path, begun = self.folder.checkpoint, time.monotonic()
        if not self.sound or self.chosen or not self.team.first:
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
        self.saving = self.saved - begun
        return path

    def _checkpoint_if_due(self) -> None:
        """By the clock; with several ranks, of which any may die, as often as costs next to nothing."""
        since = time.monotonic() - self.saved
        early = not self.team.alone and self.saving < SAVING_AT_MOST * since
        if early or since > 60 * self.config.train.checkpoint_minutes:
            self.checkpoint()

    def write_profile(self) -> None:
        """Write where the time of the steps that were taken went."""
        if self.profile is not None and self.profile.steps and self.team.first:
            text = json.dumps(self.profile.as_dict(), indent=2) + "\n"
            write_whole(self.config.out / "profile.json", text.encode())

    # Learning.

    def learn(self, interrupt: Interrupt, enough: Callable[[Step], bool] | None) -> None:
        """All steps that are left, or until ``enough`` or a lack of progress says so."""
        config, team = self.config, self.team
        parts = config, self.model, self.cases, self.plans, self.watch, partial(self._progress, interrupt), self._react
        self.slides = SlideSteps(*parts, self.folder.checkpoint, self.profile)
        self.batch = Batch(team, self.model, self.mover, lambda step: self.slides.take(step, self.mover.rate))
        self.model.train()
        self.watch.on_start(self.step, self.total)
        self._validate_if_due(interrupt)  # an interrupt may have come between a step and its validation
        while self.step < self.total and not self.stopped:
            interrupt.check()
            self._react()
            taken = self._one_step() if team.alone else self._steps()
            for told in taken:
                self._note(told.event, None if team.alone else told.rank)
            self.sound = True
            for told in taken:
                self._say(told.event)
            if enough is not None:
                asked = [enough(told.event) for told in taken if isinstance(told.event, Step)]
                if any(team.share(asked, "the end of a step")):
                    break
            self._validate_if_due(interrupt)
            self._checkpoint_if_due()
        if self.val_cases and self.validated != self.step and self.step:
            self._validate(interrupt)

    def _react(self) -> None:
        """Adapt an automatic budget to the memory that is free."""
        event = self.plans.react(self.step)
        if event is not None and self.team.alone:
            self._note(event)
            self._say(event)
        elif event is not None:
            self.batch.notes.append(event)

    def _note(self, event: Event, rank: int | None = None) -> None:
        if self.team.first:
            line = as_line(event) if rank is None else {**as_line(event), "rank": rank}
            self.log.write(line)
            self.tracking.note(line)

    def _say(self, event: Event) -> None:
        if isinstance(event, Step):
            self.watch.on_step(event)
        elif isinstance(event, Skip):
            self.watch.on_skip(event)
        elif isinstance(event, Replan):
            self.watch.on_note(str(event))

    def _one_step(self) -> list[Told]:
        """One slide, on the only rank."""
        start = time.perf_counter()
        event = self.slides.take(self.step, self.mover.rate)
        self.sound = False
        last = self._ends_update(self.step + 1)
        if isinstance(event, Step):
            self.mover.add(more=not last)
        norm = self._move(event.slide) if last else None
        self.step += 1
        if isinstance(event, Step):
            event = dataclasses.replace(event, norm=norm, seconds=round(time.perf_counter() - start, 3))
        return [Told(0, event)]

    def _steps(self) -> list[Told]:
        """The slides up to the next update or validation, shared out over the ranks."""
        last = next(step for step in range(self.step + 1, self.total + 1) if self._ends_update(step) or self._due(step))
        told = self.batch.run(self.step, last)
        self.sound = False
        norm = self._move(f"steps {self.step} to {last - 1}") if self._ends_update(last) else None
        self.step = last
        self.batch.compare(last - 1)
        return [each.with_norm(norm) if each.event.step == last - 1 else each for each in told]

    def _ends_update(self, step: int) -> bool:
        """Whether an update follows when so many steps are done."""
        return step % self.config.train.accumulate == 0 or step >= self.total

    def _move(self, name: str) -> float | None:
        norm = self.mover.move()
        if norm is not None and not math.isfinite(norm):
            raise self.slides.ruined(self.step, name, "gradient is not finite")
        return norm

    # Judging.

    def _due(self, step: int) -> bool:
        """Whether a validation follows when so many steps are done."""
        validation = self.config.validation
        every = validation.steps or (validation.epochs or 0) * len(self.cases)
        return bool(every) and step % every == 0

    def _validate_if_due(self, interrupt: Interrupt) -> None:
        if self.step and self._due(self.step) and self.validated != self.step:
            self._validate(interrupt)

    def _validate(self, interrupt: Interrupt) -> None:
        """Score the validation slides with the weights to use, and keep those if they are the best so far."""
        self.mover.swap()
        try:
            scores = self._scores(self.val_cases, interrupt)
            dice = mean_dice(scores)
            better = self.best is None or dice > self.best + self.config.validation.delta
            if better and self.team.first:
                save_weights(self.folder.best, self.model, self._card(scores, self.step))
            how = self.plans.budget, self._progress(interrupt), self.plans.where
            self.watch.on_judged(Judged(self.model, self.val_cases, self.step, *how))
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
        more = {"rates": self.plans.conditions.rates, **self.plans.where}

        def scores(some: list[Case], skip: Skipped) -> list[Score]:
            seed_everything(self.config.train.seed, self.step)
            return evaluate(self.model, some, self.plans.budget, self._progress(interrupt), None, skip, **more)

        def leave_out(case: Case, error: SlideError) -> None:
            self.watch.on_note(f"{case.name} is skipped: {error}")

        return judged(self.team, cases, scores, leave_out if self.config.train.on_error == "skip" else None, on_case)

    def test(self, interrupt: Interrupt) -> list[Score]:
        """Scores on the test slides, after a checkpoint, so that nothing here can lose the training."""
        self.checkpoint()
        self.chosen = True
        if self.best is None:
            self.mover.swap()
        else:
            with self.team.together("the best weights"):
                if self.team.first:
                    load_model(self.folder.best, without_normalization(self.model))
            share_state(self.team, self.model)
        return self._scores(self.test_cases, interrupt, self.watch.on_score)

    def draw(self, scores: list[Score], interrupt: Interrupt) -> list[Path]:
        """A mask and a picture of each test slide, if the configuration wants them."""
        if not self.config.train.panels or not self.team.first:
            return []
        folder, progress, where = self.config.out / "predictions", self._progress(interrupt), self.plans.where
        self.model.eval()
        of_name = {score.name: caption(score, self.step) for score in scores}
        drawn = []
        for case in (case for case in self.test_cases if case.name in of_name):
            try:
                said = of_name[case.name]
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
        if not self.team.first:
            return Outcome(self.step, weights, tuple(scores), (), interrupted=False)
        save_weights(weights, self.model, card)
        table = json.dumps([dataclasses.asdict(score) for score in scores], indent=2) + "\n"
        write_whole(self.config.out / "test.json", table.encode())
        plans = [(size, plan) for (size, _), plan in self.plans.made.items()]
        report = write_report(self.config, card, scores, pictures, plans)
        self.tracking.finish(card, report)
        return Outcome(self.step, weights, tuple(scores), tuple(pictures), interrupted=False, report=report)

    def _progress(self, interrupt: Interrupt, check: Check = lambda: None) -> Progress:
        def progress(event: wg.Progress) -> None:
            interrupt.check()
            check()
            self.team.beat()
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

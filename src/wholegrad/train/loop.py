"""The training loop: whole slides one at a time, exact gradients, Adam.

Which slide and which region a step sees, and its learning rate, are functions of the seed and the step's
number alone: a run continued from its checkpoint sees what an unbroken one would have seen (rule 11).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import wholegrad as wg
from wholegrad.errors import ConfigError, NumericsError, WholegradError
from wholegrad.losses import LOSSES, Loss, dice_from_counts
from wholegrad.plan.storage import NARROW
from wholegrad.run.process import peak_resident, resident
from wholegrad.run.profile import Profile
from wholegrad.train.cases import Case, Readers, open_cases
from wholegrad.train.config import Config, TrainConfig
from wholegrad.train.interrupt import Interrupt
from wholegrad.train.metrics import METRICS, Score, evaluate, mean_dice
from wholegrad.train.networks import build_network
from wholegrad.train.report import caption, report_case
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


@dataclass(frozen=True)
class Step:
    """One line of the log: memory in bytes, of the whole process; Dice as it was before this update."""

    step: int
    slide: str
    loss: float
    dice: float
    seconds: float
    rss: int
    peak: int
    projected: int
    lr: float


@dataclass
class Watch:
    """What the loop tells whoever looks on; every one may be replaced, none needs to be."""

    on_start: Callable[[int, int], None] = lambda first, total: None
    on_plan: Callable[[str, wg.Plan], None] = lambda slide, plan: None
    on_tile: Callable[[wg.Progress], None] = lambda progress: None
    on_step: Callable[[Step], None] = lambda step: None
    on_score: Callable[[Score], None] = lambda score: None


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps taken, the file to use, scores on test slides, and whether Ctrl-C ended it."""

    steps: int
    weights: Path
    scores: tuple[Score, ...]
    pictures: tuple[Path, ...]
    interrupted: bool


def train(
    config: Config,
    watch: Watch | None = None,
    resume: bool = False,
    enough: Callable[[Step], bool] = lambda step: False,
    profile: Profile | None = None,
) -> Outcome:
    """Train as ``config`` says, then score the test slides; everything goes into ``config.out``.

    ``enough`` is asked after each step and may end the training early; ``profile`` records where steps' time goes.

    Writes ``log.jsonl`` (a line a step), ``checkpoint.safetensors`` (now and then, at the end, on Ctrl-C and
    before an error), ``weights.safetensors`` with ``weights.json``, ``test.json``, and ``profile.json`` if there is a
    profile.

    Raises:
        ConfigError: the configuration does not fit its files, or ``config.out`` holds another run.
        SlideError: a slide cannot be read; every file is tried before the first step.
        BudgetError: a slide does not fit the budget.
        NumericsError: loss or gradients are not finite; the checkpoint before is kept.
    """
    run = Run(config, watch or Watch(), profile)
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
            if run.step:
                run.checkpoint()  # what was learned until here is worth keeping
            raise
    return Outcome(run.step, run.finish(scores), tuple(scores), tuple(pictures), interrupted=False)


def pick(seed: int, step: int, count: int) -> int:
    """Which of ``count`` slides a step sees: every epoch all of them, in an order of its own."""
    epoch, place = divmod(step, count)
    return int(np.random.default_rng((seed, epoch)).permutation(count)[place])


def draw_seed(seed: int, step: int) -> int:
    """The seed of a step's dropout (rule 6): the same when a run is resumed."""
    return int(np.random.default_rng((seed, step, 2)).integers(2**63))


def learning_rate(train: TrainConfig, step: int, total: int) -> float:
    """The rate at a step: a linear warm-up, then constant or half a cosine down to nothing."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup) / max(1, total - train.warmup)
    return train.lr * (1 + math.cos(math.pi * done)) / 2


def build_loss(train: TrainConfig) -> Loss:
    """The loss that the configuration names, with its class weights."""
    loss = LOSSES[train.loss]
    return loss if train.weights == (1.0, 1.0) else functools.partial(loss, weights=train.weights)


class Run:
    """A run's moving parts; ``train`` is its only caller."""

    def __init__(self, config: Config, watch: Watch, profile: Profile | None = None) -> None:
        self.config, self.watch, self.profile = config, watch, profile
        self.step = 0
        self.total = config.total_steps
        self.scores: list[Score] = []
        self.plans: dict[tuple[int, int], wg.Plan] = {}
        self.saved = time.monotonic()
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.model = self._network()
        self.loss_fn = build_loss(config.train)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.train.lr)

    def open(self, resume: bool) -> None:
        """Open every slide, then the run's folder: nothing is written if a slide is bad."""
        self.cases = open_cases(self.config, "train")
        self.test_cases = open_cases(self.config, "test")
        log, checkpoint = self.config.out / "log.jsonl", self.config.out / "checkpoint.safetensors"
        if resume:
            self.step = load_checkpoint(checkpoint, self.model, self.optimizer).step
            kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] < self.step]
            write_whole(log, "".join(line + "\n" for line in kept).encode())
        elif checkpoint.exists() or (log.exists() and log.stat().st_size):
            remedy = "choose another --out, or continue it with --resume"
            raise ConfigError(str(self.config.out), "already holds a run", remedy)
        self.config.out.mkdir(parents=True, exist_ok=True)

    def learn(self, interrupt: Interrupt, enough: Callable[[Step], bool]) -> None:
        """All steps that are left, or until ``enough`` says so."""
        self.model.train()
        self.watch.on_start(self.step, self.total)
        with (self.config.out / "log.jsonl").open("a") as log:
            while self.step < self.total:
                interrupt.check()
                done = self._step(interrupt)
                log.write(json.dumps(dataclasses.asdict(done)) + "\n")
                log.flush()
                self.watch.on_step(done)
                if enough(done):
                    break
                if time.monotonic() - self.saved > 60 * self.config.train.checkpoint_minutes:
                    self.checkpoint()

    def write_profile(self) -> None:
        """Write where the time of the steps that were taken went."""
        if self.profile is not None and self.profile.steps:
            text = json.dumps(self.profile.as_dict(), indent=2) + "\n"
            write_whole(self.config.out / "profile.json", text.encode())

    def test(self, interrupt: Interrupt) -> list[Score]:
        """Scores on the test slides, after a checkpoint, so that nothing here can lose the training."""
        self.checkpoint()
        budget, progress = self.config.train.budget, self._progress(interrupt)
        return evaluate(self.model, self.test_cases, budget, progress, self.watch.on_score)

    def draw(self, scores: list[Score], interrupt: Interrupt) -> list[Path]:
        """A mask and a picture of each test slide, if the configuration wants them."""
        if not self.config.train.panels:
            return []
        folder, budget, progress = (
            self.config.out / "predictions",
            self.config.train.budget,
            self._progress(interrupt),
        )
        self.model.eval()
        return [
            report_case(self.model, case, folder, caption(score, self.step), budget, progress)
            for case, score in zip(self.test_cases, scores, strict=True)
        ]

    def checkpoint(self) -> Path:
        """Write the checkpoint; returns its path."""
        path = self.config.out / "checkpoint.safetensors"
        save_checkpoint(path, self.model, self.optimizer, self._card([]))
        self.saved = time.monotonic()
        return path

    def finish(self, scores: list[Score]) -> Path:
        """Write weights, card and test table; returns the weights' path."""
        path = self.config.out / "weights.safetensors"
        save_weights(path, self.model, self._card(scores))
        table = json.dumps([dataclasses.asdict(score) for score in scores], indent=2) + "\n"
        write_whole(self.config.out / "test.json", table.encode())
        return path

    def _step(self, interrupt: Interrupt) -> Step:
        case, settings = self._case(), self.config.train
        rate = learning_rate(settings, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with case.open() as readers:
            plan = self._plan(case, readers)
            start = time.perf_counter()
            loss, dice = self._backward(case.name, readers, plan, interrupt)
        self.optimizer.step()
        self.step += 1
        return Step(
            step=self.step - 1,
            slide=case.name,
            loss=loss,
            dice=dice,
            seconds=round(time.perf_counter() - start, 3),
            rss=resident(),
            peak=peak_resident(),
            projected=plan.projected,
            lr=rate,
        )

    def _case(self) -> Case:
        seed = self.config.train.seed
        case = self.cases[pick(seed, self.step, len(self.cases))]
        if self.config.data.crop is None:
            return case
        return case.crop(self.config.data.crop, np.random.default_rng((seed, self.step, 1)))

    def _plan(self, case: Case, readers: Readers) -> wg.Plan:
        """The plan for this size of image; made once, since capture and planning take seconds."""
        if case.size not in self.plans:
            self.plans[case.size] = wg.plan(
                self.model,
                self.loss_fn,
                readers.slide,
                readers.mask,
                budget=self.config.train.budget,
                metrics=METRICS,
                boundary_dtype=NARROW.get(self.config.train.boundary_dtype or ""),
            )
            self.watch.on_plan(case.name, self.plans[case.size])
        return self.plans[case.size]

    def _backward(self, name: str, readers: Readers, plan: wg.Plan, interrupt: Interrupt) -> tuple[float, float]:
        """Loss and Dice of a case, its gradients left in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with nullcontext() if self.profile is None else self.profile.step():
                loss, values = wg.backward(
                    self.model,
                    self.loss_fn,
                    readers.slide,
                    readers.mask,
                    plan=plan,
                    metrics=METRICS,
                    progress=self._progress(interrupt),
                    seed=draw_seed(self.config.train.seed, self.step),
                )
        except NumericsError as error:
            raise self._ruined(name, f"{error.where} {error.cause}") from error
        if not math.isfinite(loss):
            raise self._ruined(name, f"loss is {float(loss)}")
        for parameter_name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                raise self._ruined(name, f"gradient of {parameter_name} is not finite")
        return float(loss), dice_from_counts(values["counts"])

    def _ruined(self, slide: str, cause: str) -> NumericsError:
        """The refusal of an update that would ruin the weights; those before it are written first."""
        path = self.checkpoint()
        remedy = f"lower train.lr or look at that slide; the weights before are in {path}"
        return NumericsError(slide, f"{cause} at step {self.step}", remedy)

    def _progress(self, interrupt: Interrupt) -> Callable[[wg.Progress], None]:
        def progress(event: wg.Progress) -> None:
            interrupt.check()
            self.watch.on_tile(event)

        return progress

    def _network(self) -> nn.Module:
        network = self.config.network
        model = build_network(network.name, network.args)
        return load_model(self.config.path(network.weights), model) if network.weights else model

    def _card(self, scores: list[Score]) -> Card:
        dice = {score.name: score.dice for score in scores}
        return Card(
            network=self.config.network.name,
            args=self.config.network.args,
            parameters=count_parameters(self.model),
            step=self.step,
            dice={**dice, "mean": mean_dice(scores)} if scores else {},
            config=self.config.model_dump(mode="json"),
            versions=versions(),
        )

"""How good a network is on whole slides: pixels counted, forward only, in the same memory as training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import wholegrad as wg
from wholegrad.api import DeviceLike
from wholegrad.errors import SlideError
from wholegrad.losses import dice_counts
from wholegrad.metrics.counts import Counts
from wholegrad.plan.rates import Rates
from wholegrad.train.cases import Case, Readers

METRICS = {"counts": dice_counts}


@dataclass(frozen=True)
class Score:
    """One slide's counted pixels and what follows from them, each between 0 and 1."""

    name: str
    pixels: int
    dice: float
    precision: float
    recall: float

    @property
    def iou(self) -> float:
        """The intersection's share of the union."""
        return self.dice / (2 - self.dice)


def evaluate(
    model: nn.Module,
    cases: Sequence[Case],
    budget: str | int | Callable[[Readers], int] | None = None,
    progress: Callable[[wg.Progress], None] | None = None,
    on_case: Callable[[Score], None] | None = None,
    on_error: Callable[[Case, SlideError], None] | None = None,
    rates: Rates | None = None,
    device: DeviceLike = None,
    host_budget: str | int | None = None,
) -> list[Score]:
    """The score of ``model`` on each whole slide; its mode (train or eval) is put back afterwards.

    Args:
        budget: as for :func:`wholegrad.measure`, or a function of the slide's readers.
        rates, device, host_budget: as for :func:`wholegrad.measure`.
        on_error: told of a slide that cannot be read, which is then left out; without it the error ends everything.

    Raises:
        BudgetError: a slide does not fit the budget.
        SlideError: a slide cannot be read.
    """
    training, scores = model.training, []
    model.eval()
    try:
        for case in cases:
            try:
                with case.open() as readers:
                    allowed = budget(readers) if callable(budget) else budget
                    options: dict[str, Any] = {"rates": rates, "device": device, "host_budget": host_budget}
                    values = wg.measure(model, *readers, metrics=METRICS, budget=allowed, progress=progress, **options)
            except SlideError as error:
                if on_error is None:
                    raise
                on_error(case, error)
                continue
            scores.append(score(case.name, values["counts"]))
            if on_case:
                on_case(scores[-1])
    finally:
        model.train(training)
    return scores


def score(name: str, counts: torch.Tensor) -> Score:
    """The score that counts ``(tp, fp, fn, tn)`` make; what has nothing to be measured on is 1."""
    found = Counts(*(int(count) for count in counts))
    return Score(name, found.pixels, found.dice, found.precision, found.recall)


def mean_dice(scores: Sequence[Score]) -> float:
    """The mean over slides, each slide counting once; 0 without any."""
    return sum(score.dice for score in scores) / len(scores) if scores else 0.0

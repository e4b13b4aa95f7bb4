"""Predictions of a run on disk, and pictures of them: the step from gigapixel files to thumbnails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

import wholegrad as wg
from wholegrad.slide.mask import open_mask
from wholegrad.slide.reader import MapReader
from wholegrad.slide.thumbnail import thumbnail
from wholegrad.train.cases import Case, Readers
from wholegrad.train.metrics import Score
from wholegrad.train.panel import draw_panel

SIDE = 1000  # pixels: the longer side of a picture's views


def report_case(
    model: nn.Module,
    case: Case,
    folder: Path,
    caption: str = "",
    budget: str | int | Callable[[Readers], int] | None = None,
    progress: Callable[[wg.Progress], None] | None = None,
    **where: Any,
) -> Path:
    """Predict a whole slide to ``folder/NAME.tif`` and draw ``folder/NAME.png``; returns the picture's path.

    Args:
        where: ``device`` and ``host_budget`` as for :func:`wholegrad.predict`.

    Raises:
        BudgetError: the slide does not fit the budget.
        SlideError: the slide cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{case.name}.tif"
    with case.open() as (slide, mask):
        allowed = budget(Readers(slide, mask)) if callable(budget) else budget
        wg.predict(model, slide, out=out, budget=allowed, progress=progress, **where)
        picture(out.with_suffix(".png"), slide, mask, out, case.name, caption)
    return out.with_suffix(".png")


def caption(score: Score, steps: int) -> str:
    """What a picture says of how it came about."""
    return f"Dice {score.dice:.3f} on a slide not trained on, {score.pixels / 1e6:.1f} megapixels, {steps} steps"


def picture(
    path: Path, slide: MapReader, mask: MapReader | None, predicted: Path, title: str, caption: str = ""
) -> None:
    """Draw slide, truth (if known) and the mask file ``predicted`` as a PNG at ``path``.

    Raises:
        SlideError: one of them cannot be read.
    """
    ground = thumbnail(slide, SIDE)
    truth = None if mask is None else _labels(mask, ground.shape)
    said = _labels(open_mask(predicted, like=slide), ground.shape)
    draw_panel(path, ground, truth, said, title, caption)


def _labels(mask: MapReader, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """A label map's thumbnail at the slide's ``(h, w)``: pyramid levels round their sizes differently."""
    small = thumbnail(mask, SIDE)[..., 0]
    rows = np.arange(shape[0]) * small.shape[0] // shape[0]
    cols = np.arange(shape[1]) * small.shape[1] // shape[1]
    fitted: npt.NDArray[np.uint8] = small[rows[:, None], cols]
    return fitted

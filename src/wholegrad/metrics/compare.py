"""Compares a predicted label map with the true one, band by band: two readers in, one score out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from wholegrad.errors import ConfigError, ShapeError
from wholegrad.graph.geometry import Box
from wholegrad.metrics.boundary import Boundaries, Distances
from wholegrad.metrics.counts import IGNORE, Counts, macro
from wholegrad.metrics.tally import Tally
from wholegrad.slide.reader import MapReader

BAND_BYTES = 16 << 20
TOLERANCE = 10.0  # um

METRICS: Mapping[str, Callable[[ClassScore], float | None]] = {
    "dice": lambda score: score.counts.dice,
    "iou": lambda score: score.counts.iou,
    "precision": lambda score: score.counts.precision,
    "recall": lambda score: score.counts.recall,
    "boundary_f1": lambda score: score.distances.f1 if score.distances else None,
    "hausdorff95_um": lambda score: score.distances.hausdorff95 if score.distances else None,
    "surface_distance_um": lambda score: score.distances.mean if score.distances else None,
}


@dataclass(frozen=True)
class ClassScore:
    """One class of one slide; ``distances`` is None where um a pixel are unknown, or were not asked for."""

    label: int
    counts: Counts
    distances: Distances | None


@dataclass(frozen=True)
class SlideScore:
    """One slide: a score for each class, in order of labels."""

    name: str
    classes: tuple[ClassScore, ...]

    def value(self, metric: str) -> float | None:
        """A metric's mean over classes that are not background (macro); see ``METRICS``."""
        return macro(METRICS[metric](score) for score in self.classes)


def compare(
    predicted: MapReader,
    true: MapReader,
    *,
    mpp: float | None = None,
    tolerance: float = TOLERANCE,
    labels: tuple[int, ...] | None = None,
    boundaries: bool = True,
    name: str = "",
) -> SlideScore:
    """Score a predicted label map ``(1, H, W)`` against the true one of the same size, streamed.

    Args:
        predicted: labels 0 to 254.
        true: labels 0 to 254, and 255 where pixels are not to be counted.
        mpp: um a pixel; None leaves the boundaries out.
        tolerance: um, of the boundary F1.
        labels: the classes to score; None for those that occur, or 1 if none does.
        boundaries: whether to measure them.

    Raises:
        ShapeError: the maps differ in size, or are no labels.
        ConfigError: a tolerance or mpp that is no positive number.
        SlideError: one cannot be read.
    """
    _check(predicted, true, mpp, tolerance)
    tally = Tally()
    found = Boundaries(predicted, true, tally.add) if boundaries and mpp is not None else None
    if found is None:
        _count(predicted, true, tally)
    if tally.table[:IGNORE, IGNORE].any():
        cause = "holds label 255, which means ignore in a truth and nothing in a prediction"
        raise ShapeError(predicted.name, cause, "write classes as 1, 2, ...")
    wanted = labels if labels is not None else tuple(tally.labels()) or (1,)
    apart = {} if found is None or mpp is None else found.distances(wanted, tolerance, mpp)
    return SlideScore(name or predicted.name, tuple(ClassScore(k, tally.of(k), apart.get(k)) for k in wanted))


def _count(predicted: MapReader, true: MapReader, tally: Tally) -> None:
    _, height, width = true.shape
    step = max(16, BAND_BYTES // width)
    for top in range(0, height, step):
        box = Box(top, min(top + step, height), 0, width)
        tally.add(predicted.read(box)[0], true.read(box)[0])


def _check(predicted: MapReader, true: MapReader, mpp: float | None, tolerance: float) -> None:
    if (
        predicted.shape != true.shape
        or predicted.shape[0] != 1
        or {predicted.dtype, true.dtype} != {np.dtype(np.uint8)}
    ):
        cause = f"is {predicted.shape}, {predicted.dtype}, and {true.name} {true.shape}, {true.dtype}"
        raise ShapeError(predicted.name, cause, "give two label maps (1, H, W) of uint8")
    for what, value in (("mpp", mpp), ("tolerance", tolerance)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(what, f"is {value}", "give a positive number")

"""Dice, IoU, precision and recall from exact counts of pixels, which add up over bands, slides and classes.

Conventions where a ratio has nothing to be measured on: Dice and IoU of a class that neither map has are 1; precision
is 1 where nothing was predicted, recall 1 where there was nothing to find. Pixels whose true label is 255
count nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

IGNORE = 255


@dataclass(frozen=True)
class Counts:
    """One class's pixels: true and false positives and negatives."""

    tp: int
    fp: int
    fn: int
    tn: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def pixels(self) -> int:
        """All that count."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def dice(self) -> float:
        """``2 tp / (2 tp + fp + fn)``."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """``tp / (tp + fp + fn)``."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """``tp / (tp + fp)``."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """``tp / (tp + fn)``."""
        return _ratio(self.tp, self.tp + self.fn)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def macro(values: Iterable[float | None]) -> float | None:
    """The mean over classes; None where no class has a value."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

"""What scores of several slides say together: mean, spread, and how sure the mean is.

The interval is the bootstrap's percentile interval (Efron 1979): slides are drawn with replacement, for slides, not
pixels, are what is independent. The same seed gives the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Summary:
    """Of one metric over slides.

    Attributes:
        mean, deviation: over the slides that have a value; the standard deviation with n - 1, None for one slide.
        low, high: of the 95 % interval of the mean; None for one slide.
        slides: with a value; ``missing``: without (a distance to an outline that is not there).
    """

    mean: float | None
    deviation: float | None
    low: float | None
    high: float | None
    slides: int
    missing: int


def summarise(values: Sequence[float | None], seed: int = 0, level: float = 0.95) -> Summary:
    """The summary of one value a slide."""
    known = np.array([value for value in values if value is not None], np.float64)
    missing = len(values) - len(known)
    if not len(known):
        return Summary(None, None, None, None, 0, missing)
    if len(known) == 1:
        return Summary(float(known[0]), None, None, None, 1, missing)
    drawn = np.random.default_rng(seed).integers(len(known), size=(DRAWS, len(known)))
    low, high = np.quantile(known[drawn].mean(axis=1), ((1 - level) / 2, (1 + level) / 2))
    return Summary(float(known.mean()), float(known.std(ddof=1)), float(low), float(high), len(known), missing)

"""Everything that a step draws, each from the seed and the step's number alone.

A run continued from its checkpoint therefore sees what an unbroken one would have seen, and needs no generator's state
(rule 11). Each kind of draw has a number of its own, so that adding one changes no other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch

from wholegrad.slide.augment import Turned
from wholegrad.slide.augment.tones import Colour
from wholegrad.train.cases import Case, Readers
from wholegrad.train.tables import AugmentConfig, Config

REGION, DROPOUT, CHANGE, GLOBAL = 1, 2, 3, 4


def pick(seed: int, step: int, count: int) -> int:
    """Which of ``count`` slides a step sees: every epoch all of them, in an order of its own."""
    epoch, place = divmod(step, count)
    return int(np.random.default_rng((seed, epoch)).permutation(count)[place])


def draw_seed(seed: int, step: int) -> int:
    """The seed of a step's dropout (rule 6): the same when a run is resumed."""
    return int(np.random.default_rng((seed, step, DROPOUT)).integers(2**63))


def seed_everything(seed: int, step: int) -> None:
    """Set the global generators of torch, NumPy and Python, of which only the user's own code draws."""
    drawn = int(np.random.default_rng((seed, step, GLOBAL)).integers(2**32))
    torch.manual_seed(drawn)
    np.random.seed(drawn)
    random.seed(drawn)


@dataclass(frozen=True)
class Change:
    """How a step's slide is changed; the default is not at all."""

    quarters: int = 0
    flip: bool = False
    blur: float = 0.0
    colour: Colour = field(default_factory=Colour)

    def fullest(self, augment: AugmentConfig) -> Change:
        """A change to the same size of image that needs as much memory as any does: what plans are made for."""
        coloured = augment.stain or augment.stain_shift or augment.brightness or augment.contrast
        return Change(
            quarters=self.quarters or 2 * augment.turn,
            flip=augment.flip,
            blur=augment.blur if augment.blur >= LEAST_BLUR else 0.0,
            colour=Colour(contrast=0.5) if coloured else Colour(),
        )

    def apply(self, readers: Readers) -> Readers:
        """The slide and its labels, changed as they are read."""
        slide, mask = readers
        if self.quarters or self.flip:
            slide, mask = Turned(slide, self.quarters, self.flip), Turned(mask, self.quarters, self.flip)
        if self.blur:
            from wholegrad.slide.augment.blur import Blurred  # Numba only where it is needed: it takes memory

            slide = Blurred(slide, self.blur)
        if self.colour != Colour():
            from wholegrad.slide.augment.colour import Coloured

            slide = Coloured(slide, self.colour)
        return Readers(slide, mask)


LEAST_BLUR = 0.2  # pixels of standard deviation, below which a Gaussian in 8 bits is no blur


def draw_change(augment: AugmentConfig, seed: int, step: int) -> Change:
    """The change of a step's slide. Every number is drawn whether it is used or not: settings move no other's draw."""
    rng = np.random.default_rng((seed, step, CHANGE))
    quarters, flip = int(rng.integers(4)), bool(rng.integers(2))
    scale, shift = rng.uniform(-1, 1, 3), rng.uniform(-1, 1, 3)
    contrast, brightness, blur = rng.uniform(-1, 1), rng.uniform(-1, 1), augment.blur * rng.uniform(0, 1)
    colour = Colour(
        scale=_three(1 + augment.stain * scale),
        shift=_three(augment.stain_shift * shift),
        contrast=float(1 + augment.contrast * contrast),
        brightness=float(augment.brightness * brightness),
    )
    return Change(
        quarters=quarters if augment.turn else 0,
        flip=flip and augment.flip,
        blur=float(blur) if blur >= LEAST_BLUR else 0.0,
        colour=colour,
    )


def draw_region(case: Case, config: Config, step: int) -> Case:
    """The region of a case that a step sees."""
    if config.data.crop is None:
        return case
    rng = np.random.default_rng((config.train.seed, step, REGION))
    return case.crop(config.data.crop, rng, config.data.pad)


def _three(values: np.ndarray) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])

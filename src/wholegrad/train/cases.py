"""The slides of a run, all opened and tried before the first step: a bad file costs seconds, not hours.

Afterwards each is open only while a step uses it. A reader keeps decoded tiles, up to a bound that plans
count; those of ten slides at once would be ten times that bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from wholegrad.errors import ConfigError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import Cropped
from wholegrad.slide.mask import open_mask
from wholegrad.slide.reader import MapReader
from wholegrad.slide.slide import open_slide
from wholegrad.train.config import Config

PROBE = 256  # pixels: side of the box that is read at the middle of each file to see that it can be


class Readers(NamedTuple):
    """A slide ``(3, H, W)`` with its labels ``(1, H, W)``: 0 background, 1 tissue, 255 ignore."""

    slide: MapReader
    mask: MapReader


@dataclass(frozen=True)
class Case:
    """A slide and its mask by path, at one resolution; ``box`` is the region of it that counts."""

    name: str
    slide_path: Path
    mask_path: Path
    mpp: float | None
    level: int | None
    box: Box

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.box.height, self.box.width

    @contextmanager
    def open(self) -> Iterator[Readers]:
        """The case's pixels, while the block runs.

        Raises:
            SlideError: slide or mask cannot be opened, or the two do not match.
        """
        with open_slide(self.slide_path, mpp=self.mpp, level=self.level) as slide:
            mask = open_mask(self.mask_path, like=slide)
            try:
                whole = self.size == slide.shape[1:]
                yield (Readers(slide, mask) if whole else Readers(Cropped(slide, self.box), Cropped(mask, self.box)))
            finally:
                mask.close()

    def crop(self, size: tuple[int, int], rng: np.random.Generator) -> Case:
        """A region of at most ``size`` (height, width), placed at random."""
        height, width = (min(wanted, have) for wanted, have in zip(size, self.size, strict=True))
        y = self.box.y0 + int(rng.integers(self.box.height - height + 1))
        x = self.box.x0 + int(rng.integers(self.box.width - width + 1))
        return dataclasses.replace(self, box=Box(y, y + height, x, x + width))


def open_cases(config: Config, part: Literal["train", "test"]) -> list[Case]:
    """Every case of ``data.train`` or ``data.test``, each opened, matched with its mask, and tried.

    Raises:
        ConfigError: a name stands for no file, or for two, or a mask has other labels than 0, 1 and 255.
        SlideError: a slide or mask cannot be opened or read, or the two do not match.
    """
    cases: list[Case] = []
    for name, slide_path, mask_path in config.pairs(part):
        if any(case.name == name for case in cases):
            raise ConfigError(f"data.{part}", f"names {name} twice", "name each slide once")
        cases.append(_tried(name, slide_path, mask_path, config.data.mpp, config.data.level))
    return cases


def _tried(name: str, slide_path: Path, mask_path: Path, mpp: float | None, level: int | None) -> Case:
    with open_slide(slide_path, mpp=mpp, level=level) as slide:
        case = Case(name, slide_path, mask_path, mpp, level, Box(0, slide.shape[1], 0, slide.shape[2]))
    with case.open() as readers:
        middle = _middle(case.size)
        readers.slide.read(middle)
        odd = [int(label) for label in np.unique(readers.mask.read(middle)) if label not in (0, 1, 255)]
    if odd:
        remedy = "use 0 for background, 1 for tissue, 255 for ignore"
        raise ConfigError(str(mask_path), f"holds label {odd[0]}", remedy)
    return case


def _middle(size: tuple[int, int]) -> Box:
    height, width = size
    y, x = max(0, (height - PROBE) // 2), max(0, (width - PROBE) // 2)
    return Box(y, min(height, y + PROBE), x, min(width, x + PROBE))

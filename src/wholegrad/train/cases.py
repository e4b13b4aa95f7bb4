"""The slides of a run, all opened and tried before the first step: a bad file costs seconds, not hours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from wholegrad.errors import ConfigError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import Cropped
from wholegrad.slide.mask import open_mask
from wholegrad.slide.reader import MapReader
from wholegrad.slide.slide import open_slide
from wholegrad.train.config import Config

PROBE = 256  # pixels: side of the box that is read at the middle of each file to see that it can be


@dataclass(frozen=True)
class Case:
    """A slide ``(3, H, W)`` with its labels ``(1, H, W)``: 0 background, 1 tissue, 255 ignore."""

    name: str
    slide: MapReader
    mask: MapReader

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.slide.shape[1:]

    def crop(self, size: tuple[int, int], rng: np.random.Generator) -> Case:
        """A region of at most ``size`` (height, width), placed at random, of slide and mask alike."""
        height, width = (min(wanted, have) for wanted, have in zip(size, self.size, strict=True))
        y = int(rng.integers(self.size[0] - height + 1))
        x = int(rng.integers(self.size[1] - width + 1))
        box = Box(y, y + height, x, x + width)
        return Case(self.name, Cropped(self.slide, box), Cropped(self.mask, box))


def open_cases(config: Config, part: Literal["train", "test"]) -> list[Case]:
    """Every case of ``data.train`` or ``data.test``, opened, matched with its mask, and tried.

    Raises:
        ConfigError: a name stands for no file, or for two.
        SlideError: a slide or mask cannot be opened or read, or the two do not match.
    """
    cases: list[Case] = []
    for name, slide_path, mask_path in config.pairs(part):
        if any(case.name == name for case in cases):
            raise ConfigError(f"data.{part}", f"names {name} twice", "name each slide once")
        slide = open_slide(slide_path, mpp=config.data.mpp, level=config.data.level)
        case = Case(name, slide, open_mask(mask_path, like=slide))
        _probe(case.slide)
        _probe(case.mask)
        cases.append(case)
    return cases


def check_mask_has_labels(case: Case) -> None:
    """Refuse a mask whose middle rows hold other labels than 0, 1 and 255."""
    labels = np.unique(case.mask.read(_middle(case.mask)))
    odd = [int(label) for label in labels if label not in (0, 1, 255)]
    if odd:
        cause = f"holds label {odd[0]}"
        raise ConfigError(case.mask.name, cause, "use 0 for background, 1 for tissue, 255 for ignore")


def _probe(reader: MapReader) -> None:
    reader.read(_middle(reader))


def _middle(reader: MapReader) -> Box:
    _, height, width = reader.shape
    y, x = max(0, (height - PROBE) // 2), max(0, (width - PROBE) // 2)
    return Box(y, min(height, y + PROBE), x, min(width, x + PROBE))

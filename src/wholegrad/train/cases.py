"""The slides of a run, all opened and tried before the first step: a bad file costs seconds, not hours.

Afterwards each is open only while a step uses it. A reader keeps decoded tiles, up to a bound that plans
count; those of ten slides at once would be ten times that bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wholegrad.errors import ConfigError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import Cropped
from wholegrad.slide.augment import Framed
from wholegrad.slide.background import WHITE, glass_colour
from wholegrad.slide.balance import Balance, Balanced
from wholegrad.slide.mask import open_mask
from wholegrad.slide.reader import MapReader
from wholegrad.slide.slide import open_slide
from wholegrad.slide.thumbnail import balanced
from wholegrad.train.split import Entry
from wholegrad.train.tables import DataConfig

BACKGROUND = 0  # the label of a frame beyond a slide
PROBE = 256  # pixels: side of the box that is read at the middle of each file to see that it can be


class Readers(NamedTuple):
    """A slide ``(3, H, W)`` with its labels ``(1, H, W)``: 0 background, 1 tissue, 255 ignore."""

    slide: MapReader
    mask: MapReader


@dataclass(frozen=True)
class Case:
    """A slide and its mask by path, at one resolution.

    Attributes:
        data: says at which resolution, and what outlines mean.
        slide_mpp: um a pixel of level 0, where the file does not say.
        box: the region that counts; may reach beyond the slide, where glass is.
        balance: what its glass and ink look like, if they are to be evened out.
        glass: its colour as the network sees it, which a frame beyond the slide has.
        broken: why the slide could not be opened, if the run goes on without it.
    """

    name: str
    slide_path: Path
    mask_path: Path
    data: DataConfig
    slide_mpp: float | None
    box: Box
    balance: Balance | None = None
    glass: tuple[int, ...] = WHITE
    broken: SlideError | None = None

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
        if self.broken is not None:
            raise self.broken
        data = self.data
        with open_slide(self.slide_path, data.mpp, data.level, slide_mpp=self.slide_mpp) as slide:
            mask = open_mask(self.mask_path, like=slide, classes=data.classes, ignore=data.ignore)
            try:
                even = slide if self.balance is None else Balanced(slide, self.balance)
                yield self._seen(Readers(even, mask))
            finally:
                mask.close()

    def _seen(self, readers: Readers) -> Readers:
        """The region of ``box``."""
        _, height, width = readers.slide.shape
        box = self.box
        if box == Box(0, height, 0, width):
            return readers
        if box.y0 >= 0 and box.x0 >= 0 and box.y1 <= height and box.x1 <= width:
            return Readers(Cropped(readers.slide, box), Cropped(readers.mask, box))
        return Readers(Framed(readers.slide, box, self.glass), Framed(readers.mask, box, BACKGROUND))

    def crop(self, size: tuple[int, int], rng: np.random.Generator, pad: bool = False) -> Case:
        """A region placed at random: of ``size`` (height, width) if ``pad``, else of no more than the slide has."""
        if self.broken is not None:
            return self
        wanted = size if pad else (min(size[0], self.box.height), min(size[1], self.box.width))
        y, x = (_place(each, have, rng) for each, have in zip(wanted, self.size, strict=True))
        y, x = self.box.y0 + y, self.box.x0 + x
        return dataclasses.replace(self, box=Box(y, y + wanted[0], x, x + wanted[1]))


def _place(wanted: int, have: int, rng: np.random.Generator) -> int:
    """Where a window starts that lies within the map, or holds all of it."""
    offset = int(rng.integers(abs(have - wanted) + 1))
    return offset if wanted <= have else -offset


def open_cases(
    entries: Sequence[Entry], data: DataConfig, skip: bool = False, tried: Callable[[], None] = lambda: None
) -> list[Case]:
    """A case of every entry, each opened, matched with its mask, and tried.

    Args:
        skip: whether a slide that cannot be read becomes a broken case in place of an error.
        tried: called after each.

    Raises:
        ConfigError: a mask has other labels than 0, 1 and 255.
        SlideError: a slide or mask cannot be opened or read, or the two do not match.
    """
    cases = []
    for entry in entries:
        tried()
        try:
            cases.append(_tried(entry, data))
        except SlideError as error:
            if not skip:
                raise
            cases.append(Case(entry.name, entry.slide, entry.mask, data, None, Box(0, 0, 0, 0), broken=error))
    return cases


def _tried(entry: Entry, data: DataConfig) -> Case:
    slide_mpp = entry.mpp if entry.mpp is not None else data.slide_mpp
    with open_slide(entry.slide, data.mpp, data.level, slide_mpp=slide_mpp) as slide:
        whole = Box(0, slide.shape[1], 0, slide.shape[2])
        balance = balanced(slide).balance if data.balance else None
    case = Case(entry.name, entry.slide, entry.mask, data, slide_mpp, whole, balance)
    with case.open() as readers:
        if data.pad:
            glass = glass_colour(readers.slide, readers.slide)  # all that is read is the slide's own
            case = dataclasses.replace(case, glass=tuple(glass.tolist()))
        middle = _middle(case.size)
        readers.slide.read(middle)
        odd = [int(label) for label in np.unique(readers.mask.read(middle)) if label not in (0, 1, 255)]
    if odd:
        remedy = "use 0 for background, 1 for tissue, 255 for ignore"
        raise ConfigError(str(entry.mask), f"holds label {odd[0]}", remedy)
    return case


def _middle(size: tuple[int, int]) -> Box:
    height, width = size
    y, x = max(0, (height - PROBE) // 2), max(0, (width - PROBE) // 2)
    return Box(y, min(height, y + PROBE), x, min(width, x + PROBE))

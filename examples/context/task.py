"""The slides of this example, made from a number: regions whose label depends on something far away, or does not.

A slide has ``HEIGHT x WIDTH`` pixels of one channel, 8 bits, grey 120 where nothing else is said. There lie

- a *control* on the left, a square of ``CONTROL`` pixels at a height drawn at random: striped on slides of even number,
  plain on the others;
- ``REGIONS`` discs on the right, of ``RADII`` pixels, none touching another, half of them striped, half plain, whatever
  the control.

Plain is grey 120 too. Stripes are sines around that grey, of a period of 12 pixels, of random phase and direction.
Everything has Gaussian noise. So all of a slide has the same mean: what tells things apart is gone on a picture that
averages a dozen pixels or more. Between the control's edge and the nearest region lie at least ``AWAY`` pixels.

Two tasks, on the same pixels:

- ``context``: striped regions are to be found where the control is striped too; where it is plain, nothing is;
- ``local``: striped regions are to be found, whatever the control.

So in ``context`` whoever sees no control can be right on all plain regions and on half of the striped ones.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Task = Literal["context", "local"]
TASKS: tuple[Task, ...] = ("context", "local")
HEIGHT, WIDTH = 1536, 6144
CONTROL, REGIONS, RADII = 768, 8, (120, 200)
LEFT, AWAY = 128, 1904  # pixels left of the control, and between it and the nearest region, at least
FIELD = LEFT + CONTROL + AWAY  # from this column on regions lie
PERIOD, GREY, SWING, NOISE = 12.0, 120, 50, 12
FOUND, STRIPED, PLAIN = 1, 2, 3  # labels of a region: to be found; striped, but not to be found; plain

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Disc:
    """A region, in pixels."""

    y: int
    x: int
    radius: int
    striped: bool


@dataclass(frozen=True)
class Layout:
    """What is where on a slide; the control's upper edge is at ``top``."""

    striped: bool
    top: int
    discs: tuple[Disc, ...]


@cache
def layout(number: int) -> Layout:
    """The layout of slide ``number``; controls of even numbers are striped, so that both are as frequent in any set."""
    rng = np.random.default_rng((number, 1))
    discs: list[Disc] = []
    kinds = rng.permutation([True, False] * (REGIONS // 2))
    while len(discs) < REGIONS:
        radius = int(rng.integers(*RADII))
        y, x = int(rng.integers(radius, HEIGHT - radius)), int(rng.integers(FIELD + radius, WIDTH - radius))
        if all((y - d.y) ** 2 + (x - d.x) ** 2 > (radius + d.radius + 16) ** 2 for d in discs):
            discs.append(Disc(y, x, radius, bool(kinds[len(discs)])))
    return Layout(number % 2 == 0, int(rng.integers(0, HEIGHT - CONTROL)), tuple(discs))


def draw(number: int) -> tuple[Pixels, Pixels]:
    """Image ``(1, H, W)`` and kinds ``(1, H, W)``: ``STRIPED`` and ``PLAIN`` regions, 0 elsewhere."""
    made = layout(number)
    rng = np.random.default_rng((number, 2))
    image = np.full((HEIGHT, WIDTH), GREY, np.float32)
    kinds = np.zeros((HEIGHT, WIDTH), np.uint8)
    square = np.s_[made.top : made.top + CONTROL, LEFT : LEFT + CONTROL]
    image[square] = _texture(made.striped, square, rng)
    for disc in made.discs:
        box = np.s_[disc.y - disc.radius : disc.y + disc.radius, disc.x - disc.radius : disc.x + disc.radius]
        y, x = np.ogrid[box]
        inside = (y - disc.y) ** 2 + (x - disc.x) ** 2 < disc.radius**2
        image[box][inside] = _texture(disc.striped, box, rng)[inside]
        kinds[box][inside] = STRIPED if disc.striped else PLAIN
    image += NOISE * rng.standard_normal(image.shape, np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)[None], kinds[None]


def _texture(striped: bool, box: tuple[slice, slice], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Grey values of a box, before noise."""
    y, x = np.mgrid[box]
    turn, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    along = x * np.cos(turn) + y * np.sin(turn)
    swing = SWING if striped else 0
    return (GREY + swing * np.sin(2 * np.pi * along / PERIOD + phase)).astype(np.float32)


def labels(kinds: Pixels, number: int, task: Task) -> Pixels:
    """The labels of kinds of slide ``number``: ``FOUND`` on what the task says is to be found."""
    if task == "context" and not layout(number).striped:
        return kinds
    return np.array([0, 0, FOUND, PLAIN], np.uint8)[kinds]


@cache
def stored(folder: Path, number: int) -> tuple[Pixels, Pixels]:
    """Image and kinds of a slide as memory maps of files, which are drawn first if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.{what}.npy" for what in ("image", "kinds")]
    if not all(path.exists() for path in paths):
        for path, values in zip(paths, draw(number), strict=True):
            aside = path.with_suffix(f".{os.getpid()}.part.npy")
            np.save(aside, values)
            aside.replace(path)
    image, kinds = (np.load(path, mmap_mode="r") for path in paths)
    return image, kinds

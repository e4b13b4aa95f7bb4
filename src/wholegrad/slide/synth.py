"""Makes a slide for machines without one: a stained section on glass, and its exact tissue mask, from a seed.

The layout is drawn at low resolution (``synth_fields``), the detail comes from periodic textures
(``synth_textures``), and both meet in one pass over each band of rows (``synth_paint``) on its way to the two
files: memory does not grow with the slide beyond its low-resolution fields and one band of pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError
from wholegrad.slide.synth_fields import FIELDS, grid_for, make_fields
from wholegrad.slide.synth_paint import Painter, make_look
from wholegrad.slide.synth_textures import make_textures
from wholegrad.slide.write import PyramidWriter

Progress = Callable[[int, int], None]

BAND = 512  # rows painted at once, and the tiles' edge
QUALITY = 85


@dataclass(frozen=True)
class _Speck:
    """Dust or debris: centre and radii in pixels, densities in RGB, softness of the edge in pixels."""

    y: float
    x: float
    radius: float
    density: tuple[float, float, float]
    soft: float
    lobes: tuple[float, float, float]


def synthesize(
    height: int,
    width: int,
    seed: int,
    slide_path: str | os.PathLike[str],
    mask_path: str | os.PathLike[str],
    *,
    mpp: float = 0.5,
    progress: Progress | None = None,
) -> None:
    """Write a synthetic H&E slide and its tissue mask, the same for the same size, seed and mpp.

    Pieces of tissue (glands, stroma, lymphoid tissue, fat) with frayed outlines, tears and holes lie on glass
    with dust, hairs, an air bubble, pen and the edge of the coverslip. In the mask, 1 is everything inside an
    outline, lumina and fat cells too; holes and tears are 0, as is all that merely lies on the glass.

    Args:
        height, width: of level 0, pixels; at least 64.
        seed: any integer from 0.
        slide_path: a JPEG pyramid, BigTIFF.
        mask_path: uint8 labels at full resolution, deflate pyramid, BigTIFF.
        mpp: um a pixel; nuclei and glands have their true size, pieces of tissue scale with the slide.
        progress: called with (rows done, rows in all) at the start and after each band.

    Raises:
        ConfigError: a size below 64 pixels, an mpp outside 0.1 to 8, or a negative seed.
        SlideError: a file cannot be written; an unfinished one is never left under its name.
    """
    _check(height, width, seed, mpp)
    if progress is not None:
        progress(0, height)  # what follows takes some seconds
    rng = np.random.default_rng([seed, height, width])
    grid = grid_for(height, width, mpp)
    look, textures, fields = make_look(rng, mpp), make_textures(rng, mpp), make_fields(rng, grid)
    specks = _specks(rng, height, width, mpp, fields[FIELDS.index("depth")], grid.pitch)
    painter = Painter(fields, textures, look, grid.pitch, mpp)
    image = np.empty((min(BAND, height), width, 3), np.uint8)
    mask = np.empty((min(BAND, height), width), np.uint8)
    with (
        PyramidWriter(slide_path, (3, height, width), compression="jpeg", quality=QUALITY, mpp=mpp) as slide_out,
        PyramidWriter(mask_path, (1, height, width), mpp=mpp, label=True) as mask_out,
    ):
        for top in range(0, height, BAND):
            rows = min(BAND, height - top)
            painter.paint(top, image[:rows], mask[:rows])
            _add_specks(specks, top, image[:rows])
            slide_out.write_rows(image[:rows])
            mask_out.write_rows(mask[:rows])
            if progress is not None:
                progress(top + rows, height)


def _check(height: int, width: int, seed: int, mpp: float) -> None:
    if min(height, width) < 64:
        raise ConfigError("synthesize", f"size {height} x {width}", "ask for at least 64 x 64 pixels")
    if not 0.1 <= mpp <= 8 or seed < 0:
        raise ConfigError("synthesize", f"mpp={mpp}, seed={seed}", "give an mpp of 0.1 to 8 and a seed from 0")


def _specks(
    rng: np.random.Generator, height: int, width: int, mpp: float, depth: npt.NDArray[np.float32], pitch: int
) -> list[_Speck]:
    """Dust (sharp), grime under the glass (blurred discs) and torn-off cells, none of them on tissue."""
    area = height * width * (mpp / 1000) ** 2  # mm2
    specks = []
    for rate, kind in ((1.6, "dust"), (0.12, "blurred"), (0.8, "cells")):
        for _ in range(min(rng.poisson(rate * area) + 1, 4000)):
            speck = _speck(rng, kind, rng.uniform(0, height), rng.uniform(0, width), mpp)
            clear = speck.radius * 1.6 * mpp + 40.0
            if depth[int(speck.y / pitch), int(speck.x / pitch)] < -clear:
                specks.append(speck)
    return specks


def _speck(rng: np.random.Generator, kind: str, y: float, x: float, mpp: float) -> _Speck:
    lobes = (float(rng.uniform(0, 6.3)), float(rng.uniform(0, 0.35)), float(rng.uniform(0, 0.25)))
    dark = float(rng.uniform(0.3, 1.0))
    if kind == "blurred":
        radius = float(rng.uniform(25, 75)) / mpp
        faint = 0.11 * dark
        return _Speck(y, x, radius, (faint, faint, faint * 0.95), 0.4 * radius, (0.0, 0.0, 0.0))
    if kind == "cells":
        return _Speck(y, x, float(rng.uniform(2, 14)) / mpp, (0.35 * dark, 0.6 * dark, 0.3 * dark), 2.0, lobes)
    radius = float(np.clip(rng.lognormal(1.0, 0.7), 1.0, 22.0)) / mpp
    return _Speck(y, x, radius, (0.75 * dark, 0.85 * dark, 0.95 * dark), 1.2, lobes)


def _add_specks(specks: list[_Speck], top: int, image: npt.NDArray[np.uint8]) -> None:
    """Darken the band's pixels under each speck."""
    for speck in specks:
        reach = speck.radius * 1.7 + speck.soft + 2
        y0, y1 = max(int(speck.y - reach), top) - top, min(int(speck.y + reach), top + len(image)) - top
        x0, x1 = max(int(speck.x - reach), 0), min(int(speck.x + reach), image.shape[1])
        if y0 >= y1 or x0 >= x1:
            continue
        v = np.arange(y0 + top, y1 + top)[:, None] - speck.y
        u = np.arange(x0, x1)[None] - speck.x
        angle = np.arctan2(v, u) + speck.lobes[0]
        edge = speck.radius * (1 + speck.lobes[1] * np.cos(2 * angle) + speck.lobes[2] * np.cos(5 * angle))
        cover = np.clip((edge - np.hypot(v, u)) / speck.soft + 0.5, 0, 1)[..., None]
        patch = image[y0:y1, x0:x1]
        patch[...] = (patch * np.exp(-cover * np.asarray(speck.density)) + 0.5).astype(np.uint8)

"""Tissue of a slide, out of the box: the network that ships, on an evened-out slide, tidied, in every format.

Three passes over a map of a few um a pixel: a picture of the slide says what glass and ink look like; the network's
mask goes to a file beside the results; its outlines, without what is too small, are painted into the results.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wholegrad.aside import held_folder
from wholegrad.errors import SlideError
from wholegrad.graph.geometry import Box
from wholegrad.nets.tissue import MPP, tissue4492
from wholegrad.outputs import Paths, Result, checked_paths, open_outputs
from wholegrad.predict import npy_output, predict
from wholegrad.run.executor import ProgressFn
from wholegrad.slide.arrays import RawReader
from wholegrad.slide.balance import Balance, Balanced
from wholegrad.slide.grid import OutlineOptions
from wholegrad.slide.output import ClassNames
from wholegrad.slide.slide import open_slide
from wholegrad.slide.thumbnail import balanced

if TYPE_CHECKING:
    from wholegrad.slide.tidy import Painting

MIN_AREA, MIN_HOLE = 5_000.0, 50_000.0  # um2
BAND = 512  # rows at once

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Segmented:
    """What was found on a slide.

    Attributes:
        shape: ``(H, W)`` of the mask, pixels; ``mpp``: um a pixel.
        tissue: share of the pixels; ``area``: mm2.
        balance: the colour of glass and the gain that were found.
        seconds: that it took.
    """

    shape: tuple[int, int]
    mpp: float
    tissue: float
    area: float
    balance: Balance
    seconds: float


def segment(
    slide: str | os.PathLike[str],
    out: Paths,
    *,
    mpp: float = MPP,
    slide_mpp: float | None = None,
    min_area: float = MIN_AREA,
    min_hole: float = MIN_HOLE,
    simplify: float | None = None,
    budget: str | int | None = None,
    progress: ProgressFn | None = None,
) -> Segmented:
    """Find the tissue of a slide with the network that ships (``wholegrad.nets.tissue``).

    Args:
        slide: whatever :func:`wholegrad.open_slide` reads.
        out: one file or several, by their endings, as for :func:`wholegrad.predict`.
        mpp: um a pixel to work at; the network learned at 4.
        slide_mpp: um a pixel of the slide's level 0, where the file does not say or is wrong.
        min_area: um2; pieces that enclose less are left out.
        min_hole: um2; holes that are smaller are filled.
        simplify: um by which outlines in GeoJSON may move; None for one pixel.
        budget: the whole process's peak, as for :func:`wholegrad.plan`.

    Raises:
        ConfigError: an option makes no sense.
        SlideError: the slide cannot be read, does not tell its um a pixel, or a file cannot be written; no file is
            left behind then.
    """
    started = time.monotonic()
    paths = checked_paths(out, "mask", slide=Path(slide))
    options = OutlineOptions(min_area, min_hole, simplify)
    options.in_pixels(mpp)
    with open_slide(slide, mpp=mpp, slide_mpp=slide_mpp) as image:
        real = image.mpp
        if real is None:
            raise SlideError(str(slide), "does not tell its um a pixel", "give slide_mpp")
        even = balanced(image)
        painting = _mask(even, paths[0].parent, options, budget, progress)
        result = Result(
            (1, *painting.shape), "mask", np.dtype(np.uint8), real, image, ClassNames(("Tissue",)), outlines=options
        )
        count = _write(painting, paths, result)
    share = count / (painting.shape[0] * painting.shape[1])
    return Segmented(painting.shape, real, share, count * real**2 / 1e6, even.balance, time.monotonic() - started)


def _mask(
    image: Balanced,
    folder: Path,
    options: OutlineOptions,
    budget: str | int | None,
    progress: ProgressFn | None,
) -> Painting:
    """The network's mask, tidied; by way of a file in ``folder`` that is removed."""
    from wholegrad.slide.tidy import tidied  # with Numba

    area, hole, _ = options.in_pixels(image.mpp)
    with held_folder(folder) as held:
        raw = held / "mask.npy"
        try:
            predict(tissue4492(), image, out=raw, budget=budget, progress=progress)
        except SlideError as error:
            if error.where != str(raw):
                raise
            raise SlideError(str(folder), error.cause, error.remedy) from error  # of that file nobody knows
        stored = np.load(raw, mmap_mode="r")
        reader = RawReader(raw, stored.shape, stored.dtype, stored.offset)
        del stored
        return tidied(_bands(reader), reader.shape[2], area, hole)


def _bands(reader: RawReader) -> Iterator[Labels]:
    _, height, width = reader.shape
    for y0 in range(0, height, BAND):
        yield np.asarray(reader.read(Box(y0, min(y0 + BAND, height), 0, width))[0], np.uint8)


def _write(painting: Painting, paths: list[Path], result: Result) -> int:
    """Paint the mask into every file; returns how many pixels are tissue."""
    outputs = open_outputs(paths, result, lambda path: npy_output(path, result.shape, result.dtype))
    count = 0
    try:
        for y0, rows in painting.bands(BAND):
            outputs.write(y0, rows[None])
            count += int(np.count_nonzero(rows))
        outputs.seal()
        outputs.publish()
    except BaseException:
        outputs.abort()
        raise
    return count

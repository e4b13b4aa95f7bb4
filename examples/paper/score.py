"""How good a trained network's mask of a whole slide is, on the grid on which the reference was drawn.

Networks that saw a slide at 0.25 and at 16 um a pixel are compared on one grid, that of the reference mask (2 to 4 um):
each of its pixels takes the prediction at its centre.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from torch import nn

import wholegrad as wg
from wholegrad.losses import IGNORE
from wholegrad.segment import MIN_AREA, MIN_HOLE
from wholegrad.slide.slide import Slide
from wholegrad.slide.thumbnail import balanced
from wholegrad.slide.tidy import tidied

Labels = npt.NDArray[np.uint8]


def score(model: nn.Module, slide: Path, mask: Path, mpp: float | None, budget: str = "1.5GiB") -> dict[str, float]:
    """Dice of the network's mask, and of that mask without small pieces and holes, as ``wholegrad segment`` tidies.

    Args:
        mpp: um a pixel at which the slide is read; None for level 0.
    """
    with tempfile.TemporaryDirectory() as folder, wg.open_slide(slide, mpp=mpp) as image:
        file = Path(folder) / "mask.npy"
        wg.predict(model, balanced(image), out=file, budget=budget)
        truth, pixel = reference(mask, image)
        found = sampled(np.load(file, mmap_mode="r")[0], truth.shape)
    neat = tidied([found], found.shape[1], MIN_AREA / pixel**2, MIN_HOLE / pixel**2).rows(0, found.shape[0])
    return {"network": dice(found, truth), "tidied": dice(neat, truth)}


def reference(mask: Path, image: Slide) -> tuple[Labels, float]:
    """The reference mask on its own grid, and um a pixel of it."""
    truth = np.asarray(tifffile.imread(mask), np.uint8)
    assert image.mpp is not None
    return truth, image.mpp * image.shape[2] / truth.shape[1]


def sampled(found: Labels, shape: tuple[int, ...]) -> Labels:
    """A mask's labels at the centres of the pixels of a grid over the same field of view."""
    rows, cols = (((np.arange(n) + 0.5) * have / n).astype(int) for n, have in zip(shape, found.shape, strict=True))
    out = np.empty(shape, np.uint8)
    for y, row in enumerate(rows):
        out[y] = found[row][cols]
    return out


def dice(found: Labels, truth: Labels) -> float:
    """Dice over pixels that count."""
    tissue, said = truth == 1, (found == 1) & (truth != IGNORE)
    return float(2 * (tissue & said).sum() / max(1, tissue.sum() + said.sum()))

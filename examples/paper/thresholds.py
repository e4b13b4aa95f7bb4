"""Tissue by threshold, as pipelines do it without a network: saturation and Otsu, and CLAM's recipe.

Both work on a small RGB picture of a slide. Otsu: N. Otsu, "A threshold selection method from gray-level histograms"
(IEEE SMC 1979). CLAM: Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide images"
(Nature Biomedical Engineering 2021), the steps of its ``segmentTissue`` with two of its presets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

CLAM_PATCH = 128  # um: its reference patch of 512 pixels, on slides of 0.25 um a pixel


@dataclass(frozen=True)
class Preset:
    """Values of CLAM's command line: saturation, median filter, closing; areas in reference patches; holes kept."""

    threshold: int
    median: int
    close: int
    tissue: float
    hole: float
    holes: int


TCGA = Preset(threshold=8, median=7, close=4, tissue=16, hole=4, holes=8)
BIOPSY = Preset(threshold=15, median=11, close=2, tissue=1, hole=1, holes=2)


def saturation(picture: Picture) -> Picture:
    """HSV saturation, 0 to 255, of an RGB picture ``(h, w, 3)``."""
    wide = picture.astype(np.float32)
    high, low = wide.max(axis=2), wide.min(axis=2)
    return np.round(255 * (high - low) / np.maximum(high, 1)).astype(np.uint8)


def otsu_threshold(values: Picture) -> int:
    """The value that parts a histogram of 8 bits with the greatest variance between its parts."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    moment = np.cumsum(counts * np.arange(256))
    means = (moment / np.maximum(below, 1), (moment[-1] - moment) / np.maximum(above, 1))
    return int(np.argmax(below * above * (means[0] - means[1]) ** 2))


def otsu(picture: Picture) -> Mask:
    """Tissue where the saturation exceeds Otsu's threshold."""
    values = saturation(picture)
    return np.asarray(values > otsu_threshold(values))


def clam(picture: Picture, mpp: float, preset: Preset = TCGA) -> Mask:
    """Tissue as CLAM finds it with one of its presets.

    Args:
        picture: RGB ``(h, w, 3)``.
        mpp: um a pixel of the picture; areas are meant physically, whatever the slide's own resolution.
        preset: the values.
    """
    values = ndimage.median_filter(saturation(picture), preset.median, mode="nearest")
    square = np.ones((preset.close, preset.close))
    found = ndimage.binary_closing(np.pad(values > preset.threshold, preset.close), square)
    found = found[preset.close : -preset.close, preset.close : -preset.close]
    patch = (CLAM_PATCH / mpp) ** 2  # of the picture's pixels
    filled = ndimage.binary_fill_holes(found)
    holes = _larger(filled & ~found, preset.hole * patch)
    pieces, count = ndimage.label(filled, np.ones((3, 3)))
    keep = np.zeros(count + 1, bool)
    for piece, ink in enumerate(np.bincount(pieces[found], minlength=count + 1)):
        keep[piece] = piece > 0 and ink > preset.tissue * patch
    return np.asarray(keep[pieces] & ~_largest_of_each(holes, pieces, preset.holes))


def _largest_of_each(holes: Mask, pieces: npt.NDArray[np.int_], most: int) -> Mask:
    """Of the holes of each piece, the ``most`` largest."""
    labels, count = ndimage.label(holes)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    owner = np.zeros(count + 1, int)
    owner[labels[holes]] = pieces[holes]
    keep = np.zeros(count + 1, bool)
    for piece in np.unique(owner[1:]):
        of_piece = np.flatnonzero(owner == piece)
        of_piece = of_piece[of_piece > 0]
        keep[of_piece[np.argsort(-sizes[of_piece], kind="stable")[:most]]] = True
    return np.asarray(keep[labels])


def _larger(mask: Mask, pixels: float) -> Mask:
    """The connected parts of a mask that have more than so many pixels."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return np.asarray((sizes > pixels)[labels])

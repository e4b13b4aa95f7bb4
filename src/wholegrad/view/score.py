"""How good a prediction is, and where it is worst: counted at the prediction's own resolution, published as it comes.

First what counting tells (Dice, IoU, precision, recall), then the regions with most wrong pixels, then what the
boundaries tell, which takes longest.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.metrics.compare import METRICS, SlideScore, compare
from wholegrad.slide.mask import LabelMask
from wholegrad.slide.partial import PartMask
from wholegrad.view import paint
from wholegrad.view.jobs import Publish
from wholegrad.view.labels import Thresholded, stored_shape
from wholegrad.view.ladder import Ladder, tile_box
from wholegrad.view.layers import ErrorLayer, ThresholdLayer
from wholegrad.view.scene import Scene

LOOKED_AT = 2048  # pixels: regions are looked for on the first rung that is no longer than this
REGIONS = 12  # at most
SHARE = 16  # a region's edge is the rung's longer side by this
LEAST = 0.002  # of a region that must be wrong
COUNTED = tuple(name for name in METRICS if not name.endswith("_um") and name != "boundary_f1")

Labels = npt.NDArray[np.uint8]


def score(scene: Scene, error: ErrorLayer, threshold: int, publish: Publish) -> None:
    """Publish ``metrics``, ``classes``, ``grid``, then ``worst``, then the boundaries' metrics.

    Raises:
        WholegradError: labels cannot be read, or are no labels.
    """
    truth, said = error.truth.screen.full, error.prediction.screen.full
    if isinstance(said, PartMask):
        truth = PartMask(truth, said.part)  # beyond what was predicted nothing counts
    if isinstance(error.prediction, ThresholdLayer):
        said = Thresholded(said, threshold)
    height, width = _grid(error, truth)
    mpp = None if scene.slide.mpp is None else scene.slide.mpp * scene.slide.shape[2] / width
    maps = [_Watched(mask.at(height, width), publish) for mask in (said, truth)]
    counted = compare(*maps, mpp=None, boundaries=False)
    publish({"grid": [height, width], "mpp": mpp, **_told(counted, error, COUNTED)})
    publish({"worst": worst_regions(scene.ladder, error, threshold, publish)})
    if mpp is not None:
        publish(_told(compare(*maps, mpp=mpp), error, tuple(METRICS)))


def _grid(error: ErrorLayer, truth: LabelMask) -> tuple[int, int]:
    """The pixels that are counted: the prediction's as they are stored, else the truth's, else the slide's."""
    for mask in (error.prediction.screen.full, truth):
        if (stored := stored_shape(mask)) is not None:
            return stored
    return truth.shape[1], truth.shape[2]


def _told(found: SlideScore, error: ErrorLayer, metrics: tuple[str, ...]) -> dict[str, Any]:
    names = error.truth.names
    classes = [
        {
            "name": names.name(one.label),
            **asdict(one.counts),
            **{metric: METRICS[metric](one) for metric in metrics},
        }
        for one in found.classes
    ]
    return {"metrics": {metric: found.value(metric) for metric in metrics}, "classes": classes}


class _Watched:
    """A mask that ends the work once nobody waits for it."""

    def __init__(self, mask: LabelMask, publish: Publish) -> None:
        self._mask, self._publish = mask, publish
        self.shape, self.dtype, self.name, self.cache_bytes = mask.shape, mask.dtype, mask.name, mask.cache_bytes
        self.concurrent = True

    def read(self, box: Box) -> Labels:
        self._publish({})
        return self._mask.read(box)


def worst_regions(ladder: Ladder, error: ErrorLayer, threshold: int, publish: Publish) -> list[dict[str, Any]]:
    """Squares with most wrong pixels, worst first, none overlapping another: box of level 0, areas that are wrong.

    Areas are of level-0 pixels, from a picture of the slide in which each pixel is what its centre is.
    """
    verdict, scale = _overview(ladder, error, threshold, publish)
    wrong = np.isin(verdict, (paint.EXTRA, paint.MISSED, paint.MIXED))
    side = max(1, max(verdict.shape) // SHARE)
    found = []
    _, height, width = ladder.slide.shape
    for _ in range(REGIONS):
        y, x, count = _densest(wrong, side)
        if count < max(1, LEAST * side * side):
            break
        part = verdict[y : y + side, x : x + side]
        box = [x * scale, y * scale, min(width, (x + side) * scale), min(height, (y + side) * scale)]
        areas = {
            "extra": int((part[wrong[y : y + side, x : x + side]] == paint.EXTRA).sum()) * scale**2,
            "missed": int((part[wrong[y : y + side, x : x + side]] == paint.MISSED).sum()) * scale**2,
            "mixed": int((part[wrong[y : y + side, x : x + side]] == paint.MIXED).sum()) * scale**2,
        }
        found.append({"box": [box[0], box[1], box[2] - box[0], box[3] - box[1]], **areas})
        wrong[y : y + side, x : x + side] = False
    return found


def _overview(ladder: Ladder, error: ErrorLayer, threshold: int, publish: Publish) -> tuple[Labels, int]:
    """The verdict on the whole slide at a rung that is small enough, and level-0 pixels to one of its pixels."""
    rung = next(k for k, size in enumerate(ladder.sizes) if max(size) <= LOOKED_AT)
    size = ladder.sizes[rung]
    whole = np.zeros(size, np.uint8)
    rows = cols = 0
    while (box := tile_box(size, cols, rows)) is not None:
        publish({})
        whole[box.slices()] = error.verdict(rung, box, threshold)
        cols += 1
        if tile_box(size, cols, rows) is None:
            rows, cols = rows + 1, 0
    return whole, 1 << rung


def _densest(wrong: npt.NDArray[np.bool_], side: int) -> tuple[int, int, int]:
    """Corner ``(y, x)`` of the square (as much of it as there is room for) with most wrong pixels, and how many."""
    sums = np.zeros((wrong.shape[0] + 1, wrong.shape[1] + 1), np.int64)
    np.cumsum(np.cumsum(wrong, axis=0), axis=1, out=sums[1:, 1:])
    high, wide = min(side, wrong.shape[0]), min(side, wrong.shape[1])
    counts = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    y, x = np.unravel_index(int(counts.argmax()), counts.shape)
    return int(y), int(x), int(counts[y, x])

"""Labels and probabilities as maps for the screen: each rung's pixels, each with the value at its centre.

A large label map is read from its smaller levels where these hold labels (those that wholegrad wrote) and the rung has
no more pixels than they; otherwise from level 0, which is what masks up to 64 MiB are kept in memory for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.slide.mask import SMALL, LabelMask
from wholegrad.slide.partial import PartMask

Labels = npt.NDArray[np.uint8]


class Screen:
    """One map of bytes at every rung of its slide. Thread-safe.

    Attributes:
        full: the map at the slide's resolution.
        lower: its smaller levels, largest first, where these are fit to look at.
    """

    def __init__(self, full: LabelMask, lower: Sequence[LabelMask], sizes: Sequence[tuple[int, int]]) -> None:
        self.full, self.lower, self._sizes = full, lower, sizes
        self._rungs = [self._choose(size) for size in sizes]

    def _choose(self, size: tuple[int, int]) -> LabelMask:
        enough = [level for level in self.lower if (stored_shape(level) or (0, 0))[0] >= size[0]]
        return (enough[-1] if enough else self.full).at(*size)

    def read(self, rung: int, box: Box) -> Labels:
        """Values of a box of a rung, ``(h, w)``, valid until this thread's next read.

        Raises:
            SlideError: the file is damaged.
        """
        values: Labels = self._rungs[rung].read(box)[0]
        return values

    def read_around(self, rung: int, box: Box, margin: int) -> Labels:
        """The same with ``margin`` pixels more on each side, those beyond the map as its border is."""
        height, width = self._sizes[rung]
        inner = Box(
            max(0, box.y0 - margin),
            min(height, box.y1 + margin),
            max(0, box.x0 - margin),
            min(width, box.x1 + margin),
        )
        more = (
            (inner.y0 - box.y0 + margin, box.y1 + margin - inner.y1),
            (inner.x0 - box.x0 + margin, box.x1 + margin - inner.x1),
        )
        return np.pad(self.read(rung, inner), more, mode="edge")

    def labels(self) -> list[int]:
        """Those on the smallest rung; none where reading it means reading a large map to the end."""
        stored = stored_shape(self.full)
        if stored is not None and not self.lower and math.prod(stored) > SMALL:
            return []
        height, width = self._sizes[-1]
        return [int(label) for label in np.unique(self.read(len(self._sizes) - 1, Box(0, height, 0, width)))]

    def close(self) -> None:
        """Close the files."""
        for mask in (self.full, *self.lower):
            mask.close()

    def beyond(self, rung: int, box: Box) -> npt.NDArray[np.bool_] | None:
        """Which pixels of a box lie beyond the part of the slide that the map shows; None if it shows all of it."""
        mask = self._rungs[rung]
        if not isinstance(mask, PartMask):
            return None
        outside = np.ones((box.height, box.width), np.bool_)
        inner = mask.inner(box)
        if inner is not None:
            outside[inner.slices(box)] = False
        return outside


class Likeliest(LabelMask):
    """The number of the mask, of several of probabilities, that has the largest value; the first of equal ones."""

    def __init__(self, masks: Sequence[LabelMask]) -> None:
        self._masks = masks
        self.shape, self.placement = masks[0].shape, masks[0].placement
        self.stored_shape = stored_shape(masks[0])

    @staticmethod
    def of(masks: Sequence[LabelMask]) -> LabelMask:
        """The likeliest of masks of a whole slide, or all of the same part of it."""
        parts = [mask for mask in masks if isinstance(mask, PartMask)]
        if not parts:
            return Likeliest(masks)
        return PartMask(Likeliest([part.mask for part in parts]), parts[0].part, parts[0].grid)

    @property
    def name(self) -> str:
        return self._masks[0].name

    @property
    def cache_bytes(self) -> int:
        return sum(mask.cache_bytes for mask in self._masks)

    def read(self, box: Box) -> Labels:
        best = self._masks[0].read(box).copy()
        labels = np.zeros(best.shape, np.uint8)
        for number, mask in enumerate(self._masks[1:], 1):
            values = mask.read(box)
            more = values > best
            labels[more] = number
            np.copyto(best, values, where=more)
        return labels

    def at(self, height: int, width: int) -> Likeliest:
        return Likeliest([mask.at(height, width) for mask in self._masks])


def stored_shape(mask: LabelMask) -> tuple[int, int] | None:
    """``(h, w)`` of the whole slide in pixels as large as those that are stored; None of outlines."""
    if isinstance(mask, PartMask):
        return mask.grid
    return getattr(mask, "stored_shape", None)


class Thresholded(LabelMask):
    """The mask that probabilities make: 1 from ``threshold`` (of 255) on."""

    def __init__(self, probability: LabelMask, threshold: int) -> None:
        self._probability, self.threshold = probability, threshold
        self.shape, self.placement = probability.shape, probability.placement

    @property
    def name(self) -> str:
        return self._probability.name

    @property
    def cache_bytes(self) -> int:
        return self._probability.cache_bytes

    def read(self, box: Box) -> Labels:
        return (self._probability.read(box) >= self.threshold).view(np.uint8)

    def at(self, height: int, width: int) -> Thresholded:
        return Thresholded(self._probability.at(height, width), self.threshold)

"""Labels and probabilities as maps for the screen: each rung's pixels, each with the value at its centre.

A large label map is read from its smaller levels where these hold labels (those that wholegrad wrote) and the rung has
no more pixels than they; otherwise from level 0, which is what masks up to 64 MiB are kept in memory for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from wholegrad.errors import ShapeError
from wholegrad.graph.geometry import Box
from wholegrad.metrics.files import source
from wholegrad.slide.arrays import open_npy
from wholegrad.slide.mask import SMALL, LabelMask, StoredMask, open_lower_levels, open_mask
from wholegrad.slide.reader import MapReader

Labels = npt.NDArray[np.uint8]

TIFFS = (".tif", ".tiff")
SOFTWARE = "wholegrad"  # what our own files say that they were written by


class Screen:
    """One map of bytes at every rung of its slide. Thread-safe.

    Attributes:
        full: the map at the slide's resolution.
    """

    def __init__(self, full: LabelMask, lower: Sequence[LabelMask], sizes: Sequence[tuple[int, int]]) -> None:
        self.full, self._lower, self._sizes = full, lower, sizes
        self._rungs = [self._choose(size) for size in sizes]

    def _choose(self, size: tuple[int, int]) -> LabelMask:
        enough = [level for level in self._lower if isinstance(level, StoredMask) and level.stored_shape[0] >= size[0]]
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
        if isinstance(self.full, StoredMask) and not self._lower and math.prod(self.full.stored_shape) > SMALL:
            return []
        height, width = self._sizes[-1]
        return [int(label) for label in np.unique(self.read(len(self._sizes) - 1, Box(0, height, 0, width)))]

    def close(self) -> None:
        """Close the files."""
        for mask in (self.full, *self._lower):
            mask.close()


def open_labels(
    path: Path,
    slide: MapReader,
    sizes: Sequence[tuple[int, int]],
    classes: Mapping[str, int | None] | None = None,
) -> Screen:
    """The labels of a slide: what ``open_mask`` opens, Zarr, too.

    Raises:
        WholegradError: as ``open_mask``.
    """
    full = open_mask(source(path), like=slide, classes=classes)
    lower = []
    if path.suffix.lower() in TIFFS and _written_by_us(path):
        lower = open_lower_levels(path, slide)
    return Screen(full, lower, sizes)


def open_probability(path: Path, slide: MapReader, sizes: Sequence[tuple[int, int]]) -> Screen:
    """One channel of probabilities, as bytes times 255 or (.npy) as floating-point numbers.

    Raises:
        ShapeError: several channels, or numbers that are no probabilities.
        SlideError: it cannot be read, or does not fit the slide.
    """
    if path.suffix.lower() == ".npy":
        return Screen(open_mask(_Bytes(open_npy(path)), like=slide), [], sizes)
    full = open_mask(source(path), like=slide)
    if not isinstance(full, StoredMask):
        full.close()
        raise ShapeError(str(path), "holds outlines, which are no probabilities", "give it as --prediction")
    return Screen(full, open_lower_levels(path, slide) if path.suffix.lower() in TIFFS else [], sizes)


def _written_by_us(path: Path) -> bool:
    with tifffile.TiffFile(path) as tiff:
        return str(tiff.pages.first.tags.valueof(305, default="")) == SOFTWARE


class _Bytes:
    """Probabilities as bytes."""

    def __init__(self, reader: MapReader) -> None:
        if reader.dtype.kind != "f" and reader.dtype != np.uint8:
            raise ShapeError(reader.name, f"holds {reader.dtype} values", "give probabilities as floats or as uint8")
        self._reader, self.shape, self.name = reader, reader.shape, reader.name
        self.dtype: np.dtype[np.generic] = np.dtype(np.uint8)
        self.cache_bytes = reader.cache_bytes
        self.concurrent = bool(getattr(reader, "concurrent", False))

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        values = self._reader.read(box)
        if values.dtype == np.uint8:
            return values
        return np.rint(np.clip(values.astype(np.float32), 0, 1) * 255).astype(np.uint8)


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

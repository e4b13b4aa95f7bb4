"""Opens labels and probabilities for the screen, of a whole slide or of a part of it, of one channel or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from wholegrad.errors import ConfigError, ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.metrics.files import is_outlines, source
from wholegrad.slide.arrays import as_reader, open_npy
from wholegrad.slide.mask import SMALL, LabelMask, StoredMask, open_mask, stored_labels
from wholegrad.slide.origin import Origin
from wholegrad.slide.partial import Part, PartMask, of_part
from wholegrad.slide.placement import placement_of
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.pyramid import HeldPixels
from wholegrad.slide.reader import MapReader
from wholegrad.slide.tiff import count_planes, read_container
from wholegrad.view.labels import Likeliest, Screen

TIFFS = (".tif", ".tiff")
SOFTWARE = "wholegrad"  # what our own files say that they were written by
Sizes = Sequence[tuple[int, int]]


def open_labels(
    path: Path,
    slide: MapReader,
    sizes: Sizes,
    classes: Mapping[str, int | None] | None = None,
    part: Part | None = None,
) -> Screen:
    """A label map, or outlines with ``classes``, for the screen.

    Args:
        part: of the slide, in level-0 pixels, that it shows, where the file does not tell.

    Raises:
        ConfigError, ShapeError, SlideError: as :func:`wholegrad.open_mask`.
    """
    if is_outlines(path):
        drawn: LabelMask = open_mask(path, like=slide, classes=classes)
        return Screen(drawn if part is None else PartMask(drawn, part), [], sizes)
    if path.suffix.lower() not in TIFFS:
        if part is None:
            return Screen(open_mask(source(path), like=slide, classes=classes), [], sizes)
        reader = _reader(path)
        if reader.dtype != np.uint8:
            raise ShapeError(reader.name, f"holds {reader.dtype} values", "give labels 0 to 254 as uint8")
        return Screen(of_part(reader, slide, part), [], sizes)
    tiff = _Tiff(path)
    part = tiff.part(slide) or part
    levels = tiff.levels if tiff.ours else 1  # other programs' smaller levels may mix labels
    full, *lower = _all(range(levels), lambda number: tiff.open(number, slide, part))
    return Screen(full, lower, sizes)


def open_probability(path: Path, slide: MapReader, sizes: Sizes, part: Part | None = None) -> list[Screen]:
    """Probabilities of each channel, as bytes times 255 or (.npy, .zarr) as floating-point numbers.

    Raises:
        ShapeError: numbers that are no probabilities.
        SlideError: it cannot be read, or does not fit the slide.
    """
    if is_outlines(path):
        raise ShapeError(str(path), "holds outlines, which are no probabilities", "give it as --prediction")
    if path.suffix.lower() not in TIFFS:
        reader = _reader(path)
        channels = [Channel(reader, number) for number in range(reader.shape[0])]
        return [Screen(_placed(channel, slide, part), [], sizes) for channel in channels]
    tiff = _Tiff(path)
    part = tiff.part(slide) or part
    screens: list[Screen] = []
    try:
        for channel in range(tiff.channels):
            full, *lower = _all(range(tiff.levels), lambda number, c=channel: tiff.open(number, slide, part, c))  # type: ignore[misc]
            screens.append(Screen(full, lower, sizes))
    except BaseException:
        for screen in screens:
            screen.close()
        raise
    return screens


def likeliest(screens: Sequence[Screen], sizes: Sizes) -> Screen:
    """The channel of the greatest probability, as a label map; closes nothing, since its maps are those of others."""
    full = Likeliest.of([screen.full for screen in screens])
    levels = zip(*(screen.lower for screen in screens), strict=True)
    return Screen(full, [Likeliest.of(level) for level in levels], sizes)


class _Tiff:
    """What a TIFF has, before its levels are opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = PositionedFile(path)
        try:
            self.planes = count_planes(path, file.size)
            container = read_container(path, file.size, 0 if self.planes > 1 else None)
        finally:
            file.close()
        self.levels, self._origin = len(container.levels), container.origin
        self.samples = container.levels[0].channels
        self.channels = self.planes if self.planes > 1 else self.samples
        with tifffile.TiffFile(path) as tiff:
            self.ours = str(tiff.pages.first.tags.valueof(305, default="")) == SOFTWARE

    def part(self, slide: MapReader) -> Part | None:
        """The part of the slide that the file says to show; None if it does not say.

        Raises:
            SlideError: it is of another slide.
        """
        return None if self._origin is None else _part_of(self._origin, slide, self.path)

    def open(self, number: int, slide: MapReader, part: Part | None, channel: int | None = None) -> LabelMask:
        """One level of one channel; the only one if ``channel`` is not given."""
        which = {}
        if channel is not None and self.channels > 1:
            which = {"plane": channel} if self.planes > 1 else {"sample": channel}
        elif channel is None and self.planes > 1:
            cause = f"has {self.planes} channels, so its values are no labels"
            raise ShapeError(str(self.path), cause, "give it as --probability, or export labels as one channel")
        stored, container = stored_labels(self.path, SMALL // self.channels, 1, number, **which)
        try:
            told = container.mpp if number == 0 and part is None else None
            return _placed(stored, slide, part, told)
        except BaseException:
            stored.close()
            raise


def _part_of(origin: Origin, slide: MapReader, path: Path) -> Part | None:
    placed = placement_of(slide)
    if origin.size != placed.size:
        cause = f"shows a part of a slide of {origin.size[0]} x {origin.size[1]} pixels, not of {slide.name}"
        raise SlideError(str(path), cause, "give the prediction of this slide")
    ends = [(axis.start, axis.start + axis.step) for axis in (origin.rows, origin.cols)]
    whole = all(first == 0 and last == size for (first, last), size in zip(ends, placed.size, strict=True))
    return None if whole else (*ends[0], *ends[1])


def part_of_region(region: tuple[int, int, int, int]) -> Part:
    """``(x, y, width, height)`` in level-0 pixels as a part.

    Raises:
        ConfigError: it is empty.
    """
    x, y, width, height = region
    if width < 1 or height < 1:
        raise ConfigError("region", f"{region} is empty", "give X,Y,WIDTH,HEIGHT in level-0 pixels")
    return Fraction(y), Fraction(y + height), Fraction(x), Fraction(x + width)


def _placed(stored: MapReader, slide: MapReader, part: Part | None, mpp: float | None = None) -> LabelMask:
    known = mpp if mpp is not None and np.isfinite(mpp) else None
    return StoredMask(stored, slide, known) if part is None else of_part(stored, slide, part)


def _reader(path: Path) -> MapReader:
    """A label file that is no TIFF, as it is stored."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return open_npy(path)
    if suffix == ".zarr":
        return as_reader(source(path), name=str(path))
    if suffix in (".png", ".jpg", ".jpeg"):
        from wholegrad.slide.pictures import read_label_picture  # Pillow, for those who need it

        PositionedFile(path).close()  # for its plain error when the file is missing
        return HeldPixels(read_label_picture(str(path)), str(path))
    PositionedFile(path).close()
    raise SlideError(str(path), "is no label file by its name", "name it .tif, .zarr, .npy, .png, .geojson or .xml")


def _all(numbers: Sequence[int], make: Callable[[int], LabelMask]) -> list[LabelMask]:
    """What ``make`` opens of each; all closed again if one cannot be opened."""
    opened: list[LabelMask] = []
    try:
        for number in numbers:
            opened.append(make(number))
    except BaseException:
        for mask in opened:
            mask.close()
        raise
    return opened


class Channel:
    """One channel of probabilities as bytes."""

    def __init__(self, reader: MapReader, number: int) -> None:
        if reader.dtype.kind != "f" and reader.dtype != np.uint8:
            raise ShapeError(reader.name, f"holds {reader.dtype} values", "give probabilities as floats or as uint8")
        self._reader, self._number, self.name = reader, number, reader.name
        self.shape = (1, reader.shape[1], reader.shape[2])
        self.dtype: np.dtype[np.generic] = np.dtype(np.uint8)
        self.cache_bytes = reader.cache_bytes
        self.concurrent = bool(getattr(reader, "concurrent", False))

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        values = self._reader.read(box)[self._number : self._number + 1]
        if values.dtype == np.uint8:
            return values
        return np.rint(np.clip(values.astype(np.float32), 0, 1) * 255).astype(np.uint8)

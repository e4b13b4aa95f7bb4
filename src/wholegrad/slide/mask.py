"""Aligns labels with their slide: label maps of any resolution, and outlines, read by box (rule 9).

A mask pixel covers ``slide size / mask size`` slide pixels along each axis, and a pixel of the slide gets the label at
its centre, found in whole numbers. Outlines are in level-0 pixels and rasterised by box (``slide.drawn``).
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError, ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import as_reader, open_npy
from wholegrad.slide.buffers import ReusedBuffer, check_box
from wholegrad.slide.placement import Placement, placement_of, whole_slide
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.pyramid import HeldPixels
from wholegrad.slide.reader import MapReader
from wholegrad.slide.tiff import Container, Level, read_container
from wholegrad.slide.tiff_tiles import TiffTiles
from wholegrad.slide.tiles import TileReader

if TYPE_CHECKING:  # shapely and Numba are loaded for those who open outlines
    from wholegrad.slide.drawn import Drawing

GEOJSON = (".geojson", ".json", ".geojson.gz", ".json.gz")
PICTURES = (".png", ".jpg", ".jpeg")
SMALL = 64 << 20  # bytes; a label map up to this size is decoded once and kept
ROUNDING = 1.5  # mask pixels by which the fields of view may differ, along either axis
SAME_VIEW = 0.02  # by which they may differ where both files tell their um a pixel
OUTSIDE = 0.02  # of a slide's side by which outlines may reach beyond it

Labels = npt.NDArray[np.uint8]


def open_mask(
    source: str | os.PathLike[str] | Any,
    like: MapReader,
    *,
    mpp: float | None = None,
    classes: Mapping[str, int | None] | None = None,
    ignore: Iterable[str] | None = None,
    origin: tuple[float, float] = (0.0, 0.0),
    cache_bytes: int = SMALL,
    threads: int = 1,
) -> LabelMask:
    """Open the labels of a slide at that slide's resolution and region.

    Args:
        source: a label map of any resolution (one channel of uint8, labels 0 to 254, 255 to ignore) as TIFF, PNG, .npy
            or array; or outlines in level-0 pixels: GeoJSON (QuPath's; .geojson or .json, also .gz), ASAP XML or
            Aperio XML. A label map shows the whole slide, or exactly the region that ``like`` shows.
        like: the slide (at any resolution, whole or a region) or image.
        mpp: um a pixel of the label map, where the file does not say or is an array.
        classes: of outlines: the label of each class, 0 to 255, None to leave it out; "*" stands for all others. Where
            areas overlap, the class named later wins. By default a single class gets label 1, and several are refused.
        ignore: names of the classes of outlines that become 255 and win over all others; by default those that end in
            a star (QuPath's rule) and "Ignore".
        origin: ``(x, y)`` in level-0 pixels that outlines count from; QuPath leaves out what ``region="bounds"`` does.
        cache_bytes: a label map up to this size (as stored) is kept in memory, a larger one read by box.
        threads: that decode a larger one's tiles.

    Returns:
        A ``MapReader`` of shape ``(1, H, W)``, dtype uint8, with the slide's H and W. What no outline covers is 0.

    Raises:
        SlideError: the file is missing or damaged, holds no outline or several classes without ``classes``, or does
            not belong to the slide: another field of view, outlines beyond its edge.
        ShapeError: several channels, or values that are not uint8.
        ConfigError: ``classes`` lacks a class of the file, or goes with a label map.
    """
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    suffix = "" if path is None else path.name.lower()
    if path is not None and suffix.endswith((*GEOJSON, ".xml")):
        return _open_outlines(str(path), like, classes, ignore, origin)
    if classes is not None or ignore is not None:
        remedy = "leave out classes and ignore, or give GeoJSON or XML"
        raise ConfigError(str(path or "mask"), "is a label map, whose values are labels already", remedy)
    if path is None:
        return StoredMask(_uint8(as_reader(source, name="mask")), like, mpp)
    if suffix.endswith(PICTURES):
        from wholegrad.slide.pictures import read_label_picture  # Pillow, for those who need it

        PositionedFile(path).close()  # for its plain error when the file is missing
        return StoredMask(HeldPixels(read_label_picture(str(path)), str(path)), like, mpp)
    if suffix.endswith(".npy"):
        return StoredMask(_uint8(open_npy(path)), like, mpp)
    return _open_tiff(path, like, mpp, cache_bytes, threads)


def _uint8(reader: MapReader) -> MapReader:
    if reader.dtype != np.uint8:
        raise ShapeError(reader.name, f"holds {reader.dtype} values", "give labels 0 to 254 as uint8, 255 to ignore")
    return reader


def open_lower_levels(path: str | os.PathLike[str], like: MapReader, cache_bytes: int = SMALL) -> list[LabelMask]:
    """The smaller levels of a TIFF of one channel, largest first, each as a mask of ``like``; to look at, not to count.

    ``open_mask`` reads level 0 alone, since other programs' smaller levels may hold means of labels.

    Raises:
        SlideError, ShapeError: as ``open_mask``.
    """
    file = PositionedFile(path)
    try:
        count = len(read_container(file.path, file.size).levels)
    finally:
        file.close()
    opened: list[LabelMask] = []
    try:
        for number in range(1, count):
            opened.append(_open_tiff(Path(path), like, None, cache_bytes, 1, number))
    except BaseException:
        for mask in opened:
            mask.close()
        raise
    return opened


def _open_tiff(
    path: Path, like: MapReader, mpp: float | None, cache_bytes: int, threads: int, number: int = 0
) -> LabelMask:
    stored, container = stored_labels(path, cache_bytes, threads, number)
    told = container.mpp if number == 0 and container.mpp and math.isfinite(container.mpp) else None
    try:
        return StoredMask(stored, like, mpp or told)
    except BaseException:
        stored.close()
        raise


def stored_labels(
    path: Path,
    cache_bytes: int = SMALL,
    threads: int = 1,
    number: int = 0,
    plane: int | None = None,
    sample: int | None = None,
) -> tuple[StoredLabels, Container]:
    """The labels of one level of a TIFF as stored, and what the file tells of itself.

    Args:
        plane, sample: which of several channels, where these lie apart or beside each other; without, there is one.

    Raises:
        SlideError, ShapeError: as ``open_mask``.
    """
    file = PositionedFile(path)
    try:
        container = read_container(path, file.size, plane)
        level = _one_channel(path, container, number) if sample is None else container.levels[number]
        small = level.height * level.width <= cache_bytes
        source = TiffTiles(file, level, channels=1, first=sample or 0)
        tiles = TileReader(source, str(path), number, cache_bytes=0 if small else cache_bytes, threads=threads)
        return StoredLabels(file, tiles, keep=small), container
    except BaseException:
        file.close()
        raise


def _one_channel(path: Path, container: Container, number: int) -> Level:
    level = container.levels[number]
    if level.channels != 1:
        cause = f"has {level.channels} channels, so its values are colours and not labels"
        raise ShapeError(str(path), cause, "export labels 0 to 254 as one channel of uint8")
    return level


def _open_outlines(
    path: str,
    like: MapReader,
    classes: Mapping[str, int | None] | None,
    ignore: Iterable[str] | None,
    origin: tuple[float, float],
) -> DrawnMask:
    from wholegrad.slide.classes import to_paint
    from wholegrad.slide.drawn import Drawing
    from wholegrad.slide.geojson_read import read_geojson
    from wholegrad.slide.xml_read import read_xml

    outlines = read_xml(path) if path.lower().endswith(".xml") else read_geojson(path)
    drawing = Drawing(path, to_paint(path, outlines, classes, ignore), origin)
    _check_on_slide(path, drawing, like)
    return DrawnMask(drawing, like)


def _check_on_slide(path: str, drawing: Drawing, like: MapReader) -> None:
    """Refuse outlines that reach well beyond the slide: they belong to another."""
    height, width = placement_of(like).size
    left, top, right, bottom = drawing.bounds
    beyond = max(-left / width, -top / height, right / width - 1, bottom / height - 1)
    if beyond > OUTSIDE:
        cause = f"has outlines at x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}"
        remedy = "give the outlines of this slide, in level-0 pixels (origin= shifts them)"
        raise SlideError(path, f"{cause}, beyond {like.name} ({width} x {height} pixels)", remedy)


class StoredLabels:
    """The label map as stored, ``(1, h, w)``: decoded at the first read and kept, or read by box."""

    def __init__(self, file: PositionedFile, tiles: TileReader, keep: bool) -> None:
        self._file, self._tiles, self._keep = file, tiles, keep
        self._kept: Labels | None = None
        self.shape, self.dtype = tiles.shape, np.dtype(np.uint8)
        self.name = str(file.path)
        self.cache_bytes = tiles.cache_bytes + (tiles.shape[1] * tiles.shape[2] if keep else 0)

    def read(self, box: Box) -> Labels:
        if not self._keep:
            return self._tiles.read(box)
        if self._kept is None:
            self._kept = self._read_all()
        rows, cols = box.slices()
        return self._kept[:, rows, cols]

    def _read_all(self) -> Labels:
        """Every label, read in bands so that no second copy of the whole exists."""
        _, height, width = self.shape
        kept = np.empty((1, height, width), np.uint8)
        for top in range(0, height, 512):
            band = Box(top, min(top + 512, height), 0, width)
            kept[:, band.y0 : band.y1] = self._tiles.read(band)
        return kept

    def close(self) -> None:
        self._tiles.close()
        self._file.close()


class LabelMask(ABC):
    """Labels at the size of their slide: a map ``(1, H, W)`` of uint8. See ``open_mask``.

    Attributes:
        placement: where its pixels lie on the slide.
    """

    concurrent = True  # a buffer a thread
    dtype: np.dtype[np.generic] = np.dtype(np.uint8)
    shape: tuple[int, int, int]
    placement: Placement

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes held between reads. The labels of one box come on top."""

    @abstractmethod
    def read(self, box: Box) -> Labels:
        """Labels of ``box`` as ``(1, h, w)``, valid until this thread's next read.

        Raises:
            ShapeError: the box is empty or reaches outside the slide.
            SlideError: the mask is closed or damaged.
        """

    @abstractmethod
    def at(self, height: int, width: int) -> LabelMask:
        """The same labels on another number of pixels, each with the label at its centre."""

    def close(self) -> None:  # noqa: B027 - outlines have no file to close
        """Close the file; reading afterwards is a SlideError, unless the labels are kept in memory."""

    def __enter__(self) -> LabelMask:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StoredMask(LabelMask):
    """The nearest label of a label map.

    Attributes:
        stored_shape: ``(h, w)`` of the label map as stored.
        mpp: um a pixel of the stored map, None if unknown.
    """

    def __init__(self, stored: MapReader, like: MapReader, mpp: float | None = None) -> None:
        if stored.shape[0] != 1:
            raise ShapeError(stored.name, f"has {stored.shape[0]} channels", "give one channel of labels")
        self._stored = stored
        self.shape = (1, like.shape[1], like.shape[2])
        self.stored_shape = (stored.shape[1], stored.shape[2])
        self.mpp = mpp
        self.placement = placement_of(like)
        self._on = _shown(stored.name, self.stored_shape, mpp, like)
        self._out = ReusedBuffer()

    @classmethod
    def of(cls, stored: MapReader, like: MapReader, on: Placement) -> StoredMask:
        """One whose field of view nobody checks: ``on`` has ``like``'s pixels on what the label map shows."""
        made = cls.__new__(cls)
        made._stored, made._on, made._out, made.mpp = stored, on, ReusedBuffer(), None
        made.shape, made.stored_shape = (1, like.shape[1], like.shape[2]), (stored.shape[1], stored.shape[2])
        made.placement = placement_of(like)
        return made

    @property
    def name(self) -> str:
        return self._stored.name

    @property
    def cache_bytes(self) -> int:
        """Bytes of labels kept and tiles in decoding. The box's labels, stored and scaled, come on top."""
        return self._stored.cache_bytes

    def read(self, box: Box) -> Labels:
        check_box(self.name, self.shape, box)
        rows = self._on.rows.nearest(box.y0, box.y1, self.stored_shape[0], self._on.size[0])
        cols = self._on.cols.nearest(box.x0, box.x1, self.stored_shape[1], self._on.size[1])
        inner = Box(int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1)
        labels = self._stored.read(inner)[0]
        out = self._out.take((box.height, box.width)).view(np.uint8)
        if (inner.height, inner.width) == (box.height, box.width):
            out[...] = labels
        else:
            _spread(labels, rows - inner.y0, cols - inner.x0, out)
        return out[None]

    def at(self, height: int, width: int) -> StoredMask:
        other = StoredMask.__new__(StoredMask)
        other.__dict__.update(self.__dict__)
        before, after = self.shape[1:], (height, width)
        other.shape, other._out = (1, height, width), ReusedBuffer()
        other._on, other.placement = self._on.scaled(before, after), self.placement.scaled(before, after)
        return other

    def close(self) -> None:
        """Close the file; reading afterwards is a SlideError, unless the labels are kept in memory."""
        close = getattr(self._stored, "close", None)
        if close is not None:
            close()

    def __repr__(self) -> str:
        (h, w), (_, height, width) = self.stored_shape, self.shape
        return f"LabelMask({Path(self.name).name}, {h} x {w} stored, {height} x {width} as read)"


class DrawnMask(LabelMask):
    """Outlines, rasterised by box."""

    def __init__(self, drawing: Drawing, like: MapReader) -> None:
        self._drawing, self._out = drawing, ReusedBuffer()
        self.shape, self.placement = (1, like.shape[1], like.shape[2]), placement_of(like)

    @property
    def name(self) -> str:
        return self._drawing.name

    @property
    def cache_bytes(self) -> int:
        """Bytes of the outlines. The box's labels come on top, twice."""
        return self._drawing.nbytes

    def read(self, box: Box) -> Labels:
        check_box(self.name, self.shape, box)
        out = self._out.take((box.height, box.width)).view(np.uint8)
        self._drawing.paint(box, self.placement, out)
        return out[None]

    def at(self, height: int, width: int) -> DrawnMask:
        other = DrawnMask(self._drawing, self)
        other.shape = (1, height, width)
        other.placement = self.placement.scaled(self.shape[1:], (height, width))
        return other

    def __repr__(self) -> str:
        return f"DrawnMask({Path(self.name).name}, {self._drawing.count} outlines, {self.shape[1]} x {self.shape[2]})"


def _spread(labels: Labels, rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64], out: Labels) -> None:
    """``out[y, x] = labels[rows[y], cols[x]]``; each stored row is spread once and copied to its repeats."""
    previous = -1
    for y, row in enumerate(rows.tolist()):
        if row == previous:
            out[y] = out[y - 1]
        else:
            np.take(labels[row], cols, out=out[y], mode="clip")
        previous = row


def _shown(name: str, stored: tuple[int, int], mpp: float | None, like: MapReader) -> Placement:
    """Where ``like``'s pixels lie on what the label map shows: the whole slide, or ``like``'s region of it.

    Both are one field of view divided by some factor and rounded, so the products of one's height and the
    other's width may differ only by what that rounding explains.
    """
    placed, (_, height, width) = placement_of(like), like.shape
    region = whole_slide((height, width), (height, width))
    if stored == (height, width):
        return region
    full = float(placed.size[0] / placed.rows.step), float(placed.size[1] / placed.cols.step)
    for shown, view in ((placed, full), (region, (float(height), float(width)))):
        if _same_shape(stored, view):
            _check_same_size(name, stored, mpp, view, like)
            return shown
    raise SlideError(
        name,
        f"is {stored[0]} x {stored[1]} pixels, which is not {like.name} ({full[0]:.0f} x {full[1]:.0f}) at"
        " another scale",
        "give the mask of this slide, with the same field of view",
    )


def _same_shape(stored: tuple[int, int], view: tuple[float, float]) -> bool:
    (h, w), (height, width) = stored, view
    return abs(h * width - w * height) <= ROUNDING * max(height + width, h + w)


def _check_same_size(
    name: str, stored: tuple[int, int], mpp: float | None, view: tuple[float, float], like: MapReader
) -> None:
    """Refuse a label map that shows more or fewer micrometres, where both files tell."""
    slide_mpp = getattr(like, "mpp", None)
    if mpp is None or slide_mpp is None:
        return
    (h, w), (height, width) = stored, view
    ratio = math.sqrt((h * w) / (height * width)) * mpp / slide_mpp
    if abs(ratio - 1) > SAME_VIEW + ROUNDING / min(h, w):
        raise SlideError(
            name,
            f"shows {h * mpp:.0f} x {w * mpp:.0f} um, but {like.name} shows"
            f" {height * slide_mpp:.0f} x {width * slide_mpp:.0f} um",
            "give the mask of this slide, or the right mpp",
        )

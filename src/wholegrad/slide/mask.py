"""Aligns a label map with its slide: same field of view, any resolution, nearest label, read by box (rule 9).

A mask pixel covers ``slide size / mask size`` slide pixels along each axis, so label ``(y, x)`` of the slide
is the mask's at ``(floor((y + 0.5) * h / H), floor((x + 0.5) * w / W))``, computed in integers.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import as_reader
from wholegrad.slide.buffers import ReusedBuffer, check_box
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.reader import MapReader
from wholegrad.slide.tiff import Container, Level, read_container
from wholegrad.slide.tiles import TileReader

SMALL = 64 << 20  # bytes; a label map up to this size is decoded once and kept
ROUNDING = 1.5  # mask pixels by which the fields of view may differ, along either axis
SAME_VIEW = 0.02  # by which they may differ where both files tell their um a pixel

Labels = npt.NDArray[np.uint8]


def open_mask(
    source: str | os.PathLike[str] | Any,
    like: MapReader,
    *,
    mpp: float | None = None,
    cache_bytes: int = SMALL,
    threads: int = 1,
) -> LabelMask:
    """Open the label map of a slide at that slide's size.

    Args:
        source: a one-channel uint8 TIFF of any resolution (labels 0 to 254, 255 to ignore), or such an array.
        like: the slide (at any level) or image.
        mpp: um a pixel of the mask, where the file does not say or is an array.
        cache_bytes: a label map up to this size (as stored) is kept in memory, a larger one read by box.
        threads: that decode a larger one's tiles.

    Returns:
        A ``MapReader`` of shape ``(1, H, W)``, dtype uint8, with the slide's H and W.

    Raises:
        SlideError: the file is missing, damaged or not 8-bit, or has another field of view than the slide.
        ShapeError: several channels, or values that are not uint8.
    """
    if isinstance(source, str | os.PathLike):
        return _open_file(Path(source), like, mpp, cache_bytes, threads)
    reader = as_reader(source, name="mask")
    if reader.dtype != np.uint8:
        raise ShapeError(reader.name, f"holds {reader.dtype} values", "give labels 0 to 254 as uint8, 255 to ignore")
    return LabelMask(reader, like, mpp)


def _open_file(path: Path, like: MapReader, mpp: float | None, cache_bytes: int, threads: int) -> LabelMask:
    file = PositionedFile(path)
    try:
        if path.suffix.lower() in (".geojson", ".json"):
            raise SlideError(str(path), "outlines are not read as a mask", "export a label TIFF of the same slide")
        container = read_container(path, file.size)
        level = _one_channel(path, container)
        small = level.height * level.width <= cache_bytes
        tiles = TileReader(
            file, level, 0, channels=1, blank=0, cache_bytes=0 if small else cache_bytes, threads=threads
        )
        stored = _StoredLabels(file, tiles, keep=small)
        return LabelMask(stored, like, mpp or container.mpp)
    except BaseException:
        file.close()
        raise


def _one_channel(path: Path, container: Container) -> Level:
    level = container.levels[0]
    if level.channels != 1:
        cause = f"has {level.channels} channels, so its values are colours and not labels"
        raise ShapeError(str(path), cause, "export labels 0 to 254 as one channel of uint8")
    return level


class _StoredLabels:
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


class LabelMask:
    """A label map at the size of its slide: ``(1, H, W)`` uint8, the nearest stored label. See ``open_mask``.

    Attributes:
        stored_shape: ``(h, w)`` of the label map as stored.
        mpp: um a pixel of the stored map, None if unknown.
    """

    concurrent = True  # a buffer a thread

    def __init__(self, stored: MapReader, like: MapReader, mpp: float | None = None) -> None:
        if stored.shape[0] != 1:
            raise ShapeError(stored.name, f"has {stored.shape[0]} channels", "give one channel of labels")
        self._stored = stored
        self.shape = (1, like.shape[1], like.shape[2])
        self.stored_shape = (stored.shape[1], stored.shape[2])
        self.mpp = mpp
        _check_same_view(stored.name, self.stored_shape, mpp, like)
        self._out = ReusedBuffer()

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(np.uint8)

    @property
    def name(self) -> str:
        return self._stored.name

    @property
    def cache_bytes(self) -> int:
        """Bytes of labels kept and tiles in decoding. The box's labels, stored and scaled, come on top."""
        return self._stored.cache_bytes

    def read(self, box: Box) -> Labels:
        """Labels of ``box`` as ``(1, h, w)``, valid until this thread's next read.

        Raises:
            ShapeError: the box is empty or reaches outside the slide.
            SlideError: the mask is closed or damaged.
        """
        check_box(self.name, self.shape, box)
        rows = _nearest(box.y0, box.y1, self.stored_shape[0], self.shape[1])
        cols = _nearest(box.x0, box.x1, self.stored_shape[1], self.shape[2])
        inner = Box(int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1)
        labels = self._stored.read(inner)[0]
        out = self._out.take((box.height, box.width)).view(np.uint8)
        if (inner.height, inner.width) == (box.height, box.width):
            out[...] = labels
        else:
            _spread(labels, rows - inner.y0, cols - inner.x0, out)
        return out[None]

    def close(self) -> None:
        """Close the file; reading afterwards is a SlideError, unless the labels are kept in memory."""
        close = getattr(self._stored, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> LabelMask:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        (h, w), (_, height, width) = self.stored_shape, self.shape
        return f"LabelMask({Path(self.name).name}, {h} x {w} stored, {height} x {width} as read)"


def _nearest(start: int, stop: int, stored: int, size: int) -> npt.NDArray[np.int64]:
    """Stored index of each of the pixels ``start .. stop`` of an axis that is ``size`` long here."""
    return (2 * np.arange(start, stop, dtype=np.int64) + 1) * stored // (2 * size)


def _spread(labels: Labels, rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64], out: Labels) -> None:
    """``out[y, x] = labels[rows[y], cols[x]]``; each stored row is spread once and copied to its repeats."""
    previous = -1
    for y, row in enumerate(rows.tolist()):
        if row == previous:
            out[y] = out[y - 1]
        else:
            np.take(labels[row], cols, out=out[y], mode="clip")
        previous = row


def _check_same_view(name: str, stored: tuple[int, int], mpp: float | None, like: MapReader) -> None:
    """Refuse a mask whose field of view is not the slide's.

    Both are one field of view divided by some factor and rounded, so the products of one's height and the
    other's width may differ only by what that rounding explains.
    """
    (h, w), (_, height, width) = stored, like.shape
    if abs(h * width - w * height) > ROUNDING * max(height + width, h + w):
        raise SlideError(
            name,
            f"is {h} x {w} pixels, which is not {like.name} ({height} x {width}) at another scale",
            "give the mask of this slide, with the same field of view",
        )
    slide_mpp = getattr(like, "mpp", None)
    if mpp is None or slide_mpp is None:
        return
    ratio = math.sqrt((h * w) / (height * width)) * mpp / slide_mpp
    if abs(ratio - 1) > SAME_VIEW + ROUNDING / min(h, w):
        raise SlideError(
            name,
            f"shows {h * mpp:.0f} x {w * mpp:.0f} um, but {like.name} shows"
            f" {height * slide_mpp:.0f} x {width * slide_mpp:.0f} um",
            "give the mask of this slide, or the right mpp",
        )

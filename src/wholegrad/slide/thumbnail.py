"""Makes a small picture of a map of any size for reports and panels, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ShapeError
from wholegrad.graph.geometry import Box
from wholegrad.slide.balance import PICTURE, Balanced, find_balance
from wholegrad.slide.mask import LabelMask
from wholegrad.slide.reader import MapReader
from wholegrad.slide.slide import Slide

READ_BYTES = 8 << 20  # of the boxes read
BAND = 16  # rows of labels at a time


def thumbnail(reader: MapReader, max_side: int = 1024) -> npt.NDArray[np.uint8]:
    """The whole map as ``(h, w, 3)`` uint8, its longer side at most ``max_side`` pixels.

    Images are averaged over blocks; one channel is repeated three times; a label mask keeps its labels
    (nearest). A slide is read from its lowest level that is large enough.

    Raises:
        ShapeError: values that are not uint8, or ``max_side`` below one.
        SlideError: the pixels cannot be read.
    """
    if reader.dtype != np.uint8 or max_side < 1 or reader.shape[0] not in (1, 3):
        cause = f"{reader.shape[0]} channels of {reader.dtype} at max_side={max_side}"
        raise ShapeError(reader.name, cause, "give one or three channels of uint8 and a size above zero")
    if isinstance(reader, LabelMask):
        return _labels(reader, max_side)
    if isinstance(reader, Balanced):
        return reader.seen(thumbnail(reader.beneath, max_side))
    lower = _lower_level(reader, max_side) if isinstance(reader, Slide) else None
    if isinstance(reader, Slide) and lower is not None:
        with reader.at(lower) as level:
            return _shrink(level, max_side)
    return _shrink(reader, max_side)


def balanced(slide: MapReader) -> Balanced:
    """A slide ``(3, H, W)`` of uint8 with its glass and ink evened out, by what a picture of all of it shows.

    Raises:
        ShapeError: it has other channels or values.
        SlideError: its pixels cannot be read.
    """
    if isinstance(slide, Slide) and slide.share != (1.0, 1.0):  # of a region too
        with slide.whole() as whole:
            return Balanced(slide, find_balance(thumbnail(whole, PICTURE)))
    return Balanced(slide, find_balance(thumbnail(slide, PICTURE)))


def _lower_level(slide: Slide, max_side: int) -> int | None:
    """The smallest level that is smaller than the slide as opened and still large enough, if there is one."""
    shown = [max(h * slide.share[0], w * slide.share[1]) for h, w in slide.level_shapes]
    fitting = [n for n, side in enumerate(shown) if max_side <= side < max(slide.shape[1:])]
    return max(fitting, default=None)


def _labels(mask: LabelMask, max_side: int) -> npt.NDArray[np.uint8]:
    """Labels at the centres of the picture's pixels, a band of rows at a time."""
    height, width = mask.shape[1:]
    scale = max(1.0, max(height, width) / max_side)
    small = mask.at(max(1, int(height / scale)), max(1, int(width / scale)))
    _, h, w = small.shape
    bands = (Box(y, min(y + BAND, h), 0, w) for y in range(0, h, BAND))
    one = np.concatenate([small.read(band)[0].copy() for band in bands])
    return np.repeat(one[..., None], 3, axis=2)


def _shrink(reader: MapReader, max_side: int) -> npt.NDArray[np.uint8]:
    channels, height, width = reader.shape
    scale = max(1.0, max(height, width) / max_side)
    rows, cols = (_edges(size, max(1, int(size / scale))) for size in (height, width))
    out = np.empty((len(rows) - 1, len(cols) - 1, 3), np.uint8)
    for y, x0, x1 in _boxes(rows, cols, channels):
        box = Box(int(rows[y]), int(rows[y + 1]), int(cols[x0]), int(cols[x1]))
        pixels = reader.read(box).transpose(1, 2, 0)
        lefts = cols[x0:x1] - cols[x0]
        total = np.add.reduceat(pixels.sum(axis=0, dtype=np.int64), lefts, axis=0)
        area = box.height * np.diff(cols[x0 : x1 + 1])[:, None]
        out[y, x0:x1] = (total + area // 2) // area
    return out


def _edges(size: int, parts: int) -> npt.NDArray[np.int64]:
    """Where each of ``parts`` nearly equal parts of an axis starts, and the end."""
    return np.arange(parts + 1, dtype=np.int64) * size // parts


def _boxes(rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64], channels: int) -> Iterator[tuple[int, int, int]]:
    """One output row and a range of output columns at a time, each a box of at most READ_BYTES."""
    for y in range(len(rows) - 1):
        per_column = int(rows[y + 1] - rows[y]) * channels * int(np.diff(cols).max())
        step = max(1, READ_BYTES // per_column)
        for x0 in range(0, len(cols) - 1, step):
            yield y, x0, min(x0 + step, len(cols) - 1)

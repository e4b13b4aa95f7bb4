"""Cuts an image of any size that comes top to bottom into tiles of a pyramid, in bounded memory.

A band of one row of tiles is encoded as soon as it is complete, and made half as large into the next level's band,
so that what is held is one band a level, never an image:

    level 0  band of T rows  -> encoded tiles -> store
                |  halved (mean of 2 x 2; for labels the top left of each 2 x 2, so that none mix)
    level 1  band of T rows  -> ...

What a tile becomes and where it goes is each format's own: see :mod:`wholegrad.slide.write` and ``zarr_write``.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import imagecodecs
import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError, ShapeError, SlideError
from wholegrad.graph.geometry import Box

Array = npt.NDArray[Any]
Levels = int | Literal["auto"]

FLAT, FLAT_BYTES = 256, 1 << 16  # encoded tiles of one value that are kept, and the most bytes of one


@dataclass
class Level:
    """One level in the making: its rows so far."""

    height: int
    width: int
    done: int = 0  # rows encoded
    held: int = 0  # rows waiting in the buffer
    buffer: Array | None = None


class LevelWriter(ABC):
    """Takes rows top to bottom and stores encoded tiles, level by level; complete or not at all (rule 11).

    Args:
        path: of the result; an existing one is replaced at the end.
        shape: ``(C, H, W)``.
        dtype: of the values.
        tile: edge of the square tiles, pixels, a multiple of 16.
        levels: how many, or "auto": until the smallest fits in one tile.
        label: lower levels take one of the labels instead of the mean.
        planar: a tile holds one channel, not all.
        threads: that encode tiles; by default two.

    Raises:
        ConfigError: settings that do not go together.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: tuple[int, int, int],
        dtype: npt.DTypeLike,
        *,
        tile: int,
        levels: Levels,
        label: bool,
        planar: bool,
        threads: int | None,
    ) -> None:
        self.path, self.shape, self.dtype = Path(path), shape, np.dtype(dtype)
        self._tile, self._label, self._planar = tile, label, planar
        if tile < 16 or tile % 16:
            raise ConfigError(str(path), f"tile={tile}", "give a multiple of 16")
        if self.dtype.kind not in "uif" or min(shape) < 1:
            raise ConfigError(str(path), f"shape {shape}, dtype {self.dtype}", "give sizes above zero, and numbers")
        self.levels = _levels(shape, tile, levels)
        self._strip: tuple[Array, int] | None = None
        self._workers = ThreadPoolExecutor(threads or min(2, os.cpu_count() or 1), "wholegrad-encode")
        self._flat: dict[bytes, list[bytes]] = {}  # encoded tiles of one value, of which masks are full
        self._open = True

    @abstractmethod
    def _encode(self, tile: Array) -> bytes:
        """A tile ``(T, T, C)``, C-contiguous, as bytes; called on several threads."""

    @abstractmethod
    def _store(self, level: int, row: int, channel: int, data: list[bytes]) -> None:
        """Keep one row of encoded tiles; channels (only 0 unless planar) follow each other."""

    @abstractmethod
    def _seal(self) -> None:
        """Write what comes after the last tile, and sync."""

    @abstractmethod
    def _publish(self) -> None:
        """Give the sealed result its name."""

    @abstractmethod
    def _discard(self) -> None:
        """Remove what was written so far."""

    @property
    def rows_written(self) -> int:
        """Rows received so far."""
        return self.levels[0].done + self.levels[0].held

    @property
    def buffer_bytes(self) -> int:
        """Most bytes held: one band a level, the first only if rows come in other heights than bands."""
        row = self._tile * self.shape[0] * self.dtype.itemsize
        return sum(band.width * row for band in self.levels)

    def write_rows(self, rows: Array) -> None:
        """Append full rows ``(h, W, C)`` or, for one channel, ``(h, W)``. Multiples of ``tile`` are fastest.

        Raises:
            ShapeError: another width, channel count or dtype, or more rows than the image has.
            SlideError: the writer is closed, or the file cannot be written.
        """
        if not self._open:
            raise SlideError(str(self.path), "is closed or given up", "open another writer")
        rows = rows[..., None] if rows.ndim == 2 else rows
        channels, height, width = self.shape
        if rows.ndim != 3 or rows.shape[1:] != (width, channels) or rows.dtype != self.dtype:
            cause = f"rows of shape {rows.shape}, {rows.dtype} do not belong to {self.shape}, {self.dtype}"
            raise ShapeError(str(self.path), cause, "give (h, W, C), or (h, W) for one channel")
        if self.rows_written + len(rows) > height:
            cause = f"{len(rows)} rows after {self.rows_written} are more than its {height}"
            raise ShapeError(str(self.path), cause, "write each row once")
        try:
            self._push(0, rows)
        except BaseException:
            self.abort()
            raise

    def write_box(self, box: Box, pixels: Array) -> None:
        """Append a box of pixels ``(C, h, w)``; boxes come in rows of equal height, each from left to right.

        Raises:
            ShapeError: the box does not follow the one before, or errors as for ``write_rows``.
        """
        channels, _, width = self.shape
        if self._strip is None:
            self._strip = np.empty((box.height, width, channels), self.dtype), 0
        strip, filled = self._strip
        expected = (self.rows_written, self.rows_written + len(strip), filled)
        if (box.y0, box.y1, box.x0) != expected or pixels.shape != (channels, box.height, box.width):
            cause = f"box {tuple(box)} of shape {pixels.shape} does not follow (rows and column {expected})"
            raise ShapeError(str(self.path), cause, "write boxes left to right in rows of equal height")
        strip[:, box.x0 : box.x1] = pixels.transpose(1, 2, 0)
        self._strip = strip, box.x1
        if box.x1 == width:
            self._strip = None
            self.write_rows(strip)

    def _push(self, number: int, rows: Array) -> None:
        """Give rows to a level: whole bands are encoded from where they are, others wait in its buffer."""
        band = self.levels[number]
        while len(rows):
            want = min(self._tile, band.height - band.done)
            if band.held == 0 and len(rows) >= want:
                self._flush(number, rows[:want])
                rows = rows[want:]
                continue
            take = min(want - band.held, len(rows))
            self._room(number, take)[...] = rows[:take]
            rows = rows[take:]
            self._grown(number, take)

    def _room(self, number: int, rows: int) -> Array:
        """Where the next ``rows`` rows of a level go in its buffer."""
        band = self.levels[number]
        if band.buffer is None:
            band.buffer = np.empty((min(self._tile, band.height), band.width, self.shape[0]), self.dtype)
        return band.buffer[band.held : band.held + rows]

    def _grown(self, number: int, rows: int) -> None:
        band = self.levels[number]
        band.held += rows
        if band.held == min(self._tile, band.height - band.done):
            held, band.held = band.held, 0
            assert band.buffer is not None
            self._flush(number, band.buffer[:held])

    def _flush(self, number: int, rows: Array) -> None:
        """Encode one band of tiles, and halve it into the next level."""
        band, half = self.levels[number], (len(rows) + 1) // 2
        below = self._room(number + 1, half) if number + 1 < len(self.levels) else None
        lefts = range(0, band.width, self._tile)
        tiles = list(self._workers.map(lambda left: self._encode_tile(rows, left, below), lefts))
        for channel in range(len(tiles[0])):
            self._store(number, band.done // self._tile, channel, [tile[channel] for tile in tiles])
        band.done += len(rows)
        if below is not None:
            self._grown(number + 1, half)

    def _encode_tile(self, rows: Array, left: int, below: Array | None) -> list[bytes]:
        """A tile's bytes, or those of each of its channels."""
        part = rows[:, left : left + self._tile]
        value = part[0, 0]
        flat = self.dtype.kind != "f" and bool((part == value).all())  # 0.0 equals -0.0
        if below is not None:
            out = below[:, left // 2 : left // 2 + (part.shape[1] + 1) // 2]
            if flat:
                out[...] = value
            else:
                _halve(part, out, self._label)
        key = value.tobytes()
        if flat and key in self._flat:
            return self._flat[key]
        encoded = self._encode_part(part)
        if flat and len(self._flat) < FLAT and sum(map(len, encoded)) < FLAT_BYTES:
            self._flat[key] = encoded
        return encoded

    def _encode_part(self, part: Array) -> list[bytes]:
        """A whole tile of ``part``, its edges repeated where it is smaller."""
        missing = self._tile - part.shape[0], self._tile - part.shape[1]
        if any(missing):
            part = np.pad(part, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        if not self._planar:
            return [self._encode(np.ascontiguousarray(part))]
        return [self._encode(np.ascontiguousarray(part[..., c : c + 1])) for c in range(part.shape[2])]

    def seal(self) -> None:
        """All but the name: the result is complete on disk under a temporary one.

        Raises:
            SlideError: rows are missing (nothing is left behind then), or the disk is full.
        """
        if not self._open:
            raise SlideError(str(self.path), "is closed or given up", "open another writer")
        if self.rows_written != self.shape[1]:
            written = self.rows_written
            self.abort()
            cause = f"only {written} of {self.shape[1]} rows were written"
            raise SlideError(str(self.path), cause, "write all rows; no file was left")
        try:
            self._seal()
        except BaseException:
            self.abort()
            raise

    def publish(self) -> None:
        """Give a sealed result its name.

        Raises:
            SlideError: it cannot be renamed; nothing is left behind.
        """
        try:
            self._publish()
        except BaseException:
            self.abort()
            raise
        self._open = False
        self._workers.shutdown()

    def close(self) -> None:
        """Complete the result and give it its name; nothing if that was done.

        Raises:
            SlideError: as ``seal`` and ``publish``.
        """
        if self._open:
            self.seal()
            self.publish()

    def abort(self) -> None:
        """Give up: remove what is unfinished. What had that name stays as it was."""
        self._workers.shutdown(cancel_futures=True)
        if self._open:
            self._open = False
            self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def deflate(tile: Array) -> bytes:
    """A tile as a zlib stream."""
    return bytes(imagecodecs.deflate_encode(tile.tobytes(), level=6))


def _levels(shape: tuple[int, int, int], tile: int, levels: Levels) -> list[Level]:
    """The levels, each half of the one above (rounded up)."""
    _, height, width = shape
    bands = [Level(height, width)]
    while (max(height, width) > tile) if levels == "auto" else (len(bands) < levels):
        height, width = (height + 1) // 2, (width + 1) // 2
        bands.append(Level(height, width))
    return bands


def _halve(part: Array, out: Array, label: bool) -> None:
    """Half of ``part`` into ``out``: the mean of 2 x 2 pixels (odd edges count twice), or a label."""
    if label:
        out[...] = part[::2, ::2]
        return
    whole = part.dtype.kind != "f"
    wide = np.uint16 if part.dtype == np.uint8 else (np.int64 if whole else np.float64)
    odd_rows, odd_cols = part.shape[0] % 2, part.shape[1] % 2
    if odd_rows or odd_cols:
        part = np.pad(part, ((0, odd_rows), (0, odd_cols), (0, 0)), mode="edge")
    tall = np.add(part[::2], part[1::2], dtype=wide)
    for channel in range(part.shape[2]):
        four = np.add(tall[:, ::2, channel], tall[:, 1::2, channel])
        out[..., channel] = (four + 2) >> 2 if whole else four / 4

"""Streams an image or a label map of any size into a tiled, pyramidal BigTIFF in bounded memory.

Pixels come top to bottom. A band of one row of tiles is encoded as soon as it is complete, and made half as
large into the next level's band, so that what is held is one band a level, never an image:

    level 0  band of T rows  -> encoded tiles -> file
                |  halved (mean of 2 x 2; for labels the top left of each 2 x 2, so that none mix)
    level 1  band of T rows  -> ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import imagecodecs
import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError, ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide import bigtiff
from wholegrad.slide.bigtiff import LONG, LONG8, SHORT, PartialFile, Tag

Compression = Literal["jpeg", "deflate"] | None
Array = npt.NDArray[Any]

COMPRESSION_TAG = {None: 1, "jpeg": 7, "deflate": 8}
SAMPLE_FORMAT = {"u": 1, "i": 2, "f": 3}


@dataclass
class _Band:
    """One level in the making: its rows so far, and where its tiles lie in the file."""

    height: int
    width: int
    done: int = 0  # rows encoded
    held: int = 0  # rows waiting in the buffer
    buffer: Array | None = None
    offsets: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


class PyramidWriter:
    """A tiled pyramidal BigTIFF that is written from top to bottom and appears only when complete (rule 11).

    Args:
        path: of the file; an existing one is replaced at the end.
        shape: ``(C, H, W)``, with one channel for labels.
        dtype: of the values; JPEG needs uint8 and one or three channels.
        tile: edge of the square tiles, pixels, a multiple of 16.
        compression: "jpeg" (colour as YCbCr 4:2:0), "deflate" or None.
        quality: of JPEG, 1 to 100.
        mpp: um a pixel, written as resolution tags (and in OME-XML); None leaves them out.
        levels: how many, or "auto": until the smallest fits in one tile.
        label: lower levels take one of the labels instead of the mean.
        ome: OME-TIFF, its lower levels as SubIFDs; by default if the name ends in .ome.tif or .ome.tiff.
        description: text for the file's first directory, where OME-XML does not stand.
        threads: that encode tiles; by default two.

    Raises:
        ConfigError: settings that do not go together.
        SlideError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: tuple[int, int, int],
        dtype: npt.DTypeLike = np.uint8,
        *,
        tile: int = 512,
        compression: Compression = "deflate",
        quality: int = 80,
        mpp: float | None = None,
        levels: int | Literal["auto"] = "auto",
        label: bool = False,
        ome: bool | None = None,
        description: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.path, self.shape, self.dtype = Path(path), shape, np.dtype(dtype)
        self._tile, self._compression, self._mpp, self._label = tile, compression, mpp, label
        self._ome = self.path.name.lower().endswith((".ome.tif", ".ome.tiff")) if ome is None else ome
        self._description = description
        self._check(quality)
        self._encode = _encoder(compression, quality)
        self._bands = _bands(shape, tile, levels)
        self._strip: tuple[Array, int] | None = None
        self._pool = ThreadPoolExecutor(threads or min(2, os.cpu_count() or 1), "wholegrad-encode")
        self._file: PartialFile | None = PartialFile(self.path)
        bigtiff.start(self._file)

    def _check(self, quality: int) -> None:
        where, channels = str(self.path), self.shape[0]
        if self._tile < 16 or self._tile % 16:
            raise ConfigError(where, f"tile={self._tile}", "give a multiple of 16")
        if self._compression not in COMPRESSION_TAG:
            raise ConfigError(where, f"compression={self._compression!r}", "give 'jpeg', 'deflate' or None")
        if self._compression == "jpeg" and (self.dtype != np.uint8 or channels not in (1, 3) or self._label):
            cause = f"JPEG cannot keep {'labels' if self._label else f'{channels} channels of {self.dtype}'}"
            raise ConfigError(where, cause, "use compression='deflate'")
        if self.dtype.kind not in SAMPLE_FORMAT or not 1 <= quality <= 100 or min(self.shape) < 1:
            cause = f"shape {self.shape}, dtype {self.dtype}, quality {quality}"
            raise ConfigError(where, cause, "give sizes above zero, numbers, and a quality of 1 to 100")

    @property
    def rows_written(self) -> int:
        """Rows received so far."""
        return self._bands[0].done + self._bands[0].held

    @property
    def buffer_bytes(self) -> int:
        """Most bytes held: one band a level, the first only if rows come in other heights than bands."""
        row = self._tile * self.shape[0] * self.dtype.itemsize
        return sum(band.width * row for band in self._bands)

    def write_rows(self, rows: Array) -> None:
        """Append full rows ``(h, W, C)`` or, for one channel, ``(h, W)``. Multiples of ``tile`` are fastest.

        Raises:
            ShapeError: another width, channel count or dtype, or more rows than the image has.
            SlideError: the writer is closed, or the file cannot be written.
        """
        if self._file is None:
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
        band = self._bands[number]
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
        band = self._bands[number]
        if band.buffer is None:
            band.buffer = np.empty((min(self._tile, band.height), band.width, self.shape[0]), self.dtype)
        return band.buffer[band.held : band.held + rows]

    def _grown(self, number: int, rows: int) -> None:
        band = self._bands[number]
        band.held += rows
        if band.held == min(self._tile, band.height - band.done):
            held, band.held = band.held, 0
            assert band.buffer is not None
            self._flush(number, band.buffer[:held])

    def _flush(self, number: int, rows: Array) -> None:
        """Encode one band of tiles, and halve it into the next level."""
        band, half = self._bands[number], (len(rows) + 1) // 2
        below = self._room(number + 1, half) if number + 1 < len(self._bands) else None
        lefts = range(0, band.width, self._tile)
        jobs = self._pool.map(lambda left: self._encode_tile(rows, left, below), lefts)
        for data in jobs:
            assert self._file is not None
            band.offsets.append(self._file.append(data))
            band.counts.append(len(data))
        band.done += len(rows)
        if below is not None:
            self._grown(number + 1, half)

    def _encode_tile(self, rows: Array, left: int, below: Array | None) -> bytes:
        part = rows[:, left : left + self._tile]
        if below is not None:
            out = below[:, left // 2 : left // 2 + (part.shape[1] + 1) // 2]
            _halve(part, out, self._label)
        missing = self._tile - part.shape[0], self._tile - part.shape[1]
        if any(missing):
            part = np.pad(part, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        return self._encode(np.ascontiguousarray(part))

    def close(self) -> None:
        """Write the directories, sync and give the file its name.

        Raises:
            SlideError: rows are missing (nothing is left behind then), or the disk is full.
        """
        if self._file is None:
            return
        if self.rows_written != self.shape[1]:
            written = self.rows_written
            self.abort()
            cause = f"only {written} of {self.shape[1]} rows were written"
            raise SlideError(str(self.path), cause, "write all rows; no file was left")
        try:
            bigtiff.finish(self._file, [self._tags(n) for n in range(len(self._bands))], self._ome)
            self._file.commit()
        except BaseException:
            self.abort()
            raise
        self._file = None
        self._pool.shutdown()

    def abort(self) -> None:
        """Give up: remove the unfinished file. An existing file of that name stays as it was."""
        file, self._file = self._file, None
        self._pool.shutdown(cancel_futures=True)
        if file is not None:
            file.discard()

    def __enter__(self) -> PyramidWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _tags(self, number: int) -> list[Tag]:
        """The directory of one level."""
        band, channels = self._bands[number], self.shape[0]
        colour = channels == 3
        tags: list[Tag] = [
            (254, LONG, [1 if number else 0]),  # NewSubfileType: reduced
            (256, LONG, [band.width]),
            (257, LONG, [band.height]),
            (258, SHORT, [8 * self.dtype.itemsize] * channels),
            (259, SHORT, [COMPRESSION_TAG[self._compression]]),
            (262, SHORT, [(6 if self._compression == "jpeg" else 2) if colour else 1]),  # Photometric
            (277, SHORT, [channels]),
            (284, SHORT, [1]),  # channels interleaved
            bigtiff.text(305, "wholegrad"),
            (322, LONG, [self._tile]),
            (323, LONG, [self._tile]),
            (324, LONG8, band.offsets),
            (325, LONG8, band.counts),
            (339, SHORT, [SAMPLE_FORMAT[self.dtype.kind]] * channels),
        ]
        if colour and self._compression == "jpeg":
            tags.append((530, SHORT, [2, 2]))  # chroma subsampling
        if not colour and channels > 1:
            tags.append((338, SHORT, [0] * (channels - 1)))  # extra samples of no stated meaning
        if self._ome and number == 0:
            tags.append(bigtiff.text(270, self._ome_xml()))
        elif self._description and number == 0:
            tags.append(bigtiff.text(270, self._description))
        return tags + self._resolution(band.width)

    def _resolution(self, width: int) -> list[Tag]:
        if self._mpp is None:
            return []
        per_cm = 1e4 / self._mpp * width / self.shape[2]
        return [bigtiff.rational(282, per_cm), bigtiff.rational(283, per_cm), (296, SHORT, [3])]

    def _ome_xml(self) -> str:
        channels, height, width = self.shape
        kind = {"u": "uint", "i": "int"}.get(self.dtype.kind)
        pixel = f"{kind}{8 * self.dtype.itemsize}" if kind else {4: "float", 8: "double"}[self.dtype.itemsize]
        size = f' PhysicalSizeX="{self._mpp}" PhysicalSizeY="{self._mpp}"' if self._mpp else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
            f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="{pixel}" SizeX="{width}"'
            f' SizeY="{height}" SizeC="{channels}" SizeZ="1" SizeT="1" Interleaved="true"{size}>'
            f'<Channel ID="Channel:0:0" SamplesPerPixel="{channels}"/><TiffData IFD="0" PlaneCount="1"/>'
            "</Pixels></Image></OME>"
        )


def _bands(shape: tuple[int, int, int], tile: int, levels: int | Literal["auto"]) -> list[_Band]:
    """The levels, each half of the one above (rounded up)."""
    _, height, width = shape
    bands = [_Band(height, width)]
    while (max(height, width) > tile) if levels == "auto" else (len(bands) < levels):
        height, width = (height + 1) // 2, (width + 1) // 2
        bands.append(_Band(height, width))
    return bands


def _encoder(compression: Compression, quality: int) -> Callable[[Array], bytes]:
    """The function that turns a tile ``(T, T, C)`` into bytes."""
    if compression is None:
        return lambda tile: tile.tobytes()
    if compression == "deflate":
        return lambda tile: bytes(imagecodecs.deflate_encode(tile.tobytes(), level=6))

    def encode(tile: Array) -> bytes:
        if tile.shape[2] == 1:
            return bytes(imagecodecs.jpeg8_encode(tile[..., 0], level=quality))
        encoded = imagecodecs.jpeg8_encode(
            tile, level=quality, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
        )
        return bytes(encoded)

    return encode


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

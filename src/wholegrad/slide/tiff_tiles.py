"""TIFF, BigTIFF, OME-TIFF and Aperio SVS: the quick path, tiles straight from the file's bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.slide.background import BLACK_BELOW, WHITE_BELOW, Background, glass_colour
from wholegrad.slide.decode import TileDecoder, decode_raw
from wholegrad.slide.origin import Origin
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.pyramid import LevelReader
from wholegrad.slide.tiff import Level, read_container
from wholegrad.slide.tiles import TileReader

Pixels = npt.NDArray[np.uint8]


class TiffTiles:
    """The tiles of one level, a ``TileSource``.

    Args:
        file: open slide file; stays the caller's to close.
        level: what to read.
        channels: 3 (RGB, see ``decode``) or 1 (values as stored).
        background: the colour of tiles that were never written, and below transparent pixels; labels are 0 there.
        first: which value of a pixel is taken, where ``channels`` is 1.
    """

    def __init__(
        self,
        file: PositionedFile,
        level: Level,
        *,
        channels: int,
        background: Background = WHITE_BELOW,
        first: int = 0,
    ) -> None:
        self.shape = (channels, level.height, level.width)
        self.tile_height, self.tile_width = level.tile_height, level.tile_width
        self._file, self._level, self._background = file, level, background
        self._decode = TileDecoder(
            level.segments,
            level.planes,
            level.samples,
            channels,
            level.white_is_zero,
            level.premultiplied,
            background,
            first,
        )
        self._raw = self._decode.direct and level.segments[0] is decode_raw
        scratch = 0 if self._decode.direct else 2 * level.tile_height * level.tile_width * max(3, level.channels)
        self.in_flight = int(level.counts.sum(axis=0).max(initial=0)) + scratch

    def fill(self, tile: int, slot: Pixels) -> None:
        counts = self._level.counts[:, tile]
        if not counts.all():
            slot[...] = 0 if self.shape[0] == 1 else self._background.colour
            return
        if self._raw and counts[0] == slot.nbytes:
            self._file.read_into(int(self._level.offsets[0, tile]), slot)
            return
        places = zip(self._level.offsets[:, tile].tolist(), counts.tolist(), strict=True)
        self._decode([self._file.read(offset, count) for offset, count in places], self._numbers(tile), slot)

    def _numbers(self, tile: int) -> list[int]:
        """Of the tile's segments within their pages: planes of one page follow each other."""
        step = self._level.offsets.shape[1] if len(self._level.segments) == 1 else 0
        return [tile + plane * step for plane in range(self._level.planes)]


class TiffPyramid:
    """A slide in a TIFF file.

    Raises:
        SlideError: missing, truncated, not a TIFF, or a layout that cannot be read by box.
    """

    bounds: Box | None = None

    def __init__(self, path: str) -> None:
        self.name = path
        self._file = PositionedFile(path)
        try:
            container = read_container(self._file.path, self._file.size)
        except BaseException:
            self._file.close()
            raise
        self._levels, self.mpp = container.levels, container.mpp
        self.origin: Origin | None = container.origin
        self.level_shapes = tuple((level.height, level.width) for level in self._levels)
        self._background = Background(estimate=self._glass)

    def level(self, number: int, cache_bytes: int, threads: int) -> LevelReader:
        return self._read(number, self._background, cache_bytes, threads)

    def _read(self, number: int, background: Background, cache_bytes: int, threads: int) -> TileReader:
        tiles = TiffTiles(self._file, self._levels[number], channels=3, background=background)
        return TileReader(tiles, self.name, number, cache_bytes=cache_bytes, threads=threads)

    def _glass(self) -> Pixels:
        last = len(self._levels) - 1
        return glass_colour(self._read(last, BLACK_BELOW, 0, 1), self._read(last, WHITE_BELOW, 0, 1))

    def close(self) -> None:
        self._file.close()

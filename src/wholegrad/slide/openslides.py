"""Every format that OpenSlide knows: SVS, NDPI, MRXS, SCN, BIF, VMS, Philips, Sakura, Trestle, Zeiss, generic TIFF.

Tiles are asked for on one fixed grid a level, so that a pixel does not depend on the box that it is read with.
OpenSlide itself shares a handle among threads; a handle that has met an error refuses everything afterwards, so it is
opened anew.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.background import BLACK_BELOW, WHITE_BELOW, Background, glass_colour
from wholegrad.slide.origin import Origin
from wholegrad.slide.pyramid import LevelReader
from wholegrad.slide.tiles import TileReader

Pixels = npt.NDArray[np.uint8]
OWN_CACHE = 16 << 20  # bytes, of OpenSlide's own: overlapping tiles (MRXS, BIF) are decoded for several of ours
TILES = (128, 1024)  # edges between which the file's own tiles are taken as ours
TILE = 512


def vendor_of(path: str) -> str | None:
    """The name of the format if OpenSlide knows it (``"hamamatsu"``, ``"mirax"`` ...), else None."""
    openslide = _library()
    if openslide is None:
        return None
    found: str | None = openslide.OpenSlide.detect_format(path)
    return found


def _library() -> Any:
    try:
        import openslide
    except (ImportError, OSError):  # no library for this platform
        return None
    return openslide


class OpenSlidePyramid:
    """A slide read by OpenSlide.

    Raises:
        SlideError: OpenSlide is not there, or cannot read the file.
    """

    origin: Origin | None = None

    def __init__(self, path: str) -> None:
        self.name, self._library, self._lock = path, _library(), threading.Lock()
        if self._library is None:
            raise SlideError(
                path, "needs OpenSlide, which cannot be loaded", "pip install openslide-python openslide-bin"
            )
        self._handle: Any = None
        try:
            handle = self.handle()
        except Exception as error:
            raise SlideError(path, f"cannot be read by OpenSlide ({error})", "copy the file again") from None
        self.level_shapes = tuple((height, width) for width, height in handle.level_dimensions)
        self._told = dict(handle.properties)
        self.mpp = self._mpp()
        self.bounds = self._bounds()
        colour = self._told.get("openslide.background-color")
        known = None if colour is None else (int(colour[:2], 16), int(colour[2:4], 16), int(colour[4:6], 16))
        self._background = Background(known, None if known else self._glass)

    def handle(self) -> Any:
        """OpenSlide's object, opened anew after an error."""
        with self._lock:
            if self._handle is None:
                self._handle = self._library.OpenSlide(self.name)
                self._handle.set_cache(self._library.OpenSlideCache(OWN_CACHE))
            return self._handle

    def forget(self, handle: Any) -> None:
        """Give up a handle that has met an error. Other threads may still be inside it, so it is left to them."""
        with self._lock:
            if self._handle is handle:
                self._handle = None

    def _mpp(self) -> float | None:
        told = self._told.get("openslide.mpp-x")
        try:
            return None if told is None else float(told)
        except ValueError:
            return float("nan")

    def _bounds(self) -> Box | None:
        names = ("y", "height", "x", "width")
        told = [self._told.get(f"openslide.bounds-{name}") for name in names]
        if any(value is None for value in told):
            return None
        y, height, x, width = (int(value) for value in told if value is not None)
        return Box(y, y + height, x, x + width)

    def level(self, number: int, cache_bytes: int, threads: int) -> LevelReader:
        return self._read(number, self._background, cache_bytes, threads)

    def _read(self, number: int, background: Background, cache_bytes: int, threads: int) -> TileReader:
        tiles = _Tiles(self, number, self._tile(number), background)
        return TileReader(tiles, self.name, number, cache_bytes=cache_bytes, threads=threads)

    def _tile(self, number: int) -> tuple[int, int]:
        """Height and width of our tiles: the file's own if they are of a useful size."""
        own = [self._told.get(f"openslide.level[{number}].tile-{side}", "0") for side in ("height", "width")]
        high, wide = (int(size) for size in own)
        return (high, wide) if all(TILES[0] <= size <= TILES[1] for size in (high, wide)) else (TILE, TILE)

    def _glass(self) -> Pixels:
        last = len(self.level_shapes) - 1
        return glass_colour(self._read(last, BLACK_BELOW, 0, 1), self._read(last, WHITE_BELOW, 0, 1))

    def close(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()


class _Tiles:
    """The tiles of one level on a grid of our own, a ``TileSource``."""

    def __init__(self, slide: OpenSlidePyramid, number: int, tile: tuple[int, int], background: Background) -> None:
        self._slide, self._number, self._background = slide, number, background
        self.shape = (3, *slide.level_shapes[number])
        self._scale = float(slide.handle().level_downsamples[number])
        self.tile_height, self.tile_width = tile
        self.in_flight = 3 * 4 * self.tile_height * self.tile_width + OWN_CACHE  # RGBA, twice, and with opacity

    def fill(self, tile: int, slot: Pixels) -> None:
        _, height, width = self.shape
        row, col = divmod(tile, -(-width // self.tile_width))
        top, left = row * self.tile_height, col * self.tile_width
        h, w = min(self.tile_height, height - top), min(self.tile_width, width - left)
        at = round(left * self._scale), round(top * self._scale)  # whole level-0 pixels are all that OpenSlide takes
        handle = self._slide.handle()
        try:
            rgba = np.asarray(handle.read_region(at, self._number, (w, h)))
        except Exception:
            self._slide.forget(handle)
            raise
        self._background.under(rgba, slot[:h, :w])

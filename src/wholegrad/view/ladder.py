"""A slide as a ladder of levels for the screen, each half as large as the one before, in square tiles made when asked.

Rung ``k`` has ``ceil(H / 2**k) x ceil(W / 2**k)`` pixels. Its pixels come from the file's own level of that size where
there is one, else from the next finer one, averaged (``slide.resample``). Where that would read too much, as in a file
without levels, a tile is the mean of 2 x 2 of the rung below, whose tiles are kept while there is room.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.slide.resample import Resampled
from wholegrad.slide.slide import Slide
from wholegrad.view.lru import Lru

Pixels = npt.NDArray[np.uint8]

TILE = 512  # pixels, edge of a tile on the screen
ROUNDING = 1  # pixels by which a level's size may differ from the rung's
FURTHEST = 4  # the most that a level is averaged by along an axis; more goes by rungs


class _Rung(Protocol):
    """Where a rung's pixels come from."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    def read(self, box: Box) -> Pixels: ...


def rungs(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """``(h, w)`` of each rung, the last one within a tile."""
    sizes = [(height, width)]
    while max(sizes[-1]) > TILE:
        scale = 1 << len(sizes)
        sizes.append((-(-height // scale), -(-width // scale)))
    return tuple(sizes)


def tile_box(size: tuple[int, int], col: int, row: int) -> Box | None:
    """The part of a rung that a tile shows; None if there is no such tile."""
    y, x = row * TILE, col * TILE
    if row < 0 or col < 0 or y >= size[0] or x >= size[1]:
        return None
    return Box(y, min(y + TILE, size[0]), x, min(x + TILE, size[1]))


class Ladder:
    """The rungs of a slide. Thread-safe.

    Args:
        slide: at level 0; stays the caller's to close.
        keep: bytes of tiles that were made of others.
    """

    def __init__(self, slide: Slide, keep: int) -> None:
        self.slide, self.sizes = slide, rungs(*slide.shape[1:])
        self._levels: dict[int, Slide] = {0: slide}
        self._sources: dict[int, _Rung | None] = {}
        self._kept: Lru[Pixels] = Lru(keep)
        self._lock = threading.Lock()

    def tile(self, rung: int, col: int, row: int) -> Pixels:
        """Pixels ``(h, w, 3)`` of a tile that exists.

        Raises:
            SlideError: they cannot be read.
        """
        box = tile_box(self.sizes[rung], col, row)
        assert box is not None
        source = self._source(rung)
        if source is None:
            return self._kept.get((rung, col, row), lambda: self._halved(rung, box, col, row))
        _, height, width = source.shape  # of a level that may be a pixel smaller than the rung
        there = Box(box.y0, min(box.y1, height), box.x0, min(box.x1, width))
        if not (there.height > 0 and there.width > 0):
            there = Box(min(box.y0, height - 1), min(box.y1, height), min(box.x0, width - 1), min(box.x1, width))
        pixels = source.read(there).transpose(1, 2, 0)
        missing = box.height - there.height, box.width - there.width
        return np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else pixels

    def read(self, rung: int, box: Box) -> Pixels:
        """Any box of a rung, ``(h, w, 3)``, put together from its tiles."""
        out = np.empty((box.height, box.width, 3), np.uint8)
        for row in range(box.y0 // TILE, (box.y1 - 1) // TILE + 1):
            for col in range(box.x0 // TILE, (box.x1 - 1) // TILE + 1):
                tile = tile_box(self.sizes[rung], col, row)
                assert tile is not None
                part = Box(max(box.y0, tile.y0), min(box.y1, tile.y1), max(box.x0, tile.x0), min(box.x1, tile.x1))
                out[part.slices(box)] = self.tile(rung, col, row)[part.slices(tile)]
        return out

    def _halved(self, rung: int, box: Box, col: int, row: int) -> Pixels:
        """A tile from the four below it."""
        height, width = self.sizes[rung - 1]
        below = Box(2 * box.y0, min(2 * box.y1, height), 2 * box.x0, min(2 * box.x1, width))
        pixels = self.read(rung - 1, below)
        odd = below.height % 2, below.width % 2
        if any(odd):
            pixels = np.pad(pixels, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        wide = pixels.astype(np.uint16)
        total = wide[0::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 0::2] + wide[1::2, 1::2]
        mean: Pixels = ((total + 2) >> 2).astype(np.uint8)
        return mean

    @property
    def from_all(self) -> bool:
        """Whether the overview is made of all of the slide's pixels, since the file has no level near it."""
        return any(self._source(rung) is None for rung in range(len(self.sizes)))

    def _source(self, rung: int) -> _Rung | None:
        """The reader of a rung; None if its tiles are made of those below."""
        with self._lock:
            if rung not in self._sources:
                self._sources[rung] = self._find(rung)
            return self._sources[rung]

    def _find(self, rung: int) -> _Rung | None:
        height, width = self.sizes[rung]
        shapes = self.slide.level_shapes
        for number, (h, w) in enumerate(shapes):
            if abs(h - height) <= ROUNDING and abs(w - width) <= ROUNDING:
                return self._level(number)
        finer = [number for number, (h, w) in enumerate(shapes) if h >= height and w >= width]
        nearest = max(finer, key=lambda number: -shapes[number][0])
        if shapes[nearest][0] > FURTHEST * height + FURTHEST:
            return None
        return Resampled(self._level(nearest), height, width)

    def _level(self, number: int) -> Slide:
        if number not in self._levels:
            self._levels[number] = self.slide.at(number)
        return self._levels[number]

    def close(self) -> None:
        """Close the levels that were opened here."""
        with self._lock:
            for number, level in self._levels.items():
                if number:
                    level.close()

"""What a format is to the rest: levels of RGB tiles, and what the file says of its scale. One module a library."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import ArrayReader
from wholegrad.slide.origin import Origin
from wholegrad.slide.reader import MapReader


class LevelReader(MapReader, Protocol):
    """One level as a map ``(3, H, W)`` of uint8 that can be closed."""

    def close(self) -> None: ...


class Pyramid(Protocol):
    """An opened slide file.

    Attributes:
        name: the path.
        level_shapes: ``(H, W)`` of each level, largest first.
        mpp: um a pixel of level 0; None if the file does not say, NaN if what it says is no size.
        bounds: the part of level 0 that was scanned, where the file says.
        origin: of a copy of a part; None for a slide of its own.
    """

    name: str
    level_shapes: tuple[tuple[int, int], ...]
    mpp: float | None
    bounds: Box | None
    origin: Origin | None

    def level(self, number: int, cache_bytes: int, threads: int) -> LevelReader:
        """A level by number."""
        ...

    def close(self) -> None: ...


class HeldPixels(ArrayReader):
    """An array in memory as a level."""

    def __init__(self, pixels: npt.NDArray[np.uint8], name: str) -> None:
        super().__init__(pixels, name=name)
        self.cache_bytes = pixels.nbytes

    def close(self) -> None:
        """Nothing to give back: the memory goes with the object."""


class HeldPyramid:
    """One level that is a map already: a picture in memory, an array file."""

    bounds: Box | None = None
    origin: Origin | None = None

    def __init__(self, reader: LevelReader, mpp: float | None) -> None:
        self.name, self.mpp, self._reader = reader.name, mpp, reader
        self.level_shapes: tuple[tuple[int, int], ...] = ((reader.shape[1], reader.shape[2]),)

    def level(self, number: int, cache_bytes: int, threads: int) -> LevelReader:
        return self._reader

    def close(self) -> None:
        self._reader.close()

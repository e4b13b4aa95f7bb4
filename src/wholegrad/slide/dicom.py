"""DICOM whole-slide images (VL Whole Slide Microscopy) through wsidicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.slide.library import library, read_by
from wholegrad.slide.origin import Origin
from wholegrad.slide.pyramid import LevelReader
from wholegrad.slide.tiles import TileReader

Pixels = npt.NDArray[np.uint8]


def is_dicom(path: Path) -> bool:
    """Whether ``path`` is a DICOM file, or a folder that has one."""
    files = (file for file in path.iterdir() if file.is_file()) if path.is_dir() else iter([path])
    return any(_has_magic(file) for file in files)


def _has_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:  # one of a folder's files that is not ours to read
        return False


class DicomPyramid:
    """A slide in a folder of DICOM files, or in a file.

    Raises:
        SlideError: wsidicom is not installed, or cannot read the files.
    """

    bounds: Box | None = None
    origin: Origin | None = None

    def __init__(self, path: str) -> None:
        self.name = path
        wsidicom = library("wsidicom", path, "DICOM", "dicom")
        with read_by(path, "by wsidicom", "export the slide again"):
            self._slide: Any = wsidicom.WsiDicom.open(path)
            levels = list(self._slide.levels)
            self.level_shapes = tuple((level.size.height, level.size.width) for level in levels)
            self.mpp: float | None = float(levels[0].mpp.width) or None
        self._levels = levels

    def level(self, number: int, cache_bytes: int, threads: int) -> LevelReader:
        return TileReader(
            _Tiles(self._slide, self._levels[number]), self.name, number, cache_bytes=cache_bytes, threads=threads
        )

    def close(self) -> None:
        self._slide.close()


class _Tiles:
    """The tiles of one level, a ``TileSource``; wsidicom fills those that are missing with the slide's blank colour."""

    def __init__(self, slide: Any, level: Any) -> None:
        self._slide, self._level = slide, level
        self.shape = (3, level.size.height, level.size.width)
        self.tile_height, self.tile_width = level.tile_size.height, level.tile_size.width
        self.in_flight = 3 * 4 * self.tile_height * self.tile_width

    def fill(self, tile: int, slot: Pixels) -> None:
        _, height, width = self.shape
        row, col = divmod(tile, -(-width // self.tile_width))
        top, left = row * self.tile_height, col * self.tile_width
        h, w = min(self.tile_height, height - top), min(self.tile_width, width - left)
        slot[:h, :w] = self._slide.read_region((left, top), self._level.level, (w, h)).convert("RGB")

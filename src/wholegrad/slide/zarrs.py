"""Zarr arrays and OME-Zarr pyramids (versions 2 and 3 of Zarr, 0.4 and 0.5 of OME-Zarr) through zarr.

Follows the OME-NGFF specification for ``multiscales``: levels, axes, scale and units. A chunk that holds nothing but
the fill value was never written, and gets the slide's own background.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.background import BLACK_BELOW, WHITE_BELOW, Background, glass_colour
from wholegrad.slide.library import library, read_by
from wholegrad.slide.origin import Origin
from wholegrad.slide.pyramid import LevelReader
from wholegrad.slide.tiles import TileReader

Pixels = npt.NDArray[np.uint8]
UNITS = {"micrometer": 1.0, "um": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
SMALL, LARGE = 256, 256 << 20  # chunks are joined up to this edge; refused above this many bytes


def is_zarr(path: Path) -> bool:
    """Whether ``path`` is a Zarr store: a folder with Zarr's own files, or a zip named so."""
    if path.is_dir():
        return any((path / name).exists() for name in ("zarr.json", ".zattrs", ".zgroup", ".zarray"))
    return path.name.lower().endswith(".zarr.zip")


class ZarrPyramid:
    """A slide in a Zarr store.

    Raises:
        SlideError: zarr is not installed, or the store has no image of 8 bits a channel.
    """

    bounds: Box | None = None
    origin: Origin | None = None

    def __init__(self, path: str) -> None:
        self.name = path
        zarr = library("zarr", path, "a Zarr store", "zarr")
        with read_by(path, "as Zarr", "write or copy it again"):
            node = zarr.open(path, mode="r")
            levels, self._axes, self.mpp = _levels(path, node)
        self._levels = sorted(levels, key=lambda level: -level.shape[self._axes.index("x")])
        for level in self._levels:
            _check(path, level, self._axes)
        self.level_shapes = tuple(
            (int(level.shape[self._axes.index("y")]), int(level.shape[self._axes.index("x")])) for level in self._levels
        )
        self._background = Background(estimate=self._glass)

    def level(self, number: int, cache_bytes: int, threads: int) -> LevelReader:
        return self._read(number, self._background, cache_bytes, threads)

    def _read(self, number: int, background: Background, cache_bytes: int, threads: int) -> TileReader:
        tiles = _Tiles(self.name, self._levels[number], self._axes, background)
        return TileReader(tiles, self.name, number, cache_bytes=cache_bytes, threads=threads)

    def _glass(self) -> Pixels:
        last = len(self._levels) - 1
        return glass_colour(self._read(last, BLACK_BELOW, 0, 1), self._read(last, WHITE_BELOW, 0, 1))

    def close(self) -> None:
        """Nothing stays open between reads."""


def _levels(path: str, node: Any) -> tuple[list[Any], str, float | None]:
    """The arrays of all levels, their axes as letters, and the um a pixel of the first."""
    if hasattr(node, "dtype"):
        return [node], _guessed(path, node.shape), None
    if "multiscales" not in _told(node) and "0" in node and not hasattr(node["0"], "dtype"):
        node = node["0"]  # the first image of several, as bioformats2raw lays them out
    told = _told(node)
    if not told.get("multiscales"):
        remedy = "give the path of one array in it, or write OME-Zarr"
        raise SlideError(path, "is a Zarr group without multiscales (OME-Zarr)", remedy)
    image = told["multiscales"][0]
    arrays = [node[dataset["path"]] for dataset in image["datasets"]]
    axes = [axis if isinstance(axis, str) else axis["name"] for axis in image.get("axes", "tczyx"[-arrays[0].ndim :])]
    return arrays, "".join(axes), _mpp(image, axes)


def _told(group: Any) -> dict[str, Any]:
    attributes = dict(group.attrs)
    return dict(attributes.get("ome", attributes))


def _mpp(image: dict[str, Any], axes: list[str]) -> float | None:
    x = axes.index("x")
    described = image.get("axes", [])
    unit = described[x].get("unit") if described and isinstance(described[x], dict) else None
    scales = [
        step["scale"][x]
        for steps in (
            image["datasets"][0].get("coordinateTransformations", []),
            image.get("coordinateTransformations", []),
        )
        for step in steps
        if step.get("type") == "scale"
    ]
    return UNITS[unit] * math.prod(float(scale) for scale in scales) if scales and unit in UNITS else None


def _guessed(path: str, shape: tuple[int, ...]) -> str:
    """The axes of an array that does not tell them."""
    if len(shape) == 2:
        return "yx"
    if len(shape) == 3 and (shape[2] in (1, 3, 4) or shape[0] in (1, 3, 4)):
        return "yxc" if shape[2] in (1, 3, 4) else "cyx"
    raise SlideError(
        path, f"is an array of shape {shape}", "give (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels"
    )


def _check(path: str, array: Any, axes: str) -> None:
    sizes = dict(zip(axes, array.shape, strict=True))
    if array.dtype != np.uint8:
        raise SlideError(path, f"has {array.dtype} values", "convert it to 8 bits a channel")
    if sizes.get("c", 1) not in (1, 3, 4) or sizes.get("t", 1) != 1 or sizes.get("z", 1) != 1:
        cause = f"has axes {axes} of sizes {tuple(array.shape)}"
        raise SlideError(path, cause, "give one plane of 1, 3 or 4 channels")
    if math.prod(array.chunks) > LARGE:
        cause = f"has chunks of {math.prod(array.chunks) >> 20} MiB"
        raise SlideError(path, cause, "write it with chunks of about 1 x 512 x 512 pixels")


class _Tiles:
    """The tiles of one level, each of whole chunks, a ``TileSource``."""

    def __init__(self, path: str, array: Any, axes: str, background: Background) -> None:
        self._path, self._array, self._axes, self._background = Path(path), array, axes, background
        sizes, chunks = (dict(zip(axes, each, strict=True)) for each in (array.shape, array.chunks))
        self.shape = (3, int(sizes["y"]), int(sizes["x"]))
        self.tile_height, self.tile_width = (int(chunks[a] * max(1, SMALL // chunks[a])) for a in "yx")
        self._across = -(-self.shape[2] // self.tile_width)
        self._empty = array.fill_value or 0
        self.in_flight = (
            4 * math.prod(array.chunks) * max(1, self.tile_height * self.tile_width // (chunks["y"] * chunks["x"]))
        )

    def fill(self, tile: int, slot: Pixels) -> None:
        _, height, width = self.shape
        row, col = divmod(tile, self._across)
        top, left = row * self.tile_height, col * self.tile_width
        h, w = min(self.tile_height, height - top), min(self.tile_width, width - left)
        where = {"y": slice(top, top + h), "x": slice(left, left + w), "c": slice(None)}
        pixels = np.asarray(self._array[tuple(where.get(axis, 0) for axis in self._axes)])
        kept = [axis for axis in self._axes if axis in where]
        if "c" not in kept:
            pixels, kept = pixels[..., None], [*kept, "c"]
        pixels = pixels.transpose([kept.index(axis) for axis in "yxc"])
        self._place(pixels, slot[:h, :w])

    def _place(self, pixels: Pixels, out: Pixels) -> None:
        if (pixels == self._empty).all():
            if not self._path.exists():  # zarr takes a chunk that is gone for one that was never written
                raise FileNotFoundError(self._path)
            out[...] = self._background.colour
        elif pixels.shape[2] == 4:
            self._background.under(pixels, out)
        else:
            out[...] = pixels

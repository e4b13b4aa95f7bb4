"""Opens a whole-slide image as a lazily read RGB map (rule 9): at a level or at any resolution, whole or a region."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.buffers import check_box
from wholegrad.slide.formats import open_pyramid
from wholegrad.slide.origin import Origin
from wholegrad.slide.placement import Axis, Placement, whole_slide
from wholegrad.slide.pyramid import LevelReader, Pyramid
from wholegrad.slide.resample import Resampled

CACHE_BYTES = 64 << 20
FITS = 1.02  # a level within this ratio of the mpp asked for is taken as it is
ENLARGED = 4.0  # the most that level 0 is enlarged

Region = tuple[int, int, int, int] | Literal["bounds"]


def open_slide(
    path: str | os.PathLike[str],
    mpp: float | None = None,
    level: int | None = None,
    *,
    nearest: bool = False,
    region: Region | None = None,
    slide_mpp: float | None = None,
    cache_bytes: int = CACHE_BYTES,
    threads: int | None = None,
) -> Slide:
    """Open a slide without decoding anything.

    Args:
        path: what OpenSlide reads (SVS, NDPI, MRXS, SCN, BIF, Philips ...), TIFF, BigTIFF or OME-TIFF, DICOM, Zarr or
            OME-Zarr, PNG, JPEG, or .npy ``(3, H, W)``; 8 bits a channel. Grey becomes RGB. What the file does not
            hold (missing tiles, transparent pixels) gets the slide's own background colour.
        mpp: um a pixel to read at. A level within 2 % of it is taken as it is; otherwise the nearest finer level is
            averaged over the exact area of each pixel (``slide.resample``).
        level: choose this level, 0 the largest. Neither: level 0; both: an error.
        nearest: with ``mpp``, take the level nearest (in log ratio) and resample nothing.
        region: ``(x, y, width, height)`` in level-0 pixels, rounded to pixels of the map; or "bounds", the part that
            the scanner says it scanned. None: the whole slide.
        slide_mpp: um a pixel of level 0, where the file does not say or is wrong.
        cache_bytes: decoded tiles to keep, in bytes.
        threads: that decode tiles; by default two, or one on a single core.

    Returns:
        A ``Slide``, a ``MapReader`` of shape ``(3, H, W)`` and dtype uint8.

    Raises:
        ConfigError: both ``mpp`` and ``level``, an mpp that is not positive, or a region that is not on the slide.
        SlideError: the file is missing, truncated, of an unknown format or not 8-bit; it has no such level, or is
            much coarser than ``mpp``; or ``mpp`` is asked of a slide that does not tell its own.
    """
    wish = _Wish(mpp, level, nearest, region, slide_mpp, cache_bytes, threads)
    wish.check(str(path))
    return Slide(path, wish)


@dataclass(frozen=True)
class _Wish:
    """What was asked of ``open_slide``."""

    mpp: float | None
    level: int | None
    nearest: bool
    region: Region | None
    slide_mpp: float | None
    cache_bytes: int
    threads: int | None

    def check(self, where: str) -> None:
        if self.mpp is not None and self.level is not None:
            raise ConfigError(where, f"both mpp={self.mpp} and level={self.level} were asked for", "give one of them")
        for name, value in (("mpp", self.mpp), ("slide_mpp", self.slide_mpp)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(where, f"{name}={value} is not a positive number", "give um a pixel: 0.5")
        if self.nearest and self.mpp is None:
            raise ConfigError(where, "nearest=True was asked for without mpp", "give mpp too, or level alone")


class Slide:
    """A slide at one resolution as a map of RGB pixels. Thread-safe; reopens itself when pickled.

    Attributes:
        path: of the file.
        shape: ``(3, H, W)`` of the map; ``size``: ``(H, W)`` of the whole slide's level 0.
        mpp: um a pixel of the map; None if unknown.
        level: that is read; ``resampled``: whether its pixels are averaged to ``mpp``.
        level_shapes, level_mpps: ``(H, W)`` and um a pixel of every level of the file, as they are stored.
        share: of the file's height and of its width that the region has.
        placement: where the map's pixels lie on the slide, for masks and outlines.
    """

    concurrent = True  # a buffer a thread

    def __init__(self, path: str | os.PathLike[str], wish: _Wish) -> None:
        self.path, self._wish = Path(path), wish
        self._pyramid = open_pyramid(self.path)
        try:
            self.level_shapes = self._pyramid.level_shapes
            self.level_mpps = _level_mpps(self._pyramid, wish)
            self.level, grid = self._choose(wish)
            placed, self._box = self._place(grid, wish)
            self.resampled = grid != self.level_shapes[self.level]
            threads = min(2, os.cpu_count() or 1) if wish.threads is None else wish.threads
            self._reader: LevelReader = self._pyramid.level(self.level, wish.cache_bytes, threads)
        except BaseException:
            self._pyramid.close()
            raise
        if self.resampled:
            self._reader = Resampled(self._reader, *grid)
        self.placement = placed.part(self._box.y0, self._box.x0)
        self.shape = (3, self._box.height, self._box.width)
        self.share = (self._box.height / grid[0], self._box.width / grid[1])
        self.mpp = _mpp_on(self.level_mpps[0], self.level_shapes[0], grid)

    def _choose(self, wish: _Wish) -> tuple[int, tuple[int, int]]:
        """The level to read, and the size ``(H, W)`` that the whole file gets."""
        if wish.level is not None and not 0 <= wish.level < len(self.level_shapes):
            cause = f"has levels 0 to {len(self.level_shapes) - 1}, not {wish.level}"
            raise SlideError(str(self.path), cause, "ask for one of those")
        if wish.mpp is None:
            level = wish.level or 0
            return level, self.level_shapes[level]
        known = [value for value in self.level_mpps if value is not None]
        if not known:
            cause = "does not tell its um a pixel, so it cannot be read at an mpp"
            raise SlideError(str(self.path), cause, "give slide_mpp, um a pixel of its level 0, or a level")
        ratios = [value / wish.mpp for value in known]
        level = min(range(len(ratios)), key=lambda number: abs(math.log(ratios[number])))
        if wish.nearest or 1 / FITS <= ratios[level] <= FITS:
            return level, self.level_shapes[level]
        if ratios[0] > ENLARGED:
            cause = (
                f"has no finer level than {known[0]:.4g} um a pixel, {ratios[0]:.1f} times as coarse as mpp={wish.mpp}"
            )
            raise SlideError(str(self.path), cause, f"ask for an mpp of {known[0] / ENLARGED:.3g} or more")
        level = max([0, *(number for number, ratio in enumerate(ratios) if ratio < 1)])
        height, width = self.level_shapes[0]
        return level, (max(1, round(height * ratios[0])), max(1, round(width * ratios[0])))

    def _place(self, grid: tuple[int, int], wish: _Wish) -> tuple[Placement, Box]:
        """Where the file's pixels at size ``grid`` lie, and the box of them that is the region."""
        origin = self._pyramid.origin
        placed = whole_slide(self.level_shapes[0], grid) if origin is None else _of_copy(origin, grid)
        self.size = placed.size
        region = wish.region
        if region is None:
            return placed, Box(0, grid[0], 0, grid[1])
        if region == "bounds":
            bounds = self._pyramid.bounds or Box(0, self.size[0], 0, self.size[1])
            region = (bounds.x0, bounds.y0, bounds.width, bounds.height)
        return placed, _region_box(str(self.path), placed, grid, region)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(np.uint8)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the tiles kept and in decoding. The buffer of one box (3 h w bytes) comes on top."""
        return self._reader.cache_bytes

    def read(self, box: Box) -> npt.NDArray[np.uint8]:
        """RGB pixels of ``box`` as ``(3, h, w)``, channels last in memory, valid until the next read.

        Raises:
            ShapeError: the box is empty or reaches outside the map.
            SlideError: the slide is closed, or a tile cannot be read or decoded.
        """
        check_box(self.name, self.shape, box)
        y, x = self._box.y0, self._box.x0
        pixels: Any = self._reader.read(Box(box.y0 + y, box.y1 + y, box.x0 + x, box.x1 + x))
        return pixels  # type: ignore[no-any-return]

    def at(self, level: int) -> Slide:
        """Another level of the same slide and region, opened anew with the same options."""
        return Slide(self.path, replace(self._wish, mpp=None, level=level, nearest=False))

    def whole(self) -> Slide:
        """All of the same slide, opened anew with the same options but for the region."""
        return Slide(self.path, replace(self._wish, region=None))

    def close(self) -> None:
        """Close the file; reading afterwards is a SlideError."""
        self._reader.close()
        self._pyramid.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        mpp = "unknown mpp" if self.mpp is None else f"{self.mpp:.4g} um/px"
        level = f"level {self.level} of {len(self.level_shapes)}{' resampled' if self.resampled else ''}"
        return f"Slide({self.path.name}, {level}, {self.shape[1]} x {self.shape[2]}, {mpp})"

    def __reduce__(self) -> tuple[object, ...]:
        return Slide, (self.path, self._wish)


def _level_mpps(pyramid: Pyramid, wish: _Wish) -> tuple[float | None, ...]:
    """um a pixel of every level, from level 0's and the sizes."""
    mpp = pyramid.mpp if wish.slide_mpp is None else wish.slide_mpp
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        cause = f"says that its pixels are {mpp} um wide"
        raise SlideError(pyramid.name, cause, "give slide_mpp, the true um a pixel of its level 0")
    return tuple(_mpp_on(mpp, pyramid.level_shapes[0], shape) for shape in pyramid.level_shapes)


def _mpp_on(mpp: float | None, size: tuple[int, int], grid: tuple[int, int]) -> float | None:
    """um a pixel when what has ``mpp`` at ``size`` is shown on ``grid``."""
    return None if mpp is None else mpp * math.sqrt(math.prod(size) / math.prod(grid))


def _of_copy(origin: Origin, grid: tuple[int, int]) -> Placement:
    rows, cols = (
        Axis(axis.start, axis.step / length) for axis, length in zip((origin.rows, origin.cols), grid, strict=True)
    )
    return Placement(origin.size, rows, cols)


def _region_box(name: str, placed: Placement, grid: tuple[int, int], region: tuple[int, int, int, int]) -> Box:
    """The pixels of the map nearest to ``region``, at least one."""
    x, y, width, height = region
    if width < 1 or height < 1:
        raise ConfigError(name, f"region={region} is empty", "give (x, y, width, height) in level-0 pixels")
    ends = []
    for axis, length, start, size in ((placed.rows, grid[0], y, height), (placed.cols, grid[1], x, width)):
        first, last = ((Fraction(at) - axis.start) / axis.step for at in (start, start + size))
        if first < 0 or last > length:
            covered = tuple(
                f"{float(each.start):.0f} to {float(each.start + each.step * n):.0f}"
                for each, n in ((placed.cols, grid[1]), (placed.rows, grid[0]))
            )
            cause = f"region={region} (x, y, width, height) reaches outside it: x {covered[0]}, y {covered[1]}"
            raise ConfigError(name, cause, "give a region of this slide, in level-0 pixels")
        low = min(math.floor(first + Fraction(1, 2)), length - 1)
        ends += [low, max(low + 1, math.floor(last + Fraction(1, 2)))]
    return Box(*ends)

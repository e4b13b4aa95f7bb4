"""Opens a whole-slide image as a lazily read RGB map (rule 9): one pyramid level of a TIFF or SVS file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.tiff import Container, read_container
from wholegrad.slide.tiles import TileReader

CACHE_BYTES = 64 << 20


def open_slide(
    path: str | os.PathLike[str],
    mpp: float | None = None,
    level: int | None = None,
    *,
    cache_bytes: int = CACHE_BYTES,
    threads: int | None = None,
) -> Slide:
    """Open a slide without decoding anything.

    Args:
        path: an Aperio SVS, or a tiled (or stripped) TIFF, BigTIFF or OME-TIFF, pyramidal or not, with 8 bits
            a channel. Grey becomes RGB; a fourth channel is opacity over white.
        mpp: choose the level nearest (in log ratio) to this many um a pixel.
        level: choose this level, 0 the largest. Neither: level 0; both: an error.
        cache_bytes: decoded tiles to keep, in bytes.
        threads: that decode tiles; by default two, or one on a single core.

    Returns:
        A ``Slide``, a ``MapReader`` of shape ``(3, H, W)`` and dtype uint8.

    Raises:
        ConfigError: both ``mpp`` and ``level``, or an mpp that is not positive.
        SlideError: the file is missing, truncated, of an unknown format or not 8-bit; it has no such level;
            or ``mpp`` is asked of a slide that does not tell its own.
    """
    if mpp is not None and level is not None:
        raise ConfigError(str(path), f"both mpp={mpp} and level={level} were asked for", "give one of them")
    return Slide(path, mpp, level, cache_bytes=cache_bytes, threads=threads)


class Slide:
    """One level of a slide as a map of RGB pixels. Thread-safe; reopens itself when pickled.

    Attributes:
        path: of the file.
        shape: ``(3, H, W)`` of the chosen level; ``size``: ``(H, W)`` of level 0.
        level, mpp: of the chosen level; ``mpp`` is None if the file does not say.
        level_shapes, level_mpps: ``(H, W)`` and um a pixel of every level.
    """

    concurrent = True  # a buffer a thread

    def __init__(
        self,
        path: str | os.PathLike[str],
        mpp: float | None = None,
        level: int | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
        threads: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._options = (cache_bytes, threads)
        self._file = PositionedFile(self.path)
        try:
            container = read_container(self.path, self._file.size)
            self.level_shapes = tuple((lv.height, lv.width) for lv in container.levels)
            self.level_mpps = _level_mpps(container)
            self.level = self._choose(mpp, level)
        except BaseException:
            self._file.close()
            raise
        self._reader = TileReader(
            self._file,
            container.levels[self.level],
            self.level,
            channels=3,
            blank=255,
            cache_bytes=cache_bytes,
            threads=min(2, os.cpu_count() or 1) if threads is None else threads,
        )

    def _choose(self, mpp: float | None, level: int | None) -> int:
        if level is not None:
            if not 0 <= level < len(self.level_shapes):
                cause = f"has levels 0 to {len(self.level_shapes) - 1}, not {level}"
                raise SlideError(str(self.path), cause, "ask for one of those")
            return level
        if mpp is None:
            return 0
        if not (mpp > 0 and math.isfinite(mpp)):
            raise ConfigError(str(self.path), f"mpp={mpp} is not a positive number", "give um a pixel: 0.5")
        known = [value for value in self.level_mpps if value is not None]
        if not known:
            raise SlideError(
                str(self.path), "does not tell its um a pixel, so mpp cannot choose a level", "give level=0"
            )
        return min(range(len(known)), key=lambda number: abs(math.log(known[number] / mpp)))

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width = self.level_shapes[self.level]
        return 3, height, width

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(np.uint8)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size(self) -> tuple[int, int]:
        return self.level_shapes[0]

    @property
    def mpp(self) -> float | None:
        return self.level_mpps[self.level]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the tiles kept and in decoding. The buffer of one box (3 h w bytes) comes on top."""
        return self._reader.cache_bytes

    def read(self, box: Box) -> npt.NDArray[np.uint8]:
        """RGB pixels of ``box`` as ``(3, h, w)``, channels last in memory, valid until the next read.

        Raises:
            ShapeError: the box is empty or reaches outside the level.
            SlideError: the slide is closed, or a tile cannot be read or decoded.
        """
        return self._reader.read(box)

    def at(self, level: int) -> Slide:
        """Another level of the same slide, opened anew with the same options."""
        cache_bytes, threads = self._options
        return Slide(self.path, level=level, cache_bytes=cache_bytes, threads=threads)

    def close(self) -> None:
        """Close the file; reading afterwards is a SlideError."""
        self._reader.close()
        self._file.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        height, width = self.level_shapes[self.level]
        mpp = "unknown mpp" if self.mpp is None else f"{self.mpp:.4g} um/px"
        level = f"level {self.level} of {len(self.level_shapes)}"
        return f"Slide({self.path.name}, {level}, {height} x {width}, {mpp})"

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.level, *self._options)


def _reopen(path: Path, level: int, cache_bytes: int, threads: int | None) -> Slide:
    return Slide(path, level=level, cache_bytes=cache_bytes, threads=threads)


def _level_mpps(container: Container) -> tuple[float | None, ...]:
    """um a pixel of every level, from level 0's and the sizes."""
    if container.mpp is None:
        return (None,) * len(container.levels)
    area = container.levels[0].height * container.levels[0].width
    return tuple(container.mpp * math.sqrt(area / (lv.height * lv.width)) for lv in container.levels)

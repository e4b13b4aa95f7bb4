"""Where a result's pixels lie on its slide, and what is kept of its outlines. Loads nothing that outlines need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """Where a map's pixels lie on the slide: level-0 coordinate = ``offset + scale * pixel``, each (x, y)."""

    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def place(self, xy: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Coordinates of level 0, to a thousandth of a pixel."""
        placed: npt.NDArray[np.float64] = np.round(xy * np.array(self.scale) + np.array(self.offset), 3)
        return placed


@dataclass(frozen=True)
class OutlineOptions:
    """What is kept of outlines.

    Attributes:
        min_area: um2; pieces whose outline encloses less are dropped.
        min_hole: um2; smaller holes are filled.
        simplify: um by which an outline may move; None: one pixel, 0: not at all.
    """

    min_area: float = 0.0
    min_hole: float = 0.0
    simplify: float | None = None

    def in_pixels(self, mpp: float | None) -> tuple[float, float, float]:
        """Least area and hole in pixels, and tolerance in pixels.

        Raises:
            ConfigError: a value below zero, or one in um for an image that does not tell its um a pixel.
        """
        for name in ("min_area", "min_hole", "simplify"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ConfigError(name, f"is {value}", "give a number of 0 or more")
            if value and mpp is None:
                raise ConfigError(name, "is in um, but the image does not tell its um a pixel", f"leave out {name}")
        unit = mpp or 1.0
        tolerance = 1.0 if self.simplify is None else self.simplify / unit
        return self.min_area / unit**2, self.min_hole / unit**2, tolerance

"""The colour of a slide's own glass, for pixels that the file does not hold: tiles never scanned, transparent ones.

Black or pure white there would be an edge that no tissue has. Files that tell the colour are believed; for others it
is estimated once, when the first such pixel is met, from the lowest level.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.slide.reader import MapReader

Pixels = npt.NDArray[np.uint8]

WHITE = (255, 255, 255)
PROBES, PROBE = 12, 96  # boxes along each axis of the lowest level that are looked at, and the side of each
BRIGHT = 150  # the least that all channels of glass have


class Background:
    """A colour that is known, or found when first asked for. Thread-safe.

    Args:
        colour: if known.
        estimate: finds it; called once.
    """

    def __init__(
        self, colour: tuple[int, int, int] | None = None, estimate: Callable[[], Pixels] | None = None
    ) -> None:
        self._estimate, self._lock = estimate, threading.Lock()
        known = colour or (None if estimate else WHITE)
        self._colour = None if known is None else np.array(known, np.uint8)

    @property
    def colour(self) -> Pixels:
        """``(3,)``, RGB."""
        with self._lock:
            if self._colour is None:
                assert self._estimate is not None
                self._colour = self._estimate()
            return self._colour

    def under(self, rgba: Pixels, out: Pixels, premultiplied: bool = False) -> None:
        """Lay ``rgba`` ``(h, w, 4)`` over the background into ``out`` ``(h, w, 3)``."""
        if rgba[..., 3].min(initial=255) == 255:
            out[...] = rgba[..., :3]
            return
        alpha = rgba[..., 3:4].astype(np.uint32)
        weighted = rgba[..., :3].astype(np.uint32) * (255 if premultiplied else alpha)
        below = (255 - alpha) * self.colour.astype(np.uint32)
        out[...] = np.minimum((weighted + below + 127) // 255, 255).astype(np.uint8)


BLACK_BELOW, WHITE_BELOW = Background((0, 0, 0)), Background(WHITE)


def glass_colour(over_black: MapReader, over_white: MapReader) -> Pixels:
    """The commonest bright colour ``(3,)`` among the pixels that the file holds, white if there is none.

    Args:
        over_black, over_white: the same map with black and with white where the file holds nothing: pixels that agree
            are the file's own.
    """
    found = []
    for box in _probes(*over_black.shape[1:]):
        black = over_black.read(box).transpose(1, 2, 0).copy()
        own = (black == over_white.read(box).transpose(1, 2, 0)).all(axis=2) & (black.min(axis=2) >= BRIGHT)
        found.append(black[own])
    pixels = np.concatenate(found)
    if len(pixels) == 0:
        return np.array(WHITE, np.uint8)
    coarse = (pixels >> 3).astype(np.int64) @ np.array([1, 32, 1024])
    glass: Pixels = np.median(pixels[coarse == np.bincount(coarse).argmax()], axis=0).astype(np.uint8)
    return glass


def _probes(height: int, width: int) -> list[Box]:
    rows, cols = ((np.linspace(0, max(0, size - PROBE), PROBES)).astype(int) for size in (height, width))
    tops, lefts = np.unique(rows).tolist(), np.unique(cols).tolist()
    return [Box(y, min(y + PROBE, height), x, min(x + PROBE, width)) for y in tops for x in lefts]

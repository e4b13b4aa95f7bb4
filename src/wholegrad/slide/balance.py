"""Evens out what differs from scanner to scanner and stain to stain before a network sees it: glass and ink.

Light follows Beer-Lambert: a pixel is ``glass * exp(-density)``. From a small picture of the whole slide come the
colour of its bare glass and how much ink is typical; a table a channel then turns every value ``v`` into
``WHITE * (v / glass) ** gain``: glass has one colour, and faint stains are as dense as others. A table works on
single values, so that a balanced slide is the same whatever the boxes it is read by (rule 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ShapeError
from wholegrad.graph.geometry import Box
from wholegrad.slide.augment.blocks import Transformed
from wholegrad.slide.reader import MapReader

Pixels = npt.NDArray[np.uint8]

WHITE = 240  # the value that glass gets
INK = 0.4  # the density that typical ink gets
GAINS = (0.6, 5.0)  # the least and most that densities are multiplied by
FAINTEST = 0.04  # density from which a pixel is not bare glass
BRIGHTEST, DARKEST = 254, 2  # from here on all channels: fill where nothing was scanned
PEAK_SHARE = 0.01  # of the pixels that a peak of brightness must hold to be glass
PICTURE = 2048  # longer side, pixels, of the picture that glass and ink are found in


@dataclass(frozen=True)
class Balance:
    """How a slide is evened out.

    Attributes:
        glass: RGB of bare glass, 0 to 255.
        gain: what densities are multiplied by.
    """

    glass: tuple[float, float, float]
    gain: float

    def table(self) -> Pixels:
        """``(3, 256)``: what each value of each channel becomes."""
        share = np.arange(256) / np.array(self.glass)[:, None]
        evened = WHITE * np.clip(share, 0, 1.06) ** self.gain
        values: Pixels = np.clip(np.round(evened), 0, 255).astype(np.uint8)
        return values


def find_balance(picture: Pixels) -> Balance:
    """The balance of a slide, from a small picture ``(h, w, 3)`` of all of it.

    Glass is the brightest colour that many pixels share; exact white and black, with which scanners fill what they
    did not scan, do not count. Typical ink is the upper quartile of the densities of what is not glass.
    """
    pixels = picture.reshape(-1, 3).astype(np.int64)
    filled = (pixels >= BRIGHTEST).all(axis=1) | (pixels <= DARKEST).all(axis=1)
    if (~filled).sum() > 100:
        pixels = pixels[~filled]
    glass = _glass(pixels)
    density = -np.log(np.clip(pixels / glass, 1 / 255, 1)).mean(axis=1)
    ink = density[density > FAINTEST]
    gain = 1.0 if len(ink) < 50 else float(np.clip(INK / np.percentile(ink, 75), *GAINS))
    return Balance((float(glass[0]), float(glass[1]), float(glass[2])), gain)


def _glass(pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The median colour of the brightest peak of brightness that holds enough pixels."""
    brightness = pixels.sum(axis=1) // 3
    counts = np.convolve(np.bincount(brightness, minlength=256), np.ones(5), "same")
    for value in range(253, 80, -1):
        if counts[value] >= PEAK_SHARE * len(pixels) and counts[value] == counts[value - 6 : value + 7].max():
            break
    else:
        value = int(np.percentile(brightness, 99))
    glass: npt.NDArray[np.float64] = np.median(pixels[np.abs(brightness - value) <= 4], axis=0)
    return glass.clip(1)


class Balanced(Transformed):
    """A slide ``(3, H, W)`` of uint8 seen through its :class:`Balance`; it tells what else the slide tells."""

    def __init__(self, reader: MapReader, balance: Balance) -> None:
        if reader.shape[0] != 3 or reader.dtype != np.uint8:
            cause = f"has {reader.shape[0]} channels of {reader.dtype}"
            raise ShapeError(reader.name, cause, "balance slides of three channels of uint8")
        from wholegrad.slide import loops  # with Numba

        super().__init__(reader)
        self.balance, self._table, self._look_up = balance, balance.table(), loops.look_up

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._reader, name)  # mpp, size, placement

    @property
    def beneath(self) -> MapReader:
        """The slide as it is stored."""
        return self._reader

    def seen(self, picture: Pixels) -> Pixels:
        """A picture ``(h, w, 3)`` of the slide beneath, evened out."""
        return np.stack([self._table[channel][picture[..., channel]] for channel in range(3)], axis=-1)

    def fill(self, block: Box, out: npt.NDArray[np.generic]) -> None:
        self._look_up(self._table, self._reader.read(block), out)

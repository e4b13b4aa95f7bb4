"""Stain, brightness and contrast changed pixel by pixel, from bytes to bytes.

Computed in integers between two tables (density of a byte; byte of a density), so that the result is the same on
every machine; the second table also applies brightness and contrast. ``tones`` has the formula.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import njit, types

from wholegrad.graph.geometry import Box
from wholegrad.slide.augment.blocks import Transformed
from wholegrad.slide.augment.tones import UNIT, Colour, byte_table, density_table, stain_matrix, tone_table
from wholegrad.slide.loops import look_up
from wholegrad.slide.reader import MapReader


class Coloured(Transformed):
    """Another map ``(3, H, W)`` of uint8 in other colours. One channel, or none of the stains changed: tones only."""

    def __init__(self, reader: MapReader, colour: Colour) -> None:
        super().__init__(reader)
        self._tones = np.tile(tone_table(colour), (reader.shape[0], 1))
        self._stains = colour.stains and reader.shape[0] == 3
        self._densities, self._bytes = density_table(), byte_table(colour)
        self._matrix, self._shift = stain_matrix(colour)

    def fill(self, block: Box, out: npt.NDArray[np.generic]) -> None:
        self._change(self._reader.read(block), out)

    def _change(self, pixels: npt.NDArray[np.generic], out: npt.NDArray[np.generic]) -> None:
        if self._stains:
            _stain(pixels, self._densities, self._matrix, self._shift, self._bytes, out)
        else:
            look_up(self._tones, pixels, out)


_HALF, _BITS = UNIT // 2, int(math.log2(UNIT))
_ANY = types.Array(types.uint8, 3, "A", readonly=True)  # of any strides
_OUT = types.Array(types.uint8, 3, "A")
_I4, _I8, _I8_2, _U1 = types.int32[::1], types.int64[::1], types.int64[:, ::1], types.uint8[::1]


# Compiled on import, so that no compiler runs beside a step whose memory was planned.
@njit(types.void(_ANY, _I4, _I8_2, _I8, _U1, _OUT), cache=True, nogil=True)
def _stain(pixels, densities, matrix, shift, table, out):  # type: ignore[no-untyped-def]
    top = table.shape[0] - 1
    for y in range(pixels.shape[1]):
        for x in range(pixels.shape[2]):
            r, g, b = densities[pixels[0, y, x]], densities[pixels[1, y, x]], densities[pixels[2, y, x]]
            for c in range(3):
                total = r * matrix[0, c] + g * matrix[1, c] + b * matrix[2, c]
                out[c, y, x] = table[min(max(((total + _HALF) >> _BITS) + shift[c], 0), top)]

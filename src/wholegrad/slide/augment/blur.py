"""Gaussian blur of a map, exact wherever a box ends: integer weights, one rounding, the border's pixel repeated.

Weights are integers that sum to 4096 along each axis, so that both passes stay in 32-bit integers and only the
result is rounded: any order of sums, and any cutting into tiles, gives the same bits.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import njit

from wholegrad.errors import ShapeError
from wholegrad.graph.geometry import Box
from wholegrad.slide.augment.blocks import LARGEST, SIDE, Transformed
from wholegrad.slide.buffers import ReusedBuffer
from wholegrad.slide.reader import MapReader

ONE = 4096  # what the weights of an axis sum to: 255 * ONE * ONE + ONE * ONE / 2 < 2**32
REACH = 3.0  # standard deviations to which the weights reach
LARGEST_SIGMA = (LARGEST - SIDE) // 2 / REACH  # whose halo still fits one block

Weights = npt.NDArray[np.uint32]


def gaussian_weights(sigma: float) -> Weights:
    """Integer weights of a Gaussian of ``sigma`` pixels, ``2 * ceil(3 sigma) + 1`` of them, that sum to ``ONE``."""
    reach = max(1, math.ceil(REACH * sigma))
    exact = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = np.round(exact / exact.sum() * ONE).astype(np.int64)
    weights[reach] += ONE - weights.sum()
    return np.asarray(weights, np.uint32)


class Blurred(Transformed):
    """Another map under a Gaussian of ``sigma`` pixels; beyond its border stands the border's own pixel.

    Raises:
        ShapeError: sigma is not between 0 and ``LARGEST_SIGMA``.
    """

    copies = 8.0  # the box beneath, with its halo, in 8 bits and in 32, and the reader's own

    def __init__(self, reader: MapReader, sigma: float) -> None:
        if not 0 < sigma <= LARGEST_SIGMA:
            raise ShapeError(reader.name, f"blur of sigma {sigma}", f"give 0 to {LARGEST_SIGMA:.1f} pixels")
        super().__init__(reader)
        self._weights = gaussian_weights(sigma)
        self._padded, self._half = ReusedBuffer(), ReusedBuffer()

    def fill(self, block: Box, out: npt.NDArray[np.generic]) -> None:
        channels, height, width = self.shape
        reach = len(self._weights) // 2
        wanted = Box(block.y0 - reach, block.y1 + reach, block.x0 - reach, block.x1 + reach)
        inner = Box(max(wanted.y0, 0), min(wanted.y1, height), max(wanted.x0, 0), min(wanted.x1, width))
        padded = self._padded.take((channels, wanted.height, wanted.width))
        rows, cols = inner.slices(wanted)
        padded[:, rows, cols] = self._reader.read(inner)
        padded[:, : rows.start, cols], padded[:, rows.stop :, cols] = (
            padded[:, rows.start : rows.start + 1, cols],
            padded[:, rows.stop - 1 : rows.stop, cols],
        )
        padded[:, :, : cols.start], padded[:, :, cols.stop :] = (
            padded[:, :, cols.start : cols.start + 1],
            padded[:, :, cols.stop - 1 : cols.stop],
        )
        _blur(padded, self._weights, self._half.take((channels, wanted.height, block.width), np.uint32), out)


# Compiled on import, for any strides of the result, so that no compiler runs beside a step whose memory was planned.
@njit("void(u1[:,:,::1], u4[::1], u4[:,:,::1], u1[:,:,:])", cache=True, nogil=True)
def _blur(padded, weights, half, out):  # type: ignore[no-untyped-def]
    """Rows into ``half``, columns of that into ``out``, rounded once."""
    taps, width = weights.shape[0], half.shape[2]
    for c in range(padded.shape[0]):
        for y in range(padded.shape[1]):
            row, into = padded[c, y], half[c, y]
            for x in range(width):
                into[x] = row[x] * weights[0]
            for k in range(1, taps):
                weight = weights[k]
                for x in range(width):
                    into[x] += row[x + k] * weight
        total = np.empty(width, np.uint32)
        for y in range(out.shape[1]):
            for x in range(width):
                total[x] = np.uint32(ONE * ONE // 2)
            for k in range(taps):
                weight, row = weights[k], half[c, y + k]
                for x in range(width):
                    total[x] += row[x] * weight
            for x in range(width):
                out[c, y, x] = total[x] >> np.uint32(24)

"""The loops over single pixels of resampling and of outlines, compiled by Numba.

Imported when a slide is resampled or outlines are opened, not before: Numba takes about 120 MiB, which plans made
afterwards count. Types are fixed, so that nothing is compiled later.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit, uint8, void
from numba.types import Array  # type: ignore[attr-defined]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


@njit("void(u1[:,:,::1], i8, i8, UniTuple(i8, 2), UniTuple(i8, 2), i8, i8, u1[:,:,:])", cache=True, nogil=True)
def average(
    stored: Bytes, top: int, left: int, rows: tuple[int, int], cols: tuple[int, int], y0: int, x0: int, out: Bytes
) -> None:
    """Fill ``out`` ``(h, w, C)``, whose corner is pixel ``(y0, x0)``, from ``stored``, whose corner is ``(top, left)``.

    ``rows`` and ``cols`` are ``(n, m)`` of each axis.
    """
    (n_y, m_y), (n_x, m_x) = rows, cols
    height, width, channels = out.shape
    sums = np.empty(stored.shape[1] * channels, np.uint32)
    area = n_y * n_x
    for i in range(height):
        lo, hi = (y0 + i) * n_y, (y0 + i + 1) * n_y
        first, last = lo // m_y, (hi - 1) // m_y
        sums[:] = 0
        for j in range(first, last + 1):
            weight = np.uint32(min(hi, (j + 1) * m_y) - max(lo, j * m_y))
            row = stored[j - top].reshape(-1)
            for k in range(sums.size):
                sums[k] += np.uint32(weight * np.uint32(row[k]))
        for x in range(width):
            lo, hi = (x0 + x) * n_x, (x0 + x + 1) * n_x
            first, last = lo // m_x, (hi - 1) // m_x
            for c in range(channels):
                total = np.int64(0)
                for j in range(first, last + 1):
                    weight_x = min(hi, (j + 1) * m_x) - max(lo, j * m_x)
                    total += weight_x * np.int64(sums[(j - left) * channels + c])
                out[i, x, c] = (2 * total + area) // (2 * area)


@njit("void(f8[:,::1], f8[::1], f8, f8, i8, u1[:,::1])", cache=True, nogil=True)
def toggle(edges: Floats, ys: Floats, start: float, step: float, first_col: int, flips: Bytes) -> None:
    """Mark in ``flips`` ``(h, w + 1)`` where rows with centres ``ys`` cross into or out of an area.

    ``start`` is the centre of the map's column 0, ``first_col`` the column of ``flips``' first.
    """
    last = flips.shape[1] - 1
    for e in range(edges.shape[0]):
        x0, y0, x1, y1 = edges[e, 0], edges[e, 1], edges[e, 2], edges[e, 3]
        if y1 <= ys[0] or y0 > ys[-1]:
            continue
        slope = (x1 - x0) / (y1 - y0)
        for row in range(np.searchsorted(ys, y0), np.searchsorted(ys, y1)):
            crossing = x0 + (ys[row] - y0) * slope
            col = np.int64(np.ceil((crossing - start) / step)) - first_col
            flips[row, min(max(col, 0), last)] ^= 1


@njit("void(u1[:,::1], i8, u1[:,:])", cache=True, nogil=True)
def paint(flips: Bytes, label: int, out: Bytes) -> None:
    """Give ``out`` ``(h, w)`` the label where an odd number of crossings lies to the left."""
    for row in range(out.shape[0]):
        inside = 0
        for col in range(out.shape[1]):
            inside ^= flips[row, col]
            if inside:
                out[row, col] = label


@njit(void(uint8[:, ::1], Array(uint8, 3, "A", readonly=True), Array(uint8, 3, "A")), cache=True, nogil=True)
def look_up(table: Bytes, stored: npt.NDArray[np.generic], out: npt.NDArray[np.generic]) -> None:
    """Fill ``out`` ``(C, h, w)`` with what ``table`` ``(C, 256)`` has for each value of ``stored``."""
    for y in range(stored.shape[1]):
        for c in range(stored.shape[0]):
            for x in range(stored.shape[2]):
                out[c, y, x] = table[c, stored[c, y, x]]


@njit("void(i4[::1], i4[::1], i4[::1], i4[::1], u1[:,::1])", cache=True, nogil=True)
def wind(x: Ints, top: Ints, bottom: Ints, turn: Ints, out: Bytes) -> None:
    """Paint 1 where the vertical sides to the left of a pixel's middle add up to more than nothing.

    Side ``i`` lies at column ``x[i]`` along rows ``top[i] .. bottom[i] - 1`` and counts ``turn[i]``.
    """
    height, width = out.shape
    winds = np.zeros((height, width + 1), np.int16)
    for i in range(len(x)):
        for row in range(top[i], bottom[i]):
            winds[row, x[i]] += turn[i]
    for row in range(height):
        depth = 0
        for column in range(width):
            depth += winds[row, column]
            out[row, column] = depth > 0

"""A map at any resolution, each pixel the exact mean of the area that it covers (rule 9: by box).

Along an axis of ``n`` stored pixels that becomes ``m``, pixel ``i`` covers stored pixels from ``i * n / m`` to
``(i + 1) * n / m``; a stored pixel that is covered in part counts by that part. Weights are whole numbers (``m`` for a
full pixel, ``n`` together), sums are exact, and one division rounds at the end, half up. So a pixel's value does not
depend on the box that it was read with. Works both ways: enlarged, a pixel lies within one or two stored ones.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.slide.buffers import ReusedBuffer, check_box
from wholegrad.slide.pyramid import LevelReader

Pixels = npt.NDArray[np.uint8]
READ_PIXELS = 1 << 20  # stored pixels that are read at once


class Resampled:
    """A level ``(C, n_y, n_x)`` of uint8 as a map ``(C, height, width)`` of the same field of view."""

    concurrent = True  # a buffer a thread
    dtype: np.dtype[np.generic] = np.dtype(np.uint8)

    def __init__(self, level: LevelReader, height: int, width: int) -> None:
        from wholegrad.slide import loops

        self._average = loops.average
        self._level, self.name = level, level.name
        self.shape = (level.shape[0], height, width)
        self._buffer = ReusedBuffer()

    @property
    def cache_bytes(self) -> int:
        """What the level holds, and one block of its pixels for each thread that may read."""
        return self._level.cache_bytes + (os.cpu_count() or 1) * self.shape[0] * self._block_pixels()

    def _block_pixels(self) -> int:
        """The most stored pixels read at once: at least those of one pixel here."""
        (down, across) = (
            -(-size // here) + 1 for size, here in zip(self._level.shape[1:], self.shape[1:], strict=True)
        )
        return max(READ_PIXELS, down * across)

    def read(self, box: Box) -> Pixels:
        """The pixels of ``box`` as ``(C, h, w)``, channels last in memory, valid until this thread's next read.

        Raises:
            ShapeError: the box is empty or reaches outside the map.
            SlideError: the level cannot be read.
        """
        check_box(self.name, self.shape, box)
        channels, height, width = self.shape
        _, n_y, n_x = self._level.shape
        out = self._buffer.take((box.height, box.width, channels)).view(np.uint8)
        for part in self._blocks(box):
            below = Box(
                part.y0 * n_y // height,
                -(-part.y1 * n_y // height),
                part.x0 * n_x // width,
                -(-part.x1 * n_x // width),
            )
            stored = np.ascontiguousarray(self._level.read(below).transpose(1, 2, 0))
            stored = stored if stored.flags.writeable else stored.copy()  # as the loop's types are fixed
            corner = (part.y0, part.x0)
            self._average(stored, below.y0, below.x0, (n_y, height), (n_x, width), *corner, out[part.slices(box)])
        return out.transpose(2, 0, 1)

    def _blocks(self, box: Box) -> list[Box]:
        """``box`` in blocks, each of at most ``READ_PIXELS`` stored pixels (or one pixel here)."""
        _, height, width = self.shape
        _, n_y, n_x = self._level.shape
        side = int(READ_PIXELS**0.5) - 2
        down, across = max(1, side * height // n_y), max(1, side * width // n_x)
        tops, lefts = range(box.y0, box.y1, down), range(box.x0, box.x1, across)
        return [Box(y, min(y + down, box.y1), x, min(x + across, box.x1)) for y in tops for x in lefts]

    def close(self) -> None:
        self._level.close()

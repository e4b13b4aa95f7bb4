"""What every transform of a map shares: it is computed block by block, so that its memory is bounded whatever the box.

A box of a gigapixel slide may have hundreds of megabytes. A transform that read it whole before changing it would
double that, unseen by the plan. Here a box is cut into blocks of ``SIDE`` pixels, each read, changed and put in its
place; ``cache_bytes`` counts what the blocks in flight take, so that measured peak <= projected still holds (rule 7).
How a box is cut changes no bit: the value of a pixel depends on the map beneath alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box
from wholegrad.run.workers import default_workers
from wholegrad.slide.buffers import ReusedBuffer, check_box
from wholegrad.slide.reader import MapReader

SIDE = 512  # pixels: of a block
LARGEST = 640  # pixels: a side that is not cut, so that a block with a halo is one block to the map beneath

Pixels = npt.NDArray[np.uint8]


def blocks(box: Box) -> Iterator[Box]:
    """Boxes that partition ``box``, row by row."""
    for y0, y1 in _cuts(box.y0, box.y1):
        for x0, x1 in _cuts(box.x0, box.x1):
            yield Box(y0, y1, x0, x1)


def _cuts(lo: int, hi: int) -> list[tuple[int, int]]:
    if hi - lo <= LARGEST:
        return [(lo, hi)]
    return [(at, min(at + SIDE, hi)) for at in range(lo, hi, SIDE)]


class Transformed(ABC):
    """A map ``(C, H, W)`` of uint8 made of another; subclasses say how a block of it is.

    Attributes:
        shape: ``(C, H, W)`` of the transformed map.
    """

    copies = 2.0  # blocks that a thread holds while it fills one, the inner reader's included

    def __init__(self, reader: MapReader, shape: tuple[int, int, int] | None = None) -> None:
        self._reader = reader
        self.shape = reader.shape if shape is None else shape
        self._buffer = ReusedBuffer()

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self._reader.dtype

    @property
    def name(self) -> str:
        return self._reader.name

    @property
    def concurrent(self) -> bool:
        """Whether several threads may read at once: as the reader beneath."""
        return bool(getattr(self._reader, "concurrent", False))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the reader beneath, and of the blocks in flight; the buffer of one box comes on top."""
        block = self.shape[0] * min(LARGEST, self.shape[1]) * min(LARGEST, self.shape[2])
        return self._reader.cache_bytes + default_workers() * int(self.copies * block)

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        """The pixels of ``box`` as ``(C, h, w)``, valid until this thread's next read.

        Raises:
            ShapeError: the box is empty or reaches outside the map.
            SlideError: the pixels beneath cannot be read.
        """
        out = self._buffer.take((self.shape[0], box.height, box.width), self.dtype)
        self.read_into(box, out)
        return out

    def read_into(self, box: Box, out: npt.NDArray[np.generic]) -> None:
        """Fill ``out``, ``(C, h, w)`` of the map's dtype, with the pixels of ``box``; errors as for ``read``."""
        check_box(self.name, self.shape, box)
        for block in blocks(box):
            rows, cols = block.slices(box)
            self.fill(block, out[:, rows, cols])

    @abstractmethod
    def fill(self, block: Box, out: npt.NDArray[np.generic]) -> None:
        """Fill ``out`` with the pixels of a block that lies within the map."""

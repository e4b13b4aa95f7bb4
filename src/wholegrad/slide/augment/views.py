"""Where pixels are: a frame that may reach beyond the map, and the eight ways to turn and flip it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ShapeError
from wholegrad.graph.geometry import Box
from wholegrad.slide.augment.blocks import Transformed
from wholegrad.slide.reader import MapReader


class Framed(Transformed):
    """The region ``frame`` of another map, with a constant where it reaches beyond.

    Args:
        reader: the map beneath.
        frame: in that map's pixels; may begin below 0 and end beyond its size, or miss it altogether.
        fill_value: of pixels that the map does not have; one for all channels, or one for each.

    Raises:
        ShapeError: the frame is empty.
    """

    def __init__(self, reader: MapReader, frame: Box, fill_value: int | Sequence[int] = 0) -> None:
        if frame.height < 1 or frame.width < 1:
            raise ShapeError(reader.name, f"frame {tuple(frame)} is empty", "give (y0, y1, x0, x1) with y0 < y1")
        super().__init__(reader, (reader.shape[0], frame.height, frame.width))
        self._frame, self._value = frame, np.array(fill_value, reader.dtype).reshape(-1, 1, 1)

    def fill(self, block: Box, out: npt.NDArray[np.generic]) -> None:
        _, height, width = self._reader.shape
        y, x = self._frame.y0, self._frame.x0
        y0, y1 = max(block.y0 + y, 0), min(block.y1 + y, height)
        x0, x1 = max(block.x0 + x, 0), min(block.x1 + x, width)
        inside = y0 < y1 and x0 < x1
        if not inside or (y1 - y0, x1 - x0) != (block.height, block.width):
            out[...] = self._value
        if inside:
            rows, cols = Box(y0, y1, x0, x1).slices(Box(block.y0 + y, block.y1 + y, block.x0 + x, block.x1 + x))
            out[:, rows, cols] = self._reader.read(Box(y0, y1, x0, x1))


class Turned(Transformed):
    """Another map flipped left to right, if asked, and then turned counterclockwise by quarters.

    As ``numpy.rot90(pixels[..., ::-1] if flip else pixels, quarters, axes=(1, 2))`` of the whole.
    """

    def __init__(self, reader: MapReader, quarters: int = 0, flip: bool = False) -> None:
        channels, height, width = reader.shape
        self._quarters, self._flip = quarters % 4, flip
        super().__init__(reader, (channels, width, height) if self._quarters % 2 else reader.shape)

    def fill(self, block: Box, out: npt.NDArray[np.generic]) -> None:
        pixels = self._reader.read(self._beneath(block))
        out[...] = np.rot90(pixels[..., ::-1] if self._flip else pixels, self._quarters, axes=(1, 2))

    def _beneath(self, box: Box) -> Box:
        """The box of the map beneath that becomes ``box``: the quarter turns undone, then the flip."""
        _, height, width = self._reader.shape
        y0, y1, x0, x1 = box
        box = {
            0: box,
            1: Box(x0, x1, width - y1, width - y0),
            2: Box(height - y1, height - y0, width - x1, width - x0),
            3: Box(height - x1, height - x0, y0, y1),
        }[self._quarters]
        return Box(box.y0, box.y1, width - box.x1, width - box.x0) if self._flip else box

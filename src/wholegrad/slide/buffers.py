"""What every reader needs: the bounds check of a box, and one output buffer that is used again.

First touch of fresh memory costs more than reading a tile, so a reader hands out the same bytes every time.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ShapeError
from wholegrad.graph.geometry import Box


def check_box(name: str, shape: tuple[int, int, int], box: Box) -> None:
    """Refuse a box that is empty or reaches outside the map.

    Raises:
        ShapeError: with the box and the size of the map.
    """
    _, height, width = shape
    if not (0 <= box.y0 < box.y1 <= height and 0 <= box.x0 < box.x1 <= width):
        raise ShapeError(
            name,
            f"box {tuple(box)} is empty or not within the map of {height} x {width} pixels",
            "ask for (y0, y1, x0, x1) with 0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width",
        )


class ReusedBuffer:
    """A buffer per thread that grows to the largest request and is handed out again and again."""

    def __init__(self) -> None:
        self._local = threading.local()

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[np.generic]:
        """An array of ``shape`` with undefined contents, valid until this thread's next call."""
        want = np.dtype(dtype)
        need = math.prod(shape) * want.itemsize
        if getattr(self._local, "size", -1) < need:
            self._local.store = None  # give the old one back before the larger one is asked for
            self._local.store = np.empty(need, np.uint8)
            self._local.size = need
        store: npt.NDArray[np.uint8] = self._local.store
        return store[:need].view(want).reshape(shape)

    def __reduce__(self) -> tuple[type[ReusedBuffer], tuple[()]]:
        return ReusedBuffer, ()

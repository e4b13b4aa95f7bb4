"""An image of any size that takes no room: a stained pattern, repeated as it is read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box

EDGE = 1024  # pixels of the pattern


class Repeated:
    """A map ``(C, H, W)`` whose pixels repeat those of ``pattern``, ``(C, EDGE, EDGE)``."""

    concurrent = True
    cache_bytes = 0
    name = "made-up pixels"

    def __init__(self, pattern: npt.NDArray[np.uint8], height: int, width: int) -> None:
        self.pattern = pattern
        self.shape = (pattern.shape[0], height, width)
        self.dtype: np.dtype[np.generic] = pattern.dtype

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        """A copy of the pixels on ``box``."""
        out = np.empty((self.shape[0], box.height, box.width), self.pattern.dtype)
        self.read_into(box, out)
        return out

    def read_into(self, box: Box, out: npt.NDArray[np.uint8]) -> None:
        """Fill ``out`` with the pixels on ``box``, a repetition at a time."""
        rows, cols = self.pattern.shape[1:]
        for y in range(box.y0 // rows * rows, box.y1, rows):
            top, bottom = max(y, box.y0), min(y + rows, box.y1)
            for x in range(box.x0 // cols * cols, box.x1, cols):
                left, right = max(x, box.x0), min(x + cols, box.x1)
                piece = self.pattern[:, top - y : bottom - y, left - x : right - x]
                out[:, top - box.y0 : bottom - box.y0, left - box.x0 : right - box.x0] = piece


def stained(labels: npt.NDArray[np.uint8], seed: int = 0) -> npt.NDArray[np.uint8]:
    """Pixels ``(3, H, W)`` of a stain where labels ``(1, H, W)`` are 1 and of glass elsewhere, with noise."""
    random = np.random.default_rng(seed)
    tissue, glass = np.array([180, 90, 150])[:, None, None], np.array([242, 242, 240])[:, None, None]
    clean = np.where(labels == 1, tissue, glass)
    pixels: npt.NDArray[np.uint8] = np.clip(clean + random.normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
    return pixels

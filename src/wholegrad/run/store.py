"""Where boundary maps live between segments: anonymous memory or a file, written and read by box.

Both keep pixels interleaved, ``(N, H, W, C)``, so that a tile comes back in the layout that convolutions prefer and a
row of a box is one contiguous read. Memory comes from ``mmap``: zero when new, and returned to the system on close.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from math import prod
from pathlib import Path

import numpy as np
import torch

from wholegrad.errors import PlanError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Spec


class MapStore(ABC):
    """A map of a Spec's shape whose last two dimensions are rows and columns; new ones hold zeros."""

    def __init__(self, spec: Spec) -> None:
        self.shape = spec.shape
        self.dtype = spec.dtype
        batch = self.shape[0] if len(self.shape) == 4 else 1
        self.stored = (batch, spec.rows, spec.cols, prod(self.shape[:-2]) // batch)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def _tile(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(N, h, w, C)`` as ``(..., h, w)``."""
        n, h, w, _ = pixels.shape
        return pixels.permute(0, 3, 1, 2).reshape(*self.shape[:-2], h, w) if len(self.shape) != 4 else (
            pixels.permute(0, 3, 1, 2)
        )  # fmt: skip

    def _pixels(self, tile: torch.Tensor) -> torch.Tensor:
        """``(..., h, w)`` as ``(N, h, w, C)``."""
        n, c = self.stored[0], self.stored[3]
        return tile.detach().reshape(n, c, *tile.shape[-2:]).permute(0, 2, 3, 1)

    @abstractmethod
    def read(self, box: Box) -> torch.Tensor:
        """A copy of the elements on ``box``."""

    @abstractmethod
    def write(self, box: Box, tile: torch.Tensor) -> None:
        """Set the elements on ``box``."""

    @abstractmethod
    def add(self, box: Box, tile: torch.Tensor) -> None:
        """Add to the elements on ``box``."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory or the file back."""


class HostStore(MapStore):
    """A map in anonymous memory."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._memory = mmap.mmap(-1, max(self.nbytes, 1))
        flat = torch.frombuffer(self._memory, dtype=self.dtype, count=prod(self.shape))
        self._map: torch.Tensor | None = flat.view(self.stored)

    def _box(self, box: Box) -> torch.Tensor:
        assert self._map is not None, "the store is closed"
        rows, cols = box.slices()
        return self._map[:, rows, cols]

    def read(self, box: Box) -> torch.Tensor:
        return self._tile(self._box(box).clone(memory_format=torch.contiguous_format))

    def write(self, box: Box, tile: torch.Tensor) -> None:
        self._box(box).copy_(self._pixels(tile))

    def add(self, box: Box, tile: torch.Tensor) -> None:
        self._box(box).add_(self._pixels(tile))

    def close(self) -> None:
        self._map = None
        try:
            self._memory.close()
        except BufferError:  # a view is still held somewhere; the memory goes with it
            del self._memory


class DiskStore(MapStore):
    """A map in an unnamed file of ``folder``: gone with the process, however that ends."""

    def __init__(self, spec: Spec, folder: Path | None) -> None:
        super().__init__(spec)
        try:
            self._file = tempfile.TemporaryFile(prefix="wholegrad-", suffix=".map", dir=folder)  # noqa: SIM115
            os.truncate(self._file.fileno(), self.nbytes)
        except OSError as error:
            raise PlanError(
                str(folder or tempfile.gettempdir()),
                f"cannot hold a boundary of {self.nbytes} bytes: {error.strerror}",
                "choose another spill folder or a larger budget",
            ) from error
        self._numpy = torch.empty(0, dtype=self.dtype).numpy().dtype

    def _offsets(self, box: Box) -> list[tuple[int, int, int]]:
        """Batch index, row within the box and byte offset of each contiguous run of pixels."""
        n, height, width, channels = self.stored
        step = channels * self.dtype.itemsize
        return [
            (i, y - box.y0, ((i * height + y) * width + box.x0) * step) for i in range(n) for y in range(box.y0, box.y1)
        ]

    def _read(self, box: Box) -> np.ndarray:
        result = np.empty((self.stored[0], box.height, box.width, self.stored[3]), self._numpy)
        for i, y, offset in self._offsets(box):
            row = memoryview(result[i, y]).cast("B")
            done = 0
            while done < len(row):
                self._file.seek(offset + done)
                got = self._file.raw.readinto(row[done:])
                if not got:
                    raise PlanError("spill file", "ends early", "check the disk")
                done += got
        return result

    def read(self, box: Box) -> torch.Tensor:
        return self._tile(torch.from_numpy(self._read(box)))

    def write(self, box: Box, tile: torch.Tensor) -> None:
        pixels = self._pixels(tile).contiguous().numpy()
        try:
            for i, y, offset in self._offsets(box):
                row, done = memoryview(pixels[i, y]).cast("B"), 0
                while done < len(row):
                    self._file.seek(offset + done)
                    done += self._file.raw.write(row[done:])
        except OSError as error:
            raise PlanError(
                "spill folder", f"cannot be written: {error.strerror}", "free space or choose another folder"
            ) from error

    def add(self, box: Box, tile: torch.Tensor) -> None:
        self.write(box, self.read(box) + tile)

    def close(self) -> None:
        self._file.close()

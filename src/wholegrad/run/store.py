"""Where boundary maps live between segments: anonymous memory or a file, written and read by box.

Both keep pixels interleaved, ``(N, H, W, C)``, so that a tile comes back in the layout that convolutions prefer and a
row of a box is one contiguous read. Memory comes from :mod:`wholegrad.run.blocks`.

A map may be stored in a narrower dtype than the graph's: it is rounded once, when written, and every read of it, in the
forward sweep and in the backward, gives the same rounded values in the graph's dtype.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from wholegrad.errors import PlanError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Spec
from wholegrad.run.blocks import Blocks

BAND = 1 << 19  # bytes that are read, added to and written back at once: they stay in the cache
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MapStore(ABC):
    """A map of a Spec's shape whose last two dimensions are rows and columns.

    Args:
        dtype: in which elements are stored; None for the Spec's own, in which they are read and written.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype | None = None) -> None:
        self.shape = spec.shape
        self.read_dtype = spec.dtype
        self.dtype = dtype or spec.dtype
        batch = self.shape[0] if len(self.shape) == 4 else 1
        self.stored = (batch, spec.rows, spec.cols, prod(self.shape[:-2]) // batch)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def _tile(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(N, h, w, C)`` as ``(..., h, w)``."""
        tile = pixels.permute(0, 3, 1, 2)
        return tile if len(self.shape) == 4 else tile.reshape(*self.shape[:-2], *tile.shape[-2:])

    def _pixels(self, tile: torch.Tensor) -> torch.Tensor:
        """``(..., h, w)`` as ``(N, h, w, C)``."""
        n, c = self.stored[0], self.stored[3]
        return tile.detach().reshape(n, c, *tile.shape[-2:]).permute(0, 2, 3, 1)

    @abstractmethod
    def read(self, box: Box) -> torch.Tensor:
        """A copy of the elements on ``box``."""

    def look(self, box: Box) -> torch.Tensor:
        """The elements on ``box``, perhaps the store's own: not to be written into, nor looked at once it is closed."""
        return self.read(box)

    @abstractmethod
    def write(self, box: Box, tile: torch.Tensor) -> None:
        """Set the elements on ``box``."""

    @abstractmethod
    def add(self, box: Box, tile: torch.Tensor) -> None:
        """Add to the elements on ``box``."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory or the file back."""


def overflows(tile: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a finite element becomes infinite when it is rounded to ``dtype``."""
    if tile.dtype == dtype:
        return False
    limit = torch.finfo(dtype).max
    low, high = torch.aminmax(tile.detach())
    if -limit <= low and high <= limit:
        return False
    return bool((torch.isinf(tile.to(dtype)) & torch.isfinite(tile)).any())  # infinities and NaN are not ours to judge


def check_space(needed: int, folder: Path | None) -> None:
    """Whether so many bytes of boundaries can lie on disk at once, before anything runs (rule 7).

    Raises:
        PlanError: they cannot.
    """
    where = str(folder or tempfile.gettempdir())
    try:
        free = shutil.disk_usage(where).free
    except OSError as error:
        raise PlanError(where, f"cannot hold boundaries: {error.strerror}", "choose another spill folder") from error
    if needed > free:
        cause = f"{needed >> 20} MiB of boundaries do not fit into the {free >> 20} MiB that are free"
        raise PlanError(where, cause, "choose another spill_dir or a larger budget")


class HostStore(MapStore):
    """A map in a block of anonymous memory.

    Args:
        blocks: where the block comes from, and goes back to.
        zero: whether a new map holds zeros: for sums. Else all of it must be written before it is read.
    """

    def __init__(self, spec: Spec, blocks: Blocks, zero: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, dtype)
        self._blocks = blocks
        self._block = blocks.take(max(self.nbytes, 1), zero)
        flat = self._block[: self.nbytes].view(self.dtype)
        self._map: torch.Tensor | None = flat.view(self.stored)

    def _box(self, box: Box) -> torch.Tensor:
        assert self._map is not None, "the store is closed"
        rows, cols = box.slices()
        return self._map[:, rows, cols]

    def read(self, box: Box) -> torch.Tensor:
        stored = self._box(box)
        return self._tile(torch.empty(stored.shape, dtype=self.read_dtype).copy_(stored))

    def look(self, box: Box) -> torch.Tensor:
        return self._tile(self._box(box)) if self.dtype == self.read_dtype else self.read(box)

    def write(self, box: Box, tile: torch.Tensor) -> None:
        self._box(box).copy_(self._pixels(tile))

    def add(self, box: Box, tile: torch.Tensor) -> None:
        self._box(box).add_(self._pixels(tile))

    def close(self) -> None:
        if self._map is not None:
            self._map = None
            self._blocks.give(self._block)


def _read_at(descriptor: int, run: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [run], offset)


def _write_at(descriptor: int, run: memoryview, offset: int) -> int:
    return os.pwrite(descriptor, run, offset)


class DiskStore(MapStore):
    """A map in an unnamed file of ``folder``: gone with the process, however that ends."""

    def __init__(self, spec: Spec, folder: Path | None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, dtype)
        try:
            self._file = tempfile.TemporaryFile(prefix="wholegrad-", suffix=".map", dir=folder, buffering=0)  # noqa: SIM115
            os.truncate(self._file.fileno(), self.nbytes)
        except OSError as error:
            raise PlanError(
                str(folder or tempfile.gettempdir()),
                f"cannot hold a boundary of {self.nbytes} bytes: {error.strerror}",
                "choose another spill folder or a larger budget",
            ) from error
        self._bits = _BITS[self.dtype.itemsize]  # NumPy knows no bfloat16

    def _runs(self, box: Box, pixels: torch.Tensor) -> list[tuple[memoryview, int]]:
        """Each run of ``pixels`` that lies in one piece in the file, with its byte offset: a row, or all full rows."""
        n, height, width, channels = self.stored
        step = channels * self.dtype.itemsize
        whole = pixels.view(self._bits).numpy()
        if box.width == width:
            return [(memoryview(whole[i]).cast("B"), (i * height + box.y0) * width * step) for i in range(n)]
        return [
            (memoryview(whole[i, y - box.y0]).cast("B"), ((i * height + y) * width + box.x0) * step)
            for i in range(n)
            for y in range(box.y0, box.y1)
        ]

    def _pixels_on(self, box: Box) -> torch.Tensor:
        """The pixels on ``box`` as they are stored."""
        result = torch.empty((self.stored[0], box.height, box.width, self.stored[3]), dtype=self.dtype)
        self._each(_read_at, self._runs(box, result))
        return result

    def read(self, box: Box) -> torch.Tensor:
        return self._tile(self._pixels_on(box).to(self.read_dtype))

    def write(self, box: Box, tile: torch.Tensor) -> None:
        narrow = self._pixels(tile).to(self.dtype, memory_format=torch.contiguous_format)
        self._each(_write_at, self._runs(box, narrow.contiguous()))

    def _each(self, move: Callable[[int, memoryview, int], int], runs: list[tuple[memoryview, int]]) -> None:
        """Read or write every run at its offset."""
        descriptor = self._file.fileno()
        try:
            for run, offset in runs:
                while run:
                    count = move(descriptor, run, offset)
                    if not count:
                        raise OSError(errno.EIO, "the file ends early")
                    run, offset = run[count:], offset + count
        except OSError as error:
            raise PlanError(
                "spill folder", f"failed: {error.strerror}", "free space or choose another folder"
            ) from error

    def add(self, box: Box, tile: torch.Tensor) -> None:
        if self.dtype != self.read_dtype:
            return self.write(box, self.read(box) + tile)
        pixels = self._pixels(tile)
        rows = max(1, BAND // max(1, box.width * self.stored[0] * self.stored[3] * self.dtype.itemsize))
        for top in range(box.y0, box.y1, rows):
            band = Box(top, min(top + rows, box.y1), box.x0, box.x1)
            added = self._pixels_on(band).add_(pixels[:, top - box.y0 : band.y1 - box.y0])
            self._each(_write_at, self._runs(band, added))

    def close(self) -> None:
        self._file.close()

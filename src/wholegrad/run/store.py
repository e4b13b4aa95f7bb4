"""Where boundary maps live between segments, written and read by box: in memory here, or on disk (``spill_store``).

Where tiles run on a device with memory of its own, "in memory" may be either one's (:class:`DeviceStore`,
:class:`AwayStore`, or a :class:`HostStore` whose block ops of the device reach). All hand out pixels ``(N, H, W, C)``,
and keep them so, but for maps of few channels, which lie channel by channel: a tile then comes back in the layout that
its convolutions prefer (PyTorch's or the thin ones). The host's memory comes from :mod:`wholegrad.run.blocks`.

A map may be stored in a narrower dtype than the graph's: it is rounded once, when written, and every read of it, in the
forward sweep and in the backward, gives the same rounded values in the graph's dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Spec
from wholegrad.kernels.choice import THIN
from wholegrad.run.blocks import Blocks, anonymous
from wholegrad.run.device import Device


class MapStore(ABC):
    """A map of a Spec's shape whose last two dimensions are rows and columns.

    Args:
        dtype: in which elements are stored; None for the Spec's own, in which they are read and written.
        held: the part of the map that there is memory for; None for all of it. No box reaches out of it.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype | None = None, held: Box | None = None) -> None:
        self.held = held or Box(0, spec.rows, 0, spec.cols)
        self.shape = (*spec.shape[:-2], self.held.height, self.held.width)
        self.read_dtype = spec.dtype
        self.dtype = dtype or spec.dtype
        batch = self.shape[0] if len(self.shape) == 4 else 1
        self.stored = (batch, self.held.height, self.held.width, prod(self.shape[:-2]) // batch)

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

    def ahead(self, box: Box) -> None:  # noqa: B027
        """Say that ``box`` will be read soon."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory or the file back."""


def laid_out(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Pixels of this shape ``(N, H, W, C)`` in ``flat`` memory: channel by channel where thin kernels read them."""
    n, h, w, c = shape
    return flat.view(n, c, h, w).permute(0, 2, 3, 1) if c <= THIN else flat.view(shape)


def overflows(tile: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a finite element becomes infinite when it is rounded to ``dtype``."""
    if tile.dtype == dtype:
        return False
    limit = torch.finfo(dtype).max
    low, high = torch.aminmax(tile.detach())
    if -limit <= low and high <= limit:
        return False
    return bool((torch.isinf(tile.to(dtype)) & torch.isfinite(tile)).any())  # infinities and NaN are not ours to judge


class HostStore(MapStore):
    """A map in a block of anonymous memory.

    Args:
        blocks: where the block comes from, and goes back to.
        zero: whether a new map holds zeros: for sums. Else all of it must be written before it is read.

    Attributes:
        across: whether a device's ops reach it, across the bus: then tensors that come and go are the device's.
    """

    across = False

    def __init__(
        self,
        spec: Spec,
        blocks: Blocks,
        zero: bool = True,
        dtype: torch.dtype | None = None,
        held: Box | None = None,
    ) -> None:
        super().__init__(spec, dtype, held)
        self._blocks = blocks
        self._block = blocks.take(max(self.nbytes, 1), zero)
        self.across = self._block.device.type != "cpu"
        self._map: torch.Tensor | None = laid_out(self._block[: self.nbytes].view(self.dtype), self.stored)

    def _box(self, box: Box) -> torch.Tensor:
        assert self._map is not None, "the store is closed"
        assert self.held.holds(box), f"{box} of a map of which {self.held} is held"
        rows, cols = box.slices(self.held)
        return self._map[:, rows, cols]

    def read(self, box: Box) -> torch.Tensor:
        stored = self._box(box)
        flat = torch.empty(stored.numel(), dtype=self.read_dtype, device=stored.device)
        return self._tile(laid_out(flat, tuple(stored.shape)).copy_(stored))

    def look(self, box: Box) -> torch.Tensor:
        own = self.dtype == self.read_dtype and not self.across  # ops may read what they get more than once
        return self._tile(self._box(box)) if own else self.read(box)

    def write(self, box: Box, tile: torch.Tensor) -> None:
        self._box(box).copy_(self._pixels(tile))

    def add(self, box: Box, tile: torch.Tensor) -> None:
        self._box(box).add_(self._pixels(tile))

    def close(self) -> None:
        if self._map is not None:
            self._map = None
            self._blocks.give(self._block)


class DeviceStore(HostStore):
    """A map in a device's memory, which its allocator hands out."""

    def __init__(
        self,
        spec: Spec,
        device: Device,
        zero: bool = True,
        dtype: torch.dtype | None = None,
        held: Box | None = None,
    ) -> None:
        MapStore.__init__(self, spec, dtype, held)
        make = torch.zeros if zero else torch.empty
        self._map = laid_out(make(prod(self.stored), dtype=self.dtype, device=device.torch), self.stored)

    def close(self) -> None:
        self._map = None


def host_block(device: Device, nbytes: int) -> torch.Tensor:
    """New memory of the host's, zeros: such as ops of the device reach, if there is any."""
    found = device.host_block(nbytes)
    return anonymous(nbytes) if found is None else found


class AwayStore(MapStore):
    """A map in the host's memory or on disk, read by tiles of a device.

    What is written and added comes in host memory, if the thread that computed it has fetched it, or is fetched here.
    """

    def __init__(self, spec: Spec, device: Device, store: MapStore) -> None:
        super().__init__(spec, store.dtype, store.held)
        self._device, self._store = device, store

    def read(self, box: Box) -> torch.Tensor:
        shape = (self.stored[0], box.height, box.width, self.stored[3])
        staged = self._tile(laid_out(self._device.staging((prod(shape),), self.read_dtype), shape))
        return self._device.arrived(self._device.send(staged.copy_(self._store.look(box))))

    def write(self, box: Box, tile: torch.Tensor) -> None:
        self._store.write(box, self._fetched(tile))

    def add(self, box: Box, tile: torch.Tensor) -> None:
        self._store.add(box, self._fetched(tile))

    def _fetched(self, tile: torch.Tensor) -> torch.Tensor:
        return tile if tile.device.type == "cpu" else self._device.fetched(tile)

    def ahead(self, box: Box) -> None:
        self._store.ahead(box)

    def close(self) -> None:
        self._store.close()

"""From a reader's pixels to the tensor that the model sees: one place, shared by the executor and the oracle.

The convention: an 8-bit image becomes floats ``value / 255`` of the model's dtype; a floating-point image is cast to
that dtype; a target is handed over as it is stored. A map of shape ``(C, H, W)`` gets a batch axis in front.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from wholegrad.errors import ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Kind, Ref
from wholegrad.run.reader import MapReader


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter or buffer; float32 if it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """The torch dtype of a NumPy dtype.

    Raises:
        ShapeError: torch has none.
    """
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError as error:
        raise ShapeError("image or target", f"has dtype {dtype}", "use uint8, float32 or float64") from error


_ONE_AT_A_TIME = threading.Lock()  # readers that do not say they are concurrent may reuse one buffer


def _read_into(reader: MapReader, box: Box, tile: torch.Tensor) -> None:
    """Fill ``tile`` with the pixels on ``box``, straight from the file where the reader can and types agree."""
    straight = getattr(reader, "read_into", None)
    try:
        if straight and tile.is_contiguous() and _stored_as(tile.dtype, reader.dtype):
            straight(box, tile.numpy())
        else:
            tile.copy_(torch.from_numpy(_plain(reader.read(box))))
    except OSError as error:
        cause = f"cannot be read on {tuple(box)}: {error.strerror or error}"
        raise SlideError(reader.name, cause, "check the file and the disk") from error


def _stored_as(dtype: torch.dtype, stored: np.dtype[np.generic]) -> bool:
    return stored.isnative and torch_dtype(stored) == dtype


def _plain(pixels: np.ndarray) -> np.ndarray:
    """The same values in an array that torch takes: writable, native, no negative strides."""
    good = pixels.flags.writeable and pixels.dtype.isnative and min(pixels.strides, default=1) >= 0
    return pixels if good else np.array(pixels, dtype=pixels.dtype.newbyteorder("="), order="C")


class Form(Enum):
    """How a tile on the CPU wants an image or a target: pixel by pixel, channel by channel, or as stored bytes.

    To a device all travel channel by channel.
    """

    INTERLEAVED = "interleaved"
    PLANAR = "planar"
    BYTES = "bytes"


@dataclass(frozen=True)
class Source:
    """An image or a target: one reader for each element of the batch, and how its pixels become a tensor.

    Attributes:
        readers: maps of equal shape ``(C, H, W)``.
        dtype: of the tensor; None to keep the stored one.
        scale: whether 8-bit values become fractions of 255.
        rank: of the tensor, 4 for ``(N, C, H, W)`` or 3 for ``(N, H, W)``.
    """

    readers: Sequence[MapReader]
    dtype: torch.dtype | None
    scale: bool
    rank: int = 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor at full size."""
        c, h, w = self.readers[0].shape
        return (len(self.readers), c, h, w) if self.rank == 4 else (len(self.readers), h, w)

    @property
    def out_dtype(self) -> torch.dtype:
        return self.dtype or torch_dtype(self.readers[0].dtype)

    @property
    def cache_bytes(self) -> int:
        return sum(reader.cache_bytes for reader in self.readers)

    def read(self, box: Box, form: Form = Form.INTERLEAVED) -> torch.Tensor:
        """The tensor on ``box``, the caller's own."""
        if form is Form.BYTES:
            return self.staged(box, lambda shape, dtype: torch.empty(shape, dtype=dtype))
        n, c = len(self.readers), self.readers[0].shape[0]
        layout = torch.contiguous_format if form is Form.PLANAR else torch.channels_last
        tile = torch.empty((n, c, box.height, box.width), dtype=self.out_dtype, memory_format=layout)
        self._fill(tile, box)
        if self.raw:
            tile.div_(255)
        return tile if self.rank == 4 else tile.squeeze(1)

    def staged(self, box: Box, empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]) -> torch.Tensor:
        """The elements on ``box`` channel by channel: bytes if :attr:`raw`, else as :meth:`read` gives them.

        Args:
            empty: the memory that they are read into, from its shape and dtype.
        """
        dtype = torch.uint8 if self.raw else self.out_dtype
        tile = empty((len(self.readers), self.readers[0].shape[0], box.height, box.width), dtype)
        self._fill(tile, box)
        return tile if self.rank == 4 else tile.squeeze(1)

    def lying_on(self, device: torch.device) -> list[torch.Tensor] | None:
        """The stored maps, if they are tensors of this device; None if not."""
        held = [getattr(reader, "tensor", None) for reader in self.readers]
        found = [tensor for tensor in held if isinstance(tensor, torch.Tensor) and tensor.device == device]
        return found if len(found) == len(held) else None

    def cut_out(self, held: Sequence[torch.Tensor], box: Box) -> torch.Tensor:
        """What :meth:`staged` gives, of maps that lie on a device, there; perhaps a part of them itself."""
        rows, cols = box.slices()
        tile = (
            torch.stack([tensor[:, rows, cols] for tensor in held]) if len(held) > 1 else held[0][None, :, rows, cols]
        )
        tile = tile if self.raw else tile.to(self.out_dtype)
        return tile if self.rank == 4 else tile.squeeze(1)

    def of_staged(self, staged: torch.Tensor) -> torch.Tensor:
        """What the model sees of what :meth:`staged` gave, wherever that is by now."""
        return staged.to(self.out_dtype).div_(255) if self.raw else staged

    def _fill(self, tile: torch.Tensor, box: Box) -> None:
        for i, reader in enumerate(self.readers):
            with nullcontext() if getattr(reader, "concurrent", False) else _ONE_AT_A_TIME:
                _read_into(reader, box, tile[i])

    @property
    def raw(self) -> bool:
        """Whether the tensor is 8-bit pixels as fractions of 255."""
        return self.scale and all(reader.dtype == np.uint8 for reader in self.readers)

    def whole(self) -> torch.Tensor:
        """The whole map as one tensor: for the oracle."""
        _, h, w = self.readers[0].shape
        return self.read(Box(0, h, 0, w))


def raw_images(graph: Graph, sources: Mapping[str, Source]) -> frozenset[Ref]:
    """The images that kernels may read as the bytes that they are."""
    return frozenset(Ref(node.index) for node in graph.of_kind(Kind.IMAGE) if sources[node.name].raw)

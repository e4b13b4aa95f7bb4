"""Activations that wait elsewhere: in a file for a CPU, in the host's pinned memory for a GPU.

``torch.autograd`` hands over each tensor that the backward pass will need, and asks for it when it does. Tensors of
less than ``LEAST`` bytes stay where they are. What several ops save is written once. Parameters are never moved.

The file has no name and is gone with the process, however that ends. Bytes go through the page cache by plain reads and
writes; a mapped file would count to the process's memory while its pages are there.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wholegrad.errors import SpillError
from wholegrad.plan.plan import show_bytes

LEAST = 1 << 20  # bytes of a tensor from which on it is moved
PIECE = 1 << 24  # bytes that are read or written at once


@dataclass(frozen=True)
class _Away:
    """A tensor that waits in the file at ``offset``."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Pinned:
    """A tensor that waits in the host's memory."""

    host: torch.Tensor
    device: torch.device


class Spill:
    """Where saved tensors wait; one for each step.

    Args:
        folder: of the file; None for the system's temporary folder.
        leaves: tensors that stay, whatever their size: parameters.

    Attributes:
        moved: bytes written so far.
    """

    def __init__(self, folder: Path | None, leaves: tuple[torch.Tensor, ...] = ()) -> None:
        self.moved = 0
        self._leaves = {leaf.untyped_storage()._cdata for leaf in leaves}
        self._known: dict[tuple[Any, ...], tuple[weakref.ref[Any], _Away | _Pinned]] = {}
        self._where = str(folder or tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(prefix="wholegrad-", suffix=".saved", dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While open, what ops save goes here."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _failed(self, error: OSError) -> SpillError:
        try:
            free = show_bytes(shutil.disk_usage(self._where).free)
        except OSError:
            free = "unknown"
        cause = f"cannot hold saved activations after {show_bytes(self.moved)} of them: {error.strerror} ({free} free)"
        return SpillError(self._where, cause, "free space, choose another spill_dir, or another strategy")

    def _pack(self, tensor: torch.Tensor) -> Any:
        if tensor.numel() * tensor.element_size() < LEAST or tensor.is_sparse:
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata in self._leaves:
            return tensor
        key = (id(storage), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return known[1]
        away = self._write(tensor.detach()) if tensor.device.type == "cpu" else self._fetch(tensor.detach())
        self._known[key] = (weakref.ref(storage), away)
        return away

    def _fetch(self, tensor: torch.Tensor) -> _Pinned:
        strides = tensor.stride() if _is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
        pinned = tensor.device.type == "cuda"
        host = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, pin_memory=pinned)
        self.moved += host.nbytes
        return _Pinned(host.copy_(tensor), tensor.device)

    def _write(self, tensor: torch.Tensor) -> _Away:
        dense = tensor if _is_dense(tensor) else tensor.contiguous()
        away = _Away(self.moved, dense.shape, dense.stride(), dense.dtype)
        flat = _bytes_of(dense)
        self._each(os.write, flat.numpy().data, self.moved)
        self.moved += flat.numel()
        return away

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _Pinned):
            return packed.host.to(packed.device, non_blocking=True)
        if isinstance(packed, torch.Tensor):
            return packed
        assert isinstance(packed, _Away)
        tensor = torch.empty_strided(packed.shape, packed.stride, dtype=packed.dtype)
        self._each(_read_into, _bytes_of(tensor).numpy().data, packed.offset)
        return tensor

    def _each(self, move: Callable[[int, memoryview], int], rest: memoryview, offset: int) -> None:
        """Read or write everything, from ``offset`` on."""
        try:
            os.lseek(self._file.fileno(), offset, os.SEEK_SET)
            while rest:
                count = move(self._file.fileno(), rest[:PIECE])
                if not count:
                    raise OSError(errno.EIO, "the file ends early")
                rest = rest[count:]
        except OSError as error:
            raise self._failed(error) from error


def _read_into(descriptor: int, run: memoryview) -> int:
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        return file.readinto(run) or 0


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one piece of memory, in whatever order."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda each: each[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _bytes_of(dense: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor, as bytes."""
    flat = dense.as_strided((dense.numel(),), (1,), dense.storage_offset())
    return flat.view(torch.uint8)

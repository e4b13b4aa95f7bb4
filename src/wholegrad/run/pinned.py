"""Host memory that a GPU's ops read and write where it lies: pages registered with CUDA, seen as the device's tensor.

A boundary in such memory needs no staging and no thread that copies: a box of it is read into the device's memory, and
a gradient is added to, by ops across the bus, in the order of their streams as if all of it lay on the device. Pages
stay registered for as long as a tensor looks at them.

Ops may use the host's own addresses of registered pages where CUDA says so; PyTorch takes such an address through
``__cuda_array_interface__`` (version 3, by Numba). A device is trusted with it once all kinds of ops that boundaries
need gave the right numbers. Written without a GPU, and never run on one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import torch

from wholegrad.run import cudart
from wholegrad.run.blocks import anonymous

SAME_ADDRESSES = 91  # cudaDevAttrCanUseHostPointerForRegisteredMem
PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegisterPortable, cudaHostRegisterMapped
TRIED = (64, 96)  # rows and columns of the map with which a device is tried


class Runtime(Protocol):
    """What is asked of CUDA's runtime, as ``torch.cuda.cudart()`` has it; results are error codes, 0 for none."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int: ...  # noqa: N802

    def cudaHostUnregister(self, address: int) -> int: ...  # noqa: N802


class Pages:
    """Anonymous pages of zeros that are registered for as long as this object lives.

    Args:
        finish: waits until the device is done with everything, before the pages go.

    Attributes:
        host: all bytes, as the host sees them.

    Raises:
        MemoryError: they cannot be registered.
    """

    def __init__(self, nbytes: int, runtime: Runtime, finish: Callable[[], None]) -> None:
        self.host = anonymous(nbytes)
        code = int(runtime.cudaHostRegister(self.host.data_ptr(), nbytes, PORTABLE_AND_MAPPED))
        if code:
            raise MemoryError(f"CUDA did not register {nbytes} bytes of host memory (error {code})")
        weakref.finalize(self, _forget, runtime, finish, self.host).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (len(self.host),), "typestr": "|u1", "data": (self.host.data_ptr(), False), "version": 3}


_stuck: list[torch.Tensor] = []  # pages that CUDA did not let go of: to unmap them would be worse


def _forget(runtime: Runtime, finish: Callable[[], None], host: torch.Tensor) -> None:
    try:
        finish()
        failed = bool(int(runtime.cudaHostUnregister(host.data_ptr())))
    except RuntimeError:
        failed = True
    if failed:
        _stuck.append(host)


def block(nbytes: int, where: torch.device) -> torch.Tensor | None:
    """New bytes, zeros, in the host's memory, as a tensor of the device; None where that cannot be."""
    if not trusted(where):
        return None
    try:
        return _of_device(_pages(nbytes, where), where)
    except (MemoryError, RuntimeError, OSError):
        return None


@cache
def trusted(where: torch.device) -> bool:
    """Whether ops of this GPU read and write such memory rightly; tried once."""
    library = cudart.runtime()
    if library is None or not cudart.attribute(library, SAME_ADDRESSES, where):
        return False  # ROCm, too, has no such library
    try:
        pages = _pages(4 * TRIED[0] * TRIED[1], where)
        return right(pages.host, _of_device(pages, where), partial(torch.cuda.synchronize, where))
    except (MemoryError, RuntimeError, OSError):
        return False


def _pages(nbytes: int, where: torch.device) -> Pages:
    with torch.cuda.device(where):
        try:
            return Pages(nbytes, torch.cuda.cudart(), partial(torch.cuda.synchronize, where))  # type: ignore[no-untyped-call]
        except MemoryError:
            cudart.forget_error()
            raise


def _of_device(pages: Pages, where: torch.device) -> torch.Tensor:
    """The same bytes, as a tensor of the device that keeps the pages.

    Raises:
        RuntimeError: PyTorch made a copy.
    """
    with torch.cuda.device(where):
        found = torch.as_tensor(pages, device=where)
    if found.data_ptr() != pages.host.data_ptr() or found.device != where:
        raise RuntimeError("PyTorch took another address")
    return found


def right(host: torch.Tensor, there: torch.Tensor, finish: Callable[[], None]) -> bool:
    """Whether ops on ``there`` do to the bytes of ``host`` what they should: the kinds of ops that a boundary needs.

    Args:
        host: bytes of a map of ``TRIED`` in float32, in the host's memory; written over.
        there: the same bytes as the device sees them.
    """
    seen, there = host.view(torch.float32).view(TRIED), there.view(torch.float32).view(TRIED)
    numbers = torch.arange(seen.numel(), dtype=torch.float32).view(TRIED)
    inside, tile = (slice(3, -5), slice(7, -9)), numbers[:-8, :-16] * 0.5
    wanted = numbers.clone()
    seen.copy_(numbers)
    read = there.clone(), there[inside].clone()
    good = torch.equal(read[0].cpu(), wanted) and torch.equal(read[1].cpu(), wanted[inside])
    there[inside].add_(tile.to(there.device))
    wanted[inside] += tile
    finish()
    good = good and torch.equal(seen, wanted)
    there[inside].copy_(tile.to(there.device))
    wanted[inside] = tile
    finish()
    good = good and torch.equal(seen, wanted)
    there.copy_((2 * numbers).to(there.device))
    finish()
    good = good and torch.equal(seen, 2 * numbers)
    there.zero_()
    finish()
    return good and not bool(seen.any())

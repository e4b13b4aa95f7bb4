"""Tensors in CUDA's managed memory, which the driver pages between GPU and host; never run on a GPU yet.

PyTorch takes memory for the calling thread from a pool (``torch.cuda.MemPool``) while a step runs, and the pool gets it
by two functions that call ``cudaMallocManaged`` and ``cudaFree``. They are machine code: PyTorch calls them with its
allocator's lock held, where a function of Python's could wait for a thread that waits for that lock.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from wholegrad.errors import PlanError
from wholegrad.kernels.compile import addresses
from wholegrad.run import cudart

WHERE = "strategy managed"
CONCURRENT = 89  # cudaDevAttrConcurrentManagedAccess
ATTACH_GLOBAL = 1  # cudaMemAttachGlobal
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
TEXT = """\
define ptr @managed_alloc(i64 %size, i32 %device, ptr %stream) {{
  %place = alloca ptr
  store ptr null, ptr %place
  %status = call i32 inttoptr (i64 {allocate} to ptr)(ptr %place, i64 %size, i32 {flags})
  %failed = icmp ne i32 %status, 0
  %found = load ptr, ptr %place
  %memory = select i1 %failed, ptr null, ptr %found
  ret ptr %memory
}}
define void @managed_free(ptr %memory, i64 %size, i32 %device, ptr %stream) {{
  %status = call i32 inttoptr (i64 {release} to ptr)(ptr %memory)
  ret void
}}
"""

T = TypeVar("T")


def check(where: torch.device) -> None:
    """Whether a GPU and its driver page managed memory while kernels use it.

    Raises:
        PlanError: they do not, or PyTorch would take memory another way.
    """
    if torch.version.hip is not None:
        raise PlanError(WHERE, "is for NVIDIA's GPUs, and this PyTorch is built for ROCm", "use strategy offload")
    if sys.platform != "linux":
        raise PlanError(WHERE, f"needs Linux, and this is {sys.platform}", "use strategy offload")
    if torch.cuda.get_allocator_backend() != "native" or _expandable():
        cause = "needs PyTorch's own allocator, without expandable segments"
        raise PlanError(WHERE, cause, f"leave backend and expandable_segments out of {' and '.join(SETTINGS)}")
    if not cudart.attribute(runtime(), CONCURRENT, where):
        cause = f"is not safe on {where}: its driver does not page memory while kernels use it, as none does under WSL"
        raise PlanError(WHERE, cause, "use strategy offload")


def _expandable() -> bool:
    said = ",".join(os.environ.get(name, "") for name in SETTINGS)
    return "expandable_segments:true" in said.replace(" ", "").lower()


def runtime() -> Any:
    """The CUDA runtime that PyTorch has loaded.

    Raises:
        PlanError: it is not found.
    """
    found = cudart.runtime()
    if found is None:
        cause = "does not find the CUDA runtime (libcudart) that PyTorch uses"
        raise PlanError(WHERE, cause, "install the PyTorch wheel for CUDA, or use strategy offload")
    return found


@cache
def functions(allocate: int, release: int) -> tuple[int, int]:
    """Addresses of ``void* alloc(ssize_t, int, cudaStream_t)`` and ``void free(void*, ssize_t, int, cudaStream_t)``.

    Args:
        allocate, release: the addresses of ``cudaMallocManaged`` and ``cudaFree``, which they call.
    """
    text = TEXT.format(allocate=allocate, release=release, flags=ATTACH_GLOBAL)
    alloc, free = addresses(text, ("managed_alloc", "managed_free"))
    return alloc, free


@cache
def allocator() -> Any:
    """What a pool takes its memory by; it stays, since memory of a pool may outlive the pool."""
    library = runtime()
    allocate, release = (
        ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in ("cudaMallocManaged", "cudaFree")
    )
    make = torch._C._cuda_customAllocator
    return make(*functions(allocate, release))


def warm(where: torch.device) -> None:
    """Have libraries take the workspaces that they keep: of products of matrices, without and with a bias."""
    one = torch.ones(16, 16, device=where)
    torch.nn.functional.linear(one, one, one[0]).add_(one @ one)


def managed(where: torch.device, work: Callable[[], T], out: Callable[[T], T]) -> T:
    """Run ``work`` with what the calling thread takes on the GPU in managed memory; all of it is free afterwards.

    Args:
        out: makes a copy of what ``work`` gives, in ordinary memory.
    """
    with torch.cuda.device(where):
        warm(where)
        pool = torch.cuda.MemPool(allocator())
        try:
            with torch.cuda.use_mem_pool(pool, where):
                found = work()
            copied = out(found)
            del found
            torch.cuda.synchronize(where)
        finally:
            del pool
    return copied

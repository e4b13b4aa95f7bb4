"""The CUDA runtime that PyTorch has loaded, for what PyTorch does not pass on: by ctypes, and never tried on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

NEEDED = ("cudaMallocManaged", "cudaFree", "cudaDeviceGetAttribute", "cudaGetLastError")
MAPS = Path("/proc/self/maps")


def libraries(maps: Path = MAPS) -> Iterator[str]:
    """Where it may be: files that this process has mapped, then the name by which the system knows it."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        lines = []
    mapped = (line[line.index("/") :] for line in lines if "/" in line)
    yield from dict.fromkeys(path for path in mapped if Path(path).name.startswith("libcudart"))
    if torch.version.cuda is not None:
        yield f"libcudart.so.{torch.version.cuda.partition('.')[0]}"


@cache
def runtime() -> Any | None:
    """The library; None if it is not found."""
    for name in libraries():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if all(hasattr(library, each) for each in NEEDED):
            return library
    return None


def attribute(library: Any, number: int, where: torch.device) -> int | None:
    """A property of a GPU (``cudaDeviceAttr``); None if the runtime does not say."""
    value = ctypes.c_int(0)
    failed = library.cudaDeviceGetAttribute(ctypes.byref(value), number, where.index or 0)
    return None if failed else value.value


def forget_error() -> None:
    """Have CUDA forget its last error, which it would tell whoever asks next."""
    library = runtime()
    if library is not None:
        library.cudaGetLastError()

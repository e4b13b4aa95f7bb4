"""What every measured process does alike: time steps, report, cut pixels out. NumPy only, as peers' environments."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GIB = 1 << 30


def peak() -> int:
    """The most bytes that this process ever had in memory (Linux)."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "the kernel reports no VmHWM"
    return int(found[1]) * 1024


def timed(step: Callable[[], float], steps: int) -> dict[str, Any]:
    """One step to warm up, then ``steps`` that count: seconds on the clock and of all threads, and the losses."""
    seconds, cpu, losses = [], [], []
    for i in range(steps + 1):
        started, computed = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - computed)
        label = "warm-up" if i == 0 else f"step {i}"
        text = f"  {label}: {seconds[-1]:.2f} s, {cpu[-1]:.2f} s of CPU, loss {losses[-1]:.6f}"
        print(f"{text}, peak {peak() / GIB:.2f} GiB", file=sys.stderr, flush=True)
    return {"warm_up": seconds[0], "seconds": seconds[1:], "cpu_seconds": cpu[1:], "losses": losses}


def report(**found: Any) -> None:
    """Hand the results to the parent: one line of JSON, with this process's peak."""
    print(json.dumps({**found, "peak_bytes": peak()}), flush=True)


def area(size: str) -> tuple[int, int]:
    """``"16000x64000"`` as height and width."""
    height, width = (int(edge) for edge in size.split("x"))
    return height, width


def crop(path: Path, height: int, width: int) -> np.ndarray:
    """The middle of an array file ``(C, H, W)``, channels last in memory: ``(1, height, width, C)``."""
    stored = np.load(path, mmap_mode="r")
    y, x = (stored.shape[1] - height) // 2, (stored.shape[2] - width) // 2
    return np.ascontiguousarray(stored[:, y : y + height, x : x + width].transpose(1, 2, 0))[None]


def peer_inputs(image: Path, mask: Path, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """What a whole-image peer trains on, in float32: pixels in [0, 1] and labels, both ``(1, height, width, C)``."""
    pixels = crop(image, height, width).astype(np.float32)
    pixels /= 255
    return pixels, (crop(mask, height, width) == 1).astype(np.float32)

"""The machine: processor, system, accelerators, memory."""

from __future__ import annotations

import os
import platform
import shutil
import sys

import psutil
import torch

from wholegrad.doctor.finding import Finding, Findings, State
from wholegrad.errors import WholegradError
from wholegrad.kernels.host import host
from wholegrad.plan.plan import show_bytes
from wholegrad.run import limits
from wholegrad.run.budget import budget_bytes
from wholegrad.run.device import open_device
from wholegrad.run.pressure import stalled
from wholegrad.run.process import machine, usable_cores

SHOWN = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512dq",
    "avx512vl",
    "avx512bf16",
    "avx512fp16",
    "amx-bf16",
    "neon",
    "sve",
)
LEAST = 3 << 29  # bytes that the published network's step on a gigapixel slide takes, twice
STALL = 10.0  # per cent of time in which processes waited for memory


def look_at_machine() -> Findings:
    """Processor and system."""
    yield Finding("machine", machine(), {"processor": platform.processor() or platform.machine()})
    yield Finding("system", platform.platform(), platform.platform())
    cores = {"usable": usable_cores(), "logical": psutil.cpu_count(), "physical": psutil.cpu_count(logical=False)}
    text = f"{cores['usable']} usable of {cores['logical']} logical, {cores['physical'] or 'unknown'} physical"
    yield Finding("cores", text, cores)
    yield _vectors()
    if sys.platform == "win32":
        mend = "use Linux or macOS, or WSL: boundaries on disk and memory limits need them"
        yield Finding("platform", "Windows has not been tried", sys.platform, State.ADVICE, mend)


def _vectors() -> Finding:
    found = host()
    features: list[str] = []
    try:
        import llvmlite.binding as llvm

        known = llvm.get_host_cpu_features()
        features = [name for name in SHOWN if known.get(name)]
    except (ImportError, AttributeError, RuntimeError):
        pass
    if found is None:
        mend = "thin convolutions run in PyTorch's kernels, several times slower: use AVX2 and FMA, or a 64-bit ARM"
        return Finding("vectors", "no kernels for this processor", features, State.ADVICE, mend)
    text = f"{found.width * 8} bits, {found.registers} registers ({' '.join(features) or platform.machine()})"
    return Finding("vectors", text, {"bits": found.width * 8, "features": features})


def accelerators() -> list[str]:
    """Those that PyTorch finds and tiles can run on, by name."""
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = getattr(torch.backends, "mps", None)
    return [*found, "mps"] if mps is not None and mps.is_available() else found


def look_at_devices() -> Findings:
    """Where tiles can run; each accelerator is asked for one sum."""
    yield Finding("cpu", "tiles run here by default")
    yield from _cuda()
    mps = getattr(torch.backends, "mps", None)
    if sys.platform == "darwin" and mps is not None:
        yield _tried("mps", "mps") if mps.is_available() else Finding("mps", "not available", None, State.ABSENT)


def _cuda() -> Findings:
    built = torch.version.cuda or getattr(torch.version, "hip", None)
    if built and torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(number)
            yield _tried(f"cuda:{number}", f"{name}, PyTorch for {built}")
        return
    if shutil.which("nvidia-smi") or os.path.exists("/dev/nvidia0"):  # noqa: PTH110 (a device, not a file)
        check = "check the driver and CUDA_VISIBLE_DEVICES (a container needs --gpus all)"
        mend = check if built else "install PyTorch's CUDA build (pytorch.org)"
        yield Finding("cuda", "there is a driver for a GPU, and PyTorch does not use it", built, State.ADVICE, mend)
    else:
        yield Finding("cuda", "none", built, State.ABSENT)


def _tried(name: str, text: str) -> Finding:
    """One accelerator, asked for a sum that is known."""
    try:
        total = float(torch.ones(1024, device=name).sum())
        if total != 1024:
            return Finding(name, f"adds 1024 ones to {total}", None, State.BROKEN, "do not use it: check its driver")
        room = open_device(name).room()
    except (RuntimeError, WholegradError) as error:
        said = " ".join(str(error).split())[:200]
        return Finding(name, f"does not work: {said}", None, State.BROKEN, "check its driver and PyTorch's build")
    value = {"total": room.total, "free": room.free}
    return Finding(name, f"{text}, {show_bytes(room.free)} of {show_bytes(room.total)} free", value)


def look_at_memory() -> Findings:
    """Total, free, and what limits this process."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    yield Finding("total", show_bytes(memory.total), int(memory.total))
    free = limits.available()
    few = free < LEAST
    mend = f"{show_bytes(LEAST)} or more lets a gigapixel step run: close other programs, or raise the limit"
    yield Finding("free", show_bytes(free), free, State.ADVICE if few else State.OK, mend if few else None)
    found = limits.limits()
    for limit in found:
        text = f"{show_bytes(limit.limit)}, of which {show_bytes(limit.free)} are free"
        yield Finding(limit.name, text, {"limit": limit.limit, "used": limit.used})
    if not found:
        yield Finding("limits", "none on this process")
    budget = budget_bytes(None)
    yield Finding("automatic budget", show_bytes(budget), budget)
    yield Finding("swap", f"{show_bytes(swap.used)} of {show_bytes(swap.total)} in use", {"used": swap.used})
    waited = stalled()
    if waited > STALL:
        mend = "other programs want the same memory: expect slow steps, or close them"
        yield Finding("pressure", f"processes waited for memory {waited:.0f} % of the time", waited, State.ADVICE, mend)

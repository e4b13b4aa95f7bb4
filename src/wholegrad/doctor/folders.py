"""The two folders that work goes through: boundaries on disk, and compiled kernels."""

from __future__ import annotations

import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import psutil

from wholegrad.doctor.finding import Finding, Findings, State
from wholegrad.doctor.machine import accelerators
from wholegrad.errors import SpillError, WholegradError
from wholegrad.kernels.compile import cache_folder, is_whole
from wholegrad.plan.plan import show_bytes
from wholegrad.run import calibrate, calibrate_device
from wholegrad.run.device import open_device
from wholegrad.run.spill_file import TRIED, spill_folder, trial

BLOCKS, QUICK = 32, 4  # written and read: how many
IN_MEMORY = ("tmpfs", "ramfs")
OVER_NETWORK = ("nfs", "nfs4", "cifs", "smb", "smb3", "9p", "fuse.sshfs", "lustre", "beegfs", "ceph")
LOW = 8 << 30  # bytes free, below which boundaries of a gigapixel step may not fit
KNOWN = 2000  # kernels that are checked


def look_at_spill(quick: bool) -> Findings:
    """Where boundaries on disk go: space, kind, speed past the page cache."""
    folder = spill_folder(None)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(
            "folder", f"{folder}: {error.strerror}", None, State.BROKEN, "set TMPDIR to a folder that is there"
        )
        return
    kind = file_system(folder)
    text = f"{folder}, {show_bytes(free)} free, {kind or 'unknown file system'}"
    value = {"path": str(folder), "free": free, "kind": kind}
    elsewhere = "set TMPDIR to a local disk, or give spill_dir"
    if kind in IN_MEMORY:
        mend = f"lies in memory, which boundaries on disk are to save: {elsewhere}"
        yield Finding("folder", text, value, State.ADVICE, mend)
    elif kind in OVER_NETWORK:
        yield Finding("folder", text, value, State.ADVICE, f"lies on a network: {elsewhere}")
    elif free < LOW:
        yield Finding("folder", text, value, State.ADVICE, f"little space: free some, or {elsewhere}")
    else:
        yield Finding("folder", text, value)
    yield _disk(folder, TRIED * min(QUICK if quick else BLOCKS, max(free // (4 * TRIED), 1)))


def file_system(folder: Path) -> str | None:
    """The kind of the file system that holds a folder."""
    at, best, kind = folder.resolve(), -1, None
    for each in psutil.disk_partitions(all=True):
        mounted = Path(each.mountpoint)
        if at.is_relative_to(mounted) and len(mounted.parts) > best:
            best, kind = len(mounted.parts), each.fstype
    return kind


def _disk(folder: Path, nbytes: int) -> Finding:
    """Bytes a second written and read as boundaries are."""
    try:
        tried = trial(folder, nbytes)
    except SpillError as error:
        return Finding(
            "disk", error.cause, None, State.BROKEN, "set TMPDIR to a folder that can be written, or give spill_dir"
        )
    if not tried.same:
        return Finding(
            "disk", "what is read is not what was written", None, State.BROKEN, "check the disk; set TMPDIR to another"
        )
    wrote, read = nbytes / tried.writing, nbytes / tried.reading
    how = "past the page cache" if tried.direct else "through the page cache"
    text = f"{wrote / 1e6:.0f} MB/s written, {read / 1e6:.0f} MB/s read, {how}"
    return Finding("disk", text, {"write": wrote, "read": read, "direct": tried.direct})


def look_at_kernels(quick: bool) -> Findings:
    """The folder of compiled kernels; unless ``quick``, one is compiled and its result compared."""
    folder = cache_folder()
    yield _cache(folder)
    if not quick:
        yield _kernel()
    rates = calibrate.rates_file()
    if rates.exists():
        yield Finding("rates", f"measured, in {rates}", str(rates))
    else:
        mend = "wholegrad plan --calibrate measures this machine, for predicted times"
        yield Finding("rates", "built in", None, State.ABSENT, mend)
    for name in accelerators():
        yield _rates_there(name)


def _rates_there(name: str) -> Finding:
    """Whether an accelerator was measured, with Triton's kernels or without, all other options left out."""
    what, command = f"rates of {name}", f"wholegrad plan --calibrate --device {name}"
    try:
        plain = open_device(name)
        files = {"without triton": calibrate_device.rates_file(plain)}
        if find_spec("triton") and plain.torch.type == "cuda":
            files["with triton"] = calibrate_device.rates_file(open_device(name, triton=True))
    except WholegradError as error:
        return Finding(what, f"not known: {error.cause}", None, State.ABSENT, error.remedy)
    kept = {how: str(path) for how, path in files.items() if path.exists()}
    if not kept:
        return Finding(what, "assumed", None, State.ABSENT, f"{command} measures it, for predicted times")
    return Finding(what, f"measured {' and '.join(kept)}", kept)


def _cache(folder: Path) -> Finding:
    value = {"path": str(folder), "kernels": 0, "bytes": 0, "damaged": 0}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [path for path in folder.iterdir() if path.is_file()]
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        mend = "every process compiles its kernels anew: set WHOLEGRAD_CACHE to a folder that can be written"
        return Finding("cache", f"{folder}: {said}", value, State.ADVICE, mend)
    sizes = [path.stat().st_size for path in files]
    damaged = [path for path in files[:KNOWN] if not is_whole(path)]
    value |= {"kernels": len(files), "bytes": sum(sizes), "damaged": len(damaged)}
    text = f"{folder}, {len(files)} kernels, {show_bytes(sum(sizes))}"
    if not writable:
        mend = "every process compiles its kernels anew: set WHOLEGRAD_CACHE to a folder that can be written"
        return Finding("cache", f"{text}, not writable", value, State.ADVICE, mend)
    if os.name == "posix" and folder.stat().st_mode & 0o002:
        mend = f"anybody could put machine code there that runs as you: chmod go-w {folder}"
        return Finding("cache", f"{text}, writable for all", value, State.ADVICE, mend)
    if damaged:
        mend = f"they are compiled again when needed: remove them ({damaged[0].name} and others)"
        return Finding("cache", f"{text}, {len(damaged)} damaged", value, State.ADVICE, mend)
    return Finding("cache", text, value)


def _kernel() -> Finding:
    """A thin convolution by a kernel of our own, against PyTorch's."""
    import torch

    from wholegrad.kernels import thin
    from wholegrad.kernels.host import host

    if host() is None:
        return Finding("kernel", "none for this processor", None, State.ABSENT, "nothing: PyTorch's own are used")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((1, 3, 40, 50), (2, 3, 5, 5)))
    begin = time.perf_counter()
    found = thin.forward(x, weight, None, (1, 1), (2, 2, 2, 2), (1, 1))
    seconds = time.perf_counter() - begin
    true = torch.nn.functional.conv2d(x.double(), weight.double(), padding=2)
    apart = float((found.double() - true).abs().max())
    if not apart < 1e-4:
        mend = "remove the cache folder; if that does not help, report it with this processor's name"
        return Finding("kernel", f"is off by {apart:.1e}", apart, State.BROKEN, mend)
    return Finding("kernel", f"compiled or loaded, and run, in {seconds:.2f} s", seconds)

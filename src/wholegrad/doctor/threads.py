"""How many threads work, how many could, and settings of the environment that get in the way."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import psutil

from wholegrad.doctor.finding import Finding, Findings, State
from wholegrad.run.process import usable_cores
from wholegrad.run.workers import default_workers

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
BUSY = 0.5  # of the usable cores that others may keep busy


def look_at_threads() -> Findings:
    """PyTorch's threads against the cores that this process may use."""
    workers, usable, quota = default_workers(), usable_cores(), cpu_quota()
    room = usable if quota is None else max(1, min(usable, int(quota + 0.5)))
    value = {"threads": workers, "usable": usable, "quota": quota}
    text = f"{workers} run tiles, {usable} cores are usable"
    if quota is not None:
        text += f", a control group grants {quota:g}"
    if workers > room:
        mend = f"threads wait for one another: set OMP_NUM_THREADS={room}, or call torch.set_num_threads({room})"
        yield Finding("threads", text, value, State.ADVICE, mend)
    elif 2 * workers <= room and psutil.cpu_count(logical=False) not in (None, workers):
        mend = f"cores lie idle: set OMP_NUM_THREADS={room}"
        yield Finding("threads", text, value, State.ADVICE, mend)
    else:
        yield Finding("threads", text, value)
    yield from _environment(room)
    yield from _allocator()
    yield _load(usable)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors that control groups grant; None without a limit.

    Args:
        root: where groups are mounted. In version 2 every group from this process's own up to the root counts; in
            version 1 the root alone, which in a container is its own.
        own: says which group this process is in.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    group = root / next((line[3:] for line in lines if line.startswith("0::")), "/").lstrip("/")
    found = False
    granted: list[float] = []
    for folder in (group, *group.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            found = True
            if quota != "max":
                granted.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            pass
        if folder == root:
            break
    if found:
        return min(granted, default=None)
    try:
        numbers = [int((root / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")]
        return None if numbers[0] <= 0 else numbers[0] / numbers[1]
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _environment(room: int) -> Findings:
    for name in COUNTS:
        given = os.environ.get(name)
        if given is None:
            continue
        count = re.fullmatch(r"\s*(\d+)\s*(,.*)?", given)
        if count is None or int(count[1]) < 1:
            yield Finding(name, f"{given!r} is no number of threads", given, State.ADVICE, f"unset it, or set {room}")
        elif int(count[1]) > room:
            mend = f"more threads than cores: set {name}={room}"
            yield Finding(name, given, given, State.ADVICE, mend)
        else:
            yield Finding(name, given, given)
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        mend = "threads that wait keep a core busy: set OMP_WAIT_POLICY=passive"
        yield Finding("OMP_WAIT_POLICY", "active", "active", State.ADVICE, mend)
    for name in ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND"):
        if os.environ.get(name, "").lower() not in ("", "false", "none", "disabled"):
            mend = "worker threads inherit the core of the thread that starts them, and share it: unset it"
            yield Finding(name, os.environ[name], os.environ[name], State.ADVICE, mend)


def _allocator() -> Findings:
    """Memory is kept between tiles by settings of glibc's allocator."""
    if not sys.platform.startswith("linux"):
        return
    loaded = os.environ.get("LD_PRELOAD", "")
    other = next((name for name in ALLOCATORS if name in loaded), None)
    if other is not None:
        mend = "memory is kept and given back by glibc's settings alone: peaks may differ from the plan's"
        yield Finding("allocator", f"{other} in place of glibc's", other, State.ADVICE, mend)
    set_ = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"}
    told = ", ".join(f"{name}={value}" for name, value in sorted(set_.items()))
    if any(name in ("MALLOC_PERTURB_", "MALLOC_CHECK_") for name in set_):
        yield Finding(
            "malloc", told, set_, State.ADVICE, "these settings fill every block: unset them outside of tests"
        )
    elif set_ or other is None:
        yield Finding("malloc", told or "glibc's, set while a step runs", set_)


def _load(usable: int) -> Finding:
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):
        return Finding("load", "unknown")
    if load > BUSY * usable:
        mend = "other processes work too: expect times to vary"
        return Finding("load", f"{load:.1f} processes want {usable} cores", load, State.ADVICE, mend)
    return Finding("load", f"{load:.1f} of {usable} cores", load)

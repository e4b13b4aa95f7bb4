"""How much memory this process may take: what the machine has free, and what limits lie on the process.

A Linux control group (cgroup) limits a container or a job: version 2 by ``memory.max`` and ``memory.high``, version 1
by ``memory.limit_in_bytes``, each group and all that it lies in. What a group has in use includes pages of files that
are given back when memory is wanted (``inactive_file``), which do not count here. Elsewhere there are no groups, and
nothing is found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

UNLIMITED = 1 << 60  # from here on a number means that there is no limit
_V2, _V1 = ("memory.max", "memory.high"), ("memory.limit_in_bytes",)


@dataclass(frozen=True)
class Limit:
    """A limit in bytes, what is in use of it, and what sets it, in words."""

    name: str
    limit: int
    used: int

    @property
    def free(self) -> int:
        return max(self.limit - self.used, 0)


def limits(root: Path = Path("/")) -> list[Limit]:
    """The limits of the control groups that this process is in, and of its address space.

    Args:
        root: of the file system, for tests.
    """
    return [*group_limits(root), *_address_space()]


def group_limits(root: Path = Path("/")) -> list[Limit]:
    """Those of control groups alone."""
    found = []
    for folder, names, usage, reclaimed in _groups(root):
        used = _number(folder / usage)
        for name in names:
            limit = _number(folder / name)
            if limit is not None and used is not None and limit < UNLIMITED:
                spare = _stat(folder / "memory.stat", reclaimed)
                found.append(Limit("cgroup limit", limit, max(used - spare, 0)))
    return found


def available(root: Path = Path("/")) -> int:
    """Bytes that this process could take now: of what the machine has free, and of every limit."""
    machine = int(psutil.virtual_memory().available)
    return min([machine, *(limit.free for limit in limits(root))])


def tightest(root: Path = Path("/")) -> Limit | None:
    """The lowest limit of the process's control groups; None without one."""
    return min(group_limits(root), key=lambda each: each.limit, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, ...], str, str]]:
    """Each folder of a group that holds this process, with the names of what is to be read there."""
    try:
        members = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in members:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files: tuple[tuple[str, ...], str, str] = (_V2, "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = (_V1, "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for top, inside in _mounted(mounts, "cgroup2" if not controllers else "cgroup"):
            base = root / top.lstrip("/")
            relative = os.path.relpath(path, inside) if (path + "/").startswith(inside.rstrip("/") + "/") else "."
            folder = base / relative
            if not folder.is_dir():  # a group that is not shown in here, as in a container
                folder = base
            while True:
                yield folder, *files
                if folder == base:
                    break
                folder = folder.parent


def _mounted(mounts: list[str], kind: str) -> Iterator[tuple[str, str]]:
    """Where hierarchies of this kind are mounted, and which of their folders is."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        words, rest = before.split(), after.split()
        if len(words) < 5 or len(rest) < 3 or rest[0] != kind:
            continue
        if kind == "cgroup2" or "memory" in rest[2].split(","):
            yield words[4], words[3]


def _number(path: Path) -> int | None:
    """A number in a file; None for ``max``, or if it cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _stat(path: Path, key: str) -> int:
    try:
        found = re.search(rf"^{key} (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _address_space() -> list[Limit]:
    """The limit on addresses that a shell sets (``ulimit -v``), which nothing else says before memory runs out."""
    try:
        import resource
    except ImportError:  # not on Windows
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft >= UNLIMITED:
        return []
    return [Limit("limit on addresses", soft, int(psutil.Process().memory_info().vms))]

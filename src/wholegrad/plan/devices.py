"""What plans need to know of a device with memory of its own, and what is assumed of one that nobody has measured.

Such a plan has two budgets: the device's, of what PyTorch's allocator hands out there, and the host's, of the whole
process as on the CPU. Tiles and boundaries near them count in the first; staging memory, boundaries in host memory and
those on disk in the second.
"""

from __future__ import annotations

from dataclasses import dataclass

from wholegrad.plan.rates import Rates

BEYOND = 2  # tiles that are read ahead beyond those in flight

# Assumed, not measured: that a GPU's kernels reach a part of what its data sheet says (for an H200 60e12 float32 and
# 4.3e12 bytes a second), and what a launch costs. They decide between plans; no promise follows from them.
ASSUMED = Rates(
    wide=((6e-12, 8e-12, 8e-12), (1e-12, 1.2e-12, 1.2e-12), (4e-13, 5e-13, 5e-13), (1.5e-13, 2e-13, 2e-13),
          (8e-14, 1e-13, 1e-13), (6e-14, 8e-14, 8e-14)),
    thin=((6e-12, 8e-12, 8e-12), (2e-12, 3e-12, 3e-12), (1e-12, 1.2e-12, 1.2e-12)),
    product=5e-14, made=6e-13, passed=6e-13, summed=4e-13, backward=2.5, fresh=0.0, stored=6e-13, disk=2.4e-9,
    pixels=4e-11, row=0.0, call=1e-5, parameter=1e-12,
)  # fmt: skip
ACROSS = 4e-11  # seconds a byte between host and device
SLACK = 1.25  # of a tile's bytes: what kernels take beside their results
WORKSPACE = 256 << 20  # bytes that libraries' kernels take for themselves at once
PINNED = 2.0  # of the bytes that pass through it: PyTorch rounds each piece of pinned memory up to a power of two
PIECES = 1.25  # of a step's bytes in managed memory: what was freed, which the driver cannot tell from what is in use
RUNTIME = 1 << 30  # bytes of the host's memory that a GPU's libraries take once they run


@dataclass(frozen=True)
class Apart:
    """A device with memory of its own, as a plan sees it.

    Attributes:
        name: as PyTorch has it.
        at_once: tiles in flight.
        graphs: whether tiles are recorded: a recording keeps the working set of its tiles, from step to step.
        most_bytes: a tensor there has fewer; None without such a limit.
        host_budget: bytes for the whole process; None for no limit.
        host_reserved: bytes that it holds whatever the plan.
        room: bytes that this process could have there now, those that it holds included.
        safe: a safe share of them, which is the budget where nobody names one.
        named: whether somebody did.
    """

    name: str
    at_once: int
    graphs: bool = False
    most_bytes: int | None = None
    host_budget: int | None = None
    host_reserved: int = 0
    room: int = 0
    safe: int = 0
    named: bool = False


@dataclass(frozen=True)
class Host:
    """The host's side of a plan for a device, in bytes: what is allowed, held whatever the plan, and projected."""

    budget: int | None
    reserved: int
    projected: int

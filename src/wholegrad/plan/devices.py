"""What plans need to know of a device with memory of its own, and what is assumed of one that nobody has measured.

Such a plan has two budgets: the device's, of what PyTorch's allocator hands out there, and the host's, of the whole
process as on the CPU. Tiles and boundaries near them count in the first; staging memory, boundaries in host memory and
those on disk in the second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from wholegrad.kernels.choice import THIN
from wholegrad.plan.rates import Rates

BEYOND = 2  # tiles that are read ahead beyond those in flight


@dataclass(frozen=True)
class DeviceRates(Rates):
    """Seconds of the whole device, by the clock, while it always has more to do: what its tiles take one after another.

    Tiles in flight share the device, so that a step's seconds are the sum over its tiles, whatever ``at_once`` is; on
    a CPU they are of one thread, and threads share the tiles. What is read ahead and what crosses is added too, though
    it overlaps with arithmetic: of a step that waits for nothing the sum is too large.

    Attributes:
        wide: of PyTorch's convolutions in the layout of tiles there: planar up to ``THIN`` channels, else interleaved.
        thin: of Triton's kernels, and ``passed`` of their passes, where these run; ``made`` is of PyTorch's ops.
        stored: of a byte of a boundary in the device's memory, written.
        pixels: of a byte of an image or target as it travels (8-bit images as bytes), from the host's ordinary memory
            to the device; reading and decoding files is not in it. Making floats of it there is counted with ``made``.
        across: of a byte of a boundary between the host's memory and the device, either way: by the device's ops where
            they reach that memory, else through staging.
        up_to: channels of the thinner side up to which Triton's kernels run a convolution (0: none), at most ``THIN``.
    """

    across: float = 4e-11
    up_to: int = THIN

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        found = super().of(values)
        if found.up_to not in range(THIN + 1):
            raise ValueError("channels that cannot be")
        return replace(found, up_to=int(found.up_to))


# Assumed, not measured: that a GPU's kernels reach a part of what its data sheet says (for an H200 60e12 float32 and
# 4.3e12 bytes a second), and what a launch costs. They decide between plans; no promise follows from them.
ASSUMED = DeviceRates(
    wide=((6e-12, 8e-12, 8e-12), (1e-12, 1.2e-12, 1.2e-12), (4e-13, 5e-13, 5e-13), (1.5e-13, 2e-13, 2e-13),
          (8e-14, 1e-13, 1e-13), (6e-14, 8e-14, 8e-14)),
    thin=((6e-12, 8e-12, 8e-12), (2e-12, 3e-12, 3e-12), (1e-12, 1.2e-12, 1.2e-12)),
    product=5e-14, made=6e-13, passed=6e-13, summed=4e-13, backward=2.5, fresh=0.0, stored=6e-13, disk=2.4e-9,
    pixels=4e-11, row=0.0, call=1e-5, parameter=1e-12, across=4e-11,
)  # fmt: skip
SLACK = 1.25  # of a tile's bytes: what kernels take beside their results
WORKSPACE = 256 << 20  # bytes that libraries' kernels take for themselves at once
OF_PRODUCTS = 32 << 20  # bytes that a library of products of matrices keeps for each thread with each stream (Hopper)
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
        triton: channels of the thinner side up to which Triton's kernels run convolutions (and all that is computed
            where it is read); None where PyTorch's own ops run everything. Decided with the plan, which runs by it.
        across: seconds of a byte of a boundary that goes to the host's memory or comes back.
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
    triton: int | None = None
    across: float = ASSUMED.across
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


def workspace(products: bool, at_once: int) -> int:
    """Bytes of the device that libraries take for themselves.

    Args:
        products: whether tiles have products of matrices.
        at_once: tiles in flight. So many threads, and autograd's, meet as many streams; the caller's, and autograd's,
            meet its own stream and those on which tiles are recorded.
    """
    return WORKSPACE + OF_PRODUCTS * (at_once * (at_once + 1) + 2 * (at_once + 1)) * products

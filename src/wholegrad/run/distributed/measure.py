"""How fast the ranks of a group really talk: seconds a byte and a round, for plans' predictions."""

from __future__ import annotations

import time

import torch

from wholegrad.plan.traffic import Link
from wholegrad.run.distributed.wire import Wire

SHORT, LONG = 24, 8 << 20  # bytes of the messages that are timed
TIMES = 5


def measured_link(wire: Wire) -> Link:
    """Of the slowest rank, while every one sends to the next and receives from the one before, as halos travel.

    The median of some rounds of short messages, and of long ones. All ranks of the group call it at once.
    """
    if wire.size == 1:
        return Link(0.0, 0.0)
    short, long = _median(wire, SHORT), _median(wire, LONG)
    mine = torch.tensor([short, max(long - short, 0.0) / LONG], dtype=torch.float64)
    slowest = torch.stack([each.cpu() for each in wire.gathered(mine)]).amax(0).tolist()
    return Link(byte=slowest[1], message=slowest[0])


def _median(wire: Wire, size: int) -> float:
    following, before = (wire.rank + 1) % wire.size, (wire.rank - 1) % wire.size
    given, taken = (torch.zeros(size, dtype=torch.uint8, device=wire.device) for _ in range(2))
    found = []
    for _ in range(TIMES):
        wire.meet()
        started = time.monotonic()
        wire.swap([(following, given)], [(before, taken)])
        found.append(time.monotonic() - started)
    return sorted(found)[TIMES // 2]

"""Which budget to run under while other processes come and go: less in time, more again with patience.

Between steps (and now and then within one) the memory that is free is looked at. A budget that no longer fits into it
is replaced by a safe share of what is left, before the system kills the process. When memory comes back, the budget
grows again, up to what it was at first, but only after several looks in a row that found much more: plans differ in how
sums are rounded, and a run should not change them for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wholegrad.run import limits, process

SHARE = 0.6  # of the memory that is free, for a budget
DANGER = 0.9  # of the memory that is free; a budget that needs more is too large
RECOVERED = 1.25  # times the budget that a safe share must allow before the budget grows
PATIENCE = 3  # looks in a row that must say so
STALLED = 10.0  # per cent of time in which some process waited for memory
STEP = 64 << 20  # bytes in which budgets are counted


@dataclass(frozen=True)
class Look:
    """What was found: bytes of this process, bytes that it could still take, per cent of time lost in waiting."""

    held: int
    free: int
    stalled: float = 0.0

    @property
    def safe(self) -> int:
        """A budget that leaves a good part of what is free to others, in whole steps."""
        budget = self.held + int(SHARE * self.free)
        return budget // STEP * STEP if budget >= STEP else budget

    def fits(self, peak: int) -> bool:
        """Whether this process may come to hold so many bytes."""
        return peak <= self.held + DANGER * self.free


def look() -> Look:
    """What is free now. Costs about a tenth of a millisecond."""
    return Look(process.resident(), limits.available(), stalled())


def stalled(path: Path = Path("/proc/pressure/memory")) -> float:
    """Per cent of the last ten seconds in which some process waited for memory; 0 where nobody counts."""
    try:
        found = re.search(r"^some avg10=([\d.]+)", path.read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return float(found[1]) if found else 0.0


class Governor:
    """A budget that follows what is free.

    Args:
        most: the budget at first, never exceeded.
        probe: how to look.
    """

    def __init__(self, most: int, probe: Callable[[], Look] = look) -> None:
        self.most = self.budget = most
        self.probe = probe
        self._calm = 0

    def changed(self, peak: int | None = None) -> Look | None:
        """Look, and adapt ``budget``; returns what was found if it changed.

        Args:
            peak: what the next step will hold at most, where that is known; else the whole budget.
        """
        seen = self.probe()
        if not seen.fits(self.budget if peak is None else min(peak, self.budget)) or seen.stalled > STALLED:
            self._calm = 0
            return self._set(min(self.budget, seen.safe), seen)
        wanted = min(seen.safe, self.most)
        roomy = self.budget < self.most and (wanted >= RECOVERED * self.budget or wanted == self.most)
        self._calm = self._calm + 1 if roomy else 0
        if self._calm < PATIENCE:
            return None
        self._calm = 0
        return self._set(wanted, seen)

    def squeezed(self, peak: int) -> bool:
        """Whether a step that runs, and will hold so many bytes at most, had better be given up."""
        seen = self.probe()
        return peak > seen.held and not seen.fits(peak)

    def _set(self, budget: int, seen: Look) -> Look | None:
        before, self.budget = self.budget, budget
        return seen if budget != before else None

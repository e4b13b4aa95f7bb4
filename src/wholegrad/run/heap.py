"""The heap that a step leaves to the plan's next one.

What tiles freed stays with the process after a step (:func:`~wholegrad.run.process.reuse_memory`), since the next step
of the plan asks for the same sizes again: on a small image the first touch of fresh pages is a tenth of a step. A sweep
over a segment that ran since memory was last given back finds there what it left, and nothing is given back before it;
any other one is taken to find nothing that it can use (``Boundaries.make_room``). The projected peak of a plan with a
backward sweep counts what a heap keeps in pieces after many tiles, however few a step has.
"""

from __future__ import annotations

from wholegrad.run import process

Sweep = tuple[int, bool]  # over which segment, and whether it is pulled back


class Heap:
    """Which sweeps ran in the heap as it is."""

    def __init__(self) -> None:
        self._sweeps: set[Sweep] = set()
        self._since = -1

    def knows(self, sweep: Sweep) -> bool:
        """Whether a sweep ran since memory was last given back."""
        return self._since == process.times_given_back() and sweep in self._sweeps

    def ran(self, sweep: Sweep) -> None:
        """Note that it runs now."""
        if self._since != process.times_given_back():
            self._sweeps, self._since = set(), process.times_given_back()
        self._sweeps.add(sweep)

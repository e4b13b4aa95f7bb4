"""The heap that a sweep leaves to the next one, and a step to the plan's next (``Plan.keeps_heap``).

What tiles freed stays with the process, after a step too (:func:`~wholegrad.run.process.reuse_memory`): on a small
image the first touch of fresh pages is a tenth of a step. Once a sweep over a segment is done all that its tiles took
from the heap is free again, in large pieces. Tiles that take no more find their memory there, and nothing is given back
before them; those that take more find as much (``Boundaries.make_room``). The projected peak of a plan with a backward
sweep counts what a heap keeps in pieces after several steps (``plan.memory.wear``).

That does not hold of tensors with pages of their own (``plan.memory.PAGED``), which the heap has not, nor of what
PyTorch's convolutions take; and tiles of many segments leave too many pieces: MONAI's UNet in nine segments came to
hold 1 per cent more than projected. Such plans give memory back between segments and after a step.
"""

from __future__ import annotations

from wholegrad.run import process


class Heap:
    """What ran in the heap as it is."""

    def __init__(self) -> None:
        self._most, self._since = 0, -1

    def finds(self, working: int) -> int:
        """Of so many bytes that tiles may take, those that an earlier sweep of the plan left."""
        return min(working, self._most) if self._since == process.times_given_back() else 0

    def ran(self, working: int) -> None:
        """Note that tiles run now which may take so many bytes."""
        if self._since != process.times_given_back():
            self._most, self._since = 0, process.times_given_back()
        self._most = max(self._most, working)

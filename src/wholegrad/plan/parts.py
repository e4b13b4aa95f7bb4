"""What a plan's projected peak is made up of: bytes by name, at the moment when they are most.

A moment is one segment in one sweep. What the process holds whatever runs is the same at all of them; boundaries, their
gradients and tiles differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wholegrad.graph.graph import Graph
from wholegrad.plan import memory


@dataclass(frozen=True)
class Parts:
    """Bytes of a projected peak; they add up to it.

    Attributes:
        interpreter: what the process held when the plan was made: Python, PyTorch, model, captured graph.
        libraries: kernels' code and scratch space, LLVM, oneDNN, thread stacks, autograd, once they have run.
        readers: caches and decoders of images and targets.
        parameters: parameters' gradients.
        whole: small values held whole and their gradients, those of dense regions among them.
        boundaries: boundaries in host memory.
        gradients: their gradients.
        spill: what boundaries on disk take in memory: blocks on their way.
        tiles: working sets of the tiles that run side by side, and rows of tiles that wait to be written.
        allocator: what the heap keeps in pieces that nobody can use, and libraries' copies.
        messages: what ranks send and receive at once, of one image and of the gradients of several.
        recordings: what recorded tiles keep on a device.
    """

    interpreter: int
    libraries: int
    readers: int
    parameters: int
    whole: int
    boundaries: int
    gradients: int
    spill: int
    tiles: int
    allocator: int
    messages: int = 0
    recordings: int = 0

    @property
    def total(self) -> int:
        """The projected peak."""
        return sum(size for _, size in self.rows())

    def rows(self) -> list[tuple[str, int]]:
        """Name and bytes of each part, largest first."""
        found = [(name, getattr(self, name)) for name in self.__dataclass_fields__]
        return sorted(found, key=lambda each: -each[1])


def parts(
    graph: Graph,
    reserved: int,
    moments: Sequence[tuple[int, int, int, float]],
    segments: int,
    spill: int = 0,
    messages: int = 0,
    recordings: int = 0,
) -> Parts:
    """The parts at the moment when they are most.

    Args:
        reserved: bytes taken whatever the plan.
        moments: for each segment and sweep, bytes of boundaries, of their gradients, of tiles, and the slack in these.
        segments: how many there are.
        spill: what boundaries on disk take in memory.
        messages: what ranks send and receive at once.
        recordings: what recorded tiles keep.
    """
    held = reserved if isinstance(reserved, memory.Reserved) else memory.Reserved(reserved)
    boundaries, gradients, working, slack = max(moments, key=lambda each: sum(each[:3]), default=(0, 0, 0, 1.0))
    tiles = int(working / slack)
    return Parts(
        held.interpreter,
        held.libraries,
        held.readers,
        memory.gradient_accumulators(graph),
        memory.held_whole(graph),
        boundaries,
        gradients,
        spill,
        tiles,
        working - tiles + memory.leftover(segments),
        messages + held.exchange,
        recordings,
    )

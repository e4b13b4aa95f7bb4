"""Several tiles in flight on a device: each on a stream of its own, merged in tile order on the caller's.

::

    caller's   ready ---------------- wait a, merge tile 0 -- wait b, merge tile 1 -- ...
    lane 0          wait ready, tile 0, a        tile 2, c
    lane 1          wait ready, tile 1, b        tile 3, d

Streams order nothing among themselves, so every crossing needs a mark that the other side waits for, and memory that
one stream's ops still read must not go to another's: PyTorch's allocator is told who uses what. Ops that a thread asks
for run long after; a lane is never more than ``DEPTH`` tiles behind the thread that fills it, or memory that waits for
them would pile up. Results are merged in tile order whatever lane made them, so that bits do not depend on it (rule 6).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from wholegrad.run.device import Gate

DEPTH = 2  # tiles of a lane that are asked for and not done, the one that is being asked for among them


class Streams(Protocol):
    """What a device with streams is asked for."""

    def current(self) -> Any:
        """The calling thread's stream."""

    def using(self, stream: Any) -> AbstractContextManager[None]:
        """While open, the calling thread's ops go to this stream."""

    def mark(self, stream: Any) -> Any:
        """A mark behind all that the stream was asked for."""

    def wait(self, stream: Any, mark: Any) -> None:
        """What the stream is asked for from now on comes after the mark."""

    def look(self, mark: Any) -> None:
        """Wait, in the calling thread, until the mark is passed."""

    def used_on(self, tensor: torch.Tensor, stream: Any) -> None:
        """The tensor's memory is used again only after what this stream was asked for until it is freed."""


class Lane:
    """A stream, its number, and marks behind the tiles that it was asked for last."""

    def __init__(self, number: int, stream: Any) -> None:
        self.number, self.stream = number, stream
        self.behind: deque[Any] = deque()


class Lanes:
    """The lanes of a device, each with one thread at a time."""

    def __init__(self, streams: Sequence[Any]) -> None:
        self._free = deque(Lane(i, stream) for i, stream in enumerate(streams))
        self._changed = threading.Condition()

    @contextmanager
    def taken(self) -> Iterator[Lane]:
        """The lane that has been free for longest."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free))
            lane = self._free.popleft()
        try:
            yield lane
        finally:
            with self._changed:
                self._free.append(lane)
                self._changed.notify()


class StreamGate(Gate):
    """The gate of a device with streams; tiles that run in the merging thread itself stay on its stream."""

    def __init__(self, streams: Streams, lanes: Lanes) -> None:
        self._streams, self._lanes = streams, lanes
        self._caller, self._thread = streams.current(), threading.get_ident()
        self._ready = streams.mark(self._caller)
        self._here = Lane(0, self._caller)
        self._own = threading.local()

    @contextmanager
    def lane(self) -> Iterator[int]:
        streams = self._streams
        if threading.get_ident() == self._thread:
            yield self._filled(self._here)
            return
        with self._lanes.taken() as lane, streams.using(lane.stream):
            streams.wait(lane.stream, self._ready)
            yield self._filled(lane)

    def _filled(self, lane: Lane) -> int:
        while len(lane.behind) >= DEPTH:
            self._streams.look(lane.behind.popleft())
        self._own.lane = lane
        return lane.number

    def done(self) -> Any:
        lane: Lane = self._own.lane
        mark = self._streams.mark(lane.stream)
        lane.behind.append(mark)
        return mark if lane is not self._here else None

    def join(self, mark: Any, tensors: Iterable[torch.Tensor]) -> None:
        if mark is None:
            return
        self._streams.wait(self._caller, mark)
        for tensor in tensors:
            self._streams.used_on(tensor, self._caller)

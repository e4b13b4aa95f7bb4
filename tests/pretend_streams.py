"""The pretended device with streams and recordings: nothing runs later than asked, but what might be a race raises.

Every stream keeps a clock, and how far it is known to be behind every other: marks carry that from one stream to
another, as events do on a GPU. An op that touches memory which another stream wrote, or writes what another still
reads, without having waited is an error; so is memory that goes back to its stream while another may still use it.

A recording keeps the list of its ops and runs them again on the same memory, as a CUDA graph does; an op that would
make the host wait cannot be recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import pretend
from pretend import LEDGER, WATCHES, Pretend, PretendDevice, Watch
from wholegrad.run.device import Gate, Moving, Options
from wholegrad.run.lanes import Lanes, StreamGate

aten = torch.ops.aten
Mark = dict["Stream", int]


class RaceError(RuntimeError):
    """Streams that touch the same memory in no order."""


class Stream:
    def __init__(self, name: str) -> None:
        self.name, self.clock, self.runs_tiles = name, 0, name.startswith("lane")
        self.known: Mark = {}

    def __repr__(self) -> str:
        return self.name


class _Memory:
    """Whose a storage is, who wrote it last, who read it since, and who said so."""

    def __init__(self, owner: Stream) -> None:
        self.owner = owner
        self.written: tuple[Stream, int] | None = None
        self.read: Mark = {}
        self.recorded: set[Stream] = set()


class Streams(Watch):
    """What :class:`~wholegrad.run.lanes.StreamGate` asks for, watching every op."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.default = Stream("caller")
        self.memory: dict[int, _Memory] = {}
        self.errors: list[str] = []
        self.most_behind = 0
        self._own = threading.local()

    # What is asked for.

    def current(self) -> Stream:
        if not hasattr(self._own, "stream"):
            self._own.stream = self.default
        found: Stream = self._own.stream
        return found

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._own, "stream", None)
        self._own.stream = stream
        try:
            with torch.autograd.set_multithreading_enabled(False):  # CUDA pulls an op back on the stream of its forward
                yield
        finally:
            if before is None:
                del self._own.stream
            else:
                self._own.stream = before

    def mark(self, stream: Stream) -> Mark:
        with self.lock:
            return {**stream.known, stream: stream.clock}

    def wait(self, stream: Stream, mark: Mark) -> None:
        with self.lock:
            for other, clock in mark.items():
                stream.known[other] = max(stream.known.get(other, 0), clock)

    def look(self, mark: Mark) -> None:
        """The host waits: whatever it asks for from now on comes after the mark."""

    def used_on(self, tensor: torch.Tensor, stream: Stream) -> None:
        if isinstance(tensor, Pretend):
            with self.lock:
                memory = self.memory.get(tensor.raw.untyped_storage()._cdata)
                if memory is not None:
                    memory.recorded.add(stream)

    # What is watched.

    def op(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Pretend)]
        written = {id(each) for each in pretend._written(func, args, kwargs)}
        if func is aten.copy_.default:
            written.add(id(args[0]))
        with self.lock:
            stream = self._of_thread(given)
            if stream is None:
                return
            stream.clock += 1
            for each in given:
                self._touched(stream, each, id(each) in written, func)
            views = {each.raw.untyped_storage()._cdata for each in given}
            for each in tree_leaves(found):
                if isinstance(each, Pretend) and each.raw.untyped_storage()._cdata not in views:
                    memory = self.memory[each.raw.untyped_storage()._cdata] = _Memory(stream)
                    memory.written = stream, stream.clock

    def _of_thread(self, given: list[Pretend]) -> Stream | None:
        """The thread's own, or of PyTorch's thread of the device, which runs ops on the streams of what they read."""
        own: Stream | None = getattr(self._own, "stream", None)
        if own is not None:
            return own
        keys = [each.raw.untyped_storage()._cdata for each in given]
        known = [self.memory[key] for key in keys if key in self.memory]
        lasts = [memory.written[0] for memory in known if memory.written is not None]
        lasts += [stream for memory in known for stream in memory.recorded]  # of what was uploaded for them
        lanes = [stream for stream in lasts if stream.runs_tiles]
        return lanes[0] if lanes else (self.default if given else None)

    def _touched(self, stream: Stream, tensor: Pretend, writes: bool, func: Any) -> None:
        memory = self.memory.setdefault(tensor.raw.untyped_storage()._cdata, _Memory(stream))
        if memory.written is not None:
            self._ordered(stream, *memory.written, f"{func} on {stream} touches {tuple(tensor.shape)} that", "wrote")
        if writes:
            for other, clock in memory.read.items():
                self._ordered(stream, other, clock, f"{func} on {stream} writes {tuple(tensor.shape)} that", "reads")
            memory.written, memory.read = (stream, stream.clock), {}
        else:
            memory.read[stream] = stream.clock

    def _ordered(self, stream: Stream, other: Stream, clock: int, what: str, did: str) -> None:
        if other is not stream and stream.known.get(other, 0) < clock:
            self.errors.append(f"{what} {other} {did}, without waiting")

    def gone(self, block: int) -> None:
        with self.lock:
            memory = self.memory.pop(block, None)
            if memory is None:
                return
            uses = dict(memory.read)
            if memory.written is not None:
                uses[memory.written[0]] = max(uses.get(memory.written[0], 0), memory.written[1])
            for other, clock in uses.items():
                known = memory.owner.known.get(other, 0)
                if other is not memory.owner and other not in memory.recorded and known < clock:
                    self.errors.append(f"memory of {memory.owner} is free while {other} may use it")


class _Log(Watch):
    """Ops while a recording is made."""

    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.waits = False

    def op(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        every = [each for each in tree_leaves((args, kwargs, found)) if isinstance(each, torch.Tensor)]
        if func is aten._local_scalar_dense.default or not all(isinstance(each, Pretend) for each in every):
            self.waits = True  # something of the host went in or came out
        raw = tree_map_only(Pretend, lambda each: each.raw, (args, kwargs, found))
        self.ops.append((func, *raw))


class _Replay:
    """A list of ops on memory that stays, told to watches as one op that reads and writes all of it."""

    def __init__(self, ops: list[tuple[Any, Any, Any, Any]]) -> None:
        self.ops, self.replays = ops, 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, found in self.ops:
                self._again(func, args, {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}, found)

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, found: Any) -> None:
        given = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        made = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if made and not writes and all(each.untyped_storage()._cdata in given for each in made):
            return  # a view: it looks at memory that is there
        new = func(*args, **kwargs)
        if not writes:
            for to, each in zip(made, [e for e in tree_leaves(new) if isinstance(e, torch.Tensor)], strict=True):
                to.copy_(each)


class StreamedDevice(PretendDevice):
    """The pretended device with uploads, tiles and results on streams of their own, as on CUDA."""

    def __init__(self, where: torch.device, options: Options) -> None:
        super().__init__(where, options)
        self.streams = Streams()
        self.uploads = Stream("uploads")
        self.of_tiles = [Stream(f"lane {i}") for i in range(options.at_once)]
        self.lanes = Lanes(self.of_tiles)
        self.recordings: list[_Replay] = []
        self.kept: dict[int, int] = {}  # bytes that each lane's recordings share
        self.refused = 0
        self.fail = False  # whether nothing can be recorded

    def gate(self) -> Gate:
        return StreamGate(self.streams, self.lanes)

    def send(self, tensor: torch.Tensor) -> Moving:
        with self.streams.using(self.uploads):
            sent = super().send(tensor).tensor
            self._made(sent)
            return Moving(sent, self.streams.mark(self.uploads))

    def _made(self, tensor: torch.Tensor) -> None:
        """What comes from the host: no tensor of the device went in."""
        assert isinstance(tensor, Pretend)
        with self.streams.lock:
            self.uploads.clock += 1
            memory = self.streams.memory[tensor.raw.untyped_storage()._cdata] = _Memory(self.uploads)
            memory.written = self.uploads, self.uploads.clock

    def arrived(self, moving: Moving) -> torch.Tensor:
        current = self.streams.current()
        assert isinstance(moving.mark, dict)
        self.streams.wait(current, moving.mark)
        self.streams.used_on(moving.tensor, current)
        return moving.tensor

    def recorded(self, work: Callable[[], None], lane: int) -> _Replay | None:
        log = _Log()
        before, LEDGER.peak = LEDGER.peak, LEDGER.now
        WATCHES.append(log)
        try:
            work()
        finally:
            WATCHES.remove(log)
            took, LEDGER.peak = LEDGER.peak - LEDGER.now, max(before, LEDGER.peak)
        if self.fail or log.waits:
            self.refused += 1
            return None
        self.kept[lane] = max(self.kept.get(lane, 0), took)
        self.recordings.append(_Replay(log.ops))
        return self.recordings[-1]

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())

    def forget_recordings(self) -> None:
        self.kept.clear()

    def peak(self) -> int:
        """What tensors held, and what recordings keep beside, as on CUDA."""
        return super().peak() + self.kept_bytes

    def finish(self) -> None:
        """All streams have done all: whatever comes is after it."""
        with self.streams.lock:
            every = {memory.owner for memory in self.streams.memory.values()}
            every |= {self.streams.default, self.uploads, *self.of_tiles}
            now = {stream: stream.clock for stream in every}
            for stream in every:
                stream.known.update(now)


@contextmanager
def streamed(reaches_host: bool = False, **options: Any) -> Iterator[StreamedDevice]:
    """The device, whose streams are watched while this is open; raises for what was a race.

    Raises:
        RaceError: two streams touched the same memory in no order.
    """
    made = StreamedDevice(torch.device(pretend.NAME, 0), Options(**options))
    made.reaches_host = reaches_host  # type: ignore[misc]
    WATCHES.append(made.streams)
    try:
        yield made
    finally:
        WATCHES.remove(made.streams)
    if made.streams.errors:
        raise RaceError(f"{len(made.streams.errors)}: {made.streams.errors[0]}")


__all__ = ["LEDGER", "RaceError", "StreamedDevice", "streamed"]

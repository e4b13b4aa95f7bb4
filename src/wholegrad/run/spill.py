"""Blocks of boundaries on their way to and from disk: written behind, read ahead, checked, in bounded memory.

::

    tiles --change--> [ blocks in memory, at most ``limit`` bytes ] --one thread--> file
    tiles <--read---- [ least lately used ones make room          ] <-one thread--- file   (read ahead)

A block that a tile changed stays here until the writing thread has brought it to its file, which it does once half of
the memory is taken by such blocks: what several tiles add to is then written once for all of them, and a small map
never reaches the disk. Who wants room where all blocks wait to be written waits too, so the queue is bounded. Blocks
that the next tile will read are read ahead, up to half of the memory.
"""

from __future__ import annotations

import mmap
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch

from wholegrad import clock
from wholegrad.errors import SpillError
from wholegrad.plan.spill import Layout
from wholegrad.run.spill_blocks import BlockFile
from wholegrad.run.spill_file import check_space, remove_orphans, spill_folder

SLOW_SECONDS, SLOW_SHARE = 5.0, 0.25  # of a step spent waiting for the disk, both exceeded: worth a warning
_warned: set[Path] = set()


Key = tuple[BlockFile, int]


@dataclass(eq=False)
class _Block:
    """A block in memory.

    Attributes:
        readers: threads that look at it now; nobody changes it meanwhile.
        held: whether one thread fills or changes it; nobody looks at it meanwhile.
        fresh: made just now, by the thread that holds it.
        ahead: read ahead, and not looked at yet.
    """

    slot: mmap.mmap
    readers: int = 0
    held: bool = False
    fresh: bool = False
    ahead: bool = False
    values: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.values = torch.frombuffer(self.slot, dtype=torch.uint8)


@dataclass
class Traffic:
    """Bytes and seconds of one direction."""

    bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = f" at {self.bytes / self.seconds / 1e6:.0f} MB/s" if self.seconds else ""
        return f"{self.bytes / 1e9:.2f} GB{rate}"


class Spill:
    """Blocks in memory of all boundaries on disk of one step.

    Args:
        limit: bytes that they may take (:func:`wholegrad.plan.spill.spill_bytes`).
        folder: of their files; None for the system's temporary folder.
        needed: bytes that must be free there.

    Raises:
        SpillError: they are not, or it is no folder.
    """

    def __init__(self, limit: int, folder: Path | None, needed: int) -> None:
        self.limit, self.folder = limit, spill_folder(folder)
        check_space(needed, self.folder)
        remove_orphans(self.folder)
        self.written, self.read, self.waited = Traffic(), Traffic(), 0.0
        self.held = 0  # bytes of blocks and free slots
        self._started = perf_counter()
        self._clean: OrderedDict[Key, _Block] = OrderedDict()  # least lately used first
        self._dirty: OrderedDict[Key, _Block] = OrderedDict()
        self._free: dict[int, list[mmap.mmap]] = {}
        self._wanted: deque[Key] = deque()  # to be read ahead
        self._dirty_bytes = self._ahead_bytes = self._short = 0  # the last: threads that wait for room
        self._error: BaseException | None = None
        self._closing = False
        lock = threading.RLock()
        self._turn = threading.Condition(lock)  # for threads that want blocks
        self._work = threading.Condition(lock)  # for the two that bring and write them
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._write_behind, self._read_ahead)]
        for thread in self._threads:
            thread.start()

    # What stores do.

    def file(self, layout: Layout, what: str) -> BlockFile:
        """A file for the blocks of ``what``."""
        return BlockFile(layout, self.folder, what)

    @contextmanager
    def reading(self, file: BlockFile, number: int) -> Iterator[torch.Tensor]:
        """The bytes of a block to look at; zeros where nothing was written."""
        block = self._take((file, number))
        try:
            yield block.values
        finally:
            with self._turn:
                block.readers -= 1
                self._tell()

    @contextmanager
    def changing(self, file: BlockFile, number: int, whole: bool) -> Iterator[torch.Tensor]:
        """The bytes of a block to change; whatever they are if the ``whole`` of it is going to be set."""
        key = (file, number)
        block = self._take(key, change=True, fill=not whole)
        try:
            yield block.values
        finally:
            with self._turn:
                block.held = False
                if self._clean.pop(key, None) is not None:
                    self._dirty_bytes += len(block.slot)
                    self._dirty[key] = block
                self._tell()

    def ahead(self, file: BlockFile, numbers: Iterable[int]) -> None:
        """Have these blocks read before they are asked for."""
        with self._turn:
            self._wanted.extend((file, number) for number in numbers)
            self._tell()

    def forget(self) -> None:
        """Read no further ahead: what was asked for is not going to be looked at."""
        with self._turn:
            self._wanted.clear()
            for block in (*self._clean.values(), *self._dirty.values()):
                self._looked_at(block)
            self._tell()

    def drop(self, file: BlockFile) -> None:
        """Close a file; blocks that wait to be written are not."""
        with self._turn:
            self._wanted = deque(key for key in self._wanted if key[0] is not file)
            for key in [key for key in (*self._clean, *self._dirty) if key[0] is file]:
                block = self._find(key)
                while block is not None and (block.held or block.readers):
                    self._turn.wait()
                    block = self._find(key)
                if block is not None:
                    self._remove(key)
            self._tell()
        file.file.close()

    def close(self) -> None:
        """End both threads; all files must have been dropped. Warns of a disk for which tiles waited long."""
        with self._turn:
            self._closing = True
            self._tell()
        for thread in self._threads:
            thread.join()
        self._free.clear()
        seconds = perf_counter() - self._started
        if self.waited > max(SLOW_SECONDS, SLOW_SHARE * seconds) and self.folder not in _warned:
            _warned.add(self.folder)
            warnings.warn(
                f"spill folder {self.folder}: tiles waited {self.waited:.1f} s of a step of {seconds:.1f} s for the "
                f"disk ({self.written} written, {self.read} read); choose a faster spill_dir or a larger budget",
                stacklevel=2,
            )

    # Blocks in memory.

    def _take(self, key: Key, change: bool = False, fill: bool = True) -> _Block:
        """A block to look at, or held to be changed; waits for whoever holds it, and for room."""
        with self._turn:
            while (block := self._found(key, change) or self._added(key)) is None:
                self._short += 1
                self._work.notify_all()
                try:
                    self._wait()
                finally:
                    self._short -= 1
            if not block.fresh:
                return block
            block.fresh = False
        if fill:
            self._fill(key, block, "waiting")
        if not change:
            self._release(block, readers=1)
        return block

    def _fill(self, key: Key, block: _Block, stage: str) -> None:
        """What the file has for a block that is held, or zeros; without it the block is forgotten."""
        file, number = key
        try:
            if file.sums[number] is None:
                block.values.zero_()
            else:
                self._moved(self.read, stage, "read", file.read, number, block)
        except BaseException:
            with self._turn:
                self._remove(key)
                self._tell()
            raise

    def _moved(
        self, traffic: Traffic, stage: str, op: str, move: Callable[[int, memoryview], int], number: int, block: _Block
    ) -> None:
        start = perf_counter()
        with clock.span(stage, op) as span:
            count = move(number, memoryview(block.slot))
            span.moved(block.values[:count])
        seconds = perf_counter() - start
        with self._turn:
            traffic.bytes += count
            traffic.seconds += seconds
            self.waited += seconds if stage == "waiting" else 0.0

    def _release(self, block: _Block, readers: int) -> None:
        with self._turn:
            block.held = False
            block.readers += readers
            self._tell()

    # With the lock held.

    def _found(self, key: Key, change: bool) -> _Block | None:
        """The block if it is in memory, once nobody is in the way; None if it is not."""
        self._check()
        while (block := self._find(key)) is not None and (block.held or (change and block.readers)):
            self._wait()
        if block is not None:
            (self._clean if key in self._clean else self._dirty).move_to_end(key)
            self._looked_at(block)
            block.held, block.readers = change, block.readers + (not change)
        return block

    def _added(self, key: Key) -> _Block | None:
        """A new block, held and fresh, as soon as there is room; None if nothing can make room now."""
        slot = self._slot(key[0].layout.slot)
        if slot is None:
            return None
        block = self._clean[key] = _Block(slot, held=True, fresh=True)
        return block

    def _find(self, key: Key) -> _Block | None:
        return self._clean.get(key) or self._dirty.get(key)

    def _tell(self) -> None:
        self._turn.notify_all()
        self._work.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        """Wait for another thread to bring or write a block, as time of the disk's."""
        start = perf_counter()
        with clock.span("waiting", "for the disk"):
            self._turn.wait()
        self.waited += perf_counter() - start
        self._check()

    def _looked_at(self, block: _Block) -> None:
        if block.ahead:
            block.ahead = False
            self._ahead_bytes -= len(block.slot)

    def _remove(self, key: Key) -> None:
        block = self._clean.pop(key, None)
        if block is None:
            block = self._dirty.pop(key)
            self._dirty_bytes -= len(block.slot)
        self._looked_at(block)
        self._free.setdefault(len(block.slot), []).append(block.slot)

    def _slot(self, size: int) -> mmap.mmap | None:
        """Room for a block: a free slot, a new one, or that of the block that was used longest ago."""
        while True:
            if self._free.get(size):
                return self._free[size].pop()
            if self.held + size <= self.limit:
                self.held += size
                return mmap.mmap(-1, size)
            if other := next((slots for slots in self._free.values() if slots), None):
                self.held -= len(other.pop())
                continue
            idle = (key for key, block in self._clean.items() if not block.held and not block.readers)
            latest = None  # of those read ahead, which go last
            for latest in idle:
                if not self._clean[latest].ahead:
                    break
            if latest is None:
                return None
            self._remove(latest)

    # The two threads.

    def _write_behind(self) -> None:
        while True:
            with self._turn:
                while (key := self._to_write()) is None:
                    if self._closing:
                        return
                    self._work.wait()
                block = self._dirty[key]
                block.readers += 1
            error: BaseException | None = None
            try:
                self._moved(self.written, clock.DISK, "written", key[0].write, key[1], block)
            except BaseException as raised:  # for whoever asks for a block next
                error = raised
            with self._turn:
                self._error = self._error or error
                block.readers -= 1
                if error is None:
                    self._dirty_bytes -= len(block.slot)
                    self._clean[key] = self._dirty.pop(key)
                    self._clean.move_to_end(key, last=False)
                self._tell()
            if error is not None:
                return

    def _to_write(self) -> Key | None:
        """The block that was changed longest ago, if it is time to write it."""
        if self._dirty_bytes <= self.limit // 2 and not self._short:
            return None
        return next((key for key, block in self._dirty.items() if not block.held), None)

    def _read_ahead(self) -> None:
        while True:
            with self._turn:
                while (found := self._to_read()) is None:
                    if self._closing:
                        return
                    self._work.wait()
                key, block = found
            with suppress(SpillError):  # whoever asks for the block gets the same
                self._fill(key, block, clock.DISK)
                self._release(block, readers=0)

    def _to_read(self) -> tuple[Key, _Block] | None:
        """A block to read ahead, held, if there is one and room for it."""
        while self._wanted:
            file, number = key = self._wanted[0]
            size = file.layout.slot
            if self._find(key) is None and file.sums[number] is not None:
                if self._ahead_bytes + size > self.limit // 2 or (block := self._added(key)) is None:
                    return None
                self._wanted.popleft()
                block.fresh, block.ahead = False, True
                self._ahead_bytes += size
                return key, block
            self._wanted.popleft()
        return None

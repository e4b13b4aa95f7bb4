"""Reads any box of one pyramid level: decodes the tiles it touches, each into a slot of a small cache.

Neighbouring boxes share tiles, so decoded ones are kept, least recently used out first. Slots are allocated
once and used again (first touch of fresh memory costs more than decoding a tile), so the memory held is what
``cache_bytes`` says. A box visits the tiles that are still in the cache first: a scan whose rows of tiles are
longer than the cache then still finds part of the previous row.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wholegrad.errors import SlideError, WholegradError
from wholegrad.graph.geometry import Box
from wholegrad.slide.buffers import ReusedBuffer, check_box

Pixels = npt.NDArray[np.uint8]


class TileSource(Protocol):
    """Where a level's tiles come from: one small class for each library that reads slides. Thread-safe.

    Attributes:
        shape: ``(C, H, W)`` of the level.
        tile_height, tile_width: of its tiles, pixels; the last ones may reach beyond the level.
        in_flight: bytes that decoding one tile takes besides the tile itself.
    """

    shape: tuple[int, int, int]
    tile_height: int
    tile_width: int
    in_flight: int

    def fill(self, tile: int, slot: Pixels) -> None:
        """Decode tile ``tile`` (row by row) into ``slot`` ``(tile_height, tile_width, C)``; any error means corrupt."""
        ...


class TileCache:
    """``slots`` decoded tiles of ``shape`` in one block; evicts the least recently used. Thread-safe."""

    def __init__(self, slots: int, shape: tuple[int, int, int]) -> None:
        self._store = np.empty((slots, *shape), np.uint8)
        self._of_key: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(slots))
        self._pins = [0] * slots
        self._changed = threading.Condition()
        self.nbytes = self._store.nbytes

    def __contains__(self, key: int) -> bool:
        return key in self._of_key

    @contextmanager
    def tile(self, key: int, fill: Callable[[Pixels], None]) -> Iterator[Pixels]:
        """The pixels of tile ``key``, valid inside the ``with``; ``fill`` decodes them if they are new."""
        slot, known = self._pin(key)
        try:
            if not known:
                fill(self._store[slot])
                self._publish(key, slot)
                known = True
            yield self._store[slot]
        finally:
            self._unpin(slot, known)

    def _pin(self, key: int) -> tuple[int, bool]:
        with self._changed:
            if key in self._of_key:
                self._of_key.move_to_end(key)
                slot, known = self._of_key[key], True
            else:
                slot, known = self._claim(), False
            self._pins[slot] += 1
            return slot, known

    def _claim(self) -> int:
        """A slot that nobody uses: a free one, or that of the oldest tile. Waits while all are in use."""
        while True:
            if self._free:
                return self._free.pop()
            for key, slot in self._of_key.items():
                if self._pins[slot] == 0:
                    del self._of_key[key]
                    return slot
            self._changed.wait()

    def _publish(self, key: int, slot: int) -> None:
        with self._changed:
            self._of_key.setdefault(key, slot)  # another thread may have decoded the same tile meanwhile

    def _unpin(self, slot: int, known: bool) -> None:
        with self._changed:
            self._pins[slot] -= 1
            if self._pins[slot] == 0 and (not known or slot not in self._of_key.values()):
                self._free.append(slot)
            self._changed.notify()


class TileReader:
    """Boxes of one level as uint8.

    Args:
        source: of the decoded tiles.
        name: of the file, for messages.
        number: of the level, for messages.
        cache_bytes: decoded tiles to keep, bytes; at least one tile a thread is kept.
        threads: that decode one box's tiles, the caller's own included.
    """

    concurrent = True  # a buffer a thread
    dtype: np.dtype[np.generic] = np.dtype(np.uint8)

    def __init__(self, source: TileSource, name: str, number: int, *, cache_bytes: int, threads: int) -> None:
        self.shape, self.name = source.shape, name
        self._source, self._number = source, number
        self._across = -(-source.shape[2] // source.tile_width)
        self._threads = max(1, threads)
        slot = (source.tile_height, source.tile_width, source.shape[0])
        tiles = -(-source.shape[1] // source.tile_height) * self._across
        slots = min(max(self._threads, cache_bytes // math.prod(slot)), max(self._threads, tiles))
        self._cache = TileCache(slots, slot)
        self.cache_bytes = self._cache.nbytes + self._threads * source.in_flight
        self._buffer = ReusedBuffer()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = -1

    def read(self, box: Box) -> Pixels:
        """The pixels of ``box`` as ``(channels, h, w)``, a view of a reused buffer ``(h, w, channels)``.

        Raises:
            ShapeError: the box is empty or reaches outside the level.
            SlideError: a tile cannot be read or decoded.
        """
        check_box(self.name, self.shape, box)
        out = self._buffer.take((box.height, box.width, self.shape[0])).view(np.uint8)
        todo = sorted(self._tiles(box), key=lambda tile: tile not in self._cache)
        queue = iter(todo)
        helpers = min(self._threads, len(todo)) - 1
        if helpers < 1:
            self._drain(queue, box, out)
        else:
            self._share(helpers, queue, box, out)
        return out.transpose(2, 0, 1)

    def _tiles(self, box: Box) -> list[int]:
        high, wide = self._source.tile_height, self._source.tile_width
        rows = range(box.y0 // high, (box.y1 - 1) // high + 1)
        cols = range(box.x0 // wide, (box.x1 - 1) // wide + 1)
        return [row * self._across + col for row in rows for col in cols]

    def _share(self, helpers: int, queue: Iterator[int], box: Box, out: Pixels) -> None:
        """Drain the queue with helper threads, and return only when none of them writes any more."""
        pool = self._workers()
        running = [pool.submit(self._drain, queue, box, out) for _ in range(helpers)]
        try:
            self._drain(queue, box, out)
        finally:
            wait(running)
        for job in running:
            job.result()

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool_pid != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="wholegrad-decode")
            self._pool_pid = os.getpid()
        return self._pool

    def _drain(self, queue: Iterator[int], box: Box, out: Pixels) -> None:
        try:
            for tile in queue:
                self._place(tile, box, out)
        except BaseException:
            for _ in queue:  # nothing more to do for the others
                pass
            raise

    def _place(self, tile: int, box: Box, out: Pixels) -> None:
        high, wide = self._source.tile_height, self._source.tile_width
        row, col = divmod(tile, self._across)
        top, left = row * high, col * wide
        part = Box(max(box.y0, top), min(box.y1, top + high), max(box.x0, left), min(box.x1, left + wide))
        with self._cache.tile(tile, lambda slot: self._fill(tile, box, slot)) as pixels:
            out[part.slices(box)] = pixels[part.slices(Box(top, top, left, left))]

    def _fill(self, tile: int, box: Box, slot: Pixels) -> None:
        try:
            self._source.fill(tile, slot)
        except (MemoryError, WholegradError):
            raise
        except Exception as error:  # every codec has its own error class
            raise self._corrupt(tile, box, error) from error

    def _corrupt(self, tile: int, box: Box, error: Exception) -> SlideError:
        if not Path(self.name).exists():
            return SlideError(self.name, "is gone: it was moved or removed while it was read", "put it back")
        row, col = divmod(tile, self._across)
        detail = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return SlideError(
            self.name,
            f"tile row {row}, column {col} of level {self._number} is corrupt ({detail}), met while reading"
            f" box {tuple(box)}",
            "copy the file again, or leave this slide out",
        )

    def close(self) -> None:
        """End the helper threads."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pool_pid == os.getpid():
            pool.shutdown(wait=True)

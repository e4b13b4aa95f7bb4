"""Reads any box of one pyramid level: decodes the tiles it touches, each into a slot of a small cache.

Neighbouring boxes share tiles, so decoded ones are kept, least recently used out first. Slots are allocated
once and used again (first touch of fresh memory costs more than decoding a tile), so the memory held is what
``cache_bytes`` says. A box visits the tiles that are still in the cache first: a scan whose rows of tiles are
longer than the cache then still finds part of the previous row.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from wholegrad.errors import SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.buffers import ReusedBuffer, check_box
from wholegrad.slide.decode import TileDecoder
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.tiff import Level

Pixels = npt.NDArray[np.uint8]


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
        file: open slide file; stays the caller's to close.
        level: what to read.
        number: of the level, for messages.
        channels: 3 (RGB, see ``decode``) or 1 (values as stored).
        blank: value of tiles that were never written (255 glass, 0 background label).
        cache_bytes: decoded tiles to keep, bytes; at least one tile a thread is kept.
        threads: that decode one box's tiles, the caller's own included.
    """

    def __init__(
        self,
        file: PositionedFile,
        level: Level,
        number: int,
        *,
        channels: int,
        blank: int,
        cache_bytes: int,
        threads: int,
    ) -> None:
        self.shape = (channels, level.height, level.width)
        self._file, self._level, self._number, self._blank = file, level, number, blank
        self._decode = TileDecoder(
            level.segments, level.planes, level.samples, channels, level.white_is_zero, level.premultiplied
        )
        self._threads = max(1, threads)
        tile = level.tile_height * level.tile_width * channels
        tiles = level.down * level.across
        slots = min(max(self._threads, cache_bytes // tile), max(self._threads, tiles))
        self._cache = TileCache(slots, (level.tile_height, level.tile_width, channels))
        scratch = 0 if self._decode.direct else 2 * level.tile_height * level.tile_width * max(3, level.channels)
        in_flight = int(level.counts.sum(axis=0).max(initial=0)) + scratch
        self.cache_bytes = self._cache.nbytes + self._threads * in_flight
        self._buffer = ReusedBuffer()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = -1

    def read(self, box: Box) -> Pixels:
        """The pixels of ``box`` as ``(channels, h, w)``, a view of a reused buffer ``(h, w, channels)``.

        Raises:
            ShapeError: the box is empty or reaches outside the level.
            SlideError: a tile cannot be read or decoded.
        """
        check_box(str(self._file.path), self.shape, box)
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
        level = self._level
        rows = range(box.y0 // level.tile_height, (box.y1 - 1) // level.tile_height + 1)
        cols = range(box.x0 // level.tile_width, (box.x1 - 1) // level.tile_width + 1)
        return [row * level.across + col for row in rows for col in cols]

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
        level = self._level
        row, col = divmod(tile, level.across)
        top, left = row * level.tile_height, col * level.tile_width
        part = Box(
            max(box.y0, top),
            min(box.y1, top + level.tile_height),
            max(box.x0, left),
            min(box.x1, left + level.tile_width),
        )
        with self._cache.tile(tile, lambda slot: self._fill(tile, box, slot)) as pixels:
            out[part.slices(box)] = pixels[part.slices(Box(top, top, left, left))]

    def _fill(self, tile: int, box: Box, slot: Pixels) -> None:
        counts = self._level.counts[:, tile]
        if not counts.all():
            slot[...] = self._blank
            return
        places = zip(self._level.offsets[:, tile].tolist(), counts.tolist(), strict=True)
        data = [self._file.read(offset, count) for offset, count in places]
        try:
            self._decode(data, self._numbers(tile), slot)
        except MemoryError:
            raise
        except Exception as error:  # every codec has its own error class
            raise self._corrupt(tile, box, error) from error

    def _numbers(self, tile: int) -> list[int]:
        """Of the tile's segments within their pages: planes of one page follow each other."""
        step = self._level.offsets.shape[1] if len(self._level.segments) == 1 else 0
        return [tile + plane * step for plane in range(self._level.planes)]

    def _corrupt(self, tile: int, box: Box, error: Exception) -> SlideError:
        row, col = divmod(tile, self._level.across)
        detail = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return SlideError(
            str(self._file.path),
            f"tile row {row}, column {col} of level {self._number} is corrupt ({detail}), met while reading"
            f" box {tuple(box)}",
            "copy the file again, or leave this slide out",
        )

    def close(self) -> None:
        """End the helper threads."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pool_pid == os.getpid():
            pool.shutdown(wait=True)

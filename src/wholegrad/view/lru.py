"""Keeps what was made last, up to a number of bytes, and makes nothing twice that two threads ask for at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something whose bytes can be counted."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Lru(Generic[T]):
    """Values by key; evicts the least recently used while their bytes exceed ``limit``. Thread-safe.

    A value larger than ``limit`` is made and returned, and not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0  # of what is kept, at most ``limit``
        self.made = 0  # values that had to be made
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._making: dict[Hashable, Future[T]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``key``: kept, in the making by another thread, or made now. An error goes to all who wait."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            future = self._making.get(key)
            mine = future is None
            if future is None:
                future = self._making[key] = Future()
        if mine:
            self._make(key, make, future)
        return future.result()

    def _make(self, key: Hashable, make: Callable[[], T], future: Future[T]) -> None:
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            return
        with self._lock:
            del self._making[key]
            self.made += 1
            if value.nbytes <= self.limit:
                self._kept[key] = value
                self.nbytes += value.nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        future.set_result(value)

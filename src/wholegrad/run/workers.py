"""Run tiles on several threads, one PyTorch thread each, and hand their results on in tile order.

A tile is a long chain of small ops. Splitting each op over threads costs a barrier an op, and where other jobs share
the machine a barrier waits for whoever was put aside; whole tiles side by side need none. Results are merged by the
caller's thread in tile order, so that the number of threads does not change a bit (rule 6).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from wholegrad.plan.tiles import AHEAD

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """As many as PyTorch may use threads in this process."""
    return int(torch.get_num_threads())


@contextmanager
def _single_threaded(threads: int) -> Iterator[None]:
    """PyTorch's setting is kept a thread, and inherited by new ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def announced(items: Iterable[Item], soon: Callable[[Item], None]) -> Iterator[Item]:
    """The items, each once ``soon`` has been told of it and of the next."""
    before: list[Item] = []
    for item in items:
        soon(item)
        yield from before
        before = [item]
    yield from before


def in_order(
    items: Iterable[Item], count: int, work: Callable[[Item], Result], workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """``(item, work(item))`` for each of ``count`` items, in order, computed by up to ``workers`` threads.

    Closed before its end, it waits for what runs.
    """
    if workers <= 1 or count <= 1:
        for item in items:
            yield item, work(item)
        return
    with _single_threaded(1):
        pool = ThreadPoolExecutor(workers, "wholegrad-tile", initializer=torch.set_num_threads, initargs=(1,))
        pending: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) >= workers + AHEAD:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

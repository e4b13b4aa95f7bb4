"""Where a step's time goes: spans that every room can open, at the cost of one look at a global while nobody records.

A span is open while something runs on one thread. Spans nest, and each counts only the time that no span within it
counts, so that all of them together add up to what threads did. :mod:`wholegrad.run.profile` records and reports.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, ParamSpec, TypeVar

import torch


class Key(NamedTuple):
    """What a row counts: a stage of the step, what ran, and where in the model."""

    stage: str
    op: str
    path: str


@dataclass
class Row:
    """Totals over calls: multiply-adds (``wide`` of them in float64), bytes read and written."""

    calls: int = 0
    seconds: float = 0.0
    macs: float = 0.0
    wide: float = 0.0
    bytes: float = 0.0

    def add(self, other: Row) -> None:
        self.calls += other.calls
        self.seconds += other.seconds
        self.macs += other.macs
        self.wide += other.wide
        self.bytes += other.bytes


class Label(NamedTuple):
    """What a gradient needs to know of the node that it belongs to: module path, multiply-adds, whether in float64."""

    path: str
    macs: float
    wide: bool


class _Thread:
    """One thread's rows and the span that is open innermost on it."""

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}
        self.top: Span | None = None


class Recorder:
    """Rows of all threads; ``workers`` is how many of them ran tiles at once."""

    def __init__(self) -> None:
        self.workers = 1
        self._threads: list[_Thread] = []
        self._own = threading.local()
        self._lock = threading.Lock()

    def thread(self) -> _Thread:
        found: _Thread | None = getattr(self._own, "thread", None)
        if found is None:
            found = self._own.thread = _Thread()
            with self._lock:
                self._threads.append(found)
        return found

    def rows(self) -> dict[Key, Row]:
        """Every row, summed over threads."""
        result: dict[Key, Row] = {}
        for thread in self._threads:
            for key, row in thread.rows.items():
                result.setdefault(key, Row()).add(row)
        return result


class Off:
    """A span of nobody's."""

    def __enter__(self) -> Off:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def moved(self, *tensors: torch.Tensor) -> None:
        return


class Span(Off):
    """A span being recorded; ``label`` is there while a node runs forward."""

    def __init__(self, by: Recorder, key: Key, macs: float, wide: bool, size: float, label: Label | None) -> None:
        self.by, self.key, self.label = by, key, label
        self.macs, self.wide, self.bytes = macs, wide, size
        self.inner = 0.0  # seconds that spans within this one counted

    def __enter__(self) -> Span:
        self.thread = self.by.thread()
        self.outer, self.thread.top = self.thread.top, self
        self.start = perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = perf_counter() - self.start
        self.thread.top = self.outer
        if self.outer is not None:
            self.outer.inner += seconds
        wide = self.macs if self.wide else 0.0
        row = self.thread.rows.setdefault(self.key, Row())
        row.add(Row(1, seconds - self.inner, self.macs, wide, self.bytes))

    def moved(self, *tensors: torch.Tensor) -> None:
        """Count tensors as read or written."""
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


OFF = Off()
recorder: Recorder | None = None  # set by run/profile while it records


def span(stage: str, op: str, path: str = "", size: float = 0.0) -> Off:
    """A span that moves ``size`` bytes."""
    by = recorder  # once: another thread may end the recording meanwhile
    return OFF if by is None else Span(by, Key(stage, op, path), 0.0, False, size, None)


def node_span(by: Recorder, op: str, label: Label, size: float) -> Off:
    """A span of a node that runs forward; ``recompute`` in a tile that the backward sweep runs again."""
    top = by.thread().top
    again = top is not None and top.key.op == BACKWARD
    stage = "recompute" if again else "forward"
    return Span(by, Key(stage, op, label.path), label.macs, label.wide, size, label)


class Work(NamedTuple):
    """What one call of a kernel counts, known before it runs."""

    key: Key
    macs: float
    wide: bool
    bytes: float


def work_span(work: Work) -> Off:
    """A span of such a call."""
    by = recorder
    return OFF if by is None else Span(by, work.key, work.macs, work.wide, work.bytes, None)


DISK = "disk"  # stage of boundaries' reads and writes, most of them beside the threads that run tiles
FORWARD, BACKWARD, FUSED = "forward", "backward", "fused"  # sweeps, as the spans of whole tiles name them


def label(op: str) -> Label | None:
    """The label of the node that runs here, which is ``op`` from now on; None while nobody records."""
    by = recorder
    top = None if by is None else by.thread().top
    if top is None or top.label is None:
        return None
    top.key = top.key._replace(op=op)
    return top.label


def gradient_span(of: Label | None, stage: str, op: str, share: float = 0.0) -> Off:
    """A span of a gradient that takes a share of the multiply-adds of the node ``of``."""
    by = recorder
    if by is None or of is None:
        return OFF
    return Span(by, Key(stage, op, of.path), share * of.macs, of.wide, 0.0, None)


def expect(workers: int) -> None:
    """Say how many threads run tiles."""
    by = recorder
    if by is not None:
        by.workers = max(by.workers, workers)


P = ParamSpec("P")
R = TypeVar("R")


def timed(stage: str, op: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: a span around every call."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with span(stage, op):
                return function(*args, **kwargs)

        return call

    return decorate

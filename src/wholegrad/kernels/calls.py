"""Many kernel calls written down once and made for tile after tile, without Python in between.

A call is an address and pointers; each number is relative to a place (a thread's scratch memory or buffers, a tensor
given, or a block of it), so that the same schedule serves every tile or block of the same shape. One function adds the
places up and makes all calls.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wholegrad import clock
from wholegrad.kernels import slide
from wholegrad.kernels.compile import function
from wholegrad.kernels.emit import Code
from wholegrad.kernels.thin import scratch

CALL = 1 + slide.POINTERS  # 64-bit integers of a call: the function's address and its pointers
NOWHERE, TABLE, SCRATCH, BUFFERS, OUT, GIVEN = range(6)  # what a number of a schedule is relative to
Placed = tuple[int, int]  # a place and a number
_own = threading.local()


class Schedule:
    """Calls ready to be placed.

    Attributes:
        values: numbers of all calls, then of all tables; ``places`` is what each is relative to.
        buffers, memory: bytes of buffers and of scratch memory that the calls need.
        kept: what the calls point to.
        labels: what the profile counts of each call; empty where a caller counts all of them together.
    """

    def __init__(self, records: list[int], places: list[int], calls: int, buffers: int, memory: int) -> None:
        self.values = np.array(records, dtype=np.int64)
        self.places = np.array(places, dtype=np.int64)
        self.calls, self.buffers, self.memory = calls, buffers, memory
        self.kept: list[Any] = []
        self.labels: list[clock.Work] = []

    def run(self, out: torch.Tensor, given: Sequence[torch.Tensor]) -> None:
        """Make all calls, with these tensors in the places OUT and GIVEN onwards."""
        bases = np.array([[0] * OUT + [tensor.data_ptr() for tensor in (out, *given)]], dtype=np.int64)
        run([self], bases)


def run(schedules: Sequence[Schedule], bases: npt.NDArray[np.int64]) -> None:
    """Make the calls of several schedules, one after another.

    Args:
        bases: for each of them the addresses of places, of which those before ``OUT`` are filled in here.
    """
    table = np.empty(max(len(each.values) for each in schedules), dtype=np.int64)
    memory = scratch(max(each.memory for each in schedules))
    bases[:, :OUT] = (0, table.ctypes.data, memory, _buffers(max(each.buffers for each in schedules)))
    if clock.recorder is not None and all(each.labels for each in schedules):
        return _counted(schedules, bases, table)
    start, step = bases.ctypes.data, bases.strides[0]
    records = {
        id(each): (each.values.ctypes.data, each.places.ctypes.data, len(each.values), each.calls) for each in schedules
    }
    each_record = [(*records[id(each)], start + k * step) for k, each in enumerate(schedules)]
    flat = np.array(each_record, dtype=np.int64)
    _runner()((ctypes.c_int64 * 1)(len(schedules)), flat.ctypes.data, table.ctypes.data)


def _counted(schedules: Sequence[Schedule], bases: npt.NDArray[np.int64], table: npt.NDArray[np.int64]) -> None:
    """The same one call at a time, each in a span of its own."""
    one = (ctypes.c_int64 * 1)(1)
    record = np.array([0, 0, 0, 1, 0], dtype=np.int64)
    for schedule, where in zip(schedules, bases, strict=True):
        np.add(schedule.values, where[schedule.places], out=table[: len(schedule.values)])
        for k, label in enumerate(schedule.labels):
            with clock.work_span(label):
                _runner()(one, record.ctypes.data, table.ctypes.data + 8 * CALL * k)


class Calls:
    """Calls being written down."""

    def __init__(self) -> None:
        self.calls: list[list[Placed]] = []
        self.tables: list[Placed] = []
        self.memory = 64  # bytes of scratch that some call needs
        self.kept: list[Any] = []
        self.labels: list[clock.Work] = []
        self._known: dict[tuple[Placed, ...], int] = {}

    def add(self, call: Callable[..., None], pointers: Sequence[Placed], label: clock.Work | None = None) -> None:
        """A call of a kernel with these pointers; either all calls have a label, or none has."""
        self.labels += [] if label is None else [label]
        blank = [(NOWHERE, 0)] * (slide.POINTERS - len(pointers))
        self.calls.append([(NOWHERE, address(call)), *pointers, *blank])

    def table(self, entries: Sequence[Placed]) -> Placed:
        """A table that calls read; equal ones are kept once."""
        key = tuple(entries)
        if key not in self._known:
            self._known[key] = 8 * len(self.tables)
            self.tables += key
        return TABLE, self._known[key]

    def fixed(self, array: Any) -> Placed:
        """An array of ``ctypes`` that stays as it is."""
        self.kept.append(array)
        return NOWHERE, ctypes.addressof(array)

    def schedule(self, buffers: int) -> Schedule:
        """What was written, for threads with so many bytes of buffers."""
        start = 8 * CALL * len(self.calls)
        flat = [each for call in self.calls for each in call] + self.tables
        flat = [(place, number + start) if place == TABLE else (place, number) for place, number in flat]
        found = Schedule([n for _, n in flat], [p for p, _ in flat], len(self.calls), buffers, self.memory)
        found.kept, found.labels = self.kept, self.labels
        return found


def address(call: Callable[..., None]) -> int:
    """Where a kernel's code is."""
    return ctypes.cast(call, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


RECORD = 5  # 64-bit integers: where values and places are, how many, how many calls, where bases are


@cache
def _runner() -> Callable[..., None]:
    """``run(count, records, table)``: for each record, places values in ``table`` and makes the calls."""
    code = Code("double", 1)
    with code.loop(0, code.integer("%count", 0)) as block:
        record = code.at("%records", code.mul(block.index, RECORD), "i64")
        values, places, count, calls, bases = (code.integer(record, k) for k in range(RECORD))
        values, places, bases = (code.set(f"inttoptr i64 {each} to ptr") for each in (values, places, bases))
        with code.loop(0, count) as each:
            place = code.integer(code.at(places, each.index, "i64"), 0)
            base = code.integer(code.at(bases, place, "i64"), 0)
            number = code.add(code.integer(code.at(values, each.index, "i64"), 0), base)
            code.do(f"store i64 {number}, ptr {code.at('%table', each.index, 'i64')}")
        with code.loop(0, calls) as each:
            call = code.at("%table", code.mul(each.index, CALL), "i64")
            target, *pointers = (code.set(f"inttoptr i64 {code.integer(call, k)} to ptr") for k in range(CALL))
            code.do(f"call void {target}({', '.join(f'ptr {pointer}' for pointer in pointers)})")
    return function(code.function("run", "ptr %count, ptr %records, ptr %table"), "run", 3)


def _buffers(size: int) -> int:
    """The address of ``size`` bytes of this thread's own, at a multiple of 64, kept from tile to tile."""
    memory: npt.NDArray[np.uint8] | None = getattr(_own, "memory", None)
    if memory is None or memory.nbytes < size + 64:
        memory = _own.memory = np.empty(size + 64, dtype=np.uint8)
    return -(-int(memory.ctypes.data) // 64) * 64

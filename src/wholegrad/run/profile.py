"""A profile of training steps: seconds for each op and stage, and how close they come to what the machine can do.

::

    with recording() as profile:
        wg.backward(model, loss_fn, image, target, plan=plan)
    print(profile.table())

Seconds are those of threads. What no row counts of ``workers`` threads' time is the row *waiting*: for the last tile
of a segment, for merging, for Python's lock to be free while nothing is open. Seconds of the stage *disk* are those of
threads beside the workers, and count towards no sum; a tile that waits for them waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

from wholegrad import clock
from wholegrad.errors import WholegradError
from wholegrad.run.roofline import Roofline, measure

ARITHMETIC = (
    "forward", "recompute", "input gradient", "weight gradient", "bias gradient", "backward", "sums",
)  # fmt: skip
TRAFFIC = ("reading", "writing")
BESIDE = (clock.DISK, "waiting")  # stages whose bytes are not memory's
LONGEST = 40  # rows of a table
HEADER = ("stage", "op", "where", "calls", "seconds", "share", "Gmac", "GB", "of roofline")


@dataclass(frozen=True)
class Entry:
    """A row, all of a step; ``ideal`` is the least number of seconds for its work, ``fraction`` that of its seconds."""

    stage: str
    op: str
    where: str
    calls: float
    seconds: float
    macs: float
    bytes: float
    ideal: float

    @property
    def fraction(self) -> float:
        return self.ideal / self.seconds if self.seconds else 0.0

    @property
    def counts(self) -> bool:
        """Whether its seconds are those of a thread that runs tiles."""
        return self.stage != clock.DISK


@dataclass(frozen=True)
class Summary:
    """A step as a whole.

    Attributes:
        steps: how many were recorded.
        workers: threads that ran tiles.
        seconds: of a step, by the clock on the wall.
        threads: the seconds of all rows but the waiting.
        ideal: seconds of a step whose every row ran at the roofline and whose workers never waited.
        reading, arithmetic, other: shares of ``workers`` times ``seconds``; reading includes writing boundaries.
    """

    steps: int
    workers: int
    seconds: float
    threads: float
    ideal: float
    reading: float
    arithmetic: float
    other: float


class Profile:
    """What was recorded, over any number of steps.

    Args:
        roofline: of one thread.
    """

    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline
        self.steps = 0
        self.seconds = 0.0
        self._recorder = clock.Recorder()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record what runs inside as one more step.

        Raises:
            WholegradError: another step is being recorded in this process.
        """
        if clock.recorder is not None:
            raise WholegradError("profile", "another one is being recorded", "end that recording first")
        start = perf_counter()
        clock.recorder = self._recorder
        try:
            yield
        finally:
            clock.recorder = None
            self.seconds += perf_counter() - start
            self.steps += 1

    def entries(self) -> list[Entry]:
        """Every row, the longest first, and the waiting."""
        steps = max(1, self.steps)
        found = [
            Entry(*key, row.calls / steps, row.seconds / steps, row.macs / steps, row.bytes / steps,
                  self.roofline.seconds(row.macs, row.wide, row.bytes if key.stage not in BESIDE else 0.0) / steps)
            for key, row in self._recorder.rows().items()
        ]  # fmt: skip
        left = self._recorder.workers * self.seconds / steps - sum(entry.seconds for entry in found if entry.counts)
        found.append(Entry("waiting", "", "", 0.0, max(0.0, left), 0.0, 0.0, 0.0))
        return sorted(found, key=lambda entry: -entry.seconds)

    def summary(self) -> Summary:
        """The step as a whole."""
        entries, workers = [entry for entry in self.entries() if entry.counts], self._recorder.workers
        whole = sum(entry.seconds for entry in entries)

        def share(stages: Sequence[str]) -> float:
            return sum(entry.seconds for entry in entries if entry.stage in stages) / whole if whole else 0.0

        return Summary(
            steps=self.steps,
            workers=workers,
            seconds=self.seconds / max(1, self.steps),
            threads=sum(entry.seconds for entry in entries if entry.stage != "waiting"),
            ideal=sum(entry.ideal for entry in entries) / workers,
            reading=share(TRAFFIC),
            arithmetic=share(ARITHMETIC),
            other=1 - share(TRAFFIC) - share(ARITHMETIC) if whole else 0.0,
        )

    def disk(self) -> list[str]:
        """What boundaries on disk cost, in words; nothing if there are none."""
        beside = [entry for entry in self.entries() if entry.stage in BESIDE and entry.op]
        moved = []
        for op in ("written", "read"):
            size, seconds = (sum(getattr(e, name) for e in beside if e.op == op) for name in ("bytes", "seconds"))
            if seconds:
                moved.append(f"{size / 1e9:.3g} GB {op} at {size / seconds / 1e6:.0f} MB/s")
        waited = sum(entry.seconds for entry in beside if entry.counts)
        return [f"boundaries on disk: {', '.join(moved)}; tiles waited {waited:.3g} s for it"] if beside else []

    def cells(self) -> list[tuple[str, ...]]:
        """The rows of a table under :data:`HEADER`; the shortest ones as one."""
        entries = self.entries()
        whole = sum(entry.seconds for entry in entries if entry.counts)
        return [_cells(entry, whole) for entry in _shortened(entries)]

    def lines(self) -> list[str]:
        """The step as a whole, in words."""
        found = self.summary()
        return [
            f"{found.seconds:.3g} s a step, mean of {found.steps}; {found.workers} threads, "
            f"{found.threads:.3g} s of theirs accounted for; {found.ideal:.3g} s if every row ran at the roofline",
            f"reading and writing {found.reading:.0%}, arithmetic {found.arithmetic:.0%}, other {found.other:.0%}",
            f"roofline of a thread: {self.roofline.macs / 1e9:.3g} Gmac/s in float32, "
            f"{self.roofline.bytes / 1e9:.3g} GB/s read and written",
            *self.disk(),
        ]

    def table(self) -> str:
        """Everything as plain text."""
        rows = [HEADER, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        aligned = [
            "  ".join(cell.ljust(width) if i < 3 else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]  # fmt: skip
        return "\n".join([*aligned, "", *self.lines()])

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, of a step: for JSON."""
        rows = [{**asdict(entry), "fraction": entry.fraction} for entry in self.entries()]
        return {**asdict(self.summary()), "roofline": self.roofline._asdict(), "rows": rows}


def _shortened(entries: list[Entry]) -> list[Entry]:
    kept, rest = entries[: LONGEST - 1], entries[LONGEST - 1 :]
    if len(rest) < 2:
        return entries
    totals = (sum(getattr(entry, name) for entry in rest) for name in ("calls", "seconds", "macs", "bytes", "ideal"))
    return [*kept, Entry(f"{len(rest)} more", "", "", *totals)]


def _cells(entry: Entry, whole: float) -> tuple[str, ...]:
    share = entry.seconds / whole if whole else 0.0
    return (
        entry.stage,
        entry.op,
        entry.where,
        f"{entry.calls:.0f}" if entry.calls else "",
        f"{entry.seconds:.4f}",
        f"{share:.1%}",
        f"{entry.macs / 1e9:.3f}" if entry.macs else "",
        f"{entry.bytes / 1e9:.3f}" if entry.bytes else "",
        f"{entry.fraction:.0%}" if entry.ideal else "",
    )


@contextmanager
def recording(threads: int | None = None) -> Iterator[Profile]:
    """Record what runs inside as one step, after measuring the roofline of ``threads`` threads (PyTorch's number)."""
    profile = Profile(measure(threads or torch.get_num_threads()))
    with profile.step():
        yield profile

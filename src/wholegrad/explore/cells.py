"""The cells of an exploration: one strategy on one device at one image size, and what came of it, a file each.

A cell that has a file made under the same settings is done: an exploration that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wholegrad.errors import ConfigError
from wholegrad.train.state import write_whole

FULL = (16000, 64000)  # pixels of the paper's areas
HALVINGS = 12  # of that area, down to a quarter of a megapixel
QUICK = (0.25, 1.0, 4.0, 16.0, 64.0)  # megapixels
ASPECT = 4  # width over height

DONE, REFUSED, KILLED = "done", "does not fit", "out of memory"
IMPOSSIBLE, SLOW, FAILED = "impossible", "too slow", "failed"
OUTCOMES = (DONE, REFUSED, KILLED, IMPOSSIBLE, SLOW, FAILED)
UNTIMELY = "no time was left for it: the same command goes on with it"


@dataclass(frozen=True)
class Cell:
    """What one process measures."""

    strategy: str
    device: str
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.device}-{self.height}x{self.width}"


@dataclass(frozen=True)
class Settings:
    """What all cells have in common; results made under others do not count.

    Attributes:
        limit: bytes that a process may hold.
        seconds: that a step may take, by prediction or, three times that, by the clock.
    """

    network: str
    loss: str | None
    target: str
    limit: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """What came of a cell.

    Attributes:
        outcome: one of ``OUTCOMES``.
        said: why, where it is not ``done``.
        seconds: of one step on the clock, after the first where there was time for several; None if none ended.
        steps: of each step.
        cpu_seconds: of all threads, for that step.
        peak: the most bytes that the process held, so far as it came; on a GPU, of its tensors (those of ``managed``
            wherever they lay).
        projected: bytes by the plan; also where it did not fit.
        predicted: seconds by the plan.
        saved: bytes kept for the backward pass (whole maps).
        recompute: forward work over that of one forward run.
        pieces: tiles or chunks.
        others: cores that other work on the machine kept busy meanwhile.
        date: when it ended.
    """

    cell: Cell
    outcome: str
    said: str = ""
    seconds: float | None = None
    steps: tuple[float, ...] = ()
    cpu_seconds: float | None = None
    peak: int | None = None
    projected: int | None = None
    predicted: float | None = None
    saved: int | None = None
    recompute: float | None = None
    pieces: int | None = None
    others: float | None = None
    date: str = ""

    @property
    def megapixels(self) -> float:
        return self.cell.pixels / 1e6

    def flat(self) -> dict[str, Any]:
        """As one row of a table."""
        row = {**asdict(self.cell), **{key: value for key, value in asdict(self).items() if key != "cell"}}
        return row | {"steps": " ".join(f"{each:.4g}" for each in self.steps)}


def area(megapixels: float) -> tuple[int, int]:
    """Height and width, a quarter of it, of so many megapixels."""
    height = round(max(megapixels * 1e6 / ASPECT, 0.0) ** 0.5)
    return height, height * ASPECT


def all_areas() -> list[tuple[int, int]]:
    """From a quarter of a megapixel to the full area, each twice the one before."""
    return [area(FULL[0] * FULL[1] / 1e6 / 2**k) for k in range(HALVINGS, -1, -1)]


def read_areas(text: str) -> list[tuple[int, int]]:
    """``"0.25,16,1000x4000"``: megapixels at an aspect of 1:4, or height x width.

    Raises:
        ConfigError: something else.
    """
    found = []
    for part in text.split(","):
        sides = re.fullmatch(r"(\d+)x(\d+)", part.strip())
        try:
            found.append((int(sides[1]), int(sides[2])) if sides else area(float(part)))
        except (ValueError, OverflowError):
            found.append((0, 0))
        if not min(found[-1]) > 0:
            remedy = 'give megapixels or heights and widths, such as "0.25,16,1000x4000"'
            raise ConfigError(f"size {part.strip()!r}", "is not an area", remedy)
    return sorted(dict.fromkeys(found), key=lambda each: each[0] * each[1])


def grid(areas: Sequence[tuple[int, int]], kinds: Sequence[tuple[str, str]]) -> list[Cell]:
    """Every cell, small areas first; ``kinds`` are strategies with their devices."""
    return [Cell(strategy, device, *size) for size in areas for strategy, device in kinds]


class Store:
    """Results in a folder, one JSON file a cell."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder / "cells", settings

    def find(self, cell: Cell) -> Result | None:
        """The cell's result, if it was made under the same settings and did not fail."""
        try:
            stored = json.loads((self.folder / f"{cell.name}.json").read_text())
            if stored.pop("settings") != asdict(self.settings):
                return None
            found = Result(**{**stored, "cell": Cell(**stored["cell"]), "steps": tuple(stored["steps"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return None if found.outcome == FAILED else found

    def keep(self, result: Result) -> None:
        """Write a result; the file appears complete or not at all (rule 11)."""
        text = json.dumps({**asdict(result), "settings": asdict(self.settings)}, indent=1) + "\n"
        write_whole(self.folder / f"{result.cell.name}.json", text.encode())


def stamped(result: Result, date: str, others: float) -> Result:
    """With when it ended, and what else the machine did."""
    return replace(result, date=date, others=round(others, 2))

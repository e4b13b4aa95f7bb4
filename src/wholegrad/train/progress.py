"""What a run shows in the terminal: a bar for the steps, one for the tiles of the step, a line an event.

It hangs off the loop's ``Watch``; the loop knows nothing of it. Where output is no terminal it prints a plain
line now and then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

import wholegrad as wg
from wholegrad.plan.plan import show_bytes
from wholegrad.run.process import resident
from wholegrad.train.events import Skip, Step, Validation, Watch
from wholegrad.train.metrics import Score, mean_dice
from wholegrad.train.split import Entry

QUIET_SECONDS = 10.0  # between plain lines where output is no terminal
PHASES = {"fused": "fwd + bwd"}  # how sweeps are called for people, where not as in the code
REDRAW_SECONDS = 0.1  # a tile can take a millisecond; drawing each would cost more than running it


def step_line(step: Step) -> str:
    """Loss, Dice, seconds and memory of a step, for people."""
    return (
        f"loss {step.loss:.4f}  Dice {step.dice:.3f}  {step.seconds:.1f} s/step  "
        f"{show_bytes(step.rss)} now, {show_bytes(step.projected)} projected"
    )


def show_seconds(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def score_table(scores: list[Score], title: str) -> Table:
    """A table of Dice, precision and recall, a row a slide, the mean last."""
    table = Table(title=title, title_justify="left")
    table.add_column("slide")
    for name in ("megapixels", "Dice", "precision", "recall"):
        table.add_column(name, justify="right")
    for score in scores:
        figures = (f"{value:.3f}" for value in (score.dice, score.precision, score.recall))
        table.add_row(score.name, f"{score.pixels / 1e6:.1f}", *figures)
    if len(scores) > 1:
        table.add_section()
        table.add_row("mean", "", f"{mean_dice(scores):.3f}")
    return table


class _Count(MofNCompleteColumn):
    """``3/10``; nothing for what is not counted."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


class _Recent:
    """The mean of numbers, those far back counting less: what a step took lately."""

    def __init__(self) -> None:
        self.mean, self._count = 0.0, 0

    def add(self, value: float) -> None:
        self._count += 1
        self.mean += (value - self.mean) / min(self._count, 20)


class Display:
    """Bars in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, title: str = "step") -> None:
        self.console, self.title = console, title
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            _Count(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.steps = self.bars.add_task(title, total=None, note="")
        self.tiles = self.bars.add_task("tiles", total=None, note="", visible=False)
        self.printed = self.drawn = 0.0
        self.told = time.monotonic()  # of a job without steps: when it last said how far it is
        self.total = self.left = 0
        self.ranks = 1  # that take steps side by side
        self.seconds = _Recent()

    def watch(self) -> Watch:
        """The callbacks that feed this display."""
        return Watch(
            on_split=self.split,
            on_start=self.start,
            on_plan=self.plan,
            on_tile=self.tile,
            on_step=self.step,
            on_skip=self.skip,
            on_validation=self.validation,
            on_score=self.score,
            on_note=self.note,
        )

    def split(self, entries: Sequence[Entry]) -> None:
        words = {"train": "to learn from", "val": "to choose by", "test": "to be judged on"}
        for part, word in words.items():
            names = [entry.name for entry in entries if entry.part == part]
            if names:
                self.note(f"{len(names)} {word}: {', '.join(names)}")

    def start(self, first: int, total: int) -> None:
        self.total, self.left = total, total - first
        self.bars.update(self.steps, completed=first, total=total)

    def plan(self, slide: str, plan: wg.Plan) -> None:
        self.console.print(
            f"plan for {slide}: {plan.tiles} tiles, {show_bytes(plan.projected)} projected for the whole process "
            f"(whole-image training would need {show_bytes(plan.whole_image)} for its maps alone)",
            highlight=False,
        )

    def tile(self, event: wg.Progress) -> None:
        now = time.monotonic()
        if now - self.drawn < REDRAW_SECONDS and event.done < event.total:
            return
        self.drawn = now
        note = f"{show_bytes(resident())} now"
        description = PHASES.get(event.phase, event.phase)
        self.bars.update(
            self.tiles,
            description=description,
            completed=event.done,
            total=event.total,
            note=note,
            visible=event.done < event.total,
        )
        if not self.console.is_terminal and not self.total and now - self.told > QUIET_SECONDS:
            self.told = now
            self.note(f"{description}: {event.done / max(event.total, 1):.0%}")

    def step(self, step: Step) -> None:
        self.left -= 1
        self.seconds.add(step.seconds)
        self.bars.update(self.steps, advance=1, note=step_line(step))
        now = time.monotonic()
        if not self.console.is_terminal and now - self.printed > QUIET_SECONDS:
            self.printed = now
            left = f"{show_seconds(self.seconds.mean * self.left / self.ranks)} left"
            self.note(f"{self.title} {step.step + 1} of {self.total}  {step_line(step)}  {left}")

    def skip(self, skip: Skip) -> None:
        self.left -= 1
        self.bars.update(self.steps, advance=1)
        self.note(f"{self.title} {skip.step + 1} skipped: {skip.reason}")

    def validation(self, validation: Validation) -> None:
        said = "the best so far" if validation.best else f"not better, {validation.stale} in a row"
        self.note(f"validated after {validation.step} steps: Dice {validation.dice:.4f}, {said}")

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def score(self, score: Score) -> None:
        self.console.print(f"tested on {score.name}: Dice {score.dice:.3f}", highlight=False)


@contextmanager
def display(console: Console, title: str = "step") -> Iterator[Display]:
    """A display that is drawn while the block runs."""
    shown = Display(console, title)
    if not console.is_terminal:
        yield shown
        return
    with shown.bars:
        yield shown

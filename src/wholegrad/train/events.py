"""What happens in a run, as records: lines of the log, and what whoever looks on is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

import wholegrad as wg
from wholegrad.plan.plan import show_bytes
from wholegrad.train.cases import Case, Readers
from wholegrad.train.metrics import Score
from wholegrad.train.split import Entry


@dataclass(frozen=True)
class Step:
    """One slide seen: memory in bytes, of the whole process; Dice as it was before this update.

    Attributes:
        norm: of the gradient before clipping, where the step ended in an update.
    """

    kind: ClassVar[str] = "step"
    step: int
    slide: str
    loss: float
    dice: float
    seconds: float
    rss: int
    peak: int
    projected: int
    lr: float
    norm: float | None = None


@dataclass(frozen=True)
class Skip:
    """A step without an update, since its slide could not be read."""

    kind: ClassVar[str] = "skip"
    step: int
    slide: str
    reason: str


@dataclass(frozen=True)
class Validation:
    """Scores on the validation slides after so many steps.

    Attributes:
        dice: the mean over slides.
        slides: Dice of each.
        best: whether it is better than all before.
        stale: evaluations in a row that were not.
    """

    kind: ClassVar[str] = "validation"
    step: int
    dice: float
    slides: dict[str, float]
    best: bool
    stale: int


@dataclass(frozen=True)
class Replan:
    """Plans are made anew from this step on, since other processes took memory or gave it back.

    Attributes:
        before, budget: bytes of the process's peak.
        held, free: bytes that the process held, and that it could still take.
        stalled: per cent of time that processes waited for memory.
    """

    kind: ClassVar[str] = "replan"
    step: int
    before: int
    budget: int
    held: int
    free: int
    stalled: float

    def __str__(self) -> str:
        why = "other processes took memory" if self.budget < self.before else "memory is free again"
        return (
            f"{why}: budget {show_bytes(self.budget)} instead of {show_bytes(self.before)} from step {self.step} on "
            f"({show_bytes(self.free)} free), sums rounded in another order"
        )


Event = Step | Skip | Validation | Replan


def as_line(event: Event) -> dict[str, Any]:
    """An event as the log has it."""
    return {"kind": event.kind, **dataclasses.asdict(event)}


@dataclass(frozen=True)
class Judged:
    """A network that was just scored on the validation slides, to be used before the loop goes on.

    Attributes:
        model: holds the weights to use, the average if there is one; what its mode was must be put back.
        step: steps taken.
        budget, progress, where: as the evaluation had them; ``progress`` raises when the run is interrupted.
    """

    model: nn.Module
    cases: Sequence[Case]
    step: int
    budget: Callable[[Readers], int]
    progress: Callable[[wg.Progress], None]
    where: dict[str, Any] = field(default_factory=dict)


@dataclass
class Watch:
    """What the loop tells whoever looks on; every one may be replaced, none needs to be."""

    on_split: Callable[[Sequence[Entry]], None] = lambda entries: None
    on_start: Callable[[int, int], None] = lambda first, total: None
    on_plan: Callable[[str, wg.Plan], None] = lambda slide, plan: None
    on_tile: Callable[[wg.Progress], None] = lambda progress: None
    on_step: Callable[[Step], None] = lambda step: None
    on_skip: Callable[[Skip], None] = lambda skip: None
    on_validation: Callable[[Validation], None] = lambda validation: None
    on_judged: Callable[[Judged], None] = lambda judged: None
    on_score: Callable[[Score], None] = lambda score: None
    on_note: Callable[[str], None] = lambda text: None

    @staticmethod
    def joined(*watches: Watch) -> Watch:
        """One that tells all of them, in this order."""

        def both(name: str) -> Callable[..., None]:
            def tell(*told: Any) -> None:
                for watch in watches:
                    getattr(watch, name)(*told)

            return tell

        return Watch(**{each.name: both(each.name) for each in dataclasses.fields(Watch)})


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps taken, the file to use, scores on test slides, and whether Ctrl-C ended it."""

    steps: int
    weights: Path
    scores: tuple[Score, ...]
    pictures: tuple[Path, ...]
    interrupted: bool
    report: Path | None = None

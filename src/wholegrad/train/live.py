"""What a run tells of itself while it goes on, beside its log, in the folder ``live`` of the run's own.

``status.json`` says where the run is: written about once a second, whole or not at all, from the thread that trains,
which costs it half a millisecond. ``NAME.STEP.tif`` is the latest prediction of one validation slide, made after
each evaluation with the weights that were judged: one forward pass over that slide, within the run's budget. Nothing is
drawn at random here and no plan of a step changes, so the run's bits are those of a run without it.

Whoever shows this (``wholegrad view --run``) reads files, in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import wholegrad as wg
from wholegrad.aside import aside, sweep
from wholegrad.errors import ConfigError, WholegradError
from wholegrad.run.process import resident
from wholegrad.train.events import Judged, Skip, Step, Validation, Watch
from wholegrad.train.metrics import Score
from wholegrad.train.split import Entry

FOLDER, STATUS = "live", "status.json"
EVERY = 1.0  # seconds between writes of the status, where nothing but tiles went by
ENDED = ("finished", "interrupted", "failed")
PREDICTION = re.compile(r"(.+)\.(\d+)\.tif")


class Live:
    """Writes a run's status and its latest prediction; a full disk costs these, never the run.

    Args:
        out: the run's folder.
        slide: name of the validation slide that is predicted; the first without one.
        warn: told what could not be done, once.
    """

    def __init__(self, out: Path, slide: str | None = None, warn: Callable[[str], None] = lambda text: None) -> None:
        self.out, self.slide, self.warn = out, slide, warn
        self._warned = self._begun = False
        self._written = 0.0
        self._status: dict[str, Any] = {
            "state": "running", "phase": "training", "step": 0, "first": 0, "total": 0, "done": 0, "tiles": 0,
            "began": time.time(), "process": os.getpid(), "predicts": slide,
        }  # fmt: skip

    def watch(self) -> Watch:
        """The callbacks that feed this."""
        return Watch(
            on_split=self._split,
            on_start=self._start,
            on_plan=self._plan,
            on_tile=self._tile,
            on_step=self._step,
            on_skip=self._skip,
            on_validation=self._validation,
            on_judged=self._judged,
            on_score=self._score,
            on_note=lambda text: self._tell(said=text),
        )

    def end(self, state: str, said: str = "") -> None:
        """The run is over: ``finished``, ``interrupted`` or ``failed``."""
        self._tell(state=state, phase="", said=said)

    def _split(self, entries: Sequence[Entry]) -> None:
        judged = [entry.name for entry in entries if entry.part == "val"]
        if self.slide is not None and self.slide not in judged:
            known = ", ".join(judged) or "none"
            raise ConfigError(f"--live-slide {self.slide}", "is no validation slide", f"choose from: {known}")
        self.slide = self.slide or next(iter(judged), None)
        self._status["predicts"] = self.slide

    def _start(self, first: int, total: int) -> None:
        self._begun = True
        sweep(self.out / FOLDER)
        self._tell(phase="training", step=first, first=first, total=total, started=time.time())

    def _plan(self, slide: str, plan: wg.Plan) -> None:
        height, width = plan.image_shape[-2:]
        self._status.update(pixels=height * width, projected=plan.host_peak, strategy=plan.strategy)

    def _tile(self, event: wg.Progress) -> None:
        if time.monotonic() - self._written < EVERY:
            return
        self._tell(done=event.done, tiles=event.total, sweep=event.phase)

    def _step(self, step: Step) -> None:
        self._status.update(step=step.step + 1, phase="training", done=0, tiles=0)
        if time.monotonic() - self._written >= EVERY:
            self._tell()

    def _skip(self, skip: Skip) -> None:
        self._tell(step=skip.step + 1)

    def _validation(self, validation: Validation) -> None:
        self._tell(phase="training", done=0, tiles=0)

    def _score(self, score: Score) -> None:
        self._tell(phase="testing")

    def _judged(self, judged: Judged) -> None:
        case = next((case for case in judged.cases if case.name == self.slide), None)
        if case is None:
            return
        self._tell(phase=f"predicting {case.name}")
        training = judged.model.training
        judged.model.eval()
        folder = self.out / FOLDER
        try:
            with case.open() as readers:
                path, budget = folder / f"{case.name}.{judged.step}.tif", judged.budget(readers)
                how: dict[str, Any] = {"budget": budget, "progress": judged.progress, **judged.where}
                wg.predict(judged.model, readers.slide, out=path, **how)
            for older in predictions(folder, case.name)[:-1]:
                if older[1] != path:
                    with suppress(OSError):  # someone may have it open, where systems mind
                        older[1].unlink()
        except (WholegradError, OSError) as error:
            self._warn(f"the live page has no new prediction: {error}")
        finally:
            judged.model.train(training)

    def _tell(self, **news: Any) -> None:
        if not self._begun:
            return  # the folder may be another run's, and this one be refused
        self._written = time.monotonic()
        self._status.update(news, now=time.time(), rss=resident())
        path = self.out / FOLDER / STATUS
        partial = aside(path)
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_text(json.dumps(self._status))
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            self._warn(f"the live page is not kept up to date: {path} cannot be written ({error.strerror})")

    def _warn(self, said: str) -> None:
        if not self._warned:
            self._warned = True
            self.warn(said)


def read_status(out: Path) -> dict[str, Any] | None:
    """What the run in that folder said last of itself; None if it said nothing."""
    try:
        told = json.loads((out / FOLDER / STATUS).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or not isinstance(told.get("state"), str):
        return None
    return told if isinstance(told.get("now"), int | float) else None


def predictions(folder: Path, name: str) -> list[tuple[int, Path]]:
    """Step and path of each prediction of a slide, as they were made."""
    found = []
    with suppress(OSError):
        for path in folder.iterdir():
            told = PREDICTION.fullmatch(path.name)
            if told is not None and told[1] == name:
                found.append((path.stat().st_mtime_ns, int(told[2]), path))
    return [(step, path) for _, step, path in sorted(found)]

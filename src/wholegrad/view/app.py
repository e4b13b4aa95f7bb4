"""What an address stands for: tiles, numbers, and files of the page, all of it known before the first request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from wholegrad.graph.geometry import Box
from wholegrad.view.follow import Follower
from wholegrad.view.jobs import Jobs, Publish
from wholegrad.view.layers import Look, Picture
from wholegrad.view.run import RunFolder, StepWish, plan_of
from wholegrad.view.scene import Scene
from wholegrad.view.score import score
from wholegrad.view.step import as_passes

MIMES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
BITS = 32  # of what a legend can hide
NUMBER = r"(\d{1,7})"
LOOKS = {
    "line": r"[01]",
    "hide": r"\d{1,10}",
    "t": r"\d{1,3}",
    "c": r"\d{1,3}",
    "v": r"\d{1,9}",
}  # v only tells tiles apart


@dataclass(frozen=True)
class Answer:
    """What is sent; ``fresh`` answers are not to be kept by the browser."""

    data: bytes
    mime: str
    fresh: bool = True
    status: int = 200


def load_assets() -> dict[str, Answer]:
    """The files of the page by name, read once."""
    folder = files("wholegrad.view") / "assets"
    loaded = {}
    for file in folder.iterdir():
        mime = MIMES.get(Path(file.name).suffix)
        if mime:
            kind = mime if mime.startswith("image/") else f"{mime}; charset=utf-8"
            loaded[file.name] = Answer(file.read_bytes(), kind)
    return loaded


class App:
    """Answers addresses below the token. Thread-safe.

    Args:
        scene: stays the caller's to close.
        run: the folder of a run, if there is one.
        step: which step to plan where there is no run.
        renewing: whether the run's new predictions of the slide take the place of those that the scene shows.
    """

    def __init__(
        self, scene: Scene, run: RunFolder | None = None, step: StepWish | None = None, renewing: bool = False
    ) -> None:
        self.scene, self.run, self.step = scene, run, step or StepWish()
        self.follower = None if run is None else Follower(scene, run, renewing)
        self.assets, self.jobs = load_assets(), Jobs()
        self._routes: tuple[tuple[re.Pattern[str], Callable[..., Answer | None]], ...] = tuple(
            (re.compile(pattern), answer)
            for pattern, answer in (
                (rf"tiles/([a-z]{{1,16}})/(\d{{1,2}})/{NUMBER}_{NUMBER}", self._tile),
                (rf"thumb/{NUMBER}_{NUMBER}_{NUMBER}_{NUMBER}", self._thumb),
                (rf"at/{NUMBER}_{NUMBER}", self._at),
                (r"scene\.json", self._about),
                (r"problems\.json", lambda look: _json({"problems": self.scene.problems})),
                (r"score\.json", self._score),
                (r"plan\.json", self._plan),
                (r"log/(\d{1,15})", self._log),
                (r"([a-z.]{1,40})", lambda look, name: self.assets.get(name)),
                (r"", lambda look: self.assets["index.html"]),
            )
        )

    def answer(self, path: str, query: str) -> Answer | None:
        """The answer to an address, or None: there is no such thing.

        Raises:
            SlideError: a file cannot be read.
        """
        look = _look(query, self.scene.threshold)
        if look is None:
            return None
        for pattern, answer in self._routes:
            match = pattern.fullmatch(path)
            if match:
                return answer(look, *match.groups())
        return None

    def note(self, problem: str) -> None:
        """Keep what went wrong, to be shown."""
        self.scene.note(problem)

    def close(self) -> None:
        """End what goes on in the background."""
        self.jobs.close()

    def _about(self, look: Look) -> Answer:
        scene, run = self.scene, self.run
        told = None if run is None else run.told(run.entry(scene.files.slide))
        return _json({**scene.about(), "score": self._scored(), "run": told})

    def _scored(self) -> bool:
        """Whether prediction and truth are compared: not while a run needs the processor for better."""
        return self.scene.error is not None and not (self.follower is not None and self.follower.going())

    def _tile(self, look: Look, key: str, rung: str, col: str, row: str) -> Answer | None:
        return _picture(self.scene.tile(key, int(rung), int(col), int(row), look))

    def _thumb(self, look: Look, x: str, y: str, width: str, height: str) -> Answer | None:
        left, top = int(x), int(y)
        box = Box(top, top + int(height), left, left + int(width))
        return _picture(self.scene.thumb(box, look.threshold))

    def _at(self, look: Look, x: str, y: str) -> Answer | None:
        found = self.scene.at(int(y), int(x), look)
        return None if found is None else _json(found)

    def _score(self, look: Look) -> Answer | None:
        error = self.scene.error
        if error is None:
            return None
        if not self._scored():
            return _json({"state": "put off"})
        threshold = look.threshold if "threshold" in error.drawn_by else self.scene.threshold

        def work(publish: Publish) -> None:
            score(self.scene, error, threshold, publish)

        return _json(self.jobs.state(("score", self.scene.version, threshold), work))

    def _log(self, look: Look, start: str) -> Answer | None:
        return None if self.follower is None else _json(self.follower.look(int(start)))

    def _plan(self, look: Look) -> Answer:
        return _json(self.jobs.state("plan", self._make_plan))

    def _make_plan(self, publish: Publish) -> None:
        files = self.scene.files
        if self.run is None:
            made, placed = plan_of(self.step, files.slide, files.slide_mpp)
            said = f"of {self.step.network}, not yet run"
        else:
            network = self.step.network if ":" in self.step.network else None
            made, placed, said = self.run.plan_of(files.slide, files.mask, network)
        publish({"said": said, "plan": as_passes(made, placed)})


def _look(query: str, threshold: int) -> Look | None:
    """What a query asks for; None if it is no query of ours."""
    try:
        given: Mapping[str, str] = dict(parse_qsl(query, strict_parsing=True, max_num_fields=8)) if query else {}
    except ValueError:
        return None
    if any(name not in LOOKS or not re.fullmatch(LOOKS[name], value) for name, value in given.items()):
        return None
    line, hidden, threshold = given.get("line") == "1", int(given.get("hide", 0)), int(given.get("t", threshold))
    look = Look(line, hidden, threshold, int(given.get("c", 255)))  # 255: the layer's own choice
    return look if look.hidden < 1 << BITS and 0 < look.threshold < 256 else None


def _json(value: Any) -> Answer:
    return Answer(json.dumps(value, allow_nan=False).encode(), "application/json")


def _picture(picture: Picture | None) -> Answer | None:
    return None if picture is None else Answer(picture.data, picture.mime, fresh=False)

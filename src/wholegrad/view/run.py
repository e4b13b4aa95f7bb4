"""What a run's folder tells of a slide: its labels, its prediction, its scores, its steps, and the plan of a step."""

from __future__ import annotations

import json
import statistics
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import wholegrad as wg
from wholegrad.errors import ConfigError, WholegradError
from wholegrad.metrics.files import stem
from wholegrad.plan.plan import Room, show_bytes
from wholegrad.plan.storage import NARROW
from wholegrad.slide.mask import open_mask
from wholegrad.slide.placement import Placement
from wholegrad.slide.slide import Slide, open_slide
from wholegrad.train.live import FOLDER, predictions, read_status
from wholegrad.train.log import read_log
from wholegrad.train.loop import build_loss
from wholegrad.train.made_up import model_and_loss, target_of
from wholegrad.train.metrics import METRICS
from wholegrad.train.networks import NETWORKS, build_network, normalized
from wholegrad.train.plans import Conditions
from wholegrad.train.split import Entry, from_json
from wholegrad.train.state import Card, read_card
from wholegrad.train.tables import DataConfig, TrainConfig
from wholegrad.view.scene import Files

MOST = 4 << 20  # bytes of a log that are looked at for one answer
COLUMNS = {
    "step": ("step", "slide", "loss", "dice", "seconds", "rss", "peak", "projected", "lr"),
    "validation": ("step", "dice"),
    "replan": ("step", "budget"),
}  # of the log's lines, as the page gets them


@dataclass(frozen=True)
class StepWish:
    """Which step to plan where no run tells.

    Attributes:
        network, loss, target: as ``wholegrad plan`` takes them.
        budget: for the whole process, of the step, not of the viewer.
        mpp, level: at which the slide is read.
    """

    network: str = "unet4492"
    loss: str | None = None
    target: str = "labels"
    budget: str | None = None
    mpp: float | None = None
    level: int | None = None


def plan_of(wish: StepWish, path: Path, slide_mpp: float | None = None) -> tuple[wg.Plan, Placement]:
    """The plan of a step on the whole slide, and where the pixels lie that it counts in.

    Raises:
        WholegradError: as ``wholegrad plan``.
    """
    with open_slide(path, wish.mpp, wish.level, slide_mpp=slide_mpp) as slide:
        model, loss_fn = model_and_loss(wish.network, wish.loss)
        target = target_of(wish.target, (slide.shape[1], slide.shape[2]), empty=True)
        return wg.plan(model, loss_fn, slide, target, budget=wish.budget), slide.placement


class RunFolder:
    """The folder of a run, finished or not.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise ConfigError(str(path), "is no folder", "give the folder that wholegrad train wrote to (train.out)")
        if not (path / "split.json").exists():
            raise ConfigError(
                str(path), "holds no run (no split.json)", "give the folder that wholegrad train wrote to"
            )
        self.entries = from_json(path / "split.json")

    def entry(self, slide: Path) -> Entry | None:
        """The run's entry of a slide: of its file, or else of its name."""
        same = [entry for entry in self.entries if entry.slide.absolute() == slide.absolute()]
        named = [entry for entry in self.entries if entry.name == stem(slide)]
        return next(iter(same or named), None)

    def prediction(self, entry: Entry) -> Path | None:
        """The newest mask that the run predicted of a slide; None if there is none yet."""
        found = self.newest(entry)
        return None if found is None else found[1]

    def newest(self, entry: Entry) -> tuple[int | None, Path, int] | None:
        """The newest prediction of a slide: after which step (None: with the weights to use), path, time of change."""
        found: list[tuple[int, Path, int | None]] = []
        last = self.path / "predictions" / f"{entry.name}.tif"
        for step, path in ((None, last), *predictions(self.path / FOLDER, entry.name)):
            try:
                found.append((path.stat().st_mtime_ns, path, step))
            except OSError:  # it is not there, or no longer
                continue
        if not found:
            return None
        changed, path, step = max(found, key=lambda each: each[0])
        return step, path, changed

    def first(self) -> Entry:
        """The slide to show where none is named: the one that is predicted, else one that is judged, else any."""
        told = (self.status() or {}).get("predicts")
        order = {"val": 0, "test": 1, "train": 2}
        return min(self.entries, key=lambda entry: (entry.name != told, order[entry.part]))

    def status(self) -> dict[str, Any] | None:
        """What the run says of itself, if it was started to."""
        return read_status(self.path)

    def limits(self) -> dict[str, Any]:
        """``budget`` in bytes and ``steps`` in all, as far as the folder tells."""
        found: dict[str, Any] = {"budget": None, "total": None}
        with suppress(WholegradError):
            found["budget"] = Conditions.read(self.path / "run.json").budget
        status = self.status()
        if status is not None and status.get("total"):
            found["total"] = status["total"]
            return found
        with suppress(WholegradError, KeyError):
            train = self.card().config["train"]
            slides = sum(entry.part == "train" for entry in self.entries)
            found["total"] = train["steps"] or (train["epochs"] or 0) * slides or None
        return found

    def card(self) -> Card:
        """What the run's weights say of it.

        Raises:
            ConfigError: there are none yet.
        """
        return read_card(self.path)

    def told(self, entry: Entry | None) -> dict[str, Any]:
        """Scores and steps of a slide as the run wrote them down; empty where it did not."""
        name = None if entry is None else entry.name
        log = read_log(self.path / "log.jsonl")
        steps = [line for line in log if line["kind"] == "step" and line["slide"] == name]
        validations = [line for line in log if line["kind"] == "validation" and name in line["slides"]]
        found: dict[str, Any] = {"name": self.path.absolute().name, "part": None if entry is None else entry.part}
        if steps:
            found["steps"] = {
                "count": len(steps),
                "seconds": statistics.median(line["seconds"] for line in steps),
                "peak": show_bytes(max(line["peak"] for line in steps)),
                "projected": show_bytes(max(line["projected"] for line in steps)),
                "dice": steps[-1]["dice"],
            }
        if validations:
            found["validation"] = {"dice": validations[-1]["slides"][name], "step": validations[-1]["step"]}
        found["test"] = next((line for line in self._tests() if line["name"] == name), None)
        return found

    def log(self, start: int) -> dict[str, Any]:
        """What the run has logged from byte ``start`` of its log on, in whole lines; ``next`` is where to go on.

        A log that is shorter than ``start`` was cut by a resumed run: then all of it, with ``again``.
        """
        path = self.path / "log.jsonl"
        size = path.stat().st_size if path.exists() else 0
        found: dict[str, Any] = {
            "again": size < start,
            "next": 0 if size < start else start,
            "steps": [],
            "validations": [],
            "replans": [],
        }
        if not size:
            return found
        with path.open("rb") as file:
            file.seek(found["next"])
            data = file.read(MOST)
        whole = data[: data.rfind(b"\n") + 1]
        found["next"] += len(whole)
        for line in map(json.loads, whole.splitlines()):
            if line["kind"] in COLUMNS:
                found[f"{line['kind']}s"].append([line[name] for name in COLUMNS[line["kind"]]])
        return found

    def _tests(self) -> list[dict[str, Any]]:
        path = self.path / "test.json"
        try:
            return list(json.loads(path.read_text())) if path.exists() else []
        except ValueError:
            return []

    def plan_of(self, path: Path, mask: Path | None, network: str | None) -> tuple[wg.Plan, Placement, str]:
        """The plan of a training step of this run on the whole slide, where its pixels lie, and what to say of it.

        Args:
            mask: labels of the slide; without them, made-up ones, of which only the size counts.
            network: ``module:factory``, for a run of one that is not built in: a file never decides what is imported.

        Raises:
            ConfigError: the run's network is not built in and none was named.
            WholegradError: as ``wholegrad plan``.
        """
        card = self.card()
        if network is None and card.network not in NETWORKS:
            cause = f"trains {card.network}, which is not built in"
            raise ConfigError(str(self.path), cause, f"add --network {card.network}")
        data, train = DataConfig(**card.config["data"]), TrainConfig(**card.config["train"])
        conditions = Conditions.read(self.path / "run.json")
        model = normalized(build_network(network or card.network, card.args), card.mean, card.std)
        with open_slide(path, data.mpp, data.level, slide_mpp=data.slide_mpp) as slide:
            made = wg.plan(
                model,
                build_loss(train),
                slide,
                _labels(slide, mask, data),
                budget=_room(conditions, slide),
                metrics=METRICS,
                boundary_dtype=NARROW.get(train.boundary_dtype or ""),
                strategy=train.strategy,
                rates=conditions.rates,
            )
            said = f"as the run {self.path.absolute().name} takes it"
            if data.crop:
                said += f", but on the whole slide: the run trains on regions of {data.crop[0]} x {data.crop[1]}"
            return made, slide.placement, said


def _labels(slide: Slide, mask: Path | None, data: DataConfig) -> Any:
    if mask is None:
        return target_of("labels", (slide.shape[1], slide.shape[2]), empty=True)
    return open_mask(mask, like=slide, classes=data.classes, ignore=data.ignore)


def _room(conditions: Conditions, slide: Slide) -> int:
    """What the run leaves to a plan, whatever this process holds."""
    room = conditions.room(slide.cache_bytes)
    return Room(room) if room > 0 else conditions.budget


def completed(files: Files, folder: RunFolder) -> Files:
    """The run's own labels and prediction of the slide, where none were given."""
    entry = folder.entry(files.slide)
    if entry is None:
        return files
    mask = files.mask or (entry.mask if entry.mask.exists() else None)
    prediction = files.prediction
    if prediction is None and files.probability is None:
        prediction = folder.prediction(entry)
    try:
        painted = folder.card().config["data"].get("classes")
    except ConfigError:  # no checkpoint yet
        painted = None
    return replace(
        files, mask=mask, prediction=prediction, slide_mpp=files.slide_mpp or entry.mpp, painted=painted or None
    )

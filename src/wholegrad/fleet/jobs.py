"""What a worker of a fleet does to one slide. A job is plain values, sent to workers that have wholegrad installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

import wholegrad as wg
from wholegrad.errors import WholegradError
from wholegrad.outputs import Depth, Kind
from wholegrad.segment import segment
from wholegrad.slide.slide import open_slide
from wholegrad.slide.thumbnail import balanced
from wholegrad.train.networks import build_network
from wholegrad.train.state import load_model, read_card

ENDINGS = {"mask": ".mask.ome.tif", "geojson": ".mask.geojson", "picture": ".mask.png"}


class Job(Protocol):
    """What is done to every slide of a fleet."""

    def about(self) -> dict[str, Any]:
        """What shapes the results, as plain values."""

    def files(self, name: str) -> list[Path]:
        """What a slide's results will be."""

    def run(self, path: str, name: str) -> dict[str, Any]:
        """Do it; returns figures for the manifest."""


@dataclass(frozen=True)
class Outcome:
    """How a slide ended.

    Attributes:
        figures: for the manifest, if it is done.
        cause: why not, in one line.
        final: whether trying again is of no use.
        died: whether the worker did.
    """

    figures: dict[str, Any] | None
    cause: str | None = None
    final: bool = False
    seconds: float = 0.0
    died: bool = False


def attempt(job: Job, path: str, name: str, threads: int | None = None) -> Outcome:
    """Run a job on one slide. What wholegrad refuses, it refuses again; anything else may have been bad luck."""
    if threads is not None:
        torch.set_num_threads(threads)
    start = time.monotonic()
    try:
        figures = job.run(path, name)
    except WholegradError as error:
        return Outcome(None, _line(str(error)), final=True)
    except Exception as error:  # whatever a library raises on one slide, the others can still be done
        return Outcome(None, _line(f"{path}: {type(error).__name__}: {error}"))
    return Outcome(figures, seconds=round(time.monotonic() - start, 3))


def _line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Segmenting:
    """The tissue of a slide, as :func:`wholegrad.segment` finds it; ``kinds`` are keys of ``ENDINGS``."""

    out: str
    kinds: tuple[str, ...]
    mpp: float
    slide_mpp: float | None
    min_area: float
    min_hole: float
    simplify: float | None
    budget: str | int | None

    def about(self) -> dict[str, Any]:
        shaping = {key: value for key, value in asdict(self).items() if key not in ("out", "budget")}
        return {"job": "segment", "wholegrad": wg.__version__, **shaping}

    def files(self, name: str) -> list[Path]:
        return [Path(self.out) / f"{name}{ENDINGS[kind]}" for kind in self.kinds]

    def run(self, path: str, name: str) -> dict[str, Any]:
        found = segment(
            path,
            self.files(name),
            mpp=self.mpp,
            slide_mpp=self.slide_mpp,
            min_area=self.min_area,
            min_hole=self.min_hole,
            simplify=self.simplify,
            budget=self.budget,
        )
        return {"shape": list(found.shape), "mpp": found.mpp, "tissue": found.tissue, "area": found.area}


@dataclass(frozen=True)
class Predicting:
    """A trained network's result on a slide, as ``wholegrad predict`` writes it, in a file of each of ``endings``."""

    out: str
    endings: tuple[str, ...]
    weights: str
    digest: str
    network: str | None
    kind: Kind
    threshold: float
    classes: tuple[str, ...] | None
    depth: Depth
    min_area: float
    min_hole: float
    simplify: float | None
    mpp: float | None
    level: int | None
    slide_mpp: float | None
    budget: str | int | None

    def about(self) -> dict[str, Any]:
        shaping = {key: value for key, value in asdict(self).items() if key not in ("out", "budget", "weights")}
        return {"job": "predict", "wholegrad": wg.__version__, **shaping}

    def files(self, name: str) -> list[Path]:
        return [Path(self.out) / f"{name}.{self.kind}{ending}" for ending in self.endings]

    def run(self, path: str, name: str) -> dict[str, Any]:
        model, trained = _loaded(self.weights, self.network, self.digest)
        mpp, level = self.mpp, self.level
        if mpp is None and level is None:
            mpp, level = trained.get("mpp"), trained.get("level")
        with open_slide(path, mpp=mpp, level=level, slide_mpp=self.slide_mpp) as slide:
            wg.predict(
                model,
                balanced(slide) if trained.get("balance") else slide,
                out=self.files(name),
                kind=self.kind,
                threshold=self.threshold,
                classes=None if self.classes is None else list(self.classes),
                depth=self.depth,
                min_area=self.min_area,
                min_hole=self.min_hole,
                simplify=self.simplify,
                budget=self.budget,
            )
            return {"shape": list(slide.shape[1:]), "mpp": slide.mpp}


@lru_cache(maxsize=1)
def _loaded(weights: str, network: str | None, digest: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network of a weights file, and how it was trained to see slides; kept for a worker's next slide."""
    card = read_card(weights)
    model = load_model(weights, build_network(network, card.args) if network else None)
    return model, dict(card.config.get("data", {}))


Attempt = Callable[[Job, str, str, int | None], Outcome]

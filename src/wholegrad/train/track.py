"""Copies of the log for TensorBoard and MLflow, each imported only where the configuration asks for it.

``log.jsonl`` stays the record: what these cannot take does not end a run. A resumed run starts no second one: it goes
on in the files, or in the MLflow run, that it began.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from wholegrad.errors import ConfigError
from wholegrad.train.state import Card, write_whole
from wholegrad.train.tables import Config

LEFT_OUT = ("kind", "step", "slide", "slides", "best", "reason")  # of an event: what is no number to plot


class Tracker(Protocol):
    """Where a run's events go besides the log."""

    def start(self, config: Config, step: int) -> None:
        """A run begins, or goes on after ``step`` steps."""

    def note(self, line: dict[str, Any]) -> None:
        """A line of the log."""

    def finish(self, card: Card, report: Path) -> None:
        """The run is over."""

    def close(self) -> None:
        """Nothing follows."""


class Tracking:
    """All trackers that the configuration asks for; one that fails in the middle of a run is left out from there on.

    Args:
        config: of the run; None for none of them.
        warn: told of a tracker that fails.

    Raises:
        ConfigError: the package of one is not installed.
    """

    def __init__(self, config: Config | None, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.trackers: list[Tracker] = []
        if config is None:
            return
        if config.track.tensorboard:
            self.trackers.append(TensorBoard())
        if config.track.mlflow is not None:
            self.trackers.append(MLflow())

    def start(self, config: Config, step: int) -> None:
        """A run begins, or goes on after ``step`` steps.

        Raises:
            ConfigError: a tracker cannot be reached.
        """
        for tracker in self.trackers:
            try:
                tracker.start(config, step)
            except Exception as error:  # whatever another package raises
                raise ConfigError("track", _said(error), "check the address, or remove it") from error

    def note(self, line: dict[str, Any]) -> None:
        """A line of the log."""
        self._all(lambda tracker: tracker.note(line))

    def finish(self, card: Card, report: Path) -> None:
        """The run is over."""
        self._all(lambda tracker: tracker.finish(card, report))

    def close(self) -> None:
        """Nothing follows."""
        self._all(lambda tracker: tracker.close())

    def _all(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self.trackers):
            try:
                tell(tracker)
            except Exception as error:  # whatever another package raises
                self.trackers.remove(tracker)
                self.warn(f"{type(tracker).__name__} is left out from here on: {_said(error)}")


def _said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, as ``train/loss`` or ``validation/dice/NAME``."""
    if line["kind"] == "skip":
        return {"train/skipped": 1.0}
    prefix = "train" if line["kind"] == "step" else line["kind"]
    found = {f"{prefix}/{key}": value for key, value in line.items() if key not in LEFT_OUT and value is not None}
    return found | {f"{prefix}/dice/{name}": dice for name, dice in line.get("slides", {}).items()}


def needed(module: str, package: str, key: str) -> Any:
    """A module of an extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(key, f"needs the package {package}", f"pip install {package}, or remove {key}") from error


class TensorBoard:
    """Scalars in ``out/tensorboard``; what a killed run wrote beyond its checkpoint is purged when it goes on."""

    def __init__(self) -> None:
        self._module = needed("torch.utils.tensorboard", "tensorboard", "track.tensorboard")
        self._writer: Any = None

    def start(self, config: Config, step: int) -> None:
        folder = config.out / "tensorboard"
        self._writer = self._module.SummaryWriter(str(folder), purge_step=step if step else None)

    def note(self, line: dict[str, Any]) -> None:
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def finish(self, card: Card, report: Path) -> None:
        for name, dice in card.dice.items():
            self._writer.add_scalar(f"test/dice/{name}", dice, card.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """Parameters, metrics and the report in an MLflow run, whose id is kept in ``out/mlflow.txt``."""

    def __init__(self) -> None:
        self._mlflow = needed("mlflow", "mlflow-skinny", "track.mlflow")
        self._open = False

    def start(self, config: Config, step: int) -> None:
        self._mlflow.set_tracking_uri(config.track.mlflow)
        self._mlflow.set_experiment(config.track.experiment)
        kept = config.out / "mlflow.txt"
        known = kept.read_text().strip() if step and kept.exists() else None
        run = self._mlflow.start_run(run_id=known, run_name=config.out.name)
        self._open = True
        if known is None:
            write_whole(kept, f"{run.info.run_id}\n".encode())
            settings = {f"{table}.{k}": v for table, keys in config.as_dict().items() for k, v in keys.items()}
            self._mlflow.log_params({key: str(value)[:250] for key, value in settings.items()})

    def note(self, line: dict[str, Any]) -> None:
        self._mlflow.log_metrics({_name(k): float(v) for k, v in numbers(line).items()}, step=line["step"])

    def finish(self, card: Card, report: Path) -> None:
        self._mlflow.log_metrics({_name(f"test/dice/{k}"): v for k, v in card.dice.items()}, step=card.step)
        self._mlflow.log_artifact(str(report))

    def close(self) -> None:
        if self._open:
            self._mlflow.end_run()
            self._open = False


def _name(text: str) -> str:
    """A metric's name in the letters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in text)

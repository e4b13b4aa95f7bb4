"""Copies of the log for TensorBoard and MLflow, each imported only where the configuration asks for it.

``log.jsonl`` stays the record: what these cannot take does not end a run. A resumed run starts no second one: it goes
on in the files, or in the MLflow run, that it began.
"""

from __future__ import annotations

import importlib
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


def trackers(config: Config) -> list[Tracker]:
    """Those that the configuration asks for.

    Raises:
        ConfigError: the package of one is not installed.
    """
    made: list[Tracker] = []
    if config.track.tensorboard:
        made.append(TensorBoard())
    if config.track.mlflow is not None:
        made.append(MLflow())
    return made


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

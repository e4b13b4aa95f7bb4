"""A run's folder: what is in it, whether it can be written to, and what a resumed run takes from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wholegrad.aside import sweep
from wholegrad.errors import ConfigError
from wholegrad.train.log import Log
from wholegrad.train.plans import Conditions
from wholegrad.train.split import Entry, entries, from_json, to_json
from wholegrad.train.state import write_whole
from wholegrad.train.tables import Config

FREE = (
    "train.out", "train.checkpoint_minutes", "train.panels", "train.budget", "train.host_budget", "train.threads",
    "train.on_error", "mesh.tiles", "mesh.timeout",
)  # fmt: skip


class Folder:
    """The files of a run by name, and the rules by which it may be used."""

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, config.out
        self.checkpoint, self.best = self.path / "checkpoint.safetensors", self.path / "best.safetensors"
        self.split, self.run, self.lines = self.path / "split.json", self.path / "run.json", self.path / "log.jsonl"
        self._log: Log | None = None

    def check(self, resume: bool) -> None:
        """Refuse a folder that cannot be written to, or that holds another run, before anything is read.

        Raises:
            ConfigError: it is one of these.
        """
        above = self.path.absolute()
        while not above.exists() and not above.is_symlink():
            above = above.parent
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            cause = "is not writable" if above.is_dir() else "is not a folder"
            raise ConfigError(str(above), cause, "choose another --out, or change its rights")
        lines = self.lines.stat().st_size if self.lines.exists() else 0
        if not resume and (self.checkpoint.exists() or lines):
            remedy = "choose another --out, or continue it with --resume"
            raise ConfigError(str(self.path), "already holds a run", remedy)
        if resume and lines and not self.checkpoint.exists():
            raise ConfigError(str(self.path), "holds a log but no checkpoint", "restore it, or choose another --out")

    def check_validation(self, slides: int) -> None:
        """Refuse an interval of validations without slides for them.

        Raises:
            ConfigError: that is so.
        """
        validation = self.config.validation
        if not slides and (validation.steps or validation.epochs):
            raise ConfigError("validation", "has an interval but no slides", "give data.val or data.split.val")

    def entries(self, resume: bool) -> list[Entry]:
        """The run's slides: as they were divided when it started, or from the configuration."""
        return from_json(self.split) if resume and self.split.exists() else entries(self.config)

    def conditions(self, resume: bool) -> Conditions | None:
        """What the run decided when it started; None if it starts now."""
        return Conditions.read(self.run) if resume and self.run.exists() else None

    def changes(self, before: Mapping[str, Any]) -> Iterator[str]:
        """Settings that shape the result and are not as they were."""
        old, new = dict(_flat(before)), dict(_flat(self.config.as_dict()))
        for key in sorted(old.keys() | new.keys()):
            if key not in FREE and old.get(key) != new.get(key):
                yield f"{key} = {new.get(key)}, which was {old.get(key)}"

    def write(self, found: Sequence[Entry], conditions: Conditions) -> None:
        """Make the folder and write down how the run starts; what a killed write left behind goes.

        Raises:
            WholegradError: it cannot be written to.
        """
        for path, text in ((self.split, to_json(found)), (self.run, conditions.to_json())):
            if not path.exists() or not self.checkpoint.exists():
                write_whole(path, text.encode())
        sweep(self.path)

    def open_log(self, keep: int) -> Log:
        """The log, cut to the first ``keep`` bytes."""
        self._log = Log(self.lines, keep)
        return self._log

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

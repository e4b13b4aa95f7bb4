"""Slides that do to their worker what their name says. Workers get this by value, and so need not import wholegrad."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Trouble:
    """A job that notes which slides it was done to."""

    out: str

    def about(self) -> dict[str, Any]:
        return {"job": "trouble"}

    def files(self, name: str) -> list[Path]:
        return [Path(self.out) / f"{name}.txt"]

    def leave(self) -> None:
        """Die once that is wished."""
        while not (Path(self.out) / "leave").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def run(self, path: str, name: str) -> dict[str, Any]:
        with (Path(self.out) / "tries").open("a") as tries:
            tries.write(f"{name}\n")
        began = Path(self.out) / f"{name}.began"
        first = not began.exists()
        began.touch()
        if name == "killer" or (name == "killed" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "unlucky" and first:
            raise TimeoutError("the network\nwas away")
        while name.startswith("slow") and not (Path(self.out) / "go").exists():
            time.sleep(0.05)
        if name == "leaver" and first:  # its worker dies when it has said that it is done
            threading.Thread(target=self.leave, daemon=True).start()
        time.sleep(0.05)
        self.files(name)[0].write_text(name)
        return {"shape": [1, 1]}


def attempt(job: Trouble, path: str, name: str, threads: int | None) -> SimpleNamespace:
    """As ``wholegrad.fleet.jobs.attempt``, for what may be raised here."""
    ended = SimpleNamespace(figures=None, cause=None, final=name == "corrupt", seconds=0.0, died=False)
    try:
        ended.figures = None if ended.final else job.run(path, name)
        ended.cause = f"{path}: is truncated; copy it again"
    except TimeoutError as error:
        ended.cause = f"{path}: {error}"
    return ended

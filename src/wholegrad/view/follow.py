"""Keeps a scene up to what a run does: its log, where it is, and the latest prediction of the slide that is shown.

Nothing runs by itself: every look is an answer to the page, which asks every second or two.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from wholegrad.errors import WholegradError
from wholegrad.run.process import resident
from wholegrad.train.live import ENDED
from wholegrad.view.run import RunFolder
from wholegrad.view.scene import Scene

SILENT = 90.0  # seconds without a word after which a run is taken to be gone


class Follower:
    """What the page is told again and again. Thread-safe.

    Args:
        scene: shows a slide of the run.
        run: its folder.
        renewing: whether the scene takes up new predictions, or keeps one that the user named.
    """

    def __init__(self, scene: Scene, run: RunFolder, renewing: bool = True) -> None:
        self.scene, self.run, self.renewing = scene, run, renewing
        self.entry = run.entry(scene.files.slide)
        self._shown: tuple[Path, int] | None = None  # path and time of change of what the scene shows
        self._step: int | None = None
        self._lock = threading.Lock()
        self.told_end = False  # whether the page was told that the run is over
        self._take()

    def going(self) -> bool:
        """Whether the run says that it goes on, and said so lately."""
        status = self.run.status()
        return status is not None and status["state"] not in ENDED and time.time() - status["now"] < SILENT

    def look(self, start: int) -> dict[str, Any]:
        """The log from byte ``start`` on, the run's status, and which prediction is shown."""
        self._take()
        status = self.run.status()
        if status is not None:
            status["silent"] = status["state"] not in ENDED and time.time() - status["now"] >= SILENT
            self.told_end = status["state"] in ENDED
        shown = None if self._shown is None else {"version": self.scene.version, "step": self._step}
        found = self.run.log(start)
        return {**found, "status": status, "prediction": shown, "viewer": resident(), **self.run.limits()}

    def _take(self) -> None:
        """Show the newest prediction of the slide, if there is a new one."""
        if not self.renewing or self.entry is None:
            return
        with self._lock:
            newest = self.run.newest(self.entry)
            if newest is None or newest[1:] == self._shown:
                return
            step, path, changed = newest
            if path == self.scene.files.prediction and self._shown is None:
                self._shown, self._step = (path, changed), step  # it was opened with the scene
                return
            self._shown = (path, changed)  # also if it fails: it is not tried again and again
            try:
                self.scene.renew(path)
                self._step = step
            except (WholegradError, OSError) as error:
                if path.exists():  # else a newer one has taken its place already
                    self.scene.note(str(error))

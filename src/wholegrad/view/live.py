"""The page of a run in the process that the run starts for it: small caches, low priority, and an end with the run.

Until the run has divided its slides there is nothing to show, and a page says so and asks again. Memory beyond the
interpreter and its libraries is bounded: ``KEEP`` twice, ``LEVEL_CACHE`` for each level of the slide that is in use,
and label maps up to 64 MiB each, at most three of them (truth, the latest prediction, and the one before).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from html import escape
from importlib.resources import files
from pathlib import Path

from wholegrad.errors import WholegradError
from wholegrad.view.app import Answer, App
from wholegrad.view.run import RunFolder, completed
from wholegrad.view.scene import Files, Scene
from wholegrad.view.server import Server

KEEP = 32 << 20  # bytes of tiles as they are sent, and as many of tiles made of others
LEVEL_CACHE = 16 << 20  # bytes of decoded tiles for each level of the slide
LINGERS = 4.0  # seconds that a page that was just looked at has to fetch how the run ended
LOOK, SELDOM = 0.5, 30.0  # seconds between looks for the run's folder; at most, once its slide could not be opened
NICER = 10


class Opening:
    """Stands in for the page of a run that has not divided its slides yet, or whose slide cannot be shown."""

    def __init__(self) -> None:
        self.said = "The run is opening its slides …"
        self._page = (files("wholegrad.view") / "assets" / "waiting.html").read_text(encoding="utf-8")

    def answer(self, path: str, query: str) -> Answer | None:
        """The one page there is, at the address of the run's."""
        if path or query:
            return None
        return Answer(self._page.replace("SAID", escape(self.said)).encode(), "text/html; charset=utf-8")

    def note(self, problem: str) -> None:
        """Nothing is read here that could go wrong."""

    def close(self) -> None:
        """Nothing is open."""


def follow(path: Path, port: int) -> int:
    """Serve the page of the run in ``path`` until standard input closes; prints the address first.

    Raises:
        ConfigError: the port is taken.
    """
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then closes the pipe
    if hasattr(os, "nice"):
        os.nice(NICER)
    closed = threading.Event()
    threading.Thread(target=_await_end, args=(closed,), daemon=True).start()
    opening = Opening()
    with Server(opening, port) as server:
        print(server.url, flush=True)
        scene: Scene | None = None
        wait = LOOK
        while not closed.wait(wait):
            if server.app is opening and (path / "run.json").exists():
                try:
                    scene = _open(path, server)
                    wait = LOOK
                except WholegradError as error:  # the run goes on without its page
                    opening.said = f"The slide cannot be shown: {error}"
                    wait = min(2 * wait, SELDOM)
        while time.monotonic() - server.asked < LINGERS and not _fetched_end(server):
            time.sleep(0.1)
    server.app.close()
    if scene is not None:
        scene.close()
    return 0


def _open(path: Path, server: Server) -> Scene:
    run = RunFolder(path)
    scene = Scene(completed(Files(run.first().slide), run), KEEP, LEVEL_CACHE, threads=1)
    server.app = App(scene, run, renewing=True)
    return scene


def _fetched_end(server: Server) -> bool:
    """Whether the page knows that the run is over."""
    follower = getattr(server.app, "follower", None)
    return follower is None or bool(follower.told_end)


def _await_end(closed: threading.Event) -> None:
    """Until the other end of standard input is closed, or its process is gone."""
    with suppress(OSError, ValueError):
        while os.read(sys.stdin.fileno(), 1):  # not through a buffer, whose lock would outlive the interpreter's end
            pass
    closed.set()

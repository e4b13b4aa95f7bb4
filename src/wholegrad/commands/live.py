"""The page of a run that goes on: ``wholegrad view --run`` in a process of its own, which ends with the run.

That process reads the run's folder and nothing else, at a lower priority. It ends when the pipe that it reads from
closes, which the system sees to however the run ends.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from wholegrad.errors import ConfigError, WholegradError
from wholegrad.train.live import Live

LOADS = 120.0  # seconds that it may take until it listens
ENDS = 15.0  # that it may take to end


class LivePage:
    """A run's page, from before the run to its end.

    Args:
        out: the run's folder, which need not be there yet.
        port: 0 for any that is free.
        slide: the validation slide that is predicted; None for the first.
        tell: told the address and what goes wrong.

    Raises:
        ConfigError: it cannot be started, such as on a port that is taken.
    """

    def __init__(self, out: Path, port: int, slide: str | None, tell: Callable[[str], None]) -> None:
        self.live = Live(out, slide, tell)
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed with the pipes
        words = ["view", "--run", str(out.absolute()), "--no-browser", "--port", str(port), "--until-closed"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "wholegrad", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = _line(self._process.stdout, LOADS)
        if not self.url:
            self._process.kill()
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            self._close_pipes()
            cause = said[-1].removeprefix("wholegrad: error: ") if said else "did not start"
            raise ConfigError("--live", cause, "or train without it, and look on with wholegrad view --run")
        tell(f"live page: {self.url}")

    def close(self) -> None:
        """Ask the page's process to end, and wait until it has."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(ENDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_pipes()

    def wait(self) -> None:
        """Until Ctrl-C, or the page's process ends."""
        try:
            while self._process.poll() is None:
                threading.Event().wait(0.5)
        except KeyboardInterrupt:
            pass

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> LivePage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.live.end("interrupted")
        elif error is not None:
            said = str(error) if isinstance(error, WholegradError) else f"{type(error).__name__}: {error}"
            self.live.end("failed", " ".join(said.split()))
        self.close()


def _line(pipe: IO[str], seconds: float) -> str:
    """The next line, without its end; empty if there is none in time."""
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.readline()), daemon=True)
    reader.start()
    reader.join(seconds)
    return found[0].strip() if found else ""

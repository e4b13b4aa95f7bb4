"""A process under a limit of memory and time: watched from outside, and ended where it passes one.

A limit on address space would not do: PyTorch reserves far more than it touches. What counts is what is resident.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

EVERY = 0.02  # seconds between two looks
LAST_WORDS = 20  # lines of standard error that are kept


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit status; negative if a signal ended it.
        lines: what it printed.
        errors: the end of what it wrote to standard error.
        highest: the most resident bytes that were seen.
        over: ``"memory"`` or ``"time"`` if it was ended for that, else ``""``.
        others: cores that were busy with other work meanwhile, on average.
    """

    code: int
    lines: list[str]
    errors: list[str]
    highest: int
    over: str
    others: float


def run_limited(command: Sequence[str], limit: int, seconds: float) -> Ended:
    """Run a command until it ends, or holds more than ``limit`` bytes, or takes more than ``seconds``.

    Ctrl-C ends the process too.
    """
    busy, started = _busy(), time.monotonic()
    lines: list[str] = []
    errors: list[str] = []
    with subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        readers = [
            threading.Thread(target=_collect, args=(stream, kept), daemon=True)
            for stream, kept in ((process.stdout, lines), (process.stderr, errors))
        ]
        for reader in readers:
            reader.start()
        try:
            highest, over, used = _watched(process, limit, started + seconds)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            for reader in readers:
                reader.join(timeout=5)
    wall = max(time.monotonic() - started, 1e-3)
    return Ended(code, lines, errors[-LAST_WORDS:], highest, over, max(0.0, (_busy() - busy - used) / wall))


def _watched(process: subprocess.Popen[str], limit: int, until: float) -> tuple[int, str, float]:
    """The most resident bytes seen, what the process was ended for, and the seconds that it computed."""
    highest, used = 0, 0.0
    try:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            highest = max(highest, int(watched.memory_info().rss))
            used = float(sum(watched.cpu_times()[:2]))
            if highest > limit or time.monotonic() > until:
                process.kill()
                return highest, "memory" if highest > limit else "time", used
            time.sleep(EVERY)
    except psutil.Error:  # it has just ended
        pass
    return highest, "", used


def _collect(stream: object, kept: list[str]) -> None:
    for line in stream or ():  # type: ignore[attr-defined]
        kept.append(line.rstrip("\n"))
        if len(kept) > 1000:
            del kept[:-100]


def _busy() -> float:
    """Seconds that all cores worked since the machine started, for whomever."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0))


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this environment."""
    return [sys.executable, "-m", module, *arguments]

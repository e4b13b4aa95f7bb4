"""Ctrl-C at a moment that harms nothing: the signal is noted, and raised only where the run asks about it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While entered, the first SIGINT waits for the next ``check()``; a second one interrupts at once.

    Parameters change only inside an optimiser's step, where nobody asks: after an interrupt they are those of
    the last complete step. Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        terminate: whether SIGTERM counts too, with which torchrun and SLURM end a run.
    """

    def __init__(self, terminate: bool = False) -> None:
        self.asked = False
        self._signals = (signal.SIGINT, signal.SIGTERM) if terminate else (signal.SIGINT,)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, before in self._before.items():
            if callable(before) or isinstance(before, int):
                signal.signal(each, before)

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if Ctrl-C was pressed."""
        if self.asked:
            raise KeyboardInterrupt

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

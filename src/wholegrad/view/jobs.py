"""Work that takes longer than a request: done once on a thread of its own, looked at while it goes on."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from wholegrad.errors import WholegradError

Found = Mapping[str, Any]
Publish = Callable[[Found], None]
Work = Callable[[Publish], None]


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Nobody waits for the work any more."""


class Jobs:
    """Results of work by key, the last ``most`` kept; one piece of work at a time.

    Work gets a function to publish with: what it has found so far, added to what was found before. That function
    raises :class:`Stopped` once :meth:`close` was called, and once nobody has asked after the work for ``patience``
    seconds while other work waits: a slider that is drawn across its range asks for much that nobody wants to see.
    """

    def __init__(self, most: int = 8, patience: float = 5.0) -> None:
        self._most, self._patience = most, patience
        self._states, self._asked = OrderedDict[Hashable, dict[str, Any]](), dict[Hashable, float]()
        self._lock, self._turn, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self._threads: list[threading.Thread] = []

    def state(self, key: Hashable, work: Work) -> dict[str, Any]:
        """What is known: ``state`` ("running", "done", "failed"), ``problem`` if failed, and what was published."""
        with self._lock:
            self._asked[key] = time.monotonic()
            if key not in self._states:
                state = self._states[key] = {"state": "running"}
                thread = threading.Thread(target=self._run, args=(key, state, work), daemon=True)
                self._threads = [each for each in self._threads if each.is_alive()] + [thread]
                thread.start()
                while len(self._states) > self._most:
                    self._asked.pop(self._states.popitem(last=False)[0])
            return dict(self._states[key])

    def _unwanted(self, key: Hashable, state: dict[str, Any]) -> bool:
        """Whether work is to give way to other work; the lock is held."""
        if self._states.get(key) is not state:
            return True
        others = sum(each["state"] == "running" for each in self._states.values()) > 1
        return others and time.monotonic() - self._asked[key] > self._patience

    def _run(self, key: Hashable, state: dict[str, Any], work: Work) -> None:
        def publish(found: Found) -> None:
            with self._lock:
                if self._stop.is_set() or self._unwanted(key, state):
                    raise Stopped
                state.update(found)

        try:
            with self._turn:
                publish({})
                work(publish)
            publish({"state": "done"})
        except Stopped:
            with self._lock:
                if self._states.get(key) is state:  # whoever asks again starts it anew
                    del self._states[key], self._asked[key]
        except Exception as error:  # whatever it is, the page says so and does not wait for ever
            said = str(error) if isinstance(error, WholegradError) else f"{type(error).__name__}: {error}"
            with self._lock:
                state.update(state="failed", problem=" ".join(said.split()))

    def close(self, seconds: float = 5.0) -> None:
        """Ask all work to end and wait for it, ``seconds`` at most."""
        self._stop.set()
        end = time.monotonic() + seconds
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

"""Hands the slides of a fleet to workers, tries again what had bad luck, and notes in the manifest how each ended.

Dask's distributed scheduler runs the workers: processes of this machine, or of whatever machines its scheduler has. It
is a few megabytes of Python and starts under SLURM, LSF and Kubernetes by its own tools; Ray's wheel is 76 MiB, one for
each version of Python. Nothing here but the way of a slide to a worker depends on it: claims, retries and what is done
are the manifest's, so that any number of schedulers may share a folder.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from wholegrad.errors import ConfigError, WholegradError
from wholegrad.fleet.jobs import Attempt, Job, Outcome, attempt
from wholegrad.fleet.manifest import DONE, FAILED, WAITING, Manifest, Slide

POLL = 2.0  # seconds between words to the manifest
FETCH = 2.0  # seconds for an outcome to come from its worker, after which others have their turn
LOST_AT_MOST = 180.0  # seconds without a single worker after which a fleet gives up
NO_INTERRUPT = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # Ctrl-C is the scheduler's business


@dataclass
class Told:
    """What a fleet tells whoever looks on; every one may be replaced."""

    on_start: Callable[[int, int], None] = lambda left, total: None
    on_done: Callable[[Slide, Outcome], None] = lambda slide, outcome: None
    on_failed: Callable[[Slide, str, bool], None] = lambda slide, cause, again: None
    on_note: Callable[[str], None] = lambda text: None


@dataclass
class Fleet:
    """Slides on their way.

    Args:
        client: of Dask.
        manifest: where they are noted.
        job: what is done to each.
        threads: of PyTorch in each worker; None for as many as it takes.
        retries: how often a slide is tried again that met with what wholegrad does not know, and how often one whose
            worker died: the two are counted apart, since another slide may have killed it.
        wanted: workers that this machine is to have, if they are the client's own.
    """

    client: Any
    manifest: Manifest
    job: Job
    threads: int | None = None
    retries: int = 2
    wanted: int = 0
    told: Told = field(default_factory=Told)
    attempt: Attempt = attempt

    def run(self, names: Sequence[str]) -> dict[str, int]:
        """Work until none of these slides waits or is with anyone; returns how many are in each state.

        Raises:
            WholegradError: workers or scheduler are gone.
        """
        running: dict[Any, Slide] = {}
        counts = self.manifest.counts(names)
        self.told.on_start(len(names) - counts[DONE] - counts[FAILED], len(names))
        waiting_for_others, idle = False, time.monotonic()
        try:
            while True:
                workers, free = self._workers()
                idle = time.monotonic() if workers else idle
                if workers < self.wanted:
                    self.client.cluster.scale(self.wanted)  # for one that died too early for Dask to start it again
                if time.monotonic() - idle > LOST_AT_MOST:
                    raise WholegradError("workers", f"none for {LOST_AT_MOST:.0f} s", "start some, and run this again")
                for slide in self.manifest.claim(names, min(free, max(0, workers - len(running)))):
                    words = self.job, slide.path, slide.name, self.threads
                    with _of_client(self.client):
                        running[self.client.submit(self.attempt, *words, pure=False, retries=0)] = slide
                if running:
                    for future in self._ended(list(running)):
                        self.manifest.beat()
                        if self._note(running[future], future):
                            del running[future]
                    continue
                counts = self.manifest.counts(names)
                if counts[DONE] + counts[FAILED] == len(names):
                    return counts
                if not counts[WAITING] and not waiting_for_others:
                    waiting_for_others = True
                    self.told.on_note("the slides that are left are with another scheduler; waiting for them")
                time.sleep(POLL)
        finally:
            for future in running:
                with suppress(Exception):  # a scheduler that is gone
                    future.cancel()

    def _workers(self) -> tuple[int, int]:
        """Threads of workers, a slide each, and how many of them have nothing to do; others may use them too."""
        try:
            threads, busy = self.client.nthreads(), self.client.processing()
            free = (count - len(busy.get(worker, ())) for worker, count in threads.items())
            return sum(threads.values()), sum(max(0, each) for each in free)
        except (OSError, TimeoutError, RuntimeError, AttributeError) as error:  # the last of a client that is closed
            raise _gone(error) from error

    def _ended(self, futures: list[Any]) -> list[Any]:
        """Those of these that have ended, after a while if none has."""
        from dask.distributed import CancelledError, wait
        from dask.distributed import TimeoutError as DaskTimeoutError

        with suppress(DaskTimeoutError, TimeoutError, CancelledError), _of_client(self.client):
            wait(futures, timeout=POLL, return_when="FIRST_COMPLETED")  # type: ignore[no-untyped-call]
        self.manifest.beat()
        return [future for future in futures if future.status in ("finished", "error", "cancelled")]

    def _note(self, slide: Slide, future: Any) -> bool:
        """Note how a slide ended; False if it has not: what a worker held when it died, Dask does again."""
        outcome = self._outcome(slide, future)
        if outcome is None:
            return False
        future.release()
        if outcome.figures is not None:
            if self.manifest.finish(slide.name, outcome.figures, outcome.seconds):
                self.told.on_done(slide, outcome)
            return True
        before = slide.deaths if outcome.died else slide.attempts - slide.deaths
        again, cause = not outcome.final and before < self.retries, outcome.cause or "failed"
        if self.manifest.fail(slide.name, cause, again, outcome.died):
            self.told.on_failed(slide, cause, again)
        return True

    @staticmethod
    def _outcome(slide: Slide, future: Any) -> Outcome | None:
        """How it ended, also where its worker dies before that is fetched; None if it does not come."""
        from dask.distributed import CancelledError, KilledWorker
        from dask.distributed import TimeoutError as DaskTimeoutError

        try:
            outcome: Outcome = future.result(timeout=FETCH)
        except CancelledError as error:
            raise _gone(error) from error
        except Exception as error:  # also what the worker could not load
            if future.status != "error":  # it is not the slide's
                if isinstance(error, (DaskTimeoutError, TimeoutError)):
                    return None
                if isinstance(error, (OSError, RuntimeError, NameError, AttributeError)):
                    raise _gone(error) from error
            of_slide = future.exception() if future.status == "error" else error
            if isinstance(of_slide, KilledWorker):
                return Outcome(None, f"{slide.path}: its worker died (out of memory, or killed)", died=True)
            said = f"{slide.path}: {type(of_slide).__name__}: {of_slide}"
            return Outcome(None, " ".join(said.split())[:500])
        return outcome


@contextmanager
def _of_client(client: Any) -> Iterator[None]:
    """What a client raises that has given its scheduler up, in words."""
    try:
        yield
    except Exception as error:
        if client.status in ("closing", "closed"):
            raise _gone(error) from error
        raise


def _gone(why: object) -> WholegradError:
    return WholegradError("scheduler", f"is gone ({' '.join(str(why).split())[:160]})", "start it, and run this again")


def distributed() -> Any:
    """Dask's distributed scheduler.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import dask.distributed
    except ImportError as error:
        raise ConfigError("--workers", "needs the package distributed", "pip install wholegrad[fleet]") from error
    return dask.distributed


@contextmanager
def local_workers(count: int) -> Iterator[Any]:
    """A client of so many worker processes on this machine, one slide each; all end with the block."""
    module = distributed()
    import dask

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    settings = {"distributed.scheduler.allowed-failures": 0, "distributed.nanny.pre-spawn-environ": {}}
    with dask.config.set(settings):
        options: dict[str, Any] = {"n_workers": count, "threads_per_worker": 1, "processes": True, "memory_limit": 0}
        options |= {"dashboard_address": None, "host": "127.0.0.1", "silence_logs": logging.CRITICAL + 1}
        with module.LocalCluster(**options, preload=NO_INTERRUPT) as cluster, module.Client(cluster) as client:
            yield client


@contextmanager
def remote_workers(address: str) -> Iterator[Any]:
    """A client of the workers of a scheduler that runs.

    Raises:
        WholegradError: it does not answer.
    """
    module = distributed()
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        client = module.Client(address, timeout="20s")
    except (OSError, ValueError) as error:
        cause = f"does not answer ({' '.join(str(error).split())[:160]})"
        raise WholegradError(address, cause, "start it with: dask scheduler") from error
    with client:
        yield client


def share_of_machine(count: int) -> int:
    """Threads of PyTorch for each of so many workers on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // count)

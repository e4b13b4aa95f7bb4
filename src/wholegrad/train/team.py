"""The ranks of a run: who they are, how they meet, and what is said of one that does not come.

``torchrun`` starts the same program several times and tells each its rank. Ranks meet before whatever they do together,
through the store that torchrun keeps. While it works, a rank counts its tiles there, so that one that takes long is
waited for, and one that has stopped is named within the time-out, however long a slide takes. What crosses is in the
host's memory, where the weights and their gradients are, so Gloo carries it, with GPUs too.

A run that nobody launched in this way is one rank, alone, and nothing is sent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from wholegrad.errors import RankError, WholegradError
from wholegrad.train.round import PATIENCE, agree

Value = TypeVar("Value")
Result = TypeVar("Result")

LOOKS = 8  # at the others' counts within a time-out
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set where ranks are to find each other


class ElsewhereError(WholegradError):
    """Another rank failed and says why; ``quiet`` where this one has nothing to add."""

    quiet = True


@dataclass(frozen=True)
class Place:
    """Which of the ranks a process is.

    Attributes:
        rank, size: of all.
        local_rank, local_size: of those on this machine.
        launched: whether torchrun started it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False

    @staticmethod
    def found(environment: Mapping[str, str] | None = None) -> Place:
        """As the environment says; alone where it says nothing.

        Raises:
            WholegradError: it says what makes no sense.
        """
        told = os.environ if environment is None else environment
        if not all(told.get(name) for name in VARIABLES):
            return Place()
        try:
            rank, size = int(told["RANK"]), int(told["WORLD_SIZE"])
            local_rank, local_size = int(told.get("LOCAL_RANK", 0)), int(told.get("LOCAL_WORLD_SIZE", 1))
        except ValueError:
            names = ", ".join(VARIABLES[:2])
            raise WholegradError("environment", f"{names} are no numbers", "start ranks with torchrun") from None
        return Place(rank, size, local_rank, local_size, "TORCHELASTIC_RUN_ID" in told)


class Team:
    """All ranks of a run, as one of them sees it.

    Neighbouring ranks, ``tiles`` of them, share the tiles of one slide; ``slides`` such groups have a slide each.

    Args:
        place: this one; several ranks need :meth:`join` first.
        timeout: seconds in which a rank that others wait for must get on with something.
        tiles: ranks that share a slide.
    """

    def __init__(self, place: Place | None = None, timeout: float = 300.0, tiles: int = 1) -> None:
        self.place, self.timeout, self.tiles = place or Place(), timeout, tiles
        self.rank, self.size, self.local_size = self.place.rank, self.place.size, self.place.local_size
        self.slides, self.slide = self.size // tiles, self.rank // tiles
        self.shared: Any = None  # the process group of those that share this one's slide, if there are several
        self.across: Any = None  # that of those with another slide each; None for all ranks
        self.look: Callable[[], None] = lambda: None  # asked while waiting; what it raises ends the waiting
        self._common: Any = None  # torchrun's store, which outlives a round
        self._store: Any = None
        self._beats = self._meetings = 0
        self._beaten = 0.0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints, and writes to the run's folder."""
        return self.rank == 0

    def join(self) -> None:
        """Find the other ranks.

        Raises:
            WholegradError: they do not come within the time-out.
        """
        if self.alone and not self.place.launched:
            return
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        limit, began = timedelta(seconds=self.timeout), time.monotonic()
        try:
            store, rank, size = next(rendezvous("env://", timeout=limit))
            self._common = PrefixStore("wholegrad", store)
            if self.alone:
                return
            self._store = PrefixStore(agree(self._common, rank, size, self.timeout), self._common)
            self._tell()
            ranks = PrefixStore("ranks", self._store)
            dist.init_process_group("gloo", store=ranks, rank=rank, world_size=size, timeout=limit)
            self._divide(limit)
        except (RuntimeError, ValueError) as error:
            missed = "torchrun's store" if self.alone else f"the other {self.size - 1}"
            cause = f"did not find {missed} in {time.monotonic() - began:.0f} s ({_said(error)})"
            raise WholegradError(f"rank {self.rank}", cause, "start all of them, with torchrun") from error

    def claim(self, what: str) -> None:
        """Note that this start of torchrun's has begun ``what``, for ranks that it starts again."""
        if self._common is not None:
            with self._talking("the start"):
                self._common.set(f"begun/{what}", "")

    def claimed(self, what: str) -> bool:
        """Whether ranks that torchrun started before these had begun ``what``, in the store that it keeps meanwhile."""
        if self._common is None:
            return False
        with self._talking("the start"):
            return bool(self._common.check([f"begun/{what}"]))

    def _divide(self, limit: timedelta) -> None:
        """Make the groups of both axes; every rank makes all of them, in the same order."""
        import torch.distributed as dist

        if self.tiles == 1:
            return
        everyone = range(self.tiles * self.slides)
        for slide in range(self.slides):
            made = dist.new_group([rank for rank in everyone if rank // self.tiles == slide], timeout=limit)
            self.shared = made if slide == self.slide else self.shared
        for tile in range(self.tiles):
            made = dist.new_group([rank for rank in everyone if rank % self.tiles == tile], timeout=limit)
            self.across = made if tile == self.rank % self.tiles else self.across

    def close(self) -> None:
        """Leave the others."""
        self._common = None
        if self._store is not None:
            import torch.distributed as dist

            self._store = None
            if dist.is_initialized():
                dist.destroy_process_group()

    # Meeting.

    def beat(self) -> None:
        """Note that this rank gets on with its work; cheap enough for every tile."""
        now = time.monotonic()
        if self._store is not None and now - self._beaten > min(1.0, self.timeout / (2 * LOOKS)):
            self._beaten = now
            self._beats += 1
            with self._talking("its own slide"):
                self._tell()

    def _tell(self) -> None:
        self._store.set(f"beat/{self.rank}", f"{self._beats} {self._meetings}")

    def meet(self, what: str) -> None:
        """Wait until all ranks are here; ``what`` for, in an error.

        Raises:
            WholegradError: a rank did nothing for the whole time-out.
        """
        if self.alone:
            return
        self._meetings += 1
        number = self._meetings
        with self._talking(what):
            self._tell()
            if self._store.add(f"met/{number}", 1) == self.size:  # the last to come
                self._store.set(f"go/{number}", "")
                if number > 1:  # everyone has left the one before
                    for key in (f"met/{number - 1}", f"go/{number - 1}"):
                        self._store.delete_key(key)
                return
        self._wait(number, what)

    def _wait(self, number: int, what: str) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        looked, pause = time.monotonic(), PATIENCE[0]
        while True:
            with self._talking(what):
                if self._store.check([f"go/{number}"]):
                    return
            self.look()
            if time.monotonic() - looked > self.timeout / LOOKS:
                looked = time.monotonic()
                self._find_stopped(number, what, seen)
            time.sleep(pause)
            pause = min(2 * pause, PATIENCE[1])

    def _find_stopped(self, number: int, what: str, seen: dict[int, tuple[bytes, float]]) -> None:
        """Refuse to wait for a rank whose count stands still."""
        with self._talking(what):
            beats = self._store.multi_get([f"beat/{rank}" for rank in range(self.size)])
        now = time.monotonic()
        for rank, beat in enumerate(beats):
            if int(beat.split()[1]) >= number:
                continue
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = beat, now
            elif now - seen[rank][1] > self.timeout * (1 - 2 / LOOKS):  # it was seen late, and is looked at late
                cause = f"has done nothing for {now - seen[rank][1]:.0f} s while others wait for it at {what}"
                remedy = "look at its machine and its output, or raise mesh.timeout if a single tile takes longer"
                raise WholegradError(f"rank {rank}", cause, remedy)

    @contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        """What PyTorch raises where another rank is gone, in words; Ctrl-C comes first, since it reaches all ranks."""
        try:
            yield
        except RuntimeError as error:
            self.look()
            cause = f"lost the others at {what} ({_said(error)})"
            remedy = "look at what they said, and go on with --resume"
            raise WholegradError(f"rank {self.rank}", cause, remedy) from error

    @contextmanager
    def said_once(self) -> Iterator[None]:
        """What all ranks raise alike is said by rank 0; of ranks that are lost, each says what it knows."""
        try:
            yield
        except RankError:
            raise
        except WholegradError as error:
            if self.first:
                raise
            raise ElsewhereError(error.where, error.cause, error.remedy) from error

    # Doing things together. All ranks must call these in the same order.

    def call(self, what: str, function: Callable[[], Result]) -> Result:
        """Meet, then run a collective call of PyTorch's."""
        self.meet(what)
        with self._talking(what):
            return function()

    def gather(self, value: Value, what: str) -> list[Value]:
        """Each rank's value, in order of rank."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        self.call(what, lambda: dist.all_gather_object(found, value))
        return found

    def share(self, value: Value, what: str) -> Value:
        """Rank 0's value."""
        if self.alone:
            return value
        import torch.distributed as dist

        held: list[Any] = [value if self.first else None]
        self.call(what, lambda: dist.broadcast_object_list(held, src=0))
        shared: Value = held[0]
        return shared

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block that succeeds on every rank or fails on every rank; one that fails says which it was.

        Raises:
            WholegradError: what the block raised here, or on another rank.
        """
        if self.alone:
            yield
            return
        failed: WholegradError | None = None
        try:
            yield
        except WholegradError as error:
            failed = error
        self.agree(failed, what)

    def agree(self, failed: WholegradError | None, what: str) -> None:
        """Raise on every rank if one has failed.

        Raises:
            WholegradError: this rank's own, or the first one's of another rank.
        """
        if self.alone:
            if failed is not None:
                raise failed
            return
        self.settle(self.gather(failed, what), failed)

    def settle(self, failures: list[WholegradError | None], failed: WholegradError | None) -> None:
        """:meth:`agree`, where each rank's failure is known already."""
        if failed is not None:
            raise failed
        for rank, error in enumerate(failures):
            if error is not None:
                where = f"rank {rank}: {error.where}"
                kind = WholegradError if self.first else ElsewhereError
                raise kind(where, error.cause, error.remedy)


def _said(error: BaseException) -> str:
    """The first line of a message, without the place in PyTorch's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.partition("] ")[2][:160] or text[:160] if text.startswith("[") else text[:160]

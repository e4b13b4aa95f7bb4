"""Messages between the ranks of a process group: point to point, each with a time-out, never a hang.

Ranks go through a step in the same *phases*. At each they first tell each other how they fared (:meth:`Wire.meet`), so
that an error on one rank is raised on all at once; only then do they exchange maps and sums. A rank that is killed
closes its connections, one that is frozen or cut off answers nobody: those who wait for it give up after the time-out
and say for whom they waited. A wire that failed once is not used again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from wholegrad import clock, errors
from wholegrad.errors import RankError, WholegradError
from wholegrad.plan.traffic import DIRECT
from wholegrad.run.distributed.blame import culprit

SMALL = 1 << 16  # bytes up to which more ranks than that double what they know in each round
FINE, FAILED = 0, 1
SILENT = 0.9  # of the time-out: who answered nothing for so long did not close the connection
REMEDY = "look at that rank's own output; start all ranks again from the last checkpoint"


@dataclass
class Traffic:
    """What a rank sent and received, in bytes and messages, and the seconds that it waited for others."""

    sent: int = 0
    received: int = 0
    messages: int = 0
    seconds: float = 0.0


class Wire:
    """This process's connections to the other ranks of a group.

    Args:
        group: its backend moves the bytes: Gloo through host memory, NCCL between devices.
        timeout: seconds that a rank waits for another before it gives up.

    Attributes:
        rank, size: of this process in the group, and how many there are.
        at_rest: whether what ends a step ends it where no message is under way.
        traffic: so far.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._global = dist.get_process_group_ranks(group)
        self.traffic = Traffic()
        self.phase = 0
        self._broken: str | None = None
        self._left: list[dist.P2POp] = []
        self.at_rest = False
        self._told = False  # whether the ranks know of this step's error
        backend = dist.get_backend(group)
        on_device = "nccl" in backend or "xccl" in backend
        self.device = (
            torch.device(torch.accelerator.current_accelerator() or "cpu") if on_device else torch.device("cpu")
        )

    # Messages.

    def swap(self, out: Sequence[tuple[int, torch.Tensor]], into: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Send tensors to ranks and receive others, all at once; between two ranks in the order in which they stand.

        Args:
            out: contiguous tensors on :attr:`device`.
            into: the same, to be written.

        Raises:
            RankError: a rank closed its connection, or did not answer in time.
        """
        if self._broken is not None:
            raise RankError("process group", f"broke before: {self._broken}", "make a new process group")
        out = [(peer, tensor) for peer, tensor in out if tensor.numel()]
        into = [(peer, tensor) for peer, tensor in into if tensor.numel()]
        if not out and not into:
            return
        started = time.monotonic()
        ops = [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in into]
        ops += [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in out]
        peers = [peer for peer, _ in (*into, *out)]
        with clock.span("waiting", "for other ranks") as span:
            self._post(ops, peers, started)
            span.moved(*(tensor for _, tensor in (*into, *out)))
        self.traffic.sent += sum(tensor.nbytes for _, tensor in out)
        self.traffic.received += sum(tensor.nbytes for _, tensor in into)
        self.traffic.messages += len(out)
        self.traffic.seconds += time.monotonic() - started

    def _post(self, ops: list[dist.P2POp], peers: list[int], started: float) -> None:
        peer = peers[0]
        try:
            works = dist.batch_isend_irecv(ops)
            for k, work in enumerate(works):
                peer = peers[k] if len(works) == len(peers) else -1
                left = self.timeout - (time.monotonic() - started)
                work.wait(timedelta(seconds=max(left, 0.001)))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        except (RuntimeError, ValueError) as error:
            self._left = ops  # what may still be written into
            raise self._lost(peer, time.monotonic() - started, error) from error
        except BaseException:
            self._left, self._broken = ops, "a message was interrupted"
            raise

    def _lost(self, peer: int, waited: float, error: Exception) -> RankError:
        """The error for a rank that does not answer, or for the one for which that waits itself."""
        guilty = culprit(self.group, self.rank, peer) if peer >= 0 else peer
        how = f"closed its connection ({_short(error)})"
        if waited >= SILENT * self.timeout:
            how = f"has not answered for {waited:.0f} s"
        if guilty == self.rank:
            how, guilty = f"{how}, having waited for {self.name(self.rank)} in vain", peer
        elif guilty != peer:
            how = f"keeps {self.name(peer)} waiting, which {how}"
        name = "a rank" if guilty < 0 else self.name(guilty)
        self._broken = f"{name} {how}"
        return RankError(name, f"{how}, as {self.name(self.rank)} found in phase {self.phase}", REMEDY)

    def name(self, rank: int) -> str:
        """A rank of this group as the user knows it: by its number among all processes."""
        return f"rank {self._global[rank]}"

    def gathered(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in order of ranks; all have the same shape and dtype."""
        mine = mine.to(self.device).contiguous()
        if self.size <= DIRECT:
            return [each.view(mine.shape) for each in self.gathered_of(mine, [mine.numel()] * self.size)]
        held = mine.new_empty((self.size, *mine.shape))  # held[k] is that of rank + k
        held[0], known = mine, 1
        while known < self.size:
            count = min(known, self.size - known)
            down, up = (self.rank - known) % self.size, (self.rank + known) % self.size
            self.swap([(down, held[:count])], [(up, held[known : known + count])])
            known += count
        return [held[(rank - self.rank) % self.size] for rank in range(self.size)]

    def gathered_of(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Every rank's tensor of one dtype, of so many elements each."""
        mine = mine.to(self.device).contiguous()
        found = [mine.flatten() if rank == self.rank else mine.new_empty(size) for rank, size in enumerate(sizes)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        if self.size <= DIRECT:
            self.swap([(rank, found[self.rank]) for rank in others], [(rank, found[rank]) for rank in others])
            return found
        most = max(sizes)
        if most * mine.dtype.itemsize <= SMALL:
            padded = mine.new_zeros(most)
            padded[: mine.numel()] = mine.flatten()
            return [each[:size] for each, size in zip(self.gathered(padded), sizes, strict=True)]
        for step in range(self.size - 1):  # a ring: each passes on what it was given last
            given, taken = (self.rank - step) % self.size, (self.rank - step - 1) % self.size
            following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
            self.swap([(following, found[given])], [(before, found[taken])])
        return found

    # Phases.

    def meet(self, payload: torch.Tensor | None = None, failed: bool = False) -> list[torch.Tensor]:
        """What every rank brings to this phase, as bytes; an error of one is raised on all.

        Args:
            payload: of type uint8, of any length.
            failed: whether it is an error's text (:func:`told`).

        Raises:
            RankError: a rank is in another phase, or does not answer.
            WholegradError: what a rank failed with.
        """
        payload = torch.empty(0, dtype=torch.uint8) if payload is None else payload
        self.phase += 1
        head = torch.tensor([self.phase, FAILED if failed else FINE, payload.numel()], dtype=torch.int64)
        heads = [each.tolist() for each in self.gathered(head)]
        bad = [rank for rank, (_, status, _) in enumerate(heads) if status == FAILED]
        if bad:
            heads = [[phase, status, size if status == FAILED else 0] for phase, status, size in heads]
            payload = payload if failed else payload[:0]
        found = self.gathered_of(payload, [size for *_, size in heads])
        self._told = bool(bad)
        if bad:
            raise _told(bytes(found[bad[0]].cpu().tolist()), self.name(bad[0]))
        astray = [(rank, phase) for rank, (phase, *_) in enumerate(heads) if phase != heads[0][0]]
        if astray:
            rank, phase = astray[0]
            how = f"is in phase {phase} and {self.name(0)} in {heads[0][0]}"
            self._broken = f"{self.name(rank)} {how}"
            raise RankError(self.name(rank), how, REMEDY)
        return found

    @contextmanager
    def step(self) -> Iterator[None]:
        """Open while ranks take a step: an error of one is raised on all, where they meet next.

        So is Ctrl-C between two tiles; anywhere else it may have cut a message off, and the wire is not used again.
        """
        self._told = self.at_rest = False
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and not self.at_rest:
                self._broken = self._broken or "a step was interrupted"
            if self._broken is None and not self._told:
                with suppress(WholegradError):  # whatever the others say does not matter any more
                    self.meet(torch.frombuffer(bytearray(_telling(error)), dtype=torch.uint8), failed=True)
            raise


def _short(error: Exception) -> str:
    """What a backend says, without the place in its source and its advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(r"^\[[^\]]*\]\s*", "", lines[-1])
    return text.split(". ")[0][:120].rstrip(".")


def _telling(error: BaseException) -> bytes:
    """An error as others are told of it."""
    if not isinstance(error, Exception):
        parts = ["RankError", "step", "was interrupted", REMEDY]
    elif isinstance(error, WholegradError):
        parts = [type(error).__name__, error.where, error.cause, error.remedy]
    else:
        parts = ["", type(error).__name__, " ".join(str(error).split()) or "no message", REMEDY]
    return "\0".join(parts).encode()


def _told(text: bytes, rank: str) -> WholegradError:
    """The error of another rank: of the same kind, so that whoever handles it does so on every rank."""
    name, where, cause, remedy = text.decode().split("\0")
    kind = getattr(errors, name, None) if name else None
    if isinstance(kind, type) and issubclass(kind, WholegradError):
        return kind(where, f"{cause} (on {rank})", remedy)
    return RankError(rank, f"failed with {where}: {cause}", remedy)

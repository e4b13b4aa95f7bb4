"""The slides of one update over several ranks: each takes its own, and all end with the same weights.

In each round every rank takes one slide, in order of rank, and its gradient goes into a sum in the order of slides
(``exchange``). Nothing of the run moves until all slides are in: whatever ends an update early, the state is that
after the update before. What the slides of an update are does not depend on the number of ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from wholegrad.errors import ConfigError, NumericsError, WholegradError
from wholegrad.train import statistics
from wholegrad.train.events import Event, Replan, Skip, Step
from wholegrad.train.exchange import OrderedSum
from wholegrad.train.optim import Mover
from wholegrad.train.tables import Config
from wholegrad.train.team import Team

Taken = Step | Skip


@dataclass
class Record:
    """What a rank tells the others after its slide of a round.

    Attributes:
        taken: its step; None where there was no slide left for it.
        present: which parameters have a gradient; None where there is none to add.
        changed: buffers that its slide left otherwise.
        notes: what else happened there.
        failed: why it cannot go on.
    """

    taken: Taken | None = None
    present: list[bool] | None = None
    changed: statistics.Buffers = field(default_factory=dict)
    notes: list[Replan] = field(default_factory=list)
    failed: WholegradError | None = None


@dataclass(frozen=True)
class Told:
    """An event, and the rank that it happened on."""

    rank: int
    event: Event

    def with_norm(self, norm: float | None) -> Told:
        """The same, with the norm of the gradient of the update that it ended, if it is a step."""
        event = dataclasses.replace(self.event, norm=norm) if isinstance(self.event, Step) else self.event
        return Told(self.rank, event)


def check_mesh(config: Config, team: Team) -> None:
    """Refuse a run on these ranks that would not be what was asked for.

    Raises:
        ConfigError: there are more ranks than slides to an update, or tiles are to be divided.
    """
    tiles = config.mesh.tiles
    if team.size % tiles:
        cause = f"is {tiles}, and there is no such number of groups in {team.size} rank(s)"
        raise ConfigError("mesh.tiles", cause, f"start a multiple of {tiles} ranks")
    if team.slides > config.train.accumulate:
        cause = f"is {config.train.accumulate}, and {team.slides} ranks share the slides of an update"
        raise ConfigError("train.accumulate", cause, f"set it to {team.slides} or more, or start fewer ranks")


def digest(model: nn.Module, mover: Mover) -> str:
    """A number that all weights, buffers and the optimiser's state make; equal bits make equal ones."""
    made = hashlib.blake2b(digest_size=8)
    tensors = {**model.state_dict(), **mover.tensors()}
    for name in sorted(tensors):
        made.update(name.encode())
        values = tensors[name].detach().cpu().contiguous().reshape(-1)
        if values.numel():
            made.update(memoryview(values.view(torch.uint8).numpy()))
    return made.hexdigest()


def check_alike(config: Config, team: Team) -> None:
    """Refuse ranks that were not all asked for the same.

    Raises:
        ConfigError: a rank has another configuration than rank 0.
    """
    mine = config.as_dict()
    told = team.share(mine, "the configuration")
    with team.together("the configuration"):
        if told != mine:
            remedy = "start all with the same file and flags"
            raise ConfigError(f"rank {team.rank}", "has another configuration than rank 0", remedy)


class Batch:
    """Takes the slides of one update, or of a part of it, on all ranks.

    Args:
        take: the step of a number, on this rank; its gradient is left in the parameters.
    """

    def __init__(self, team: Team, model: nn.Module, mover: Mover, take: Callable[[int], Taken]) -> None:
        self.team, self.model, self.mover, self.take = team, model, mover, take
        self.notes: list[Replan] = []  # not told yet

    def run(self, first: int, last: int) -> list[Told]:
        """Steps ``first`` to ``last - 1``: their gradients wait in the mover, and buffers are as they leave them.

        Returns:
            What happened, in order of steps.

        Raises:
            WholegradError: a rank failed; nothing has changed.
        """
        mover, team = self.mover, self.team
        sums = OrderedSum(team, [p.detach() for p in mover.trained], mover.waiting)
        slides, told, added = mover.slides, list[Told](), list[statistics.Buffers]()
        for start in range(first, last, team.slides):
            mine = start + team.slide
            record, grads = self._one(mine if mine < last else None)
            records = team.gather(record, f"step {start}")
            team.settle([each.failed for each in records], record.failed)
            sums.add(grads, [each.present for each in records[:: team.tiles]])
            for rank, each in list(enumerate(records))[:: team.tiles]:
                told += [Told(rank, note) for note in each.notes]
                if each.taken is not None:
                    told.append(Told(rank, each.taken))
                if each.present is not None:
                    slides += 1
                    added.append(each.changed)
        whole = sums.whole()
        statistics.replay(self.model, added)
        mover.take(whole, slides)
        return told

    def _one(self, step: int | None) -> tuple[Record, list[torch.Tensor | None] | None]:
        """This rank's slide of a round; parameters and buffers are left as they were."""
        record = Record(notes=self.notes)
        self.notes = []
        if step is None:
            return record, None
        buffers = statistics.buffers_of(self.model)
        before = statistics.kept(buffers)
        grads: list[torch.Tensor | None] | None = None
        try:
            record.taken = self.take(step)
            if isinstance(record.taken, Step):
                grads = [p.grad for p in self.mover.trained]
                record.present = [grad is not None for grad in grads]
                record.changed = statistics.changed(before, buffers)
        except WholegradError as error:
            record.failed = error
        finally:
            statistics.put(buffers, before)
            self.mover.optimizer.zero_grad(set_to_none=True)
        record.notes += self.notes
        self.notes = []
        return record, grads

    def compare(self, step: int) -> None:
        """After an update: ranks that no longer agree would train different networks, none the one asked for.

        Raises:
            NumericsError: that is so.
        """
        digests = self.team.gather(digest(self.model, self.mover), f"the weights after step {step}")
        odd = [rank for rank, each in enumerate(digests) if each != digests[0]]
        if odd:
            cause = f"has other weights than rank 0 after step {step}"
            remedy = "use machines with the same processor and versions; go on from the checkpoint with --resume"
            raise NumericsError(f"rank {', '.join(map(str, odd))}", cause, remedy)

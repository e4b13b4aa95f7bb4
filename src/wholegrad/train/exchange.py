"""Gradients of the slides of one update, summed over slides in float64, in the order of the slides, whoever ran them.

Floating-point sums depend on their order. Here it is that of the slides, and not of the ranks: one rank that takes all
slides of an update in turn, and many that take one each, add up the same numbers in the same order, to the same bits.

Each rank adds up an equal share of all numbers. In each round it sends every other the part of its own slide's gradient
that is the other's to add (an all-to-all), and at the end all collect the shares (an all-gather). With ``P`` parameters
on ``N`` ranks a rank so sends ``4 P (N - 1) / N`` bytes a round and ``8 P (N - 1) / N`` an update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wholegrad.train.team import Team

Grads = list[torch.Tensor | None]
DOUBLE = 8  # bytes


def held_bytes(parameters: Sequence[torch.Tensor], alone: bool, slides: int) -> int:
    """Bytes that an update of several slides takes for gradients beside those of a step.

    One rank keeps a sum in float64 that waits for the other slides. Several, 20 bytes for each number of float32: what
    is sent and received in its own precision, a half of the sum (of more than two ranks it is less, but plans should
    not depend on how many there are), and one that waits from before a validation. The whole sum at the end finds room
    where the gradients of a step were.

    Args:
        alone: whether there is one rank.
        slides: of an update.
    """
    count = sum(each.numel() for each in parameters)
    if slides == 1 or not count:
        return 0
    return count * (DOUBLE if alone else 2 * _wide_enough(parameters).itemsize + DOUBLE // 2 + DOUBLE)


def _wide_enough(parameters: Sequence[torch.Tensor]) -> torch.dtype:
    """In which gradients travel: bfloat16 and float16 fit into float32."""
    return torch.float64 if any(each.dtype == torch.float64 for each in parameters) else torch.float32


class OrderedSum:
    """The sum of slides' gradients, a share of it on each rank.

    Args:
        team: the ranks.
        shapes: of the parameters' gradients: tensors like them.
        start: a sum to go on from, in float64, the same on every rank; None where there is none yet.
    """

    def __init__(self, team: Team, shapes: Sequence[torch.Tensor], start: Grads | None = None) -> None:
        self.team, self.shapes = team, list(shapes)
        self.total = sum(each.numel() for each in self.shapes)
        self.chunk = max(1, -(-self.total // team.slides))
        self.dtype = _wide_enough(self.shapes)
        self.had = [False] * len(self.shapes)
        self.share: torch.Tensor | None = None
        self._sent = torch.zeros(self.chunk * team.slides, dtype=self.dtype)  # both are used in every round, since the
        self._got = torch.empty_like(self._sent) if team.slides > 1 else self._sent  # first touch of memory is slow
        if start is not None:
            self.had = [each is not None for each in start]
            mine = slice(team.slide * self.chunk, (team.slide + 1) * self.chunk)
            flat = torch.zeros(self.chunk * team.slides, dtype=torch.float64)
            self.share = self._fill(flat, start)[mine].clone()

    def add(self, grads: Grads | None, present: Sequence[Sequence[bool] | None]) -> None:
        """Add the gradients of one slide each, in order.

        Args:
            grads: of this rank's slide, if it has one.
            present: for each slide, which parameters it has a gradient of; None where there was none left to take.
        """
        sent, got = self._fill(self._sent, grads or [None] * len(self.shapes)), self._got
        if self.team.slides > 1:
            import torch.distributed as dist

            group = self.team.across
            self.team.call("an exchange of gradients", lambda: dist.all_to_all_single(got, sent, group=group))
        for slide, has in enumerate(present):
            if has is None:
                continue
            self.had = [a or b for a, b in zip(self.had, has, strict=True)]
            part = got[slide * self.chunk : (slide + 1) * self.chunk]
            self.share = part.to(torch.float64, copy=True) if self.share is None else self.share.add_(part)

    def whole(self) -> Grads:
        """The sum, in float64, on every rank; None for a parameter that no slide has a gradient of."""
        share = torch.zeros(self.chunk, dtype=torch.float64) if self.share is None else self.share
        flat = torch.empty(self.chunk * self.team.slides, dtype=torch.float64)
        if self.team.slides == 1:
            flat.copy_(share)
        else:
            import torch.distributed as dist

            parts = list(torch.split(flat, self.chunk))
            self.team.call("a sum of gradients", lambda: dist.all_gather(parts, share, group=self.team.across))
        found: Grads = []
        at = 0
        for shape, had in zip(self.shapes, self.had, strict=True):
            found.append(flat[at : at + shape.numel()].reshape(shape.shape) if had else None)
            at += shape.numel()
        return found

    def _fill(self, flat: torch.Tensor, grads: Grads) -> torch.Tensor:
        """Gradients one after the other, zeros for those that are not there; what follows up to whole shares stays."""
        at = 0
        for shape, grad in zip(self.shapes, grads, strict=True):
            place = flat[at : at + shape.numel()]
            if grad is None:
                place.zero_()
            else:
                place.copy_(grad.reshape(-1))
            at += shape.numel()
        return flat

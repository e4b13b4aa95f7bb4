"""What reductions come to: partial results of tiles, merged in tile order in float64 (rule 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from wholegrad import clock
from wholegrad.errors import NumericsError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.rules import State
from wholegrad.graph.segment import reduction_rule
from wholegrad.plan.tiles import Tile


class BatchNorms(Protocol):
    """Brings statistics of several slides together, and their gradients (:mod:`wholegrad.run.distributed.norms`)."""

    def joined(self, reductions: Sequence[int], totals: Mapping[int, State]) -> dict[int, State]: ...
    def gathered(
        self, reductions: Sequence[int], grads: Mapping[int, tuple[torch.Tensor | None, ...]]
    ) -> dict[int, tuple[torch.Tensor | None, ...]]: ...


class Sums:
    """The reductions of one step.

    Args:
        later: whether sums are looked at only when a segment is done: on a device each look waits for all ops before.

    Attributes:
        totals: merged states by node index.
    """

    def __init__(self, graph: Graph, later: bool = False) -> None:
        self.graph, self.later = graph, later
        self.totals: dict[int, State] = {}
        self._unseen: list[tuple[int, Box, torch.Tensor]] = []  # sums that nobody looked at yet

    def merge(self, found: Mapping[int, State], tile: Tile) -> None:
        """Merge a tile's partial results into the totals.

        Raises:
            NumericsError: one is not finite.
        """
        for index, part in found.items():
            node, rule = self.graph.nodes[index], reduction_rule(self.graph, index)
            spec, box = self.graph.spec(node.operands[0]), tile.owned[node.operands[0]]
            if rule.sums:
                self._check(index, box, [value for value in part if value.is_floating_point()])
            with clock.span("merging", "sums"):
                self.totals[index] = rule.merge(node, spec, self.totals.get(index), part, box)

    def finish(self, reductions: Sequence[int]) -> dict[Ref, torch.Tensor]:
        """The outputs of these reductions, of which every tile is merged.

        Raises:
            NumericsError: a tile's sum was not finite.
        """
        self._look()
        found: dict[Ref, torch.Tensor] = {}
        for index in reductions:
            node = self.graph.nodes[index]
            outputs = reduction_rule(self.graph, index).finish(
                node, self.graph.spec(node.operands[0]), self.totals[index]
            )
            found.update(zip(node.refs, outputs, strict=True))
        return found

    def _check(self, index: int, box: Box, values: Sequence[torch.Tensor]) -> None:
        if self.later:
            self._unseen += [(index, box, value) for value in values]
        elif not all(torch.isfinite(value).all() for value in values):
            raise self._not_finite(index, box)

    def _look(self) -> None:
        """Look at what :meth:`_check` left for later, all at once."""
        unseen, self._unseen = self._unseen, []
        alike: dict[tuple[int, ...], list[int]] = {}
        for k, (*_, value) in enumerate(unseen):
            alike.setdefault((*value.shape, value.dtype.itemsize), []).append(k)
        bad = []
        for numbers in alike.values():
            values = torch.stack([unseen[k][2] for k in numbers]).flatten(1 if unseen[numbers[0]][2].dim() else 0)
            finite = torch.isfinite(values).to("cpu").reshape(len(numbers), -1).all(1)
            bad += [k for k, good in zip(numbers, finite.tolist(), strict=True) if not good]
        if bad:
            raise self._not_finite(*unseen[min(bad)][:2])

    def _not_finite(self, index: int, box: Box) -> NumericsError:
        return NumericsError(
            self.graph.nodes[index].place,
            f"is not finite on rows {box.y0} to {box.y1}, columns {box.x0} to {box.x1}",
            "lower the learning rate, or look for NaN in weights and pixels there",
        )

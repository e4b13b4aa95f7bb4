"""What reductions come to: partial results of tiles, merged in tile order in float64 (rule 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from wholegrad import clock
from wholegrad.errors import NumericsError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.rules import State
from wholegrad.graph.segment import reduction_rule
from wholegrad.plan.tiles import Tile


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
        self._unseen: list[tuple[int, Box, torch.Tensor]] = []

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
        flags = [torch.isfinite(value).all() for value in values]
        if self.later:
            self._unseen += [(index, box, flag) for flag in flags]
        elif not all(flags):
            raise self._not_finite(index, box)

    def _look(self) -> None:
        """Look at what :meth:`_check` left for later, all at once."""
        unseen, self._unseen = self._unseen, []
        if unseen:
            flags = torch.stack([flag for *_, flag in unseen]).to("cpu")
            for (index, box, _), good in zip(unseen, flags.tolist(), strict=True):
                if not good:
                    raise self._not_finite(index, box)

    def _not_finite(self, index: int, box: Box) -> NumericsError:
        return NumericsError(
            self.graph.nodes[index].place,
            f"is not finite on rows {box.y0} to {box.y1}, columns {box.x0} to {box.x1}",
            "lower the learning rate, or look for NaN in weights and pixels there",
        )

"""An output that ranks make together: brought to rank 0 by rows of tiles, in order, so that one process writes it.

The image is cut into bands of columns. All ranks so go down the same rows of tiles; after each they meet, and send what
they have of it to rank 0, which holds one such row, never more. An error of one is raised on all where they meet next.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Ref
from wholegrad.plan.halos import boxes_owned
from wholegrad.plan.plan import Plan
from wholegrad.run.distributed.wire import Wire
from wholegrad.run.sink import Sink


class Collected:
    """One output on its way to rank 0's sink.

    Args:
        number: of the segment that makes it.
        sink: on rank 0 its ``take`` gets each row of tiles, a box of every rank, from left to right.
    """

    def __init__(self, wire: Wire, plan: Plan, number: int, ref: Ref, sink: Sink) -> None:
        assert plan.bands is not None and plan.bands.shape[0] == 1
        self.wire, self.sink = wire, sink
        grid, spec = plan.grid(number), plan.graph.spec(ref)
        self.rows = [mine.get(ref) for mine in grid.rows.owned]
        boxes = boxes_owned(grid, ref, plan.bands)
        self.cols = [None if box is None else Interval(box.x0, box.x1) for box in boxes]
        self.sample = sink.made(torch.zeros((*spec.shape[:-2], 1, 1), dtype=spec.dtype))
        self._row: torch.Tensor | None = None  # this rank's part of the row of tiles that is being made

    def redirected(self) -> Sink:
        """The sink of this rank's tiles."""
        return replace(self.sink, take=self._take)

    def _take(self, box: Box, value: torch.Tensor) -> None:
        own = self.cols[self.wire.rank]
        assert own is not None
        if self._row is None:
            self._row = self._room(box.height, own)
        self._row[..., box.x0 - own.lo : box.x1 - own.lo] = value

    def _room(self, height: int, cols: Interval) -> torch.Tensor:
        return torch.empty((*self.sample.shape[:-2], height, cols.size), dtype=self.sample.dtype)

    def row_done(self, number: int) -> None:
        """Bring a row of tiles to rank 0; every rank calls this for each, whether it has a part of it or not."""
        self.wire.meet()
        rows, mine = self.rows[number], self._row
        self._row = None
        if rows is None:
            return
        if self.wire.rank:
            self.wire.swap([] if mine is None else [(0, mine.to(self.wire.device).contiguous())], [])
            return
        others = {rank: cols for rank, cols in enumerate(self.cols) if rank and cols is not None}
        found = {rank: self._room(rows.size, cols).to(self.wire.device) for rank, cols in others.items()}
        self.wire.swap([], list(found.items()))
        for rank, cols in enumerate(self.cols):
            if cols is not None:
                part = mine if rank == 0 else found[rank].cpu()
                assert part is not None
                self.sink.take(Box.of(rows, cols), part)

"""A boundary on disk: its elements as blocks that :mod:`wholegrad.run.spill` keeps, written and read by box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Ref, Spec
from wholegrad.graph.recall import Recall
from wholegrad.plan.plan import Placement, Plan
from wholegrad.plan.spill import layout, spill_bytes
from wholegrad.plan.tiles import Tile
from wholegrad.run.spill import Spill
from wholegrad.run.store import MapStore, laid_out


class DiskStore(MapStore):
    """A map in a file without a name; zeros where nothing was written.

    Args:
        cuts: along rows and columns, of the tiles that own the map: 0 to its size.
        held: the part of the map that may be written; None for all of it.
        what: the map in words, for messages.

    Raises:
        SpillError: the folder takes no such file; later: the disk is full, fails, or gives other bytes back.
    """

    def __init__(
        self,
        spec: Spec,
        spill: Spill,
        cuts: tuple[Sequence[int], Sequence[int]],
        what: str,
        dtype: torch.dtype | None = None,
        held: Box | None = None,
    ) -> None:
        super().__init__(spec, dtype, held)
        self._spill = spill
        mine = self.held
        inside = _within(cuts[0], mine.y0, mine.y1), _within(cuts[1], mine.x0, mine.x1)
        self._file = spill.file(layout(*inside, self.stored[0] * self.stored[3] * self.dtype.itemsize), what)

    def _on(self, box: Box) -> list[tuple[int, Box, Box]]:
        """Each block that ``box`` meets, the pixels of it that are in the box, and all its pixels, in the held part."""
        found = []
        for number in self._file.layout.on(box):
            block = self._file.layout.box(number)
            y0, y1 = max(box.y0, block.y0), min(box.y1, block.y1)
            found.append((number, Box(y0, y1, max(box.x0, block.x0), min(box.x1, block.x1)), block))
        return found

    def _moved(self, box: Box) -> Box:
        """A box of the map as one of the held part."""
        y, x = self.held.y0, self.held.x0
        return Box(box.y0 - y, box.y1 - y, box.x0 - x, box.x1 - x)

    def _part(self, values: torch.Tensor, block: Box, inner: Box) -> torch.Tensor:
        """The pixels on ``inner`` of a block's bytes, ``(N, h, w, C)``."""
        n, c = self.stored[0], self.stored[3]
        flat = values[: block.area * n * c * self.dtype.itemsize].view(self.dtype)
        return _crop(laid_out(flat, (n, block.height, block.width, c)), inner, block)

    def read(self, box: Box) -> torch.Tensor:
        box = self._moved(box)
        shape = (self.stored[0], box.height, box.width, self.stored[3])
        result = laid_out(torch.empty(prod(shape), dtype=self.read_dtype), shape)
        for number, inner, block in self._on(box):
            with self._spill.reading(self._file, number) as values:
                _crop(result, inner, box).copy_(self._part(values, block, inner))
        return self._tile(result)

    def write(self, box: Box, tile: torch.Tensor) -> None:
        box, pixels = self._moved(box), self._pixels(tile)
        for number, inner, block in self._on(box):
            with self._spill.changing(self._file, number, whole=inner == block) as values:
                self._part(values, block, inner).copy_(_crop(pixels, inner, box))

    def add(self, box: Box, tile: torch.Tensor) -> None:
        box, pixels = self._moved(box), self._pixels(tile)
        for number, inner, block in self._on(box):
            with self._spill.changing(self._file, number, whole=False) as values:
                part = self._part(values, block, inner)
                more = _crop(pixels, inner, box)
                part.add_(more) if self.dtype == self.read_dtype else part.copy_(part.to(self.read_dtype) + more)

    def ahead(self, box: Box) -> None:
        """Have what ``box`` meets read from disk before it is asked for."""
        self._spill.ahead(self._file, self._file.layout.on(self._moved(box)))

    def close(self) -> None:
        self._spill.drop(self._file)


def _crop(pixels: torch.Tensor, inner: Box, outer: Box) -> torch.Tensor:
    """The pixels on ``inner`` of those on ``outer``, ``(N, h, w, C)``."""
    return pixels[:, inner.y0 - outer.y0 : inner.y1 - outer.y0, inner.x0 - outer.x0 : inner.x1 - outer.x0]


def _within(cuts: Sequence[int], lo: int, hi: int) -> list[int]:
    """Cuts between two positions, counted from the first of them."""
    return [0, *(cut - lo for cut in cuts if lo < cut < hi), hi - lo]


def spill_of(plan: Plan) -> Spill | None:
    """What a step of the plan needs for its boundaries on disk; None if it has none there.

    Raises:
        SpillError: the folder is none, or has too little space.
    """
    spilled = [ref for ref, place in plan.placements.items() if place is Placement.DISK]
    if not spilled:
        return None
    held = spill_bytes(plan.graph, spilled, plan.boundary_dtype, plan.workers)
    return Spill(held, plan.spill_dir, max(plan.on_disk - held, 0))


def owners_cuts(plan: Plan, ref: Ref) -> tuple[list[int], list[int]]:
    """Where the tiles that own a boundary cut its rows and columns."""
    makers = (i for i, part in enumerate(plan.segments) if ref in part.segment.outputs)
    grid = plan.grid(next(makers))
    rows, cols = ([0, *(owned[ref].hi for owned in axis.owned if ref in owned)] for axis in (grid.rows, grid.cols))
    return rows, cols


def ask_ahead(tile: Tile, again: Recall, maps: Mapping[Ref, MapStore], grads: Mapping[Ref, MapStore]) -> None:
    """Have what a tile will read, and add to, brought from disk.

    Args:
        again: its segment as it runs.
        maps: the boundaries that there are.
        grads: their gradients; none in the forward sweep.
    """
    for ref in map(again.original, again.segment.maps):
        for stores in (maps, grads):
            if ref in stores and ref.node in tile.boxes:
                stores[ref].ahead(tile.boxes[ref.node])
    for ref in again.segment.outputs:
        if ref in grads and ref in tile.owned:
            grads[ref].ahead(tile.owned[ref])

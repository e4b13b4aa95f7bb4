"""The boundaries of one step and their gradients: made where the plan says, read and written by box."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from wholegrad import clock
from wholegrad.errors import NumericsError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Ref
from wholegrad.graph.recall import Recall
from wholegrad.graph.segment import Segment
from wholegrad.plan.plan import Placement, Plan
from wholegrad.plan.storage import dtype_name, stored_bytes
from wholegrad.plan.tiles import Tile
from wholegrad.run import process
from wholegrad.run.blocks import left_by
from wholegrad.run.device import Device
from wholegrad.run.spill_store import DiskStore, ask_ahead, owners_cuts, spill_of
from wholegrad.run.store import AwayStore, DeviceStore, HostStore, MapStore, host_block, overflows

NOTHING = Box(0, 0, 0, 0)


class Boundaries:
    """Stores of one step.

    Args:
        rank: whose part of every boundary is held, where ranks share the image.

    Attributes:
        maps: the boundaries that there are.
        grads: their gradients.
        spill: what those on disk share, if any are there.
    """

    def __init__(self, plan: Plan, device: Device, rank: int = 0) -> None:
        self.plan, self.graph, self.device, self.rank = plan, plan.graph, device, rank
        self.blocks, self.heap = left_by(plan)
        self.blocks.most, self.blocks.make = plan.most_of_boundaries, partial(host_block, device)
        self._beside = 0 if device.apart else plan.memory.parameters + plan.memory.whole + plan.memory.messages
        self.maps: dict[Ref, MapStore] = {}
        self.grads: dict[Ref, MapStore] = {}
        self.spill = spill_of(plan)

    def close(self) -> None:
        """Give all of them back."""
        for store in (*self.maps.values(), *self.grads.values()):
            store.close()
        self.maps.clear()
        self.grads.clear()
        if self.spill is not None:
            self.spill.close()
        left_by(self.plan)  # not this plan's any more, and given back, if another was made while it ran

    def placement(self, ref: Ref) -> Placement:
        """Where a boundary lives."""
        return self.plan.placements.get(ref, Placement.DEVICE if self.device.apart else Placement.HOST)

    def held(self, ref: Ref) -> Box | None:
        """The part of a boundary that lies here; None for all of it."""
        return None if self.plan.bands is None else self.plan.halos[ref].held(self.rank) or NOTHING

    def _share(self, ref: Ref) -> float:
        """Of a boundary's bytes, what lies here."""
        held, spec = self.held(ref), self.graph.spec(ref)
        return 1.0 if held is None else held.area / (spec.rows * spec.cols)

    def add_map(self, ref: Ref) -> None:
        """Make the store of a boundary that is about to be computed."""
        self.maps[ref] = self._new(ref, self.plan.stored_dtype(ref), zero=False)

    def gradient(self, ref: Ref) -> MapStore:
        """The gradient of a boundary, zeros at first."""
        if ref not in self.grads:
            self.grads[ref] = self._new(ref, self.graph.spec(ref).dtype, zero=True)
        return self.grads[ref]

    def _new(self, ref: Ref, dtype: torch.dtype, zero: bool) -> MapStore:
        spec, place, held = self.graph.spec(ref), self.placement(ref), self.held(ref)
        if place is Placement.DEVICE:
            return DeviceStore(spec, self.device, zero, dtype, held)
        if place is Placement.DISK and held != NOTHING:
            assert self.spill is not None
            what = f"{'gradient of ' if zero else ''}boundary {self.graph.nodes[ref.node].place}"
            found: MapStore = DiskStore(spec, self.spill, owners_cuts(self.plan, ref), what, dtype, held)
        else:
            found = HostStore(spec, self.blocks, zero, dtype, held)
            if found.across:
                return found
        return AwayStore(spec, self.device, found) if self.device.apart else found

    def brought(self, ref: Ref, value: torch.Tensor) -> torch.Tensor:
        """A tile of a boundary, or of its gradient, where it is written from; for the thread that made it."""
        place = self.placement(ref)
        there = place is Placement.DEVICE or (place is Placement.HOST and self.device.reaches_host)
        return value if there or not self.device.apart else self.device.fetched(value)

    def keep(self, ref: Ref, box: Box, value: torch.Tensor) -> None:
        """Write what a tile owns of a boundary.

        Raises:
            NumericsError: it is too large for the dtype in which the boundary is stored.
        """
        if overflows(value, self.maps[ref].dtype):
            self._too_large(ref, box, value)
        with clock.span("writing", "boundary", self.graph.nodes[ref.node].path) as span:
            span.moved(value)
            self.maps[ref].write(box, value)

    def add_grad(self, ref: Ref, box: Box, grad: torch.Tensor) -> None:
        """Add to the gradient of a boundary."""
        with clock.span("writing", "boundary's gradient", self.graph.nodes[ref.node].path) as span:
            span.moved(grad, grad, grad)  # read twice, written once
            self.gradient(ref).add(box, grad)

    def grad(self, ref: Ref, box: Box) -> torch.Tensor | None:
        """The gradient of a boundary on a box; None if none reached it."""
        if ref not in self.grads:
            return None
        with clock.span("reading", "boundary's gradient", self.graph.nodes[ref.node].path) as span:
            grad = self.grads[ref].read(box)
            span.moved(grad, grad)
        return grad

    def ask_ahead(self, again: Recall, grads: bool, tile: Tile) -> None:
        """Have what a tile will read, and add to, brought from disk."""
        ask_ahead(tile, again, self.maps, self.grads if grads else {})

    def new_grads(self, segment: Segment) -> dict[Ref, int]:
        """The boundaries that get a gradient when ``segment`` is pulled back, and had none, and its bytes."""
        fresh = [ref for ref in segment.maps if ref in self.maps and ref not in self.grads]
        trained = [ref for ref in fresh if self.graph.nodes[ref.node].needs_grad]
        return {ref: round(self.graph.spec(ref).nbytes * self._share(ref)) for ref in trained}

    def sizes(self, refs: Iterable[Ref]) -> dict[Ref, int]:
        """Bytes of boundaries as they are stored."""
        found = {ref: stored_bytes(self.graph.spec(ref), self.plan.boundary_dtype) for ref in refs}
        return {ref: round(size * self._share(ref)) for ref, size in found.items()}

    def make_room(self, working: int, new: Mapping[Ref, int]) -> None:
        """Return free memory to the system where a sweep over a segment might else pass the projected peak (rule 7).

        What earlier tiles and boundaries left is quick to use again. Where all tensors of tiles come from the heap they
        find what those of a sweep left that took as much, if nothing was given back since; boundaries need blocks of
        their own sizes.

        Args:
            working: what the segment's tiles may take of the host's memory.
            new: bytes of maps that are kept from now on.
        """
        sizes = [size for ref, size in new.items() if self.placement(ref) is Placement.HOST]
        room = self.plan.host_peak - self._beside - working - (self.spill.limit - self.spill.held if self.spill else 0)
        found = self._found(working)
        if process.resident() + self.blocks.missing(sizes) > room + found:
            process.release_memory()
        found = self._found(working)
        self.heap.ran(working)
        over = process.resident() + self.blocks.missing(sizes) - room - found + working // 2
        if over > 0:  # free blocks are the first to go
            self.blocks.shrink(over, sizes)

    def _found(self, working: int) -> int:
        return self.heap.finds(working) if self.plan.keeps_heap else 0

    def _too_large(self, ref: Ref, box: Box, value: torch.Tensor) -> None:
        dtype = self.maps[ref].dtype
        largest = value.detach().nan_to_num(0, 0, 0).abs().max().item()
        raise NumericsError(
            f"boundary {self.graph.nodes[ref.node].place}",
            f"reaches {largest:.5g} on rows {box.y0} to {box.y1}, columns {box.x0} to {box.x1}, more than "
            f"{dtype_name(dtype)}, in which it is stored, can hold ({torch.finfo(dtype).max:.5g})",
            "use bfloat16 (up to 3.4e+38) or no boundary_dtype",
        )

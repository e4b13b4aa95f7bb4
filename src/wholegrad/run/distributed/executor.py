"""One rank's part of a step: its own tiles, and what it gives and takes between segments.

::

    forward    tiles of Si | meet: sums joined, owners send halos of Si's boundaries
    backward   | boundaries' gradients: halos come back to their owners | tiles of Si | small gradients added up
    end        parameters' gradients added up

Small values are computed by every rank, from the same bits. Dense regions are small values: their maps are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Kind, Ref
from wholegrad.graph.rules.reduction import wide
from wholegrad.plan.halos import boxes_owned
from wholegrad.plan.plan import Placement, Plan
from wholegrad.plan.tiles import Grid, Tile
from wholegrad.plan.traffic import buckets, parameters, passes, small_only
from wholegrad.run.distributed.outputs import Collected
from wholegrad.run.distributed.sums import added, joined, of_first, summed
from wholegrad.run.distributed.wire import Wire
from wholegrad.run.executor import Executor, Result
from wholegrad.run.store import MapStore
from wholegrad.run.tile import Pull


class RankExecutor(Executor):
    """A step of a plan that several ranks share; every rank runs one at the same time."""

    def __init__(self, plan: Plan, *args: Any, wire: Wire, **options: Any) -> None:
        assert plan.bands is not None
        self.wire, self.bands, self.rank = wire, plan.bands, wire.rank
        self._parts: dict[int, Grid] = {}
        super().__init__(plan, *args, **options)
        self.of_tiles = self.small.beside()
        made = {ref: k for k, part in enumerate(plan.segments) for ref in part.segment.outputs}
        self.collected = {ref: Collected(wire, plan, made[ref], ref, sink) for ref, sink in self.sinks.items()}
        self.sinks = {ref: each.redirected() for ref, each in self.collected.items()}

    def grid(self, i: int) -> Grid:
        if i not in self._parts:
            self._parts[i] = self.plan.grid(i).part(self.bands.place(self.rank))
        return self._parts[i]

    # Forward.

    def forward(self) -> None:
        super().forward()
        if not self.plan.backward:
            self._take_from_first()

    def _tiles(
        self, i: int, work: Callable[[Tile], Result], soon: Callable[[Tile], None], sweep: str
    ) -> Iterator[tuple[Tile, Result]]:
        collected = [self.collected[ref] for ref in self.plan.segments[i].segment.outputs if ref in self.collected]
        grid = self.grid(i)
        for tile, found in super()._tiles(i, work, soon, sweep):
            yield tile, found
            row, column = divmod(tile.number, grid.cols.count)
            for each in collected if column == grid.cols.count - 1 else ():
                each.row_done(row)
        for row in range(grid.rows.count) if not len(grid) else ():
            for each in collected:
                each.row_done(row)

    def _tick(self, phase: str) -> None:
        try:
            super()._tick(phase)
        except BaseException:  # of the caller's, Ctrl-C among them
            self.wire.at_rest = True
            raise

    def _forward_tiles(self, i: int) -> None:
        super()._forward_tiles(i)
        self._join_sums(i)
        for ref in self.plan.segments[i].segment.outputs:
            if ref in self.kept.maps:
                self._send_halo(ref)

    def _join_sums(self, i: int) -> None:
        reductions = self.plan.segments[i].segment.reductions
        if reductions:
            own = {k: self.sums.totals[k] for k in reductions if k in self.sums.totals}
            self.sums.totals |= joined(self.wire, self.graph, reductions, own, self._owned(i), self.device.torch)
        else:
            self.wire.meet()

    def _owned(self, i: int) -> Any:
        """What each rank's tiles of a segment own of a map."""
        grid, owned = self.plan.grid(i), self.plan.segments[i].segment.owned(self.graph)
        boxes = {ref: boxes_owned(grid, ref, self.bands) for ref in owned}
        return lambda rank, ref: boxes[ref][rank]

    def _send_halo(self, ref: Ref) -> None:
        halo, store = self.plan.halos[ref], self.kept.maps[ref]
        out = [(peer, self._outgoing(store, box)) for peer, box in halo.sent(self.rank)]
        into = [(peer, box, self._incoming(store, box, store.dtype)) for peer, box in halo.received(self.rank)]
        self.wire.swap(out, [(peer, tensor) for peer, _, tensor in into])
        for _, box, tensor in into:
            store.write(box, self._arrived(ref, tensor).to(store.read_dtype))

    def _outgoing(self, store: MapStore, box: Box) -> torch.Tensor:
        """What is stored on a box, as bytes that may leave."""
        return store.read(box).to(self.wire.device, store.dtype).contiguous()

    def _arrived(self, ref: Ref, tensor: torch.Tensor) -> torch.Tensor:
        """What was received, in the memory in which its boundary lives."""
        return tensor.to(self.device.torch if self.kept.placement(ref) is Placement.DEVICE else "cpu")

    def _incoming(self, store: MapStore, box: Box, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((*store.shape[:-2], box.height, box.width), dtype=dtype, device=self.wire.device)

    # Backward.

    def _backward_segment(self, i: int) -> None:
        self._bring_gradients(i)
        super()._backward_segment(i)

    def _backward_tiles(self, i: int, pull: Pull) -> None:
        super()._backward_tiles(i, pull)
        self._add_small(i)

    def _fused_tiles(self, i: int) -> None:
        super()._fused_tiles(i)
        self._join_sums(i)
        self._add_small(i)

    def _bring_gradients(self, i: int) -> None:
        """Add up, where they are owned, what all ranks' tiles gave to the gradients of segment ``i``'s boundaries."""
        outputs = [ref for ref in self.plan.segments[i].segment.outputs if self.graph.nodes[ref.node].needs_grad]
        if not outputs:
            return
        has = torch.tensor([ref in self.kept.grads for ref in outputs], dtype=torch.uint8)
        somewhere = torch.stack([each.cpu() for each in self.wire.meet(has)]).any(0).tolist()
        for ref in (ref for ref, there in zip(outputs, somewhere, strict=True) if there):
            store, halo = self.kept.gradient(ref), self.plan.halos[ref]
            out = [(peer, self._outgoing(store, box)) for peer, box in halo.received(self.rank)]
            into = [(peer, box, self._incoming(store, box, store.dtype)) for peer, box in halo.sent(self.rank)]
            self.wire.swap(out, [(peer, tensor) for peer, _, tensor in into])
            for _, box, tensor in into:
                store.add(box, self._arrived(ref, tensor))

    def _add_small(self, i: int) -> None:
        """Add up what all ranks' tiles gave to the gradients of small values; of parameters, once all is done."""
        refs = [ref for ref in self.of_tiles.grads if self.graph.nodes[ref.node].kind is not Kind.PARAMETER]
        wanted = {self._name(ref): self.of_tiles.grads.pop(ref) for ref in refs}
        if not passes(self.graph, self.plan.segments[i].segment):
            self.wire.meet()
            return
        for name, grad in sorted(added(self.wire, wanted, self.device.torch).items()):
            node, out = name.split(".")
            self.small.add_grad(Ref(int(node), int(out)), grad)

    @staticmethod
    def _name(ref: Ref) -> str:
        return f"{ref.node}.{ref.out}"

    def backward(self) -> None:
        super().backward()
        self._add_parameters()
        self._take_from_first()

    def _add_parameters(self) -> None:
        """Parameters' gradients: of all ranks' tiles, and of rank 0's small values, which every rank has computed."""
        refs = parameters(self.graph, [part.segment for part in self.plan.segments])
        first = self.rank == 0
        mine = [ref in self.of_tiles.grads or (first and ref in self.small.grads) for ref in refs]
        told = self.wire.meet(torch.tensor(mine, dtype=torch.uint8))
        somewhere = torch.stack([each.cpu() for each in told]).any(0).tolist()
        refs = [ref for ref, there in zip(refs, somewhere, strict=True) if there]
        shapes = [self.graph.spec(ref).shape for ref in refs]
        for ref in refs:
            own = self.small.grads.pop(ref, None)
            if own is not None and first:
                self.of_tiles.add_grad(ref, own)
        sizes = [prod(shape) for shape in shapes]
        for k, grad in summed(self.wire, sizes, lambda k: self._of_tiles(refs[k])):
            self.small.add_grad(refs[k], grad.view(shapes[k]))

    def _of_tiles(self, ref: Ref) -> torch.Tensor:
        """What this rank's tiles gave to a parameter's gradient; zeros if nothing."""
        grad = self.of_tiles.grads.pop(ref, None)
        dtype, where = wide(torch.float64, self.device.torch), self.device.torch
        return torch.zeros(self.graph.spec(ref).shape, dtype=dtype, device=where) if grad is None else grad

    def _take_from_first(self) -> None:
        """Leave with rank 0's bits: processors of other makes round small values otherwise, and weights would part."""
        values, grads = self.small.values, self.small.grads
        own = [ref for ref in small_only(self.graph, [part.segment for part in self.plan.segments]) if ref in grads]
        kept = {*self.graph.updates.values(), *self.graph.metrics.values()}
        kept |= set() if self.graph.loss is None else {self.graph.loss}
        held = {f"value {self._name(ref)}": values[ref] for ref in sorted(kept)}
        held |= {f"grad {self._name(ref)}": grads[ref] for ref in own}
        names = list(held)
        for bucket in buckets([held[name].numel() for name in names]):
            for name, value in of_first(self.wire, {names[k]: held[names[k]] for k in bucket}).items():
                held[name].copy_(value)
        self.wire.meet()  # nobody goes on before all have all

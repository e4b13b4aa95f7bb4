"""Follow a plan: forward sweep over the segments, small values in between, backward sweep in reverse.

::

    forward    S0 ----> S1 ----> ... ----> Sk      each tile by tile; boundaries stored, sums merged in float64
    small         v0       v1                 loss
    backward   S0 <---- S1 <---- ... <---- Sk      each tile runs again with autograd on, and is pulled back

A fused last segment (rule 4) is left out of the forward sweep: its gradients are known before its sums, so each
tile runs forward and backward once, in the backward sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from wholegrad.errors import NumericsError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Kind, Ref, Spec
from wholegrad.graph.rules.reduction import wide
from wholegrad.graph.segment import Segment, reduction_rule
from wholegrad.plan.plan import Placement, Plan
from wholegrad.plan.tiles import Tile
from wholegrad.run.small import SmallValues
from wholegrad.run.sources import Source
from wholegrad.run.store import DiskStore, HostStore, MapStore
from wholegrad.run.tile import partials, pull_back, run_tile
from wholegrad.run.workers import in_order


@dataclass(frozen=True)
class Progress:
    """How far a step has come: ``done`` of ``total`` tiles, in the sweep ``phase``."""

    phase: str
    done: int
    total: int


Result = TypeVar("Result")
ProgressFn = Callable[[Progress], None]
Sink = Callable[[Box, torch.Tensor], None]


@dataclass(frozen=True)
class _Pulled:
    """What pulling a tile back gave: its partial sums, its leaves' gradients and the boxes of those that are maps."""

    sums: dict[int, torch.Tensor]
    grads: dict[Ref, torch.Tensor]
    boxes: dict[Ref, Box]


class Executor:
    """One step of one plan.

    Args:
        plan: what to run.
        tensors: parameters and buffers by the names that the graph has for them.
        image, target: where pixels come from.
        sinks: for each output map that is not kept, what takes its boxes.
        progress: called after each tile.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, torch.Tensor],
        image: Source,
        target: Source | None,
        sinks: Mapping[Ref, Sink] | None = None,
        progress: ProgressFn | None = None,
    ) -> None:
        self.plan = plan
        self.graph: Graph = plan.graph
        self.small = SmallValues(plan.graph, tensors)
        self.image, self.target = image, target
        self.sinks = dict(sinks or {})
        self.progress = progress
        self.maps: dict[Ref, MapStore] = {}
        self.map_grads: dict[Ref, MapStore] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self.level = _levels(plan)
        self.done = 0
        self.total = self._count_tiles()

    def _count_tiles(self) -> int:
        runs = 2 if self.plan.backward else 1
        return sum(part.tiles * (1 if part.fused else runs) for part in self.plan.segments)

    def close(self) -> None:
        """Give all boundaries back."""
        for store in (*self.maps.values(), *self.map_grads.values()):
            store.close()
        self.maps.clear()
        self.map_grads.clear()

    def _tick(self, phase: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(Progress(phase, self.done, self.total))

    # Forward.

    def forward(self) -> None:
        """Run every segment but a fused one, and every small value that follows."""
        self.small.settle()
        for i, part in enumerate(self.plan.segments):
            if not part.fused:
                self._forward_segment(i)
                self.small.settle()
            if not self.plan.backward:
                self._drop_unread(i)

    def _drop_unread(self, done: int) -> None:
        """Close boundaries that no later segment reads."""
        later = {ref for part in self.plan.segments[done + 1 :] for ref in part.segment.maps}
        for ref in [ref for ref in self.maps if ref not in later]:
            self.maps.pop(ref).close()

    def _forward_segment(self, i: int) -> None:
        segment = self.plan.segments[i].segment
        for ref in segment.outputs:
            if ref not in self.sinks:
                self.maps[ref] = self._new_store(ref)

        def work(tile: Tile) -> tuple[dict[Ref, torch.Tensor], dict[int, torch.Tensor]]:
            with torch.no_grad():
                run = run_tile(self.graph, segment, tile, self._fetch, self.small.leaf, False)
                outputs = {ref: run.owned[ref] for ref in segment.outputs if ref in run.owned}
                return outputs, partials(self.graph, segment, run, False)

        for tile, (outputs, sums) in self._tiles(i, work):
            for ref, value in outputs.items():
                self._keep(ref, tile.owned[ref], value)
            self._merge(sums, tile)
            self._tick("forward")
        self._finish_sums(segment.reductions)

    def _tiles(self, i: int, work: Callable[[Tile], Result]) -> Iterator[tuple[Tile, Result]]:
        """Every tile of segment ``i`` with what ``work`` made of it, in tile order."""
        tiles = self.plan.grid(i)
        return in_order(tiles, len(tiles), work, self.plan.workers)

    def _keep(self, ref: Ref, box: Box, value: torch.Tensor) -> None:
        if ref in self.sinks:
            self.sinks[ref](box, value)
        else:
            self.maps[ref].write(box, value)

    def _merge(self, found: Mapping[int, torch.Tensor], tile: Tile) -> None:
        """Add a tile's partial results to the totals, in tile order."""
        for index, part in found.items():
            part = part.detach()
            if part.is_floating_point() and not torch.isfinite(part).all():
                self._not_finite(index, tile)
            self.sums[index] = self.sums[index] + part if index in self.sums else part

    def _not_finite(self, index: int, tile: Tile) -> None:
        node = self.graph.nodes[index]
        box = tile.owned[node.operands[0]]
        raise NumericsError(
            node.place,
            f"is not finite on rows {box.y0} to {box.y1}, columns {box.x0} to {box.x1}",
            "lower the learning rate, or look for NaN in weights and pixels there",
        )

    def _finish_sums(self, reductions: tuple[int, ...]) -> None:
        for index in reductions:
            node = self.graph.nodes[index]
            spec = self.graph.spec(node.operands[0])
            self.small.values[Ref(index)] = reduction_rule(self.graph, index).finish(node, spec, self.sums[index])

    def _new_store(self, ref: Ref) -> MapStore:
        spec = self.graph.spec(ref)
        if self.plan.placements[ref] is Placement.DISK:
            return DiskStore(spec, self.plan.spill_dir)
        return HostStore(spec)

    def _fetch(self, ref: Ref, box: Box) -> torch.Tensor:
        kind = self.graph.nodes[ref.node].kind
        if kind is Kind.IMAGE:
            return self.image.read(box)
        if kind is Kind.TARGET:
            assert self.target is not None
            return self.target.read(box)
        return self.maps[ref].read(box)

    # Backward.

    def backward(self) -> None:
        """Run a fused last segment, then pull the loss's gradient back to every parameter."""
        last = len(self.plan.segments) - 1
        if self.plan.segments and self.plan.segments[last].fused:
            self._fused_segment(last)
            self.small.settle()
        assert self.graph.loss is not None
        self.small.add_grad(self.graph.loss, torch.ones_like(self.small.values[self.graph.loss]))
        self._pull_back_small(len(self.plan.segments))
        for i in reversed(range(len(self.plan.segments))):
            if not self.plan.segments[i].fused:
                self._backward_segment(i)
            self._pull_back_small(i)

    def _small_after(self, segments: int) -> list[int]:
        """Small nodes that can be computed after exactly that many segments, last first."""
        smalls = reversed(self.graph.of_kind(Kind.SMALL))
        return [node.index for node in smalls if self.level[node.index] == segments]

    def _pull_back_small(self, segments: int) -> None:
        for index in self._small_after(segments):
            for ref, grad in self.small.pull_back(index, self.small.grads).items():
                self.small.add_grad(ref, grad)

    def _sum_grads(self, reductions: tuple[int, ...], grads: Mapping[Ref, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Gradients of the totals from those of the finished reductions."""
        result = {}
        for index in reductions:
            node = self.graph.nodes[index]
            if not node.needs_grad or Ref(index) not in grads:
                continue
            total = torch.zeros_like(grads[Ref(index)]).requires_grad_()
            with torch.enable_grad():
                value = reduction_rule(self.graph, index).finish(node, self.graph.spec(node.operands[0]), total)
            (result[index],) = torch.autograd.grad(value, total, grads[Ref(index)])
        return result

    def _backward_segment(self, i: int) -> None:
        segment = self.plan.segments[i].segment
        sum_grads = self._sum_grads(segment.reductions, self.small.grads)
        if sum_grads or any(ref in self.map_grads for ref in segment.outputs):
            for _, pulled in self._tiles(i, lambda tile: self._pull_tile(segment, tile, sum_grads)):
                self._add_grads(pulled)
                self._tick("backward")
        self._after_backward(i)

    def _pull_tile(self, segment: Segment, tile: Tile, sum_grads: Mapping[int, torch.Tensor]) -> _Pulled:
        """Run a tile forward and pull it back; touches nothing that other tiles see."""
        run = run_tile(self.graph, segment, tile, self._fetch, self.small.leaf, True)
        sums = partials(self.graph, segment, run, True)
        grads = pull_back(self.graph, segment, run, sums, sum_grads, self._map_grad, tile)
        return _Pulled({index: value.detach() for index, value in sums.items()}, grads, run.boxes)

    def _add_grads(self, pulled: _Pulled) -> None:
        for ref, grad in pulled.grads.items():
            if ref in pulled.boxes:
                self._grad_store(ref).add(pulled.boxes[ref], grad)
            else:
                self.small.add_grad(ref, grad)

    def _map_grad(self, ref: Ref, box: Box) -> torch.Tensor | None:
        return self.map_grads[ref].read(box) if ref in self.map_grads else None

    def _grad_store(self, ref: Ref) -> MapStore:
        if ref not in self.map_grads:
            self.map_grads[ref] = self._new_store(ref)
        return self.map_grads[ref]

    def _after_backward(self, i: int) -> None:
        """Close what no remaining segment needs: gradients of this one's outputs, maps that only it and later read."""
        for ref in self.plan.segments[i].segment.outputs:
            if ref in self.map_grads:
                self.map_grads.pop(ref).close()
        earlier = {ref for part in self.plan.segments[:i] for ref in part.segment.maps}
        for ref in [ref for ref in self.maps if ref not in earlier]:
            self.maps.pop(ref).close()

    def _fused_segment(self, i: int) -> None:
        segment = self.plan.segments[i].segment
        sum_grads = self._sum_grads(segment.reductions, self._grads_known_before(i))
        for tile, pulled in self._tiles(i, lambda tile: self._pull_tile(segment, tile, sum_grads)):
            self._merge(pulled.sums, tile)
            self._add_grads(pulled)
            self._tick("fused")
        self._finish_sums(segment.reductions)
        self._after_backward(i)

    def _grads_known_before(self, i: int) -> dict[Ref, torch.Tensor]:
        """Gradients of a fused segment's reductions, with NaN in place of sums that are not known yet.

        The plan has shown that none of them is used; a NaN that came through would raise.
        """
        assert self.graph.loss is not None
        unknown = {
            Ref(index): unknown_sum(self.graph.nodes[index].outputs[0])
            for index in self.plan.segments[i].segment.reductions
        }
        trial = self.small.supposing(unknown)
        grads: dict[Ref, torch.Tensor] = {self.graph.loss: torch.ones_like(trial.values[self.graph.loss])}
        for index in self._small_after(i + 1):
            for ref, grad in trial.pull_back(index, grads).items():
                grads[ref] = grads[ref] + grad if ref in grads else grad
        return {
            Ref(index): grads[Ref(index)] for index in self.plan.segments[i].segment.reductions if Ref(index) in grads
        }


def unknown_sum(spec: Spec) -> torch.Tensor:
    """What stands for a sum that is not known yet: NaN, so that any use shows; zero where the dtype has no NaN."""
    dtype = wide(spec.dtype)
    return torch.full(spec.shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype)


def _levels(plan: Plan) -> dict[int, int]:
    """For each node, how many segments of the plan must have run before its value is known."""
    made: dict[int, int] = {}
    for i, part in enumerate(plan.segments):
        made.update(dict.fromkeys(part.segment.reductions, i + 1))
        made.update({ref.node: i + 1 for ref in part.segment.outputs})
    levels: dict[int, int] = {}
    for node in plan.graph.nodes:
        below = max((levels[ref.node] for ref in node.operands), default=0)
        levels[node.index] = made.get(node.index, below)
    return levels

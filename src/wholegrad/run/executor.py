"""Follow a plan: forward sweep over the segments, small values in between, backward sweep in reverse.

::

    forward    S0 ----> S1 ----> ... ----> Sk      each tile by tile; boundaries stored, sums merged in float64
    small         v0       v1                 loss
    backward   S0 <---- S1 <---- ... <---- Sk      each tile runs again with autograd on, and is pulled back

A fused last segment (rule 4) is left out of the forward sweep: its gradients are known before its sums, so each
tile runs forward and backward once, in the backward sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from wholegrad import clock
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import READERS, Graph, Kind, Node, Ref, Spec
from wholegrad.graph.inline import Inlined, inline, plain
from wholegrad.graph.layout import crop, full_box
from wholegrad.graph.recall import Recall, recall, recallable
from wholegrad.graph.rules import State
from wholegrad.graph.rules.reduction import wide
from wholegrad.graph.segment import Segment
from wholegrad.plan.plan import Plan
from wholegrad.plan.tiles import Grid, Tile
from wholegrad.run import process
from wholegrad.run.ahead import Ahead
from wholegrad.run.bodies import Bodies, Made, Pass, tensors_of
from wholegrad.run.boundaries import Boundaries
from wholegrad.run.device import Device
from wholegrad.run.recordings import recordings_of
from wholegrad.run.sink import Sink
from wholegrad.run.small import SmallValues, levels
from wholegrad.run.sources import Form, Source, raw_images
from wholegrad.run.strips import Strips
from wholegrad.run.sums import BatchNorms, Sums
from wholegrad.run.tail import Blocks, shares_of
from wholegrad.run.tile import Pull, partials, pull_back, run_tile
from wholegrad.run.workers import announced, in_order


@dataclass(frozen=True)
class Progress:
    """How far a step has come: ``done`` of ``total`` tiles, in the sweep ``phase``."""

    phase: str
    done: int
    total: int


Result = TypeVar("Result")
ProgressFn = Callable[[Progress], None]


@dataclass(frozen=True)
class _Pulled:
    """What pulling a tile back gave: its partial results, its leaves' gradients, the boxes of those that are maps."""

    parts: dict[int, State]
    grads: dict[Ref, torch.Tensor]
    boxes: dict[Ref, Box]


class Executor:
    """One step of one plan.

    Args:
        plan: what to run.
        tensors: parameters, buffers and small targets by the names that the graph has for them.
        sources: where pixels come from: images and target maps by their names.
        sinks: for each output map that is not kept, what takes its boxes.
        progress: called after each tile.
        seed: of the step, for random ops.
        device: where tiles run; None for the CPU.
        norms: batch norms whose statistics are of several slides, each on ranks of its own.

    Attributes:
        of_tiles: where gradients of small values add up that tiles give: by default with all others.
    """

    rank = 0  # where ranks share the image, which one runs here

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, torch.Tensor],
        sources: Mapping[str, Source],
        sinks: Mapping[Ref, Sink] | None = None,
        progress: ProgressFn | None = None,
        seed: int = 0,
        device: Device | None = None,
        norms: BatchNorms | None = None,
    ) -> None:
        self.plan, self.norms = plan, norms
        self.graph: Graph = plan.graph
        self.seed = seed
        self.device = device or Device()
        self.small = SmallValues(plan.graph, tensors, seed, self.device.torch)
        self.sources = sources
        self.sinks = dict(sinks or {})
        self.progress = progress
        self.of_tiles = self.small
        self.kept = Boundaries(plan, self.device, self.rank)
        self.sums = Sums(plan.graph, later=self.device.apart)
        self.ahead = Ahead(plan.graph, sources, self.device) if self.device.apart else None
        self.bodies = None if self.ahead is None else self._bodies(self.ahead)
        self.level = levels(plan)
        self.running: Generator[object, None, None] = in_order((), 0, lambda tile: None, 1)
        self.done, self.ceiling = 0, process.Ceiling(plan.host_peak)
        self.total = self._count_tiles()

    def _count_tiles(self) -> int:
        runs = 2 if self.plan.backward else 1
        return sum(len(self.grid(i)) * (1 if part.fused else runs) for i, part in enumerate(self.plan.segments))

    def _bodies(self, ahead: Ahead) -> Bodies:
        """What runs tiles on a device with memory of its own."""
        recordings = recordings_of(self.plan, self.device) if self.device.options.graphs else None
        return Bodies(self.device, self.kept, self.small, ahead, self._fetch, self.seed, recordings)

    def grid(self, i: int) -> Grid:
        """The tiles of segment ``i`` that run here."""
        return self.plan.grid(i)

    def close(self) -> None:
        """Give all boundaries back, once no tile and no op uses them any more."""
        self.bodies = None  # which knows this executor: what both hold goes now, not when Python next looks for cycles
        with ExitStack() as last:  # the last named comes first; each of them, whatever others raise
            last.callback(self.kept.close)
            if self.ahead is not None:
                last.callback(self.ahead.close)
            last.callback(self.device.finish)
            last.callback(self.running.close)  # its threads run on where whoever took its tiles has raised

    def _tick(self, phase: str) -> None:
        self.done += 1
        self.ceiling.look()
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
        self._close([ref for ref in self.kept.maps if ref not in later])

    def _close(self, refs: list[Ref]) -> None:
        for ref in refs:
            self.kept.maps.pop(ref).close()

    def _forward_segment(self, i: int) -> None:
        self._forward_tiles(i)
        reductions = self.plan.segments[i].segment.reductions
        if self.norms is not None:
            self.sums.totals |= self.norms.joined(reductions, self.sums.totals)
        self.small.values.update(self.sums.finish(reductions))

    def _forward_tiles(self, i: int) -> None:
        """Run the tiles of segment ``i``: its boundaries are made, and what they sum is merged."""
        segment = self.plan.segments[i].segment
        later = {ref for part in self.plan.segments[i + 1 :] for ref in part.segment.maps}
        kept = [ref for ref in segment.outputs if ref not in self.sinks or ref in later]
        self._make_room(i, False, self.kept.sizes(kept))
        for ref in kept:
            self.kept.add_map(ref)
        how = self._how(self.graph, segment)
        sunk = {ref: self.sinks[ref] for ref in segment.outputs if ref in self.sinks}
        strips = None
        if how.strip is not None:
            out = how.strip.out
            store = sunk[out].store if out in sunk and out not in kept else None
            sunk |= {out: replace(sunk[out], make=None)} if store else {}
            strips = Strips(self.graph, how, self.small.leaf, store)

        def work(tile: Tile) -> Made:
            with torch.no_grad():
                runs = self.graph, segment, tile, self._fetch, self.small.leaf, False, self.seed, how
                run = run_tile(*runs, strips=strips)
                outputs = {ref: run.owned[ref] for ref in kept if ref in run.owned}
                made = {ref: sink.made(run.owned[ref]) for ref, sink in sunk.items() if ref in run.owned}
                return Made(outputs, made, partials(self.graph, segment, run), {}, {}, {})

        again = Recall(self.graph, segment, {})
        soon = partial(self._soon, again, False)
        if self.bodies is None:
            found = self._tiles(i, work, soon, clock.FORWARD)
        else:
            found = self._on_device(i, Pass(("forward", i), again, how, kept=kept, sunk=sunk), soon, clock.FORWARD)
        for tile, made in found:
            for ref, value in made.outputs.items():
                self._keep(ref, tile.owned[ref], value)
            for ref, value in made.sunk.items():
                self._hand_on(ref, tile.owned[ref], value)
            self.sums.merge(made.parts, tile)
            self._tick("forward")

    def _soon(self, again: Recall, grads: bool, tile: Tile) -> None:
        """Ask for what a tile will read."""
        if self.kept.spill is not None:
            self.kept.ask_ahead(again, grads, tile)
        if self.ahead is not None:
            self.ahead.ask(again, tile)

    def _tiles(
        self, i: int, work: Callable[[Tile], Result], soon: Callable[[Tile], None], sweep: str
    ) -> Iterator[tuple[Tile, Result]]:
        """Every tile of segment ``i`` with what ``work`` made of it, in tile order; ``soon`` is told of each before."""
        clock.expect(self.plan.workers)
        with clock.span("preparing", "tiles"):
            tiles = self.grid(i)

        def counted(tile: Tile) -> Result:
            with clock.span("between ops", sweep):
                return work(tile)

        spill = self.kept.spill
        each = tiles if spill is None and self.ahead is None else announced(tiles, soon)
        self.running = in_order(each, len(tiles), counted, self.plan.workers)
        yield from self.running
        if spill is not None:
            spill.forget()

    def _on_device(self, i: int, each: Pass, soon: Callable[[Tile], None], sweep: str) -> Iterator[tuple[Tile, Made]]:
        """:meth:`_tiles` on a device, several in flight; what they made is there for the calling thread's ops."""
        bodies = self.bodies
        assert bodies is not None
        bodies.prepare(each, self.grid(i))
        gate = self.device.gate()

        def work(tile: Tile) -> tuple[Made, object]:
            with gate.lane() as lane:
                return bodies.run(each, lane, tile), gate.done()

        for tile, (made, mark) in self._tiles(i, work, soon, sweep):
            gate.join(mark, tensors_of(made))
            bodies.add(each, made)
            yield tile, made
        bodies.finish(each, self.of_tiles)

    def _make_room(self, i: int, backward: bool, new: Mapping[Ref, int]) -> None:
        """Of the host's memory, for a sweep over segment ``i``: for its tiles, or what goes to those of a device."""
        part = self.plan.segments[i]
        here = part.working.backward if backward else part.working.forward
        self.kept.make_room(part.staging if self.device.apart else here, new)

    def _keep(self, ref: Ref, box: Box, value: torch.Tensor) -> None:
        self.kept.keep(ref, box, value)

    def _hand_on(self, ref: Ref, box: Box, value: torch.Tensor) -> None:
        with clock.span("writing", "output", self.graph.nodes[ref.node].path) as span:
            span.moved(value)
            self.sinks[ref].take(box, value)

    def _fetch(self, ref: Ref, box: Box, form: Form = Form.INTERLEAVED) -> torch.Tensor:
        node = self.graph.nodes[ref.node]
        inside = node.kind in READERS or node.kind is Kind.SPREAD
        with clock.span("reading", node.kind.value if inside else "boundary", "" if inside else node.path) as span:
            found = self._read(node, ref, box, form)
            span.moved(found, found)
        return found

    def _read(self, node: Node, ref: Ref, box: Box, form: Form) -> torch.Tensor:
        if node.kind in READERS:
            if self.ahead is not None:
                return self.ahead.seen(ref, self.ahead.take(ref, box))
            return self.sources[node.name].read(box, form)
        if node.kind is Kind.SPREAD:
            layout = node.outputs[0].layout
            return crop(self.small.leaf(node.operands[0]), layout, full_box(layout), box).clone()
        return self.kept.maps[ref].look(box)

    def updates(self) -> dict[str, torch.Tensor]:
        """What the buffers that the model writes hold after the step, by name, in their own dtype."""
        return {name: self.small.leaf(ref) for name, ref in self.graph.updates.items()}

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

    def _pull(self, reductions: tuple[int, ...], grads: Mapping[Ref, torch.Tensor]) -> Pull:
        """What tiles need to know of these reductions, given the gradients of small values."""
        found = {
            index: tuple(grads.get(ref) for ref in self.graph.nodes[index].refs)
            for index in reductions
            if self.graph.nodes[index].needs_grad
        }
        if self.norms is not None:
            found |= self.norms.gathered(reductions, found)
        reached = {index: given for index, given in found.items() if any(grad is not None for grad in given)}
        totals = self.sums.totals
        return Pull(self.kept.grad, {i: totals[i] for i in reached if i in totals}, reached)

    def _backward_segment(self, i: int) -> None:
        segment = self.plan.segments[i].segment
        pull = self._pull(segment.reductions, self.small.grads)
        if pull.grads or any(ref in self.kept.grads for ref in segment.outputs):
            self._backward_tiles(i, pull)
        self._after_backward(i)

    def _backward_tiles(self, i: int, pull: Pull) -> None:
        """Run the tiles of segment ``i`` again and pull them back."""
        segment = self.plan.segments[i].segment
        again = recall(self.graph, segment, self.kept.maps.keys())
        how = self._how(again.graph, again.segment, True)
        self._make_room(i, True, self.kept.new_grads(segment))
        for _, pulled in self._pulled(i, again, how, pull, False):
            self._add_grads(pulled)
            self._tick("backward")

    def _how(self, graph: Graph, segment: Segment, pulled: bool = False) -> Inlined:
        """What of a segment is computed where it is read; ``pulled`` where tiles are pulled back."""
        with clock.span("preparing", "what is read as it is computed"):
            raw = raw_images(graph, self.sources)
            if self.device.apart:
                triton = None if self.plan.apart is None else self.plan.apart.triton
                return plain(segment) if triton is None else inline(graph, segment, raw, triton=triton)
            return inline(graph, segment, raw, not self.plan.backward, tails=pulled)

    def _pulled(self, i: int, again: Recall, how: Inlined, pull: Pull, fused: bool) -> Iterator[tuple[Tile, _Pulled]]:
        """Every tile of segment ``i``, run forward and pulled back, in tile order."""
        soon, sweep = partial(self._soon, again, True), clock.FUSED if fused else clock.BACKWARD
        if self.bodies is None:
            yield from self._tiles(i, self._pulling(again, how, pull, fused), soon, sweep)
            return
        for tile, made in self._on_device(i, Pass((sweep, i), again, how, pull, fused), soon, sweep):
            boxes = again.boxes(tile.boxes)
            yield tile, _Pulled(made.parts, made.grads, {ref: boxes[ref.node] for ref in made.grads})

    def _pulling(self, again: Recall, how: Inlined, pull: Pull, fused: bool) -> Callable[[Tile], _Pulled]:
        """What runs a tile forward and pulls it back."""
        blocks = None
        if how.tail is not None:
            shares = shares_of(again.graph, how.tail, pull.grads)
            blocks = Blocks(again.graph, how, self.small.leaf, shares, not fused)
        return partial(self._pull_tile, again, how, pull, fused, blocks)

    def _pull_tile(
        self, again: Recall, how: Inlined, pull: Pull, fused: bool, blocks: Blocks | None, tile: Tile
    ) -> _Pulled:
        """Run a tile forward and pull it back; touches nothing that other tiles see."""

        def fetch(ref: Ref, box: Box, form: Form) -> torch.Tensor:
            return self._fetch(again.original(ref), box, form)

        graph, segment, tile = again.graph, again.segment, replace(tile, boxes=again.boxes(tile.boxes))
        runs = graph, segment, tile, fetch, self.small.leaf, True, self.seed, how, pull.grads
        run = run_tile(*runs, blocks=blocks)
        parts = partials(graph, segment, run) if fused else {}
        return _Pulled(parts, pull_back(graph, segment, run, pull, tile), run.boxes)

    def _add_grads(self, pulled: _Pulled) -> None:
        for ref, grad in pulled.grads.items():
            node = self.graph.nodes[ref.node]
            if node.kind is Kind.SPREAD:
                self.of_tiles.add_grad_on(node.operands[0], node.outputs[0].layout, pulled.boxes[ref], grad)
            elif ref in pulled.boxes:
                self.kept.add_grad(ref, pulled.boxes[ref], grad)
            else:
                with clock.span("merging", "gradients"):
                    self.of_tiles.add_grad(ref, grad)

    def _after_backward(self, i: int) -> None:
        """Close what no remaining segment needs: gradients of this one's outputs, maps that only it and later read."""
        for ref in self.plan.segments[i].segment.outputs:
            if ref in self.kept.grads:
                self.kept.grads.pop(ref).close()
        earlier = [part.segment for part in self.plan.segments[:i]]
        needed = {ref for segment in earlier for ref in segment.maps}
        needed.update(ref for segment in earlier for ref in recallable(self.graph, segment, self.kept.maps.keys()))
        self._close([ref for ref in self.kept.maps if ref not in needed])

    def _fused_segment(self, i: int) -> None:
        self._fused_tiles(i)
        self.small.values.update(self.sums.finish(self.plan.segments[i].segment.reductions))
        self._after_backward(i)

    def _fused_tiles(self, i: int) -> None:
        """Run the tiles of segment ``i`` forward and pull them back, in one pass."""
        segment = self.plan.segments[i].segment
        pull = self._pull(segment.reductions, self._grads_known_before(i))
        again = recall(self.graph, segment, frozenset())
        how = self._how(again.graph, again.segment, True)
        self._make_room(i, True, self.kept.new_grads(segment))
        for tile, pulled in self._pulled(i, again, how, pull, True):
            self.sums.merge(pulled.parts, tile)
            self._add_grads(pulled)
            self._tick("fused")

    def _grads_known_before(self, i: int) -> dict[Ref, torch.Tensor]:
        """Gradients of a fused segment's reductions, with NaN in place of values that are not known yet.

        The plan has shown that none of them is used; a NaN that came through would raise.
        """
        assert self.graph.loss is not None
        mine = [ref for k in self.plan.segments[i].segment.reductions for ref in self.graph.nodes[k].refs]
        trial = self.small.supposing({ref: unknown_value(self.graph.spec(ref), self.device.torch) for ref in mine})
        grads: dict[Ref, torch.Tensor] = {self.graph.loss: torch.ones_like(trial.values[self.graph.loss])}
        for index in self._small_after(i + 1):
            for ref, grad in trial.pull_back(index, grads).items():
                grads[ref] = grads[ref] + grad if ref in grads else grad
        return {ref: grads[ref] for ref in mine if ref in grads}


def unknown_value(spec: Spec, device: torch.device | None = None) -> torch.Tensor:
    """What stands for a value that is not known yet: NaN, so that any use shows; zero where the dtype has no NaN."""
    dtype = spec.dtype if spec.dtype.is_complex else wide(spec.dtype, device)
    known = not dtype.is_floating_point and not dtype.is_complex
    return torch.full(spec.shape, 0 if known else float("nan"), dtype=dtype, device=device)

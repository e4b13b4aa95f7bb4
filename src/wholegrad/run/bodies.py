"""Tiles on a device: what a tile reads is gathered first, then its body runs, and what it made is handed on.

A body is a function of tensors alone, so that it can be recorded and replayed (:mod:`wholegrad.run.recordings`), and so
that nothing in it waits for the host. Gradients of parameters and of other small values leave it as one vector a dtype:
merging a tile is then one addition, not one for every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from wholegrad import clock
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import READERS, Graph, Kind, Node, Ref
from wholegrad.graph.inline import Inlined
from wholegrad.graph.recall import Recall
from wholegrad.graph.rules import State
from wholegrad.graph.segment import Segment
from wholegrad.plan.tiles import Tile
from wholegrad.run.ahead import Ahead
from wholegrad.run.boundaries import Boundaries
from wholegrad.run.device import Device
from wholegrad.run.kinds import Kinds
from wholegrad.run.recordings import Recordings
from wholegrad.run.sink import Sink
from wholegrad.run.small import SmallValues
from wholegrad.run.sources import Form
from wholegrad.run.tile import Pull, partials, pull_back, run_tile


class Given(NamedTuple):
    """What a body reads of its tile's own, on the device.

    Attributes:
        maps: the boxes that a tile reads, images and targets as they came.
        pulls: gradients of the elements that it owns of boundaries.
    """

    maps: dict[Ref, torch.Tensor]
    pulls: dict[Ref, torch.Tensor]


class Constants(NamedTuple):
    """What all bodies of a pass read: small values, merged states of reductions, the gradients of their outputs."""

    smalls: dict[Ref, torch.Tensor]
    totals: dict[int, State]
    shares: dict[int, tuple[torch.Tensor | None, ...]]


class Made(NamedTuple):
    """What a tile makes.

    Attributes:
        outputs: what it owns of boundaries; ``sunk`` what sinks make of outputs; ``parts`` partial results.
        grads: gradients of the maps that it read.
        flat: those of small values, one after another, a vector a dtype; ``reached`` says which there are.
    """

    outputs: dict[Ref, torch.Tensor]
    sunk: dict[Ref, torch.Tensor]
    parts: dict[int, State]
    grads: dict[Ref, torch.Tensor]
    flat: dict[torch.dtype, torch.Tensor]
    reached: dict[Ref, bool]


class Pass:
    """One sweep over one segment's tiles.

    Args:
        name: tells it from the other passes of a plan.
        fused: whether partial results are wanted although tiles are pulled back.
        pull: what tiles are pulled back from; None for a forward sweep.
    """

    def __init__(
        self,
        name: Hashable,
        again: Recall,
        how: Inlined,
        pull: Pull | None = None,
        fused: bool = False,
        kept: Iterable[Ref] = (),
        sunk: Mapping[Ref, Sink] | None = None,
    ) -> None:
        self.name, self.again, self.how, self.pull, self.fused = name, again, how, pull, fused
        self.kept, self.sunk = tuple(kept), dict(sunk or {})
        self.graph: Graph = again.graph
        self.segment: Segment = again.segment
        self.constants = Constants({}, {}, {})
        self.slots: dict[torch.dtype, list[Ref]] = {}  # of small values' gradients in each vector
        self.total: dict[torch.dtype, torch.Tensor] = {}
        self.reached: set[Ref] = set()


class Bodies:
    """Runs tiles of one step on a device."""

    def __init__(
        self,
        device: Device,
        kept: Boundaries,
        small: SmallValues,
        ahead: Ahead,
        fetch: Callable[[Ref, Box], torch.Tensor],
        seed: int,
        recordings: Recordings | None,
    ) -> None:
        self.device, self.kept, self.small, self.ahead = device, kept, small, ahead
        self.fetch, self.seed, self.recordings = fetch, seed, recordings

    def prepare(self, each: Pass, tiles: Iterable[Tile]) -> None:
        """Before any tile runs: what all of them read, where small gradients go, recordings of what many share."""
        pull = each.pull
        smalls = {ref: self.small.leaf(ref) for ref in each.segment.smalls}
        each.constants = Constants(smalls, *(({}, {}) if pull is None else (dict(pull.totals), dict(pull.grads))))
        if each.pull is not None:
            self._lay_out(each)
        if self.recordings is None or self.recordings.knows(each.name):
            return
        kinds = Kinds(each.graph, each.segment, each.how.nodes)
        if not kinds.alike:
            return
        found: dict[Hashable, list[Tile]] = {}
        for tile in tiles:
            tile = self._with_sources(each, tile)
            found.setdefault(kinds.of(tile), []).append(tile)
        self.recordings.begin(each.name, {tile.number: kind for kind, like in found.items() for tile in like})
        by_size = sorted(found.items(), key=lambda each: -sum(box.area for box in each[1][0].boxes.values()))
        for kind, like in by_size:  # the largest first: the blocks that it needs do for all
            if self.recordings.wanted(kind, len(like)):
                given = self.gathered(each, like[0])
                body = partial(self._body, each, like[0])
                self.recordings.record(each.name, kind, given, each.constants, body)

    def _with_sources(self, each: Pass, tile: Tile) -> Tile:
        return replace(tile, boxes=each.again.boxes(tile.boxes))

    def run(self, each: Pass, lane: int, tile: Tile) -> Made:
        """One tile, for the calling thread's stream."""
        tile = self._with_sources(each, tile)
        given = self.gathered(each, tile)
        made = None
        if self.recordings is not None:
            made = self.recordings.replayed(each.name, lane, tile.number, given, each.constants)
        return self._fetched(self._body(each, tile, given, each.constants) if made is None else made)

    def gathered(self, each: Pass, tile: Tile) -> Given:
        """All that a tile reads."""
        graph, pull = each.graph, each.pull
        maps = {ref: self._read(each, ref, tile.boxes[ref.node]) for ref in each.segment.maps if ref.node in tile.boxes}
        pulls: dict[Ref, torch.Tensor] = {}
        if pull is not None:
            for ref in each.segment.outputs:
                if ref in tile.owned and graph.nodes[ref.node].needs_grad:
                    grad = pull.map_grad(ref, tile.owned[ref])
                    if grad is not None:
                        pulls[ref] = grad
        return Given(maps, pulls)

    def _read(self, each: Pass, ref: Ref, box: Box) -> torch.Tensor:
        original = each.again.original(ref)
        kind = self.small.graph.nodes[original.node].kind
        if kind in READERS:
            with clock.span("reading", kind.value) as span:
                found = self.ahead.take(original, box)
                span.moved(found)
            return found
        return self.fetch(original, box)

    def _body(self, each: Pass, tile: Tile, given: Given, constants: Constants) -> Made:
        graph, segment, grad = each.graph, each.segment, each.pull is not None

        def fetch(ref: Ref, box: Box, form: Form) -> torch.Tensor:
            found = given.maps[ref].detach()
            read = graph.nodes[ref.node].kind in READERS and form is not Form.BYTES
            return self.ahead.seen(ref, found) if read else found

        with torch.set_grad_enabled(grad):
            run = run_tile(
                graph, segment, tile, fetch, lambda ref: constants.smalls[ref].detach(), grad, self.seed, each.how,
                constants.shares, device=self.device.torch,
            )  # fmt: skip
            if not grad:
                outputs = {ref: run.owned[ref] for ref in each.kept if ref in run.owned}
                sunk = {ref: sink.made(run.owned[ref]) for ref, sink in each.sunk.items() if ref in run.owned}
                return Made(outputs, sunk, partials(graph, segment, run), {}, {}, {})
            parts = partials(graph, segment, run) if each.fused else {}
            pull = Pull(lambda ref, box: given.pulls.get(ref), constants.totals, constants.shares)
            found = pull_back(graph, segment, run, pull, tile)
        with torch.no_grad():
            grads = {ref: value.detach() for ref, value in found.items() if ref in run.boxes}
            flat = {dtype: self._joined(refs, found, dtype) for dtype, refs in each.slots.items()}
        return Made({}, {}, parts, grads, flat, {ref: ref in found for refs in each.slots.values() for ref in refs})

    # Gradients of small values.

    def _lay_out(self, each: Pass) -> None:
        """Which small values' gradients each vector holds: known before, so that every tile's looks alike."""
        graph = each.graph
        for ref in each.segment.smalls:
            if graph.nodes[ref.node].needs_grad and graph.spec(ref).dtype.is_floating_point:
                each.slots.setdefault(self.small.grad_dtype(ref), []).append(ref)

    def _joined(self, refs: list[Ref], found: Mapping[Ref, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        pieces = []
        for ref in refs:
            grad = found.get(ref)
            shape = self.small.graph.spec(ref).shape
            pieces.append(
                torch.zeros(shape, dtype=dtype, device=self.device.torch).reshape(-1)
                if grad is None
                else grad.reshape(-1).to(dtype)
            )
        return torch.cat(pieces)

    def add(self, each: Pass, made: Made) -> None:
        """Add a tile's small gradients to those of the pass, in tile order."""
        each.reached.update(ref for ref, there in made.reached.items() if there)
        for dtype, value in made.flat.items():
            if dtype in each.total:
                each.total[dtype].add_(value)
            else:
                each.total[dtype] = value.clone()

    def finish(self, each: Pass, into: SmallValues) -> None:
        """Hand the sums of a pass on."""
        graph = self.small.graph
        for dtype, total in each.total.items():
            sizes = [prod(graph.spec(ref).shape) for ref in each.slots[dtype]]
            for ref, piece in zip(each.slots[dtype], torch.split(total, sizes), strict=True):
                if ref in each.reached:
                    into.add_grad(ref, piece.view(graph.spec(ref).shape))
        each.total.clear()

    # What leaves the device.

    def _fetched(self, made: Made) -> Made:
        """With what lives in the host's memory brought there, and sinks' values."""
        outputs = {ref: self.kept.brought(ref, value) for ref, value in made.outputs.items()}
        sunk = {ref: self.device.fetched(value) for ref, value in made.sunk.items()}
        grads = {
            ref: value if self._spread(ref) else self.kept.brought(ref, value) for ref, value in made.grads.items()
        }
        return made._replace(outputs=outputs, sunk=sunk, grads=grads)

    def _spread(self, ref: Ref) -> bool:
        nodes: tuple[Node, ...] = self.small.graph.nodes
        return nodes[ref.node].kind is Kind.SPREAD


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested containers, in order."""
    return [each for each in tree_leaves(value) if isinstance(each, torch.Tensor)]

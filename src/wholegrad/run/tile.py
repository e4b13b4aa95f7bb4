"""One segment on one tile: read its boxes, run its nodes, and pull gradients back from what the tile owns (rule 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from wholegrad import clock
from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Graph, Node, Ref, Spec
from wholegrad.graph.inline import Inlined, inline
from wholegrad.graph.layout import Role, crop
from wholegrad.graph.programs import Reading, planar_layout
from wholegrad.graph.rules import MapRule, State, rule_for, thin
from wholegrad.graph.rules import Tile as Place
from wholegrad.graph.rules.base import CPU
from wholegrad.graph.rules.cropping import cropped
from wholegrad.graph.rules.reduction import wide
from wholegrad.graph.segment import Segment, reduction_rule
from wholegrad.graph.tails import Tail
from wholegrad.kernels.choice import THIN
from wholegrad.kernels.thin import REAL, Mixed
from wholegrad.plan.tiles import Tile
from wholegrad.run.sources import Form
from wholegrad.run.spans import node_span, op_name
from wholegrad.run.strips import Strips
from wholegrad.run.tail import Blocks


@dataclass
class TileRun:
    """What a tile computed.

    Attributes:
        owned: the owned elements of boundaries and of reductions' operands.
        leaves: the tensors with respect to which gradients can be had: boundary boxes and small values.
        boxes: the box of each leaf that is a map.
        parts: partial results of the reductions that were summed while their terms were computed.
        roots: maps that such sums' gradients are pulled back from, with these gradients.
    """

    owned: dict[Ref, torch.Tensor] = field(default_factory=dict)
    leaves: dict[Ref, torch.Tensor] = field(default_factory=dict)
    boxes: dict[Ref, Box] = field(default_factory=dict)
    parts: dict[int, State] = field(default_factory=dict)
    roots: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


Fetch = Callable[[Ref, Box, Form], torch.Tensor]
Shares = Mapping[int, tuple[torch.Tensor | None, ...]]
NO_SHARES: Shares = {}


def run_tile(
    graph: Graph,
    segment: Segment,
    tile: Tile,
    fetch: Fetch,
    small: Callable[[Ref], torch.Tensor],
    grad: bool,
    seed: int = 0,
    how: Inlined | None = None,
    shares: Shares = NO_SHARES,
    strips: Strips | None = None,
    device: torch.device = CPU,
    blocks: Blocks | None = None,
) -> TileRun:
    """Run the nodes of ``segment`` on ``tile``.

    Args:
        fetch: a map's elements on a box, not to be written into; those of images and targets in the form asked for.
        small: a small value in the graph's dtype, detached.
        grad: whether to record for :func:`pull_back`.
        seed: of the step, for random ops.
        how: which nodes run, and which are computed where they are read.
        shares: the gradients of each reduction's outputs, as far as they are known.
        strips: what runs the strip of ``how``, if it has one.
        device: where ``fetch`` and ``small`` give what they give.
        blocks: what runs the tail of ``how``, if it has one.
    """
    how = how or inline(graph, segment)
    runner = _TileRunner(graph, segment, tile, how, seed, grad, strips, device, blocks)
    return runner.run(fetch, small, shares)


class _TileRunner:
    """Runs one tile; ``env`` has the values that are still needed, ``raw`` images as bytes."""

    def __init__(
        self,
        graph: Graph,
        segment: Segment,
        tile: Tile,
        how: Inlined,
        seed: int,
        grad: bool,
        strips: Strips | None,
        device: torch.device,
        blocks: Blocks | None,
    ) -> None:
        self.graph, self.segment, self.tile, self.how, self.seed, self.grad = graph, segment, tile, how, seed, grad
        self.strips, self.device, self.blocks = strips, device, blocks
        self.result = TileRun()
        self.env: dict[Ref, torch.Tensor] = {}
        self.raw: dict[Ref, torch.Tensor] = {}
        mapped = (graph.nodes[i].operands[0] for i in segment.reductions if i not in how.summed)
        self.wanted = {*segment.outputs, *mapped}

    def run(self, fetch: Fetch, small: Callable[[Ref], torch.Tensor], shares: Shares) -> TileRun:
        self._read(fetch, small)
        last = self._last_readers()
        for ref in self.tile.owned:
            if ref in self.env:  # a reduction straight over a map that was read
                with torch.set_grad_enabled(self.grad):
                    self._own(ref)
        for index in self.how.nodes:
            if index not in self.tile.boxes:
                continue
            node = self.graph.nodes[index]
            span = node_span(self.graph, self.how, node, self.tile.boxes[index], operand_boxes)
            with torch.set_grad_enabled(self.grad and node.needs_grad), span:
                for i, out in enumerate(self._run_node(node)):
                    self.env[Ref(index, i)] = out
                    self._own(Ref(index, i))
            for ref in self.how.reads(self.graph, index):
                if last.get(ref) == index:
                    self.env.pop(ref, None)
        for index, reading in self.how.sums.items():
            self._sum(index, reading, shares.get(index, ()))
        if self.how.tail is not None:
            self._tail(self.how.tail)
        return self.result

    def _read(self, fetch: Fetch, small: Callable[[Ref], torch.Tensor]) -> None:
        graph, kernels = self.graph, self._read_by_kernels()
        for ref in self.segment.maps:
            if ref.node not in self.tile.boxes:
                continue
            box = self.tile.boxes[ref.node]
            self.result.boxes[ref] = box
            if ref in self.how.raw:
                self.raw[ref] = fetch(ref, box, Form.BYTES)
                if ref in self.how.floats:
                    self.env[ref] = (self.raw[ref].to(graph.spec(ref).dtype)).div_(255)
                continue
            tensor = fetch(ref, box, Form.PLANAR if ref in kernels else Form.INTERLEAVED)
            if ref in kernels and tensor.stride(-1) != 1:
                tensor = tensor.contiguous()  # once, not by each kernel
            self.env[ref] = _leaf(graph, self.result, ref, tensor, self.grad)
        for ref in self.segment.smalls:
            self.env[ref] = _leaf(graph, self.result, ref, small(ref), self.grad)

    def _read_by_kernels(self) -> set[Ref]:
        """The maps that kernels want planar: thin convolutions, sums, and passes over few channels."""
        how = self.how
        chains = [chain for chain in how.chains.values() if chain.parts[0].channels <= THIN]
        return {ref for each in (*how.convolutions.values(), *chains, *how.sums.values()) for ref in each.leaves}

    def _own(self, ref: Ref) -> None:
        mine = self.tile.owned.get(ref)
        if mine is not None and ref in self.wanted:
            self.result.owned[ref] = _cropped(self.env[ref], self.graph.spec(ref), self.tile.boxes[ref.node], mine)

    def _last_readers(self) -> dict[Ref, int]:
        last = {ref: i for i in self.how.nodes if i in self.tile.boxes for ref in self.how.reads(self.graph, i)}
        kept = [ref for each in self.how.sums.values() for ref in each.leaves]
        if (tail := self.how.tail) is not None:
            kept += [*tail.leaves(self.how), *(ref for i in tail.nodes for ref in self.graph.nodes[i].operands[1:])]
        return last | dict.fromkeys(kept, -1)

    def _value(self, ref: Ref, want: Box | None, raw: bool = False) -> torch.Tensor:
        """A value on a box of it; small ones whole."""
        value = self.raw[ref] if raw else self.env[ref]
        spec = self.graph.spec(ref)
        return value if want is None or not spec.is_map else _cropped(value, spec, self.tile.boxes[ref.node], want)

    def _mixed(self, reading: Reading, want: Box | None) -> Mixed:
        leaves = tuple(self._value(ref, want, ref in self.how.raw) for ref in reading.leaves)
        return Mixed(reading.parts, leaves)

    def _run_node(self, node: Node) -> tuple[torch.Tensor, ...]:
        box = self.tile.boxes[node.index]
        if self.how.strip is not None and node.index == self.how.strip.out.node:
            assert self.strips is not None
            return (self.strips.run(self.tile.boxes, lambda ref: self._value(ref, None, ref in self.how.raw)),)
        if (chain := self.how.chains.get(node.index)) is not None:
            return (thin.chain(self._mixed(chain, box), node.outputs[0].dtype),)
        wanted = operand_boxes(self.graph, node, box)
        specs = tuple(self.graph.spec(ref) for ref in node.operands)
        reading = self.how.convolutions.get(node.index)
        tensors: list[Any] = [] if reading is None else [self._mixed(reading, wanted[0])]
        first = len(tensors)
        tensors += [self._value(ref, want) for ref, want in zip(node.operands[first:], wanted[first:], strict=True)]
        rule = rule_for(node.op)
        assert isinstance(rule, MapRule)
        return rule.run(node, tensors, Place(box, wanted, specs, node.outputs, self.seed, self.device))

    def _sum(self, index: int, reading: Reading, grads: tuple[torch.Tensor | None, ...]) -> None:
        """Sum a reduction's terms while they are computed, with their gradients where the sum's is known."""
        node = self.graph.nodes[index]
        ref = node.operands[0]
        box = self.tile.owned.get(ref)
        if box is None:
            return
        spec = self.graph.spec(ref)
        share = None
        if self.grad and node.needs_grad and grads and grads[0] is not None:
            rule = reduction_rule(self.graph, index)
            one = torch.empty((1,) * len(spec.shape), dtype=spec.dtype)
            share = rule.pull(node, spec, one, box, (), grads).reshape(())
        with torch.set_grad_enabled(self.grad):
            x = self._mixed(reading, box)
        with torch.no_grad(), clock.span("sums", op_name(node), node.path or "loss") as span:
            real = spec.dtype if spec.dtype.is_floating_point else x.dtype
            found = thin.passes(x.first).total(x, real if real in REAL else torch.float32, share)
            span.moved(*x.leaves, *found.grads.values())
            assert found.total is not None
            total = found.total.sum().to(wide(node.outputs[0].dtype))
            self.result.parts[index] = (total.reshape(node.outputs[0].shape),)
        self.result.roots += [(x.leaves[i], grad) for i, grad in found.grads.items() if x.leaves[i].requires_grad]

    def _tail(self, tail: Tail) -> None:
        """Convolutions and sums that run together, forward and back."""
        box = self.tile.owned.get(self.graph.nodes[next(iter(tail.sums))].operands[0])
        if box is None:
            return
        assert self.blocks is not None
        with torch.no_grad():
            left = self.blocks.run(box, self.tile.boxes, lambda ref: self._value(ref, None, ref in self.how.raw))
        self.result.parts |= {index: (total,) for index, total in left.sums.items()}
        if self.grad:
            self.result.roots += left.roots


def _cropped(tile: torch.Tensor, spec: Spec, have: Box, want: Box) -> torch.Tensor:
    """The part of ``tile`` (a value's elements on ``have``) that lies on ``want``."""
    if not planar_layout(spec):
        return crop(tile, spec.layout, have, want)
    return cropped(tile, (want.y0 - have.y0, have.y1 - want.y1, want.x0 - have.x0, have.x1 - want.x1))


def _leaf(graph: Graph, result: TileRun, ref: Ref, tensor: torch.Tensor, grad: bool) -> torch.Tensor:
    if grad and graph.nodes[ref.node].needs_grad and tensor.is_floating_point():
        result.leaves[ref] = tensor.requires_grad_()
    return tensor


def operand_boxes(graph: Graph, node: Node, box: Box) -> tuple[Box | None, ...]:
    """The box of each map operand that ``box`` of the node's own map depends on; None for small operands."""
    rule = rule_for(node.op)
    assert rule is not None
    specs = [graph.spec(ref) for ref in node.operands]

    def needs(position: int, role: Role, out: Interval) -> Interval:
        return rule.needs(node, specs, position, role, out)

    return tuple(
        Box.of(needs(i, Role.ROW, box.rows), needs(i, Role.COL, box.cols)) if spec.is_map else None
        for i, spec in enumerate(specs)
    )


def partials(graph: Graph, segment: Segment, run: TileRun) -> dict[int, State]:
    """The partial result of each reduction that the tile owns part of, by node index."""
    result = dict(run.parts)
    for index in segment.reductions:
        node = graph.nodes[index]
        if index not in result and node.operands[0] in run.owned:
            with torch.no_grad(), clock.span("sums", op_name(node), node.path or "loss") as span:
                span.moved(run.owned[node.operands[0]])
                result[index] = reduction_rule(graph, index).partial(node, run.owned[node.operands[0]].detach())
    return result


@dataclass(frozen=True)
class Pull:
    """What the backward sweep brings to a tile: gradients of the maps that it owns, and those of its reductions.

    Attributes:
        map_grad: the gradient of a boundary on a box; None where no gradient reached it.
        totals: for each reduction that a gradient reaches, its merged state; empty where that is not known yet.
        grads: the gradients of each such reduction's outputs.
    """

    map_grad: Callable[[Ref, Box], torch.Tensor | None]
    totals: Mapping[int, State]
    grads: Mapping[int, tuple[torch.Tensor | None, ...]]


def pull_back(graph: Graph, segment: Segment, run: TileRun, pull: Pull, tile: Tile) -> dict[Ref, torch.Tensor]:
    """Gradients of the leaves from those of what the tile owns."""
    grads: dict[Ref, torch.Tensor] = {}
    for ref in segment.outputs:  # not all that is owned: a reduction may sum a boundary that another segment made
        if ref in run.owned and run.owned[ref].requires_grad:
            grad = pull.map_grad(ref, tile.owned[ref])
            if grad is not None:
                grads[ref] = grad
    for index, given in pull.grads.items():
        if index in run.parts:
            continue
        node = graph.nodes[index]
        ref = node.operands[0]
        if ref not in run.owned or not run.owned[ref].requires_grad:
            continue
        mine, box, rule = run.owned[ref], tile.owned[ref], reduction_rule(graph, index)
        with torch.no_grad(), clock.span("sums", op_name(node), node.path or "loss"):
            total = pull.totals.get(index, ())
            grads[ref] = rule.pull_onto(grads.get(ref), node, graph.spec(ref), mine.detach(), box, total, given)
    if not (grads or run.roots) or not run.leaves:
        return {}
    roots = [run.owned[ref] for ref in grads] + [root for root, _ in run.roots]
    given_grads = list(grads.values()) + [grad for _, grad in run.roots]
    with clock.span("backward", "PyTorch's own"):  # what our own functions do not count themselves
        found_grads = torch.autograd.grad(roots, list(run.leaves.values()), given_grads, allow_unused=True)
    return {ref: grad for ref, grad in zip(run.leaves, found_grads, strict=True) if grad is not None}

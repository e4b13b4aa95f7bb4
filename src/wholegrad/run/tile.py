"""One segment on one tile: read its boxes, run its nodes, and pull gradients back from what the tile owns (rule 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Graph, Node, Ref
from wholegrad.graph.layout import Role, crop
from wholegrad.graph.rules import MapRule, State, rule_for
from wholegrad.graph.rules import Tile as Place
from wholegrad.graph.segment import Segment, reduction_rule
from wholegrad.plan.tiles import Tile


@dataclass
class TileRun:
    """What a tile computed.

    Attributes:
        owned: the owned elements of boundaries and of reductions' operands.
        leaves: the tensors with respect to which gradients can be had: boundary boxes and small values.
        boxes: the box of each leaf that is a map.
    """

    owned: dict[Ref, torch.Tensor] = field(default_factory=dict)
    leaves: dict[Ref, torch.Tensor] = field(default_factory=dict)
    boxes: dict[Ref, Box] = field(default_factory=dict)


def run_tile(
    graph: Graph,
    segment: Segment,
    tile: Tile,
    fetch: Callable[[Ref, Box], torch.Tensor],
    small: Callable[[Ref], torch.Tensor],
    grad: bool,
    seed: int = 0,
) -> TileRun:
    """Run the nodes of ``segment`` on ``tile``.

    Args:
        fetch: a map's elements on a box, as a tensor of the tile's own.
        small: a small value in the graph's dtype, detached.
        grad: whether to record for :func:`pull_back`.
        seed: of the step, for random ops.
    """
    result = TileRun()
    env: dict[Ref, torch.Tensor] = {}
    for ref in segment.maps:
        if ref.node in tile.boxes:
            result.boxes[ref] = tile.boxes[ref.node]
            env[ref] = _leaf(graph, result, ref, fetch(ref, tile.boxes[ref.node]), grad)
    for ref in segment.smalls:
        env[ref] = _leaf(graph, result, ref, small(ref), grad)
    last = _last_readers(graph, segment, tile)
    for ref, box in tile.owned.items():
        if ref in env:  # a reduction straight over a map that was read
            with torch.set_grad_enabled(grad):
                result.owned[ref] = crop(env[ref], graph.spec(ref).layout, tile.boxes[ref.node], box)
    for index in segment.nodes:
        if index not in tile.boxes:
            continue
        node = graph.nodes[index]
        with torch.set_grad_enabled(grad and node.needs_grad):
            outputs = _run_node(graph, node, tile, env, seed)
            for i, out in enumerate(outputs):
                env[Ref(index, i)] = out
                if (mine := tile.owned.get(Ref(index, i))) is not None:
                    result.owned[Ref(index, i)] = crop(out, node.outputs[i].layout, tile.boxes[index], mine)
        for ref in node.operands:
            if last.get(ref) == index:
                del env[ref]
    return result


def _leaf(graph: Graph, result: TileRun, ref: Ref, tensor: torch.Tensor, grad: bool) -> torch.Tensor:
    if grad and graph.nodes[ref.node].needs_grad and tensor.is_floating_point():
        result.leaves[ref] = tensor.requires_grad_()
    return tensor


def _last_readers(graph: Graph, segment: Segment, tile: Tile) -> dict[Ref, int]:
    return {ref: i for i in segment.nodes if i in tile.boxes for ref in graph.nodes[i].operands}


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


def _run_node(
    graph: Graph, node: Node, tile: Tile, env: Mapping[Ref, torch.Tensor], seed: int
) -> tuple[torch.Tensor, ...]:
    box = tile.boxes[node.index]
    wanted = operand_boxes(graph, node, box)
    specs = tuple(graph.spec(ref) for ref in node.operands)
    tensors = [
        env[ref] if want is None else crop(env[ref], spec.layout, tile.boxes[ref.node], want)
        for ref, spec, want in zip(node.operands, specs, wanted, strict=True)
    ]
    rule = rule_for(node.op)
    assert isinstance(rule, MapRule)
    return rule.run(node, tensors, Place(box, wanted, specs, node.outputs, seed))


def partials(graph: Graph, segment: Segment, run: TileRun) -> dict[int, State]:
    """The partial result of each reduction that the tile owns part of, by node index."""
    result = {}
    for index in segment.reductions:
        node = graph.nodes[index]
        if node.operands[0] in run.owned:
            with torch.no_grad():
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
        node = graph.nodes[index]
        ref = node.operands[0]
        if ref not in run.owned or not run.owned[ref].requires_grad:
            continue
        mine, box, rule = run.owned[ref], tile.owned[ref], reduction_rule(graph, index)
        with torch.no_grad():
            found = rule.pull(node, graph.spec(ref), mine.detach(), box, pull.totals.get(index, ()), given)
        grads[ref] = grads[ref] + found if ref in grads else found
    if not grads or not run.leaves:
        return {}
    roots = [run.owned[ref] for ref in grads]
    found_grads = torch.autograd.grad(roots, list(run.leaves.values()), list(grads.values()), allow_unused=True)
    return {ref: grad for ref, grad in zip(run.leaves, found_grads, strict=True) if grad is not None}

"""One segment on one tile: read its boxes, run its nodes, and pull gradients back from what the tile owns (rule 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Graph, Node, Ref
from wholegrad.graph.layout import Role, crop
from wholegrad.graph.rules import MapRule, rule_for
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
) -> TileRun:
    """Run the nodes of ``segment`` on ``tile``.

    Args:
        fetch: a map's elements on a box, as a tensor of the tile's own.
        small: a small value in the graph's dtype, detached.
        grad: whether to record for :func:`pull_back`.
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
            outputs = _run_node(graph, node, tile, env)
            for i, out in enumerate(outputs):
                env[Ref(index, i)] = out
                if (mine := tile.owned.get(Ref(index, i))) is not None:
                    result.owned[Ref(index, i)] = crop(out, node.outputs[i].layout, tile.boxes[index], mine)
        for ref in node.operands:
            if last.get(ref) == index:
                del env[ref]
    return result


def _leaf(graph: Graph, result: TileRun, ref: Ref, tensor: torch.Tensor, grad: bool) -> torch.Tensor:
    if grad and graph.nodes[ref.node].needs_grad:
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


def _run_node(graph: Graph, node: Node, tile: Tile, env: Mapping[Ref, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    box = tile.boxes[node.index]
    wanted = operand_boxes(graph, node, box)
    specs = tuple(graph.spec(ref) for ref in node.operands)
    tensors = [
        env[ref] if want is None else crop(env[ref], spec.layout, tile.boxes[ref.node], want)
        for ref, spec, want in zip(node.operands, specs, wanted, strict=True)
    ]
    rule = rule_for(node.op)
    assert isinstance(rule, MapRule)
    return rule.run(node, tensors, Place(box, wanted, specs, node.outputs))


def partials(graph: Graph, segment: Segment, run: TileRun, grad: bool) -> dict[int, torch.Tensor]:
    """The partial result of each reduction that the tile owns part of, by node index."""
    result = {}
    for index in segment.reductions:
        node = graph.nodes[index]
        if node.operands[0] in run.owned:
            with torch.set_grad_enabled(grad and node.needs_grad):
                result[index] = reduction_rule(graph, index).partial(node, run.owned[node.operands[0]])
    return result


def pull_back(
    graph: Graph,
    segment: Segment,
    run: TileRun,
    sums: Mapping[int, torch.Tensor],
    sum_grads: Mapping[int, torch.Tensor],
    map_grad: Callable[[Ref, Box], torch.Tensor | None],
    tile: Tile,
) -> dict[Ref, torch.Tensor]:
    """Gradients of the leaves from those of the owned maps (``map_grad``) and of the sums (``sum_grads``)."""
    roots: list[torch.Tensor] = []
    grads: list[torch.Tensor] = []
    for ref in segment.outputs:  # not all that is owned: a reduction may sum a boundary that another segment made
        if ref not in run.owned:
            continue
        value, box = run.owned[ref], tile.owned[ref]
        grad = map_grad(ref, box) if value.requires_grad else None
        if grad is not None:
            roots.append(value)
            grads.append(grad)
    for index, value in sums.items():
        if value.requires_grad and index in sum_grads:
            roots.append(value)
            grads.append(sum_grads[index].to(value.dtype))
    if not roots or not run.leaves:
        return {}
    found = torch.autograd.grad(roots, list(run.leaves.values()), grads, allow_unused=True)
    return {ref: grad for ref, grad in zip(run.leaves, found, strict=True) if grad is not None}

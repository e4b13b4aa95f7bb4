"""Which maps are worth keeping between segments."""

from __future__ import annotations

from wholegrad.graph.graph import Graph, Kind, Node, Ref, Spec
from wholegrad.graph.layout import map_layout


def candidates(graph: Graph) -> list[Ref]:
    """Maps worth keeping: one after each chain of ops, of those on a path from image to loss or output."""
    roots = [ref.node for ref in graph.outputs] if graph.loss is None else [graph.loss.node]
    alive = graph.ancestors(roots)
    return [
        Ref(node.index)
        for node in graph.of_kind(Kind.MAP)
        if node.index in alive and len(node.outputs) == 1 and _worth_keeping(graph, node)
    ]


def summed(graph: Graph, pool: list[Ref]) -> frozenset[Ref]:
    """Of these maps, those that a reduction sums while other maps depend on the sum: inputs of norms."""
    back = [
        node
        for node in graph.of_kind(Kind.REDUCTION)
        if any(graph.nodes[i].kind is Kind.MAP for i in graph.descendants([node.index]))
    ]
    found = {ref.node for node in back for ref in node.operands}
    near = found | {ref.node for index in found for ref in graph.nodes[index].operands}
    return frozenset(ref for ref in pool if ref.node in near)


def storable(spec: Spec) -> bool:
    """Whether a map can be a boundary: its last two dimensions are rows and columns."""
    return spec.is_map and len(spec.shape) >= 2 and spec.layout == map_layout(spec.shape)


def _worth_keeping(graph: Graph, node: Node) -> bool:
    spec = node.outputs[0]
    if not storable(spec) or not spec.dtype.is_floating_point or (not node.needs_grad and graph.loss is not None):
        return False
    readers = [graph.nodes[i] for i in graph.consumers(node.index)]
    if len(readers) == 1 and readers[0].kind is Kind.MAP:
        after = readers[0].outputs[0]
        return not (len(readers[0].outputs) == 1 and after.nbytes <= spec.nbytes and _single_input(readers[0]))
    return True


def _single_input(node: Node) -> bool:
    return len(node.operands) == 1

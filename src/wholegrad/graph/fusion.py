"""Can the last segment run forward and backward in one pass? Only if its gradients are known before its sums are.

The gradient of the loss with respect to a sum may depend on other sums: for ``sum(bce) / sum(valid)`` it is
``1 / sum(valid)``, known once the labels are counted; for Dice it depends on the sums themselves. For each small op
this file knows on which operand *values* the gradient of each operand depends; one walk against the arrows gives, for
every small value, the set of values that its gradient depends on.
"""

from __future__ import annotations

import torch

from wholegrad.graph.graph import Graph, Kind, Node, Ref
from wholegrad.graph.segment import reduction_rule

aten = torch.ops.aten

# Ops whose gradient depends on no value at all.
_LINEAR = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
    aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten.sum.default, aten.sum.dim_IntList, aten.mean.default,
    aten.mean.dim, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.permute.default, aten.transpose.int,
    aten.select.int, aten.slice.Tensor, aten.cat.default, aten.stack.default, aten._to_copy.default,
    aten.clone.default, aten.alias.default,
}  # fmt: skip


def _values_used(node: Node, wanted: Ref) -> list[Ref]:
    """Operands whose values the gradient of operand ``wanted`` depends on."""
    if node.op in _LINEAR:
        return []
    if node.op is aten.mul.Tensor:
        a, b = node.args[:2]
        return [ref for ref in (b if wanted == a else None, a if wanted == b else None) if isinstance(ref, Ref)]
    if node.op is aten.div.Tensor and wanted == node.args[0] != node.args[1]:
        return [node.args[1]] if isinstance(node.args[1], Ref) else []
    return [*node.operands, *node.refs]


def gradient_needs(graph: Graph) -> dict[Ref, set[Ref]]:
    """For each small value that a gradient reaches from the loss: the values that this gradient depends on."""
    assert graph.loss is not None
    needs: dict[Ref, set[Ref]] = {graph.loss: set()}
    for node in reversed(graph.nodes):
        reached = [needs[ref] for ref in node.refs if ref in needs]
        if node.kind is not Kind.SMALL or not reached or not node.needs_grad:
            continue
        so_far = set().union(*reached)
        for ref in node.operands:
            if graph.nodes[ref.node].needs_grad:
                needs.setdefault(ref, set()).update(so_far, _values_used(node, ref))
    return needs


def known_before(graph: Graph, reductions: tuple[int, ...]) -> bool:
    """Whether the gradients of these reductions are known before the reductions are.

    True also requires that maps do not consume anything that depends on them.
    """
    later = graph.descendants(list(reductions))
    local = (Kind.MAP, Kind.REDUCTION, Kind.SPREAD)
    if any(graph.nodes[index].kind in local for index in later - set(reductions)):
        return False
    needs = gradient_needs(graph)
    pulled = [
        index
        for index in reductions
        if graph.nodes[index].needs_grad and any(r in needs for r in graph.nodes[index].refs)
    ]
    return all(
        reduction_rule(graph, index).linear and not any(ref.node in later for ref in needs.get(each, set()))
        for index in pulled
        for each in graph.nodes[index].refs
    )


def free_reductions(graph: Graph, reductions: tuple[int, ...]) -> frozenset[int]:
    """Those whose sums depend on no parameter that is trained: counts of labels, for example."""
    return frozenset(
        index
        for index in reductions
        if not any(graph.nodes[i].needs_grad for i in graph.ancestors([index]))
        and not any(
            graph.nodes[i].kind is Kind.PARAMETER or graph.nodes[i].kind is Kind.IMAGE for i in graph.ancestors([index])
        )
    )

"""Small values: parameters, sums, and what is computed from them, held whole.

Whatever follows from a reduction is computed in float64 (rule 3), a node at a time. The backward sweep pulls gradients
through these nodes one by one, running each again; they cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wholegrad.graph.graph import Graph, Kind, Node, Ref
from wholegrad.graph.rules.reduction import wide


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A floating-point tensor in float64, others as they are."""
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


class SmallValues:
    """The small values of one step.

    Args:
        graph: the captured graph.
        tensors: parameters and buffers by the name that the graph has for them.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, torch.Tensor]) -> None:
        self.graph = graph
        self.values: dict[Ref, torch.Tensor] = {}
        self.grads: dict[Ref, torch.Tensor] = {}
        for node in graph.of_kind(Kind.PARAMETER, Kind.BUFFER):
            self.values[Ref(node.index)] = tensors[node.name].detach()
        for node in graph.of_kind(Kind.CONSTANT):
            self.values[Ref(node.index)] = graph.constants[node.name]

    def settle(self) -> None:
        """Compute every small node whose operands are known."""
        for node in self.graph.of_kind(Kind.SMALL):
            if Ref(node.index) not in self.values and all(ref in self.values for ref in node.operands):
                with torch.no_grad():
                    outputs = self._run(node, {ref: self.values[ref] for ref in node.operands})
                self.values.update({Ref(node.index, i): out for i, out in enumerate(outputs)})

    def supposing(self, values: Mapping[Ref, torch.Tensor]) -> SmallValues:
        """A copy in which ``values`` hold, and what follows from them."""
        other = SmallValues.__new__(SmallValues)
        other.graph, other.values, other.grads = self.graph, {**self.values, **values}, {}
        other.settle()
        return other

    def _run(self, node: Node, values: Mapping[Ref, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if node.op is torch.ops.aten.copy.default:  # the functional form has no derivative
            source = values[node.operands[-1]]
            return (widened(source.to(node.outputs[0].dtype)).expand(node.outputs[0].shape),)
        wide_node = _widened_node(node)
        return tuple(widened(out) for out in wide_node.call(lambda ref: widened(values[ref])))

    def leaf(self, ref: Ref) -> torch.Tensor:
        """The value in the dtype that the graph gives it, detached, for a tile to read."""
        return self.values[ref].detach().to(self.graph.spec(ref).dtype)

    def add_grad(self, ref: Ref, grad: torch.Tensor) -> None:
        """Add to the gradient of a small value, in float64."""
        grad = grad.detach().to(torch.float64)
        self.grads[ref] = self.grads[ref] + grad if ref in self.grads else grad.clone()

    def pull_back(self, index: int, grads: dict[Ref, torch.Tensor]) -> dict[Ref, torch.Tensor]:
        """Gradients of a small node's operands, given those of its outputs in ``grads``."""
        node = self.graph.nodes[index]
        wanted = [ref for ref in node.operands if self.graph.nodes[ref.node].needs_grad]
        reached = [i for i in range(len(node.outputs)) if Ref(index, i) in grads]
        if not wanted or not reached or not node.needs_grad:
            return {}
        values = {ref: widened(self.values[ref]).detach() for ref in node.operands}
        for ref in wanted:
            values[ref] = values[ref].clone().requires_grad_()
        with torch.enable_grad():
            outputs = self._run(node, values)
        roots = [outputs[i] for i in reached]
        found = torch.autograd.grad(
            roots, [values[ref] for ref in wanted], [grads[Ref(index, i)] for i in reached], allow_unused=True
        )
        return {ref: grad for ref, grad in zip(wanted, found, strict=True) if grad is not None}


def _widened_node(node: Node) -> Node:
    """The node with float64 in place of a floating-point dtype that its arguments name."""
    dtype = node.kwargs.get("dtype")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return node
    kwargs: dict[str, Any] = {**node.kwargs, "dtype": wide(dtype)}
    return Node(node.index, node.name, node.kind, node.op, node.args, kwargs, node.operands, node.outputs,
                node.path, node.needs_grad)  # fmt: skip

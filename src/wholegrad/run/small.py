"""Small values: parameters, sums, and what is computed from them, held whole.

Whatever follows from a reduction is computed in float64 (rule 3), a node at a time; large values (of dense regions,
rule 10) stay in the dtype that the graph gives them. The backward sweep pulls gradients through these nodes one by one,
running each again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from wholegrad import clock
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Kind, Node, Ref
from wholegrad.graph.layout import Layout, on_box, unflattened
from wholegrad.graph.rules.base import CPU
from wholegrad.graph.rules.fill import FILLS, filled
from wholegrad.graph.rules.random import drawn
from wholegrad.graph.rules.reduction import wide
from wholegrad.plan.plan import Plan

aten = torch.ops.aten
WHOLE = Box(0, 1, 0, 1)  # of a tensor without rows and columns


class SmallValues:
    """The small values of one step.

    Args:
        graph: the captured graph.
        tensors: parameters, buffers and small targets by the name that the graph has for them.
        seed: of the step, for random ops.
        device: where values are held and computed; None for the CPU.
    """

    def __init__(
        self, graph: Graph, tensors: Mapping[str, torch.Tensor], seed: int = 0, device: torch.device | None = None
    ) -> None:
        self.graph, self.device = graph, device or CPU
        self.seed = seed
        self.values: dict[Ref, torch.Tensor] = {}
        self.grads: dict[Ref, torch.Tensor] = {}
        for node in graph.of_kind(Kind.PARAMETER, Kind.BUFFER, Kind.VALUE):
            self.values[Ref(node.index)] = tensors[node.name].detach().to(self.device)
        for node in graph.of_kind(Kind.CONSTANT):
            self.values[Ref(node.index)] = graph.constants[node.name].to(self.device)

    @clock.timed("small values", "forward")
    def settle(self) -> None:
        """Compute every small node whose operands are known."""
        for node in self.graph.of_kind(Kind.SMALL):
            if Ref(node.index) not in self.values and all(ref in self.values for ref in node.operands):
                with torch.no_grad():
                    outputs = self._run(node, {ref: self.values[ref] for ref in node.operands})
                self.values.update(zip(node.refs, outputs, strict=True))

    def beside(self) -> SmallValues:
        """The same values, with gradients that add up apart."""
        other = SmallValues.__new__(SmallValues)
        other.graph, other.seed, other.device = self.graph, self.seed, self.device
        other.values, other.grads = self.values, {}
        return other

    def supposing(self, values: Mapping[Ref, torch.Tensor]) -> SmallValues:
        """A copy in which ``values`` hold, and what follows from them."""
        other = self.beside()
        other.values = {**self.values, **values}
        other.settle()
        return other

    def _held(self, ref: Ref, tensor: torch.Tensor) -> torch.Tensor:
        """A value as it is held: in float64 if it is small, in the graph's dtype if not."""
        if not tensor.is_floating_point():
            return tensor
        spec = self.graph.spec(ref)
        return tensor.to(wide(spec.dtype, self.device) if spec.wide else spec.dtype)

    def _is_wide(self, node: Node) -> bool:
        """Whether a node runs in float64: all that it reads and writes is small."""
        specs = [*(self.graph.spec(ref) for ref in node.operands), *node.outputs]
        return all(spec.wide for spec in specs if spec.dtype.is_floating_point)

    def _run(self, node: Node, values: Mapping[Ref, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        spec = node.outputs[0]
        if node.op in FILLS:
            outputs: tuple[torch.Tensor, ...] = (filled(node, spec, WHOLE, self.seed, self.device),)
        elif node.draw >= 0:
            args = [values.get(arg, arg) if isinstance(arg, Ref) else arg for arg in node.args]
            drawing = (node.op, args, node.kwargs, spec.dtype, self.seed, node.draw, spec.layout, WHOLE, self.device)
            outputs = (drawn(*drawing),)
        elif node.op is aten.copy.default:  # the functional form has no derivative
            outputs = (values[node.operands[-1]].to(spec.dtype).expand(spec.shape),)
        elif node.op in (
            aten.view.default,
            aten._unsafe_view.default,
        ):  # strides may differ from those that were traced
            outputs = (values[node.operands[0]].reshape(spec.shape),)
        elif self._is_wide(node):
            outputs = _widened_node(node, self.device).call(lambda ref: widened(values[ref]), self.device)
        else:
            outputs = node.call(lambda ref: values[ref].to(self.graph.spec(ref).dtype), self.device)
        return tuple(self._held(ref, out) for ref, out in zip(node.refs, outputs, strict=True))

    def leaf(self, ref: Ref) -> torch.Tensor:
        """The value in the dtype that the graph gives it, detached, for a tile to read."""
        return self.values[ref].detach().to(self.graph.spec(ref).dtype)

    def add_grad(self, ref: Ref, grad: torch.Tensor) -> None:
        """Add to the gradient of a small value, which is held like the value; of a parameter, in float64."""
        grad = grad.detach().to(self.grad_dtype(ref))
        if ref in self.grads:
            self.grads[ref].add_(grad)
        else:
            self.grads[ref] = grad.clone(memory_format=torch.contiguous_format)

    def add_grad_on(self, ref: Ref, layout: Layout, box: Box, grad: torch.Tensor) -> None:
        """Add to the gradient of a small value that runs along the image, on a box of it."""
        if ref not in self.grads:
            shape = self.graph.spec(ref).shape
            self.grads[ref] = torch.zeros(shape, dtype=self.grad_dtype(ref), device=self.device)
        on_box(self.grads[ref], layout, box).add_(unflattened(grad.detach(), layout, box))

    def grad_dtype(self, ref: Ref) -> torch.dtype:
        """In which the gradient of a small value is held."""
        parameter = self.graph.nodes[ref.node].kind is Kind.PARAMETER
        spec = self.graph.spec(ref)
        return wide(torch.float64, self.device) if parameter or spec.wide else spec.dtype

    def _differentiable(self, ref: Ref) -> bool:
        """Whether a value may have a gradient; the positions that a sort returns beside its values have none."""
        dtype = self.graph.spec(ref).dtype
        return self.graph.nodes[ref.node].needs_grad and (dtype.is_floating_point or dtype.is_complex)

    @clock.timed("small values", "backward")
    def pull_back(self, index: int, grads: dict[Ref, torch.Tensor]) -> dict[Ref, torch.Tensor]:
        """Gradients of a small node's operands, given those of its outputs in ``grads``."""
        node = self.graph.nodes[index]
        wanted = [ref for ref in node.operands if self._differentiable(ref)]
        reached = [i for i, ref in enumerate(node.refs) if ref in grads]
        if not wanted or not reached or not node.needs_grad:
            return {}
        values = {ref: self._held(ref, self.values[ref]).detach() for ref in node.operands}
        for ref in wanted:
            values[ref] = values[ref].clone().requires_grad_()
        with torch.enable_grad():
            outputs = self._run(node, values)
        reached = [i for i in reached if outputs[i].requires_grad]
        if not reached:
            return {}
        roots = [outputs[i] for i in reached]
        given = [grads[node.refs[i]].to(outputs[i].dtype) for i in reached]
        found = torch.autograd.grad(roots, [values[ref] for ref in wanted], given, allow_unused=True)
        return {ref: grad for ref, grad in zip(wanted, found, strict=True) if grad is not None}


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A floating-point tensor in float64 (or the widest that its device has), others as they are."""
    return tensor.to(wide(tensor.dtype, tensor.device)) if tensor.is_floating_point() else tensor


def _widened_node(node: Node, device: torch.device) -> Node:
    """The node with float64 in place of a floating-point dtype that its arguments name."""

    def widen(value: Any) -> Any:
        floats = isinstance(value, torch.dtype) and value.is_floating_point
        return wide(value, device) if floats else value

    kwargs = {key: widen(value) for key, value in node.kwargs.items()}
    args = tuple(widen(value) for value in node.args)
    return node if kwargs == node.kwargs and args == node.args else replace(node, args=args, kwargs=kwargs)


def levels(plan: Plan) -> dict[int, int]:
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

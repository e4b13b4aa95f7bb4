"""What each node of a graph means: the same op on whole tensors, by PyTorch itself and not by the op's rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wholegrad.graph.graph import SOURCES, Graph, Kind, Node, Ref
from wholegrad.graph.layout import full_box
from wholegrad.graph.rules.base import CPU
from wholegrad.graph.rules.fill import FILLS, filled
from wholegrad.graph.rules.random import drawn
from wholegrad.graph.rules.reduction import GATHER

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default}


def meaning(
    node: Node, values: Mapping[Ref, torch.Tensor], seed: int, device: torch.device = CPU
) -> tuple[torch.Tensor, ...]:
    """The outputs of a node that is no source, on whole operands, differentiable.

    Args:
        seed: of the step, for random ops.
        device: where tensors lie, for what is made from nothing.
    """
    spec = node.outputs[0]
    box = full_box(spec.layout)
    if node.op in FILLS:
        return (filled(node, spec, box, seed, device),)
    if node.draw >= 0:
        args = [values.get(arg, arg) if isinstance(arg, Ref) else arg for arg in node.args]
        return (drawn(node.op, args, node.kwargs, spec.dtype, seed, node.draw, spec.layout, box, device),)
    if node.op is aten.copy.default:  # the functional form has no derivative
        return (values[node.operands[-1]].to(spec.dtype).expand(spec.shape),)
    if node.op in _VIEWS or node.op is GATHER or node.kind is Kind.SPREAD:  # strides may differ from the traced ones
        return (values[node.operands[0]].reshape(spec.shape),)
    return node.call(values.__getitem__)


def given_values(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> dict[Ref, torch.Tensor]:
    """What the graph starts from: parameters, buffers, images and targets by name, and its own constants."""
    return {
        Ref(node.index): graph.constants[node.name] if node.kind is Kind.CONSTANT else tensors[node.name].detach()
        for node in graph.of_kind(*SOURCES)
    }


def gradients_whole(graph: Graph, tensors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The gradient of the loss for each trained parameter that it depends on, with nothing tiled."""
    assert graph.loss is not None
    values = given_values(graph, tensors)
    trained = [node for node in graph.of_kind(Kind.PARAMETER) if node.needs_grad]
    for node in trained:
        values[Ref(node.index)].requires_grad_()
    for node in graph.nodes:
        if node.kind not in SOURCES:
            with torch.set_grad_enabled(node.needs_grad):
                values.update(zip(node.refs, meaning(node, values, seed), strict=True))
    loss = values[graph.loss].reshape(())
    if not loss.requires_grad or not trained:
        return {}
    leaves = [values[Ref(node.index)] for node in trained]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return {node.name: grad for node, grad in zip(trained, found, strict=True) if grad is not None}

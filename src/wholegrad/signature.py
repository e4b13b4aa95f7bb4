"""What a captured graph and its plans depend on, and in words what of it is no longer so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wholegrad.errors import PlanError
from wholegrad.given import Given
from wholegrad.graph.graph import Graph
from wholegrad.graph.inputs import Input, Leaf
from wholegrad.looks import Looks, difference, looks
from wholegrad.plan.plan import Plan


def joint_tensors(model: nn.Module, loss_fn: Any, metrics: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
    """Parameters and buffers of model, loss and metrics by the names that the captured graph has for them."""
    parts: list[tuple[str, Any]] = [("model", model), ("loss", loss_fn)]
    parts += [(f"metrics.m{i}", fn) for i, fn in enumerate((metrics or {}).values())]
    return {
        f"{prefix}.{name}": tensor
        for prefix, part in parts
        if isinstance(part, nn.Module)
        for name, tensor in (*part.named_parameters(), *part.named_buffers())
    }


@dataclass(frozen=True)
class Signature:
    """What a captured graph depends on: a graph and its plans are used only where all of it is the same."""

    image: tuple[Any, ...]
    target: tuple[Any, ...]
    modes: tuple[bool, ...]
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype, bool], ...]
    metrics: tuple[str, ...]
    autocast: torch.dtype | None
    bytes: tuple[bool, ...]
    looks: Looks

    def difference(self, other: Signature) -> str | None:
        """What differs first, in words."""
        words = {
            "image": "an image of {}",
            "target": "a target of {}",
            "modes": "other modules in training or evaluation mode",
            "tensors": "other parameters (names, shapes, dtypes, or which are trained)",
            "metrics": "the metrics {}",
            "autocast": "autocast to {}",
            "bytes": "images of 8-bit pixels or not: {}",
        }
        for name, text in words.items():
            mine = getattr(self, name)
            if mine != getattr(other, name):
                return text.format(mine)
        return difference(self.looks, other.looks)


def signature(model: nn.Module, loss_fn: Any, inputs: Given, metrics: Mapping[str, Any] | None) -> Signature:
    """What a graph of these depends on, as it is now."""

    def leaf(each: Leaf) -> Any:
        return (*each.shape, each.dtype) if isinstance(each, Input) else each.value

    parts = [part for part in (model, loss_fn, *(metrics or {}).values()) if isinstance(part, nn.Module)]
    tensors = joint_tensors(model, loss_fn, metrics)
    nested = inputs.inputs
    return Signature(
        image=(*(leaf(each) for each in nested.images), *([nested.image_tree] if len(nested.images) > 1 else [])),
        target=(*(leaf(each) for each in nested.targets), *([nested.target_tree] if len(nested.targets) > 1 else [])),
        modes=tuple(module.training for part in parts for module in part.modules()),
        tensors=tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors.items()),
        metrics=tuple(metrics or {}),
        autocast=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        bytes=tuple(source.raw for source in inputs.sources.values()),
        looks=looks(model=model, loss=loss_fn, metrics=dict(metrics or {})),
    )


def another_buffer(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A buffer at whose values the code looked while it was traced, and which holds others now."""
    for name, value in graph.looked_at.items():
        if name not in tensors or not torch.equal(tensors[name].to("cpu"), value.to("cpu")):
            return name
    return None


def check_plan(made: Plan, wanted: Signature, tensors: Mapping[str, torch.Tensor]) -> None:
    """Whether a plan may run as it stands.

    Raises:
        PlanError: it was made for something else; says what differs first.
    """
    known = made.made_for
    apart = known.difference(wanted) if isinstance(known, Signature) else "nothing that is known"
    if apart is None and (buffer := another_buffer(made.graph, tensors)) is not None:
        apart = f"other values of {buffer}, at which the code looks"
    if apart is not None:
        raise PlanError("plan", f"was made for {apart}", "plan again for what is to be run")

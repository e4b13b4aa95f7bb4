"""Random ops: dropout's masks and noise, drawn by coordinate so that every tile sees the same numbers (rule 6).

``F.dropout`` is ``x * bernoulli / (1 - p)``, ``F.dropout2d`` the same with one number a channel (a small tensor). The
reference run (:mod:`wholegrad.run.reference`) answers the same calls through :func:`drawn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wholegrad.graph import draws
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Node
from wholegrad.graph.layout import Layout
from wholegrad.graph.rules.base import CPU, NO_DOUBLE, Tile, bind, register
from wholegrad.graph.rules.pointwise import Pointwise

aten = torch.ops.aten

# In-place random ops and what they become.
FUNCTIONAL = {
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.bernoulli_.Tensor: aten.bernoulli.Tensor,
    aten.uniform_.default: aten.uniform.default,
    aten.normal_.default: aten.normal_functional.default,
}
NUMBERS = (
    aten.bernoulli.default, aten.bernoulli.p, aten.bernoulli.Tensor, aten.uniform.default,
    aten.normal_functional.default, aten.rand_like.default, aten.randn_like.default, aten.rand.default,
    aten.randn.default,
)  # fmt: skip
RANDOM = frozenset((*NUMBERS, *FUNCTIONAL))


def is_random(op: Any) -> bool:
    """Whether PyTorch tags the op as drawing from a generator."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def drawn(
    op: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    seed: int,
    call: int,
    layout: Layout,
    box: Box,
    device: torch.device = CPU,
) -> torch.Tensor:
    """What random op number ``call`` gives on ``box`` of a tensor with this layout."""
    op = FUNCTIONAL.get(op, op)
    bound = bind(op, args, kwargs)
    where = CPU if device.type in NO_DOUBLE else device
    if op in (aten.randn_like.default, aten.randn.default, aten.normal_functional.default):
        numbers = draws.normal(seed, call, layout, box, where)
        if op is aten.normal_functional.default:
            numbers = numbers * bound["std"] + bound["mean"]
        return numbers.to(dtype).to(device)
    numbers = draws.uniform(seed, call, layout, box, where)
    if op is aten.uniform.default:
        numbers = numbers * (bound["to"] - bound["from"]) + bound["from"]
    elif op in (aten.bernoulli.default, aten.bernoulli.p, aten.bernoulli.Tensor):
        chance = bound["self" if op is aten.bernoulli.default else "p"]
        chance = 0.5 if chance is None else chance  # bernoulli_'s default, which is left out
        numbers = numbers < (chance.to(where) if isinstance(chance, torch.Tensor) else chance)
    return numbers.to(dtype).to(device)


@register(*(op for op in NUMBERS if op not in (aten.rand.default, aten.randn.default)))
class Random(Pointwise):
    """Numbers drawn for the elements of a map."""

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        spec, table = node.outputs[0], dict(zip(node.operands, tensors, strict=True))
        args = [table.get(arg, arg) if not isinstance(arg, list | float | int) else arg for arg in node.args]
        return (drawn(node.op, args, node.kwargs, spec.dtype, tile.seed, node.draw, spec.layout, tile.box,
                      tile.device),)  # fmt: skip

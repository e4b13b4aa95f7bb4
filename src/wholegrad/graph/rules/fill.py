"""Constants of a map's size: ``torch.zeros(labels.shape)`` and the like, which a tile makes for itself.

The capture turns such a call into a map where it meets one; as a tensor it might be as large as the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import tile_shape
from wholegrad.graph.rules.base import CPU, MapRule, Tile, bind, register
from wholegrad.graph.rules.random import drawn

aten = torch.ops.aten
_RANDOM = {aten.rand.default, aten.randn.default}
_VALUES = {
    aten.zeros.default: 0, aten.new_zeros.default: 0, aten.ones.default: 1, aten.new_ones.default: 1,
    aten.empty.memory_format: 0, aten.new_empty.default: 0,
}  # fmt: skip
FILLS = frozenset({*_VALUES, *_RANDOM, aten.full.default, aten.new_full.default})


def normal_form(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Op, arguments and keyword arguments of a call of the same meaning without operands: ``full``, or random."""
    if op in _RANDOM:
        return op, args, kwargs
    value = _VALUES[op] if op in _VALUES else bind(op, args, kwargs)["fill_value"]
    return aten.full.default, (list(shape), value), {}


def filled(node: Node, spec: Spec, box: Box, seed: int, device: torch.device = CPU) -> torch.Tensor:
    """What the call makes, on a box."""
    if node.op in _RANDOM:
        return drawn(node.op, node.args, node.kwargs, spec.dtype, seed, node.draw, spec.layout, box, device)
    return torch.full(tile_shape(spec.layout, box), node.args[1], dtype=spec.dtype, device=device)


@register(aten.full.default, *_RANDOM)
class Fill(MapRule):
    """A map without operands. The capture, which knows what it meets, gives it its layout."""

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        return (filled(node, node.outputs[0], tile.box, tile.seed, tile.device),)

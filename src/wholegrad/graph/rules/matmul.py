"""Matrix products that keep pixels apart: a linear layer over channels, in whatever shape libraries write it.

A product is local if rows and columns lie in a dimension that it keeps and the sum runs over a plain one:
``(pixels, K) @ (K, M)``, ``(M, K) @ (K, pixels)``, and their batched forms. A product that sums over pixels, or makes a
pixel-by-pixel table, has no locality and is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wholegrad.graph.graph import Node, Ref, Spec
from wholegrad.graph.layout import Layout, roles
from wholegrad.graph.rules.base import LayoutRequest, MapRule, checked, register

aten = torch.ops.aten
_ADDED = {aten.addmm.default, aten.baddbmm.default}


@register(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)
class Product(MapRule):
    """``a @ b``, or ``bias + a @ b``, with one factor a map."""

    def _factors(self, op: object, args: tuple[object, ...]) -> tuple[Ref, Ref]:
        a, b = args[1:3] if op in _ADDED else args[:2]
        assert isinstance(a, Ref) and isinstance(b, Ref)
        return a, b

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        a, b = self._factors(request.op, request.args)
        left, right = request.layout(a), request.layout(b)
        if request.op in _ADDED and request.specs[request.args[0]].is_map:
            raise request.refuse("adds a map to a product")
        batches = [roles(dim) for dim in (*left[:-2], *right[:-2])]
        if any(batches) and not all(batches):
            raise request.refuse("multiplies a map by a tensor that is not one, in a batch of pixels")
        if roles(left[-1]) or roles(right[-2]):
            raise request.refuse(f"sums over pixels ({request.specs[a].shape} @ {request.specs[b].shape})")
        if roles(left[-2]) and roles(right[-1]):
            raise request.refuse(f"compares every pixel with every other ({request.shapes[0]})")
        batch = left[:-2] if request.specs[a].is_map else right[:-2]
        return (checked(request, (*batch, left[-2], right[-1])),)

    def macs(self, node: Node, specs: Sequence[Spec]) -> float:
        a, _ = self._factors(node.op, node.args)
        inner = specs[node.operands.index(a)].shape[-1]
        return float(inner * node.outputs[0].pixel_bytes // node.outputs[0].dtype.itemsize)

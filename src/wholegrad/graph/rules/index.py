"""Ops that take or set elements by position: channels by a map of positions, by a small tensor, and tables by labels.

A tensor of positions that is not a map arrives whole: its elements name channels, whatever its own size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from wholegrad.graph.graph import Node, Ref
from wholegrad.graph.layout import Layout, axes, broadcast, plain, shape_of, spatial_dims
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, checked, register
from wholegrad.graph.rules.pointwise import Pointwise, dim_of, refuse_spatial_small

aten = torch.ops.aten


@register(
    aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter.reduce,
    aten.scatter.value_reduce,
)  # fmt: skip
class IndexChannels(MapRule):
    """``op(x, dim, index, ...)`` with an index map: channels picked or set, pixel by pixel (one-hot labels)."""

    aligned = True

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        ref, dim, index = request.args[:3]
        if request.op is aten.gather.default and len(request.specs[ref].shape) == 1 and request.specs[index].is_map:
            return (request.layout(index),)  # a number for each label
        if not all(spec.is_map for spec in request.specs.values()):
            raise request.refuse("indexes a map together with a tensor that is not a map")
        if len({tuple(a for a in axes(spec.layout) if a.role) for spec in request.specs.values()}) != 1:
            raise request.refuse("indexes maps of different sizes")
        dim_of(request, ref, dim)
        return (request.layout(index if request.op is aten.gather.default else ref),)


def _lookup(request: LayoutRequest, table: Ref, index: Ref) -> tuple[Layout, ...]:
    """The layout of ``table[labels]`` with a small table and a map of labels."""
    return (checked(request, (*request.layout(index), *plain(request.specs[table].shape[1:]))),)


@register(aten.embedding.default)
class Embedding(MapRule):
    """A small table looked up by a map of labels."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        table, index = request.args[:2]
        if request.specs[table].is_map or not request.specs[index].is_map:
            raise request.refuse("indexes a map, which has no locality")
        return _lookup(request, table, index)


def _picked(request: LayoutRequest) -> Layout:
    """The layout of ``x[:, positions]``: small tensors of positions along dimensions side by side, none spatial.

    Raises:
        UnsupportedOpError: rows or columns are picked, or the dimensions are apart.
    """
    layout, index = request.layout(request.args[0]), request.args[1]
    dims = [dim for dim, ref in enumerate(index) if ref is not None]
    specs = [request.specs[index[dim]] for dim in dims]
    if any(spec.is_map or spec.dtype is torch.bool for spec in specs):
        raise request.refuse("indexes a map by a map, which has no locality")
    if not dims or set(dims) & spatial_dims(layout) or dims != list(range(dims[0], dims[0] + len(dims))):
        raise request.refuse("picks rows or columns by position")
    shape = np.broadcast_shapes(*(spec.shape for spec in specs))
    return (*layout[: dims[0]], *plain(shape), *layout[dims[-1] + 1 :])


@register(aten.index.Tensor)
class Index(MapRule):
    """``x[:, positions]`` of a map, or ``table[labels]`` with a small table and one map of labels: class weights."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        table, index = request.args[:2]
        if request.specs[table].is_map:
            return (checked(request, _picked(request)),)
        if len(index) != 1 or index[0] is None or not request.specs[index[0]].is_map:
            raise request.refuse("indexes a map together with a tensor that is not a map")
        return _lookup(request, table, index[0])


@register(aten.index_put.default)
class IndexPut(Pointwise):
    """``x[:, positions] = values``: channels of a map set, or added to, by position."""

    whole = ("indices",)

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        ref, values = request.args[0], request.args[2]
        if not request.specs[ref].is_map:
            raise request.refuse("writes a map into a tensor that is not a map")
        written, given = _picked(request), request.specs[values]
        agree = len(given.shape) <= len(written) and broadcast([written, given.layout], shape_of(written)) is not None
        if given.is_map and not agree:
            raise request.refuse("writes a map into another one with rows and columns elsewhere")
        if not given.is_map:
            refuse_spatial_small(request, [written], [given])
        return (request.layout(ref),)


@register(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.index_add.default, aten.index_copy.default)
class FillChannels(MapRule):
    """``op(x, dim, positions, ...)``: channels of a map filled, added to or replaced by those of another."""

    aligned = True
    whole = ("index",)

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        ref, dim, index = request.args[:3]
        if not request.specs[ref].is_map or request.specs[index].is_map:
            raise request.refuse("writes by position, but not into a map by a small tensor")
        layout = request.layout(ref)
        dim = dim_of(request, ref, dim)
        source = request.args[3]
        if isinstance(source, Ref) and request.specs[source].numel > 1:
            other = request.layout(source)
            if [d for i, d in enumerate(other) if i != dim] != [d for i, d in enumerate(layout) if i != dim]:
                raise request.refuse("writes a tensor that is not a map of the same size into a map")
        return (layout,)


@register(aten.bucketize.Tensor, aten.searchsorted.Tensor, aten.isin.Tensor_Tensor)
class AgainstList(MapRule):
    """Each pixel compared with the elements of a small tensor: ``isin``, ``bucketize``, ``searchsorted``."""

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        pixels, known = (request.bound[name] for name in self._names(request))
        if not request.specs[pixels].is_map or any(spec.is_map for ref, spec in request.specs.items() if ref != pixels):
            raise request.refuse("looks pixels up in a map")
        if request.op is aten.searchsorted.Tensor and len(request.specs[known].shape) != 1:
            raise request.refuse("looks every row up in a list of its own")
        return (request.layout(pixels),)

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        return super().run(node, [tensor.contiguous() for tensor in tensors], tile)  # PyTorch warns of others

    def _names(self, request: LayoutRequest) -> tuple[str, str]:
        """Of the argument that is the map, and of the list."""
        if request.op is aten.isin.Tensor_Tensor:
            return "elements", "test_elements"
        return "self", "boundaries" if request.op is aten.bucketize.Tensor else "sorted_sequence"

"""Which dimension of a tensor runs along the image: every value's shape, with rows and columns marked.

A value of the graph is a *map* if it has one row axis and one column axis. Dimensions may hold several axes merged
in row-major order (``logits.flatten()`` holds N, C, H and W in one), so that losses which flatten their input
still run tile by tile: a flattened tile holds other elements in another order than a slice of the flattened map
would, which no pointwise op and no sum can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from math import prod
from typing import NamedTuple

import torch

from wholegrad.graph.geometry import Box


class Role(StrEnum):
    """What an axis runs along."""

    PLAIN = ""
    ROW = "H"
    COL = "W"


class Axis(NamedTuple):
    """``size`` elements along one axis of the image or of anything else."""

    size: int
    role: Role = Role.PLAIN


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def plain(shape: Sequence[int]) -> Layout:
    """The layout of a tensor without rows or columns."""
    return tuple((Axis(size),) for size in shape)


def map_layout(shape: Sequence[int]) -> Layout:
    """The layout of a map ``(..., H, W)``: the last two dimensions are rows and columns."""
    return (*plain(shape[:-2]), (Axis(shape[-2], Role.ROW),), (Axis(shape[-1], Role.COL),))


def shape_of(layout: Layout) -> tuple[int, ...]:
    return tuple(prod(axis.size for axis in dim) for dim in layout)


def axes(layout: Layout) -> list[Axis]:
    return [axis for dim in layout for axis in dim]


def extent(layout: Layout, role: Role) -> int | None:
    """Size of the axis with this role, or None if there is none."""
    sizes = [axis.size for axis in axes(layout) if axis.role is role]
    return sizes[0] if len(sizes) == 1 else None


def is_map(layout: Layout) -> bool:
    return extent(layout, Role.ROW) is not None and extent(layout, Role.COL) is not None


def roles(dim: Dim) -> set[Role]:
    return {axis.role for axis in dim} - {Role.PLAIN}


def spatial_dims(layout: Layout) -> set[int]:
    """Indices of the dimensions that hold a row or column axis."""
    return {i for i, dim in enumerate(layout) if roles(dim)}


def _tile_axis(axis: Axis, rows: int, cols: int) -> int:
    return {Role.PLAIN: axis.size, Role.ROW: rows, Role.COL: cols}[axis.role]


def tile_shape(layout: Layout, box: Box) -> tuple[int, ...]:
    """The shape that a tile of this value has on ``box``."""
    return tuple(prod(_tile_axis(axis, box.height, box.width) for axis in dim) for dim in layout)


def plain_size(layout: Layout) -> int:
    """Elements per pixel: the product of every axis that is neither row nor column."""
    return prod(axis.size for axis in axes(layout) if axis.role is Role.PLAIN)


def _one_each(layout: Layout) -> bool:
    """Whether every dimension holds one axis: a dimension of size 1 may hold none."""
    return all(len(dim) == 1 for dim in layout)


def crop(tile: torch.Tensor, layout: Layout, have: Box, want: Box) -> torch.Tensor:
    """The part of ``tile`` (the value's elements on ``have``) that lies on ``want``; a view where one exists."""
    if have == want:
        return tile
    flat = axes(layout)
    rows, cols = want.slices(have)
    pick = {Role.PLAIN: slice(None), Role.ROW: rows, Role.COL: cols}
    if not _one_each(layout):
        tile = tile.reshape([_tile_axis(axis, have.height, have.width) for axis in flat])
    return tile[tuple(pick[axis.role] for axis in flat)].reshape(tile_shape(layout, want))


def full_box(layout: Layout) -> Box:
    """All rows and columns of a map."""
    return Box(0, extent(layout, Role.ROW) or 1, 0, extent(layout, Role.COL) or 1)


def unflattened(tile: torch.Tensor, layout: Layout, box: Box) -> torch.Tensor:
    """``tile`` (the value's elements on ``box``) with one dimension for each axis."""
    flat = axes(layout)
    if _one_each(layout):
        return tile
    return tile.reshape([_tile_axis(axis, box.height, box.width) for axis in flat])


def on_box(whole: torch.Tensor, layout: Layout, box: Box) -> torch.Tensor:
    """The elements on ``box`` of a contiguous whole value, one dimension for each axis: a view to write through."""
    flat = axes(layout)
    pick = {Role.PLAIN: slice(None), Role.ROW: box.slices()[0], Role.COL: box.slices()[1]}
    return whole.view([axis.size for axis in flat])[tuple(pick[axis.role] for axis in flat)]


def aligned(shape: Sequence[int], layout: Layout) -> Layout | None:
    """The layout of a tensor of this shape that broadcasts with a map; None if it does not run along the image.

    Where the map has a row or column axis and the tensor has as many elements, the tensor runs along it; where it has
    one, it holds one row or column. Dimensions are compared from the back.
    """
    result: list[Dim] = []
    runs = False
    for i, size in enumerate(shape):
        back = len(shape) - i
        dim = layout[-back] if back <= len(layout) else (Axis(size),)
        if not roles(dim):
            result.append((Axis(size),))
        elif size == 1:
            result.append(tuple(axis._replace(size=1) for axis in dim))
        elif size == prod(axis.size for axis in dim):
            result.append(dim)
            runs = True
        else:
            return None
    return tuple(result) if runs and is_map(tuple(result)) else None


def _without_ones(dim: Sequence[Axis]) -> Dim:
    """A dimension less its plain axes of size one: rows that a view merged with one are rows still."""
    return tuple(axis for axis in dim if axis.size != 1 or axis.role) or tuple(dim[:1])


def regroup(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout after ``view(shape)``; None if that would split the row or the column axis."""
    pending = axes(layout)
    result: list[Dim] = []
    for size in shape:
        dim: list[Axis] = []
        missing = size
        while pending and (missing > 1 or (pending[0].size == 1 and not dim)):
            axis = pending.pop(0)
            if missing % axis.size == 0:
                dim.append(axis)
                missing //= axis.size
            elif axis.role is Role.PLAIN and axis.size % missing == 0:
                dim.append(Axis(missing))
                pending.insert(0, Axis(axis.size // missing))
                missing = 1
            else:
                return None
        if missing != 1:
            return None
        result.append(_without_ones(dim))
    if any(axis.size != 1 for axis in pending):
        return None
    if pending and result:
        result[-1] = _without_ones([*result[-1], *pending])
    return tuple(result) if result or not pending else None


def _same_axes(a: Dim, b: Dim) -> bool:
    def strip(dim: Dim) -> list[Axis]:
        return [axis for axis in dim if axis.size != 1]

    left, right = strip(a), strip(b)
    return left == right or (not roles(tuple(left)) and not roles(tuple(right)))


def broadcast(layouts: Sequence[Layout], shape: Sequence[int]) -> Layout | None:
    """The layout of a pointwise result of this shape; None if operands disagree on where rows and columns are."""
    result: list[Dim] = []
    for i in range(len(shape)):
        back = len(shape) - i
        dims = [layout[-back] for layout in layouts if len(layout) >= back]
        full = [dim for dim in dims if prod(axis.size for axis in dim) == shape[i]]
        full.sort(key=lambda dim: -len(roles(dim)))
        if not full:
            result.append((Axis(shape[i]),))
            continue
        if any(not _same_axes(full[0], other) for other in full[1:]):
            return None
        result.append(full[0])
    found = [axis.role for axis in axes(tuple(result)) if axis.role is not Role.PLAIN]
    return tuple(result) if len(found) == len(set(found)) else None

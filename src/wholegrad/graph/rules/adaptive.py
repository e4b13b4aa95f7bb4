"""Pooling to a given size: bins that differ in length by one and may overlap, which no fixed window describes.

Of n inputs and k outputs, output i reads bin ``[floor(i n / k), ceil((i + 1) n / k))``.
Example: n = 5, k = 3 has bins [0, 2), [1, 4), [3, 5).

Where k divides n, bins are windows and PyTorch's pooling runs on the tile. Otherwise averages are one product with a
matrix for rows and one for columns; for maxima every bin is laid out in as many slots as the longest has, the last
element repeated, which neither changes a maximum nor where it is found first. An average to size 1 arrives as
``aten.mean`` and is no concern of this file. :mod:`wholegrad.graph.rules.bins` registers these rules, and turns them
into reductions where bins are few and large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Node, Spec
from wholegrad.graph.layout import Layout, Role
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile
from wholegrad.graph.rules.shape import boxes, extent_of, planar, taken

aten = torch.ops.aten
Ints = npt.NDArray[np.int64]


def bins(out: Interval, size: int, count: int) -> tuple[Ints, Ints]:
    """Starts and ends (half-open) of these outputs' bins of ``size`` inputs cut into ``count``."""
    i = np.arange(out.lo, out.hi, dtype=np.int64)
    return i * size // count, -(-(i + 1) * size // count)


class Adaptive(MapRule):
    """What both poolings share: which inputs an interval of bins covers."""

    copies = (1, 1)

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        return planar(request)

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        size, count = extent_of(specs[0], role), extent_of(node.outputs[0], role)
        return Interval(out.lo * size // count, -(-out.hi * size // count))

    def axes(self, node: Node, tile: Tile) -> list[tuple[Ints, Ints, Interval]]:
        """For rows and for columns: bins' starts and ends in the whole map, and the interval of it that is there."""
        have, source, target = boxes(tile, 0), tile.specs[0], node.outputs[0]
        return [
            (*bins(tile.box.rows, source.rows, target.rows), have.rows),
            (*bins(tile.box.cols, source.cols, target.cols), have.cols),
        ]


class AdaptiveAverage(Adaptive):
    """``_adaptive_avg_pool2d``, also what interpolation by area is."""

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        x, source, target = tensors[0], tile.specs[0], node.outputs[0]
        if source.rows % target.rows == 0 and source.cols % target.cols == 0:
            kernel = [source.rows // target.rows, source.cols // target.cols]
            return (aten.avg_pool2d(x, kernel, kernel),)
        rows, cols = (averaging(*axis, x.dtype, x.device) for axis in self.axes(node, tile))
        z = (x if x.dim() == 4 else x.unsqueeze(0)).permute(0, 2, 3, 1)
        n, height, width, channels = z.shape
        z = torch.matmul(rows, z.reshape(n, height, width * channels))
        z = torch.matmul(cols, z.reshape(n * len(rows), width, channels))
        z = z.reshape(n, len(rows), len(cols), channels).permute(0, 3, 1, 2)
        return (z if x.dim() == 4 else z.squeeze(0),)


def averaging(starts: Ints, ends: Ints, have: Interval, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix ``(bins, inputs)`` that averages ``have`` over bins."""
    i = np.arange(have.lo, have.hi)
    inside = (i >= starts[:, None]) & (i < ends[:, None])
    return torch.from_numpy(inside / (ends - starts)[:, None]).to(dtype).to(device)


class AdaptiveMax(Adaptive):
    """``adaptive_max_pool2d``: the largest element of each bin and its flat position in the whole plane."""

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        x = tensors[0]
        (rows, kernel_h), (cols, kernel_w) = (slots(starts, ends) for starts, ends, _ in self.axes(node, tile))
        have = boxes(tile, 0)
        x = taken(taken(x, rows - have.y0, x.dim() - 2), cols - have.x0, x.dim() - 1)
        found, local = aten.max_pool2d_with_indices(x, [kernel_h, kernel_w], [kernel_h, kernel_w])
        first, across = (torch.from_numpy(each).to(x.device) for each in (rows * tile.specs[0].cols, cols))
        of_row = first[torch.div(local, len(cols), rounding_mode="floor")]
        return found, of_row + across[local % len(cols)]


def slots(starts: Ints, ends: Ints) -> tuple[Ints, int]:
    """Positions of the inputs with every bin in equally many slots, and how many; short bins repeat their last."""
    length = int((ends - starts).max())
    return np.minimum(starts[:, None] + np.arange(length), ends[:, None] - 1).reshape(-1), length

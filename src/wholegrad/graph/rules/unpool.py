"""Max unpooling: each input is written where a max pooling found it, which the op alone does not say.

Its indices may point anywhere. Those of a pooling with stride s point close to where its window sits, and the sizes
give s: the whole number nearest to outputs over inputs. So input i may write ``[(i - 1) s, (i + 2) s)``, outputs
``[a, b)`` hear from inputs ``[floor(a / s) - 1, ceil(b / s) + 1)``, and every tile checks what it reads: since each
input lies in some tile, an index that points elsewhere is always found, and refused.

Example: 6 inputs, 13 outputs: s = 2. Outputs [4, 6) hear from inputs [1, 4), which may write [0, 10).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Node, Spec, unsupported
from wholegrad.graph.layout import Layout, Role
from wholegrad.graph.rules.base import LayoutRequest, MapRule, Tile, register
from wholegrad.graph.rules.shape import boxes, clip, extent_of, planar

aten = torch.ops.aten


def stride(inputs: int, outputs: int) -> int:
    """The stride of the pooling that is undone, as far as sizes tell."""
    return max(1, (2 * outputs + inputs) // (2 * inputs))


def reach(inputs: Interval, step: int) -> Interval:
    """Outputs that these inputs may write, past the map's ends included."""
    return Interval((inputs.lo - 1) * step, (inputs.hi + 1) * step)


@register(aten.max_unpool2d.default)
class MaxUnpool(MapRule):
    """``max_unpool2d(x, indices, output_size)``."""

    copies = (1, 1)

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        source, shape = request.specs[request.args[0]], request.shapes[0]
        if request.layout(request.args[1]) != source.layout:
            raise request.refuse("has indices that do not run along the image as its input does")
        for size, made in ((source.shape[-2], shape[-2]), (source.shape[-1], shape[-1])):
            step = stride(size, made)
            if not (size - 2) * step < made <= (size + 2) * step:
                raise request.refuse(f"makes {made} of {size} pixels, which no stride explains")
        return planar(request)

    def needs(self, node: Node, specs: Sequence[Spec], operand: int, role: Role, out: Interval) -> Interval:
        size = extent_of(specs[0], role)
        step = stride(size, extent_of(node.outputs[0], role))
        return clip(Interval(out.lo // step - 1, -(-out.hi // step) + 1), size)

    def run(self, node: Node, tensors: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, ...]:
        x, index = tensors
        have, source, target = boxes(tile, 0), tile.specs[0], node.outputs[0]
        high, wide = stride(source.rows, target.rows), stride(source.cols, target.cols)
        rows = torch.div(index, target.cols, rounding_mode="floor")
        cols = index - rows * target.cols
        if not (_near(rows, have.rows, high, -2) and _near(cols, have.cols, wide, -1)):
            raise unsupported(node.place, "has indices that point far from where a pooling of these sizes looked")
        made = Box.of(reach(have.rows, high), reach(have.cols, wide)).union(tile.box)
        local = (rows - made.y0) * made.width + (cols - made.x0)
        mine_rows, mine_cols = tile.box.slices(made)
        return (aten.max_unpool2d(x, local, [made.height, made.width])[..., mine_rows, mine_cols],)


def _near(found: torch.Tensor, inputs: Interval, step: int, dim: int) -> bool:
    """Whether each input's index along ``dim`` lies where it may write."""
    at = torch.arange(inputs.lo, inputs.hi, device=found.device) * step
    away = found - (at.unsqueeze(-1) if dim == -2 else at)
    return bool(away.min() >= -step) and bool(away.max() < 2 * step)

"""One pass over some maps of equal size: a program's values, the gradients of what it reads, and sums over pixels.

PyTorch makes a pass through memory for each op, and one or two for each op's gradient; here a chain of them costs one
pass forward and one back. A sum over a map takes no map at all, and may give the gradients of its terms as it goes,
where the gradient of the sum is known before (rule 4).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from wholegrad import clock
from wholegrad.kernels import interleaved, stage
from wholegrad.kernels.compile import function
from wholegrad.kernels.emit import Code
from wholegrad.kernels.expression import EACH, MAP, ONE, Leaf, Program, evaluate
from wholegrad.kernels.host import Host, host
from wholegrad.kernels.thin import REAL, Mixed, Table, lanes

POINTERS = 5  # sizes, leaves, outputs, gradient, totals
SIZES = ("channels", "height", "width")
RUN = 16  # vectors that a lane sums before the sum is added to a float64 total: glass has long runs of equal terms


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        value: whether the program's values are stored, as the first output.
        slopes: the leaves whose gradients are wanted: of a map stored, of small values summed over each channel.
        grad: what slopes are multiplied by: a map, or one value; None for 1.
        total: whether the values of each channel are summed, as the first sum.
        interleaved: whether all maps have their channels next to each other in memory; else their columns.
    """

    program: Program
    real: str
    value: bool
    slopes: tuple[int, ...]
    grad: Leaf | None
    total: bool
    interleaved: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """The leaves whose gradients are maps."""
        return tuple(i for i in self.slopes if self.program.leaves[i].kind == MAP)

    @property
    def summed(self) -> tuple[int, ...]:
        """The leaves whose gradients are sums."""
        return tuple(i for i in self.slopes if self.program.leaves[i].kind != MAP)


def write(shape: Shape, machine: Host) -> str:
    """The module whose function ``walk`` computes the shape."""
    code = Code(shape.real, machine.lanes(shape.real))
    n, program = code.lanes, shape.program
    count = shape.total + len(shape.summed)

    def work(leaves: Sequence[str], factor: str) -> tuple[list[str], list[str]]:
        """What is stored and what is summed, of a vector of every leaf and one of the gradient."""
        value = evaluate(code, program, leaves).value if shape.value or shape.total else ""
        stored, added = [value] * shape.value, [value] * shape.total
        for i in shape.slopes:
            slope = evaluate(code, program, leaves, i).slope or "zeroinitializer"
            slope = code.real2("fmul", slope, factor) if factor else slope
            (stored if program.leaves[i].kind == MAP else added).append(slope)
        return stored, added

    if shape.interleaved:
        counts = shape.value + len(shape.stored), count
        return interleaved.write(code, program.leaves, shape.grad, counts, work)
    channels, height, width = (code.integer("%sizes", i) for i in range(len(SIZES)))
    whole = code.sub(width, n - 1)
    grad = Program((shape.grad,)) if shape.grad else None
    with code.loop(0, channels) as channel:
        reader = stage.Leaves(code, program, "%leaves", channel.index)
        given = stage.Leaves(code, grad, "%grad", channel.index) if grad else None
        writers = [
            stage.Leaves(code, Program((Leaf(),)), code.at("%outputs", i * stage.LEAF, "i64"), channel.index)
            for i in range(shape.value + len(shape.stored))
        ]
        totals = code.at("%totals", code.mul(channel.index, count * n), "double")
        with code.loop(0, height) as row:
            line, by = reader.row(row.index, 0), given.row(row.index, 0) if given else None
            outputs = [writer.row(row.index, 0).pointers[0] for writer in writers]

            def one(place: str, sums: list[str], mask: str = "") -> list[str]:
                leaves = line.vectors(place, mask)
                factor = by.vectors(place, mask)[0] if by else ""
                stored, added = work(leaves, factor)
                for pointer, each in zip(outputs, stored, strict=True):
                    if mask:
                        code.store_where(mask, each, code.at(pointer, place))
                    else:
                        code.store(each, code.at(pointer, place))
                kept = [code.select(mask, each, "zeroinitializer") if mask else each for each in added]
                return [code.real2("fadd", a, b) for a, b in zip(sums, kept, strict=True)]

            def keep(sums: list[str]) -> None:
                for i, each in enumerate(sums):
                    code.add_wide(code.at(totals, i * n, "double"), each)

            zeros = ["zeroinitializer"] * count
            with code.loop(0, whole, RUN * n) as run:
                end = code.least(whole, code.add(run.index, RUN * n))
                with code.loop(run.index, end, n, zeros) as place:
                    place.after = one(place.index, place.values)
                keep(place.values)
            done = code.mul(code.set(f"sdiv i64 {width}, {n}"), n)
            with code.loop(done, width, n, zeros) as rest:
                rest.after = one(rest.index, rest.values, code.lanes_within(0, code.sub(width, rest.index)))
            keep(rest.values)
    body = code.function("walk", "ptr %sizes, ptr %leaves, ptr %outputs, ptr %grad, ptr %totals")
    return stage.declarations(shape.real, n) + body


@cache
@clock.timed("preparing", "machine code")
def kernel(shape: Shape) -> Callable[..., None]:
    machine = host()
    assert machine is not None
    return function(write(shape, machine), "walk", POINTERS)


def sizes(channels: int, height: int, width: int) -> ctypes.Array[ctypes.c_int64]:
    """What a kernel is told of the maps' size."""
    return (ctypes.c_int64 * len(SIZES))(channels, height, width)


class Walked(NamedTuple):
    """What a pass gave: values, gradients of leaves by their numbers, and sums ``(N, C)`` in float64."""

    value: torch.Tensor | None
    grads: dict[int, torch.Tensor]
    total: torch.Tensor | None


def values(x: Mixed, dtype: torch.dtype) -> torch.Tensor:
    """The map that ``x``, of one part, stands for."""
    found = _walk(x, dtype, Shape(_bare(x), REAL[dtype], True, (), None, False), None).value
    assert found is not None
    return found


def pull(x: Mixed, grad: torch.Tensor) -> dict[int, torch.Tensor]:
    """Gradients of the wanted leaves of ``x`` by their numbers, given that of its values; of small ones in float64."""
    program = x.parts[0].program
    shape = Shape(_bare(x), REAL[grad.dtype], False, program.wanted, Leaf(), False)
    return _walk(x, grad.dtype, shape, grad).grads


def total(x: Mixed, dtype: torch.dtype, share: torch.Tensor | None) -> Walked:
    """The sums of ``x`` over rows and columns ``(N, C)`` in float64, and gradients of its wanted leaves.

    Args:
        share: the gradient of each sum, one value; None if no gradient is wanted.
    """
    program = x.parts[0].program
    wanted, grad = (program.wanted, Leaf(ONE)) if share is not None else ((), None)
    return _walk(x, dtype, Shape(_bare(x), REAL[dtype], False, wanted, grad, True), share)


def _bare(x: Mixed) -> Program:
    program = x.parts[0].program
    return program._replace(leaves=tuple(leaf._replace(grad=False) for leaf in program.leaves))


def lies_interleaved(x: torch.Tensor) -> bool:
    """Whether the channels of ``(N, C, H, W)``, more than one, lie next to each other in memory."""
    return x.shape[1] > 1 and x.stride(1) == 1 and (x.shape[3] == 1 or x.stride(3) >= x.shape[1])


def _channels_adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if lies_interleaved(x) else x.contiguous(memory_format=torch.channels_last)


class PixelTable(Table):
    """Maps have elements from pixel to pixel, and from row to row."""

    def _lying(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        tensor = _channels_adjacent(tensor)
        return tensor, (tensor.stride(3), tensor.stride(2))


def _along_channels(x: Mixed) -> bool:
    """Whether to walk along channels: where at least half of the maps lie so, and none is of bytes."""
    maps = [(leaf, each) for leaf, each in zip(x.parts[0].program.leaves, x.leaves, strict=True) if leaf.kind == MAP]
    return not any(leaf.bytes for leaf, _ in maps) and 2 * sum(lies_interleaved(each) for _, each in maps) >= len(maps)


def aligned(x: Mixed) -> Mixed:
    """``x``, of one part, with its maps copied where a pass would copy them each time."""
    if not _along_channels(x):
        return x
    kinds = [leaf.kind for leaf in x.parts[0].program.leaves]
    each = zip(kinds, x.leaves, strict=True)
    return x._replace(leaves=tuple(_channels_adjacent(leaf) if kind == MAP else leaf for kind, leaf in each))


def _walk(x: Mixed, dtype: torch.dtype, shape: Shape, grad: torch.Tensor | None) -> Walked:
    n, c, h, w = x.shape
    along = _along_channels(x)
    shape = shape._replace(interleaved=along)
    form = torch.channels_last if along else torch.contiguous_format
    outputs = [
        torch.empty((n, c, h, w), dtype=dtype, memory_format=form) for _ in range(shape.value + len(shape.stored))
    ]
    count, many = shape.total + len(shape.summed), lanes(shape.real)
    sums = torch.zeros((n, count, -(-c // many) * many, 1) if along else (n, c, count, many), dtype=torch.float64)
    table = PixelTable if along else Table
    call, given = kernel(shape), table(x.parts[0].program.leaves, x.leaves)
    made = table((Leaf(),) * len(outputs), outputs)
    by = None if shape.grad is None or grad is None else table((shape.grad,), (grad,))
    told = sizes(c, h, w)
    if n * c * h * w:
        for i in range(n):
            factor = None if by is None else by.of(i)
            call(told, given.of(i), made.of(i), factor, sums[i].data_ptr())
    added = list(sums[:, :, :c, 0].permute(1, 0, 2) if along else sums.sum(-1).permute(2, 0, 1))
    value = outputs.pop(0) if shape.value else None
    total = added.pop(0) if shape.total else None
    grads = dict(zip(shape.stored, outputs, strict=True))
    for i, each in zip(shape.summed, added, strict=True):
        grads[i] = each.sum(0) if x.parts[0].program.leaves[i].kind == EACH else each.sum()
    return Walked(value, grads, total)

"""The kernel of a weight gradient: sums over a map of products of the output's gradient and the input.

A block of weights keeps one vector of sums each in registers while it runs along rows: vectors of the input (some
channels, every tap of a row) times vectors of the gradient (some channels, every row that the input row belongs to), so
that a handful of loads feeds two dozen multiply-adds. After a bounded run the sums are added to float64 totals.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from typing import NamedTuple

from wholegrad.kernels import stage
from wholegrad.kernels.emit import Code, Value
from wholegrad.kernels.host import Host
from wholegrad.kernels.taps import Axis, axis

# sizes, leaves of input and gradient, totals, sums, scratch of the input, scratch of the gradient, notes for fetching
POINTERS = 8
SIZES = (
    "height", "width", "top", "left",  # of the input, and where its scratch starts
    "grad_height", "grad_width",  # of the gradient
    "rows",  # of one phase: the gradient's and those that taps reach beyond
    "band", "run",  # rows of a phase in one band, and before sums are added to totals
    "places", "scratch_channel", "grad_places", "grad_scratch_channel",
)  # fmt: skip
MOST_WEIGHTS = 640  # unrolled


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        summed: whose channels are summed on the way: x, g or neither.
        direct: which parts of the input, maps as they are, are read where they lie and not staged: of stride 1, where
            no padding is read, and where the gradient's columns fill all vectors.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    real: str
    parts: tuple[stage.Part, ...] = ()
    grad_parts: tuple[stage.Part, ...] = ()
    summed: str = ""
    direct: tuple[bool, ...] = ()

    @property
    def staged(self) -> int:
        """Channels of the input that are staged."""
        return self.inputs - stage.in_place(self.parts, self.inputs, self.direct)

    def axes(self) -> tuple[Axis, Axis]:
        rows, cols = (axis(self.kernel[i], self.stride[i], self.dilation[i], False, 0) for i in (0, 1))
        return rows, cols


class Item(NamedTuple):
    """A vector that is loaded: of the input (``tap`` along columns) or of the gradient (along rows)."""

    channel: int
    tap: int
    source: int
    shift: int


def split(items: list[Item], size: int) -> list[list[Item]]:
    """As few lists of at most ``size`` as can be, of nearly equal lengths."""
    count = ceil(len(items) / size)
    ends = [round(i * len(items) / count) for i in range(count + 1)]
    return [items[a:b] for a, b in pairwise(ends)]


def blocking(inputs: int, grads: int, registers: int) -> tuple[int, int]:
    """How many vectors of input and gradient to multiply at a time, so that all passes together take the least time."""
    best, least = (1, 1), float("inf")
    for a in range(1, inputs + 1):
        for b in range(1, grads + 1):
            if a * b + min(a, b) + 1 > registers or a * b > 25 or max(a, b) > 12:
                continue
            blocks = ceil(inputs / a) * ceil(grads / b)
            loads = 1.8 * inputs * ceil(grads / b) + grads * ceil(inputs / a)
            cost = max(loads, inputs * grads) + 0.25 * loads + 2 * blocks
            if a * b < 8:  # a multiply-add takes four cycles or more: too few sums stand waiting for themselves
                cost += blocks * (8 - a * b)
            if cost < least:
                best, least = (a, b), cost
    return best


def chunk(channels: int, taps: int, room: int) -> int:
    """How many channels to unroll: all if they fit, else the largest divisor that does."""
    return max(d for d in range(1, channels + 1) if channels % d == 0 and (d == 1 or d * taps <= room))


def write(shape: Shape, host: Host) -> str:
    """The module whose function ``correlate`` computes the shape."""
    rows, cols = shape.axes()
    n = host.lanes(shape.real)
    code = Code(shape.real, n)
    arg = {name: code.integer("%sizes", i) for i, name in enumerate(SIZES)}
    reach, step, phases = rows.reach, rows.sources, cols.sources
    taps = shape.kernel[0] * shape.kernel[1]
    outputs = chunk(shape.outputs, taps, MOST_WEIGHTS // max(1, min(shape.inputs, 4)))
    inputs = chunk(shape.inputs, taps * outputs, MOST_WEIGHTS)
    parts = stage.parts_of(shape.parts, shape.inputs)
    grad_parts = stage.parts_of(shape.grad_parts, shape.outputs)
    table = code.at("%notes", stage.NOTE * shape.inputs, "i64") if shape.direct else ""
    with code.loop(0, arg["rows"], arg["band"]) as band:
        count = code.least(arg["band"], code.sub(arg["rows"], band.index))
        first, deep = code.add(arg["top"], code.mul(band.index, step)), code.mul(count, step)
        area = stage.Area(first, deep, arg["height"], arg["width"], arg["left"], arg["places"])
        sums: tuple[str, Value] | None = ("%sums", 0) if shape.summed == "x" else None
        scratch = "%scratch", arg["scratch_channel"]
        stage.fill(code, parts, "x", "%leaves", area, scratch, sums, shape.direct)
        if table:
            stage.places(code, parts, shape.direct, "%leaves", area, scratch, table)
        above = code.sub(band.index, reach)
        area = stage.Area(above, code.add(count, reach), arg["grad_height"], arg["grad_width"], 0, arg["grad_places"])
        sums = ("%sums", reach) if shape.summed == "g" else None  # the rows above came with the band before
        stage.fill(code, grad_parts, "g", "%grad_leaves", area, ("%grad_scratch", arg["grad_scratch_channel"]), sums)
        stage.note(code, parts, "%leaves", "%notes", code.add(first, deep), arg["left"])
        with code.loop(0, count, arg["run"]) as run:
            end = code.least(code.add(run.index, arg["run"]), count)
            with code.loop(0, shape.outputs, outputs) as o, code.loop(0, shape.inputs, inputs) as i:
                x = code.at("%scratch", code.mul(i.index, arg["scratch_channel"]))
                if table:
                    x = code.at(table, code.mul(i.index, stage.PLACE), "i64")
                g = code.at("%grad_scratch", code.mul(o.index, arg["grad_scratch_channel"]))
                first_weight = code.mul(code.add(code.mul(o.index, shape.inputs), i.index), taps * n)
                totals = code.at("%totals", first_weight, "double")
                across = [Item(c, t.number, t.source, t.shift) for c in range(inputs) for t in cols.taps]
                for phase in range(step):
                    down = [
                        Item(c, t.number, t.source, reach - t.shift)
                        for c in range(outputs) for t in rows.taps if t.source == phase
                    ]  # fmt: skip
                    if not down:
                        continue
                    a, b = blocking(len(across), len(down), host.registers)
                    blocks = [(some, other) for some in split(across, a) for other in split(down, b)]
                    lines = [(c, k) for c in range(inputs) for k in range(phases)]
                    for number, (some, other) in enumerate(blocks):
                        mine = lines[number :: len(blocks)]
                        _block(code, shape, arg, (x, g, totals), run.index, end, phase, some, other, (i.index, mine))
    arguments = (
        "ptr %sizes, ptr %leaves, ptr %grad_leaves, ptr %totals, ptr %sums, ptr %scratch, ptr %grad_scratch, ptr %notes"
    )
    body = code.function("correlate", arguments)
    staging = stage.stages(shape.real, n, phases, parts, "x", shape.summed == "x", shape.direct)
    staging += stage.stages(shape.real, n, 1, grad_parts, "g", shape.summed == "g")
    return stage.declarations(shape.real, n) + staging + body


def _row(code: Code, table: str, channel: int, row: Value) -> str:
    """Where a channel has that row of the band."""
    pointer, pitch = stage.place(code, table, channel)
    return code.at(pointer, code.mul(row, pitch))


def _block(
    code: Code,
    shape: Shape,
    arg: dict[str, str],
    pointers: tuple[str, str, str],
    start: str,
    end: str,
    phase: int,
    across: list[Item],
    down: list[Item],
    fetch: tuple[Value, list[tuple[int, int]]],
) -> None:
    """Sum the products of these vectors over rows ``[start, end)`` of a phase and add the sums to the totals.

    Args:
        pointers: of the input's scratch, or of the table of its channels' places where some are direct; of the
            gradient's scratch; of the totals.
    """
    rows, cols = shape.axes()
    x, g, totals = pointers
    pairs = [(a, b) for a in across for b in down]
    with code.loop(start, end, 1, ["zeroinitializer"] * len(pairs)) as row:
        x_row = code.add(code.mul(row.index, rows.sources), phase)
        x_places = {
            key: _row(code, x, key[0], x_row)
            if shape.direct
            else code.at(
                x,
                code.add(
                    code.mul(arg["scratch_channel"], key[0]),
                    code.mul(code.add(code.mul(x_row, cols.sources), key[1]), arg["places"]),
                ),
            )
            for key in dict.fromkeys((item.channel, item.source) for item in across)
        }
        g_places = [
            code.at(
                g,
                code.add(
                    code.mul(arg["grad_scratch_channel"], item.channel),
                    code.mul(code.add(row.index, item.shift), arg["grad_places"]),
                ),
            )
            for item in down
        ]
        first, lines = fetch
        size = stage.item_size(code, stage.parts_of(shape.parts, shape.inputs))
        notes = [(stage.Note(code, "%notes", code.add(first, c), size), k) for c, k in lines]
        fetched = [(note, note.at(x_row, k * code.lanes)) for note, k in notes]
        with code.loop(0, arg["grad_width"], code.lanes, row.values) as place:
            for note, pointer in fetched:
                offset = code.mul(code.mul(place.index, cols.sources), note.size)
                code.fetch(code.at(pointer, offset, "i8"))
            found = dict(zip(pairs, place.values, strict=True))
            # The fewer ones stay in registers while each of the others is loaded.
            xs = [code.at(code.at(x_places[item.channel, item.source], place.index), item.shift) for item in across]
            gs = [code.at(pointer, place.index) for pointer in g_places]
            few, many = (xs, gs) if len(xs) < len(gs) else (gs, xs)
            held = [code.load(pointer) for pointer in few]
            for i, place_of in enumerate(many):
                each = code.load(place_of)
                for k, vector in enumerate(held):
                    pair = (across[k], down[i]) if few is xs else (across[i], down[k])
                    found[pair] = code.fma(each, vector, found[pair])
            place.after = [found[pair] for pair in pairs]
        row.after = place.values
    area = shape.kernel[0] * shape.kernel[1]
    for (item, other), value in zip(pairs, row.values, strict=True):
        weight = (other.channel * shape.inputs + item.channel) * area + other.tap * shape.kernel[1] + item.tap
        code.add_wide(code.at(totals, weight * code.lanes, "double"), value)

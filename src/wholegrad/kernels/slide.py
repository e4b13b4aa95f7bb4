"""The kernel of convolution and transposed convolution: a block of outputs stays in registers while taps add to it.

A block is some output channels x rows x column phases x vectors. Each row of the (staged) input that it needs is loaded
once for all its output rows and channels; each weight is spread over a vector's lanes once for all its vectors.
What is staged may be computed on the way (``parts``), and outputs may be multiplied by a derivative as they are stored
(``factor``), so that activations before a convolution cost no map of their own, neither forward nor backward. Or a
program is computed of each output (``store``): a mask of logits is stored as bytes. What lies as the kernel wants it
may be read where it is (``direct``).
"""

from __future__ import annotations

from collections import defaultdict
from math import ceil
from typing import NamedTuple

from wholegrad.kernels import stage
from wholegrad.kernels.emit import Code, Value
from wholegrad.kernels.expression import Program, evaluate
from wholegrad.kernels.host import Host
from wholegrad.kernels.stage import Leaves, Part
from wholegrad.kernels.taps import Axis, axis

POINTERS = 8  # sizes, leaves of the input, weight, bias, output, leaves of the factor, scratch, notes for fetching
SIZES = (
    "height", "width",  # of the input
    "out_height", "out_width", "out_channel", "out_pitch",
    "top", "left",  # input row and column that scratch starts with
    "rows", "places",  # output rows and columns of one phase
    "band", "scratch_places", "scratch_channel",  # rows of a phase in one band; elements a phase's row and a channel
)  # fmt: skip
MOST_MULTIPLIES = 4096  # unrolled for one input channel
MOST = 8  # rows of a block, and vectors
UNALIGNED = 1.8  # loads that one vector from anywhere costs


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        residue: 0 unless ``transposed``.
        parts: how the input's channels are had; a tensor as it is where empty.
        factor: outputs are multiplied by its derivative with respect to its one wanted leaf.
        store: what is made of an output, its only leaf, as it is stored.
        direct: which parts, maps as they are, are read where they lie and not staged: of stride 1 and where no padding
            is read. Of what lies after such a map up to ``MOST - 1`` rows and as many vectors are read for nothing.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    transposed: bool
    residue: tuple[int, int]
    real: str
    parts: tuple[Part, ...] = ()
    factor: Program | None = None
    store: Program | None = None
    direct: tuple[bool, ...] = ()

    @property
    def staged(self) -> int:
        """Channels of the input that are staged."""
        return self.inputs - stage.in_place(self.parts, self.inputs, self.direct)

    @property
    def bytes(self) -> bool:
        """Whether outputs are stored as bytes."""
        return self.store is not None and self.store.mask

    def axes(self) -> tuple[Axis, Axis]:
        rows, cols = (
            axis(self.kernel[i], self.stride[i], self.dilation[i], self.transposed, self.residue[i]) for i in (0, 1)
        )
        return rows, cols


class Block(NamedTuple):
    """Outputs that one pass keeps in registers."""

    channels: int
    rows: int
    vectors: int

    def groups(self, outputs: int) -> list[int]:
        """The first output channel of each pass; the last pass may do some channels again."""
        return [min(g * self.channels, outputs - self.channels) for g in range(ceil(outputs / self.channels))]


def block(shape: Shape, host: Host) -> Block:
    """The block with the fewest loads a multiply."""
    rows, cols = shape.axes()
    room = host.registers * 3 // 4
    passes = ceil(shape.outputs * cols.targets / (room // 2))
    channels = max(1, ceil(shape.outputs / passes))
    held = channels * cols.targets
    taps = len(rows.taps) * len(cols.taps) / rows.targets
    columns = len({(tap.source, tap.shift) for tap in cols.taps})
    best, least = Block(channels, 1, 1), float("inf")
    for r in range(1, MOST + 1):
        for v in range(1, MOST + 1):
            fits = held * r * v <= room and taps * channels * r * v <= MOST_MULTIPLIES
            if not fits and (r, v) != (1, 1):
                continue
            deltas = {k * rows.sources + rows.sources * t.shift + t.source for k in range(r) for t in rows.taps}
            loads = UNALIGNED * len(deltas) / rows.targets * columns * v + taps * channels * r
            cost = loads / (taps * channels * r * v) + 0.01 * v  # short blocks waste less at a row's end
            if cost < least:
                best, least = Block(channels, r, v), cost
    return best


Uses = dict[int, list[tuple[int, int]]]


def row_uses(rows: Axis, size: Block, phase: int) -> Uses:
    """For each input row, counted from the block's first: the ``(output row, tap)`` that it adds to."""
    uses: Uses = defaultdict(list)
    for r in range(size.rows):
        for tap in rows.taps:
            if tap.target == phase:
                uses[rows.sources * (r + tap.shift) + tap.source].append((r, tap.number))
    return uses


def column_uses(cols: Axis) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """For each input ``(phase, shift)``: the ``(output phase, tap)`` that it adds to."""
    uses: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for tap in cols.taps:
        uses[tap.source, tap.shift].append((tap.target, tap.number))
    return uses


def write(shape: Shape, host: Host) -> str:
    """The module whose function ``slide`` computes the shape."""
    rows, cols = shape.axes()
    n, size = host.lanes(shape.real), block(shape, host)
    code = Code(shape.real, n)
    arg = {name: code.integer("%sizes", i) for i, name in enumerate(SIZES)}
    step_y, phases = rows.sources, cols.sources
    parts = stage.parts_of(shape.parts, shape.inputs)
    groups = len(size.groups(shape.outputs))
    table = code.at("%notes", stage.NOTE * shape.inputs, "i64") if shape.direct else ""
    with code.loop(0, arg["rows"], arg["band"]) as band:
        count = code.least(arg["band"], code.sub(arg["rows"], band.index))
        blocks = code.set(f"sdiv i64 {code.add(count, size.rows - 1)}, {size.rows}")
        deep = code.add(code.mul(code.mul(blocks, size.rows), step_y), step_y * rows.reach)
        first = code.add(arg["top"], code.mul(band.index, step_y))
        area = stage.Area(first, deep, arg["height"], arg["width"], arg["left"], arg["scratch_places"])
        scratch = "%scratch", arg["scratch_channel"]
        stage.fill(code, parts, "x", "%leaves", area, scratch, direct=shape.direct)
        if table:
            stage.places(code, parts, shape.direct, "%leaves", area, scratch, table)
        # Where one pass does all channels it fetches what the next band will read; more passes have time enough.
        if groups == 1:
            stage.note(code, parts, "%leaves", "%notes", code.add(first, deep), arg["left"])
        writer = _Writer(code, shape, size, rows, cols, arg, table)
        with code.loop(0, count, size.rows) as row:
            base = code.at("%scratch", code.mul(row.index, code.mul(arg["scratch_places"], phases * step_y)))
            top = code.add(band.index, row.index)
            ahead = code.mul(row.index, step_y)
            with code.loop(0, groups) as group:
                start = code.least(code.mul(group.index, size.channels), shape.outputs - size.channels)
                for phase in range(rows.targets):
                    fetched = ahead if groups == 1 and phase == 0 else None
                    writer.sweep((base, row.index), top, phase, group.index, start, fetched)
    body = code.function(
        "slide", "ptr %sizes, ptr %leaves, ptr %w, ptr %b, ptr %out, ptr %factor, ptr %scratch, ptr %notes"
    )
    staging = stage.stages(shape.real, n, phases, parts, "x", direct=shape.direct)
    return stage.declarations(shape.real, n) + staging + body


Start = tuple[str, Value]  # of a block of rows: where the first channel's are in scratch, and which of the band


class _Writer:
    def __init__(
        self, code: Code, shape: Shape, size: Block, rows: Axis, cols: Axis, arg: dict[str, str], table: str
    ) -> None:
        self.code, self.shape, self.size, self.rows, self.cols, self.arg = code, shape, size, rows, cols, arg
        self.table = table  # of channels' places, where some are direct
        self.item = stage.item_size(code, stage.parts_of(shape.parts, shape.inputs))

    def sweep(self, base: Start, top: Value, phase: int, number: str, start: str, ahead: Value | None) -> None:
        """One block of rows of one row phase and one group of channels, from left to right.

        ``ahead`` is the first row of the next band to be fetched meanwhile; None if another sweep does it.
        """
        code, wide, v = self.code, self.arg["places"], self.size.vectors
        n = code.lanes
        # Whole blocks while more than half of one is left, then one vector at a time.
        end = code.sub(wide, v // 2 * n)
        with code.loop(0, end, v * n) as x:
            self._block(base, top, phase, number, start, ahead, x.index, v)
        if v // 2:
            done = code.mul(code.set(f"sdiv i64 {code.add(end, v * n - 1)}, {v * n}"), v * n)
            done = code.most(done, 0)
            with code.loop(done, wide, n) as x:
                self._block(base, top, phase, number, start, ahead, x.index, 1)

    def _block(
        self, base: Start, top: Value, phase: int, number: str, start: str, ahead: Value | None, x: str, v: int
    ) -> None:
        code, size, cols = self.code, self.size, self.cols
        keys = [
            (o, r, p, k) for o in range(size.channels) for r in range(size.rows) for p in range(cols.targets)
            for k in range(v)
        ]  # fmt: skip
        biases = [code.broadcast(code.at("%b", code.add(start, o))) for o in range(size.channels)]
        begin = code.at(base[0], x)
        area = self.shape.kernel[0] * self.shape.kernel[1] * size.channels
        weights = code.at("%w", code.mul(number, self.shape.inputs * area))
        with code.loop(0, self.shape.inputs, 1, [biases[key[0]] for key in keys]) as channel:
            found = dict(zip(keys, channel.values, strict=True))
            if self.table:
                start_of, pitch = stage.place(code, self.table, channel.index)
                source = code.at(start_of, code.add(code.mul(base[1], pitch), x))
            else:
                source = code.at(begin, code.mul(channel.index, self.arg["scratch_channel"]))
                pitch = self.arg["scratch_places"]
            self._taps((source, pitch), code.at(weights, code.mul(channel.index, area)), phase, v, found)
            if ahead is not None:  # after the taps: before them, some shapes had their sums spilled
                self._fetch(channel.index, ahead, x, v)
            channel.after = [found[key] for key in keys]
        final = dict(zip(keys, channel.values, strict=True))
        for o in range(size.channels):
            for r in range(size.rows):
                y = code.add(code.mul(code.add(top, r), self.rows.targets), phase)
                with code.when(code.less(y, self.arg["out_height"])):
                    self._put(
                        code.add(start, o),
                        y,
                        x,
                        {(p, k): final[o, r, p, k] for p in range(cols.targets) for k in range(v)},
                    )

    def _fetch(self, channel: str, ahead: Value, x: str, v: int) -> None:
        """Ask for the input that the next band will read in this place."""
        code, phases = self.code, self.cols.sources
        note = stage.Note(code, "%notes", channel, self.item)
        pointer = note.at(ahead, code.mul(x, phases))
        for row in range(self.size.rows * self.rows.sources):
            pointer = note.below(pointer) if row else pointer
            note.fetch(pointer, 0, v * phases * code.lanes)

    def _taps(
        self,
        source: tuple[str, str],
        weights: str,
        phase: int,
        v: int,
        found: dict[tuple[int, int, int, int], str],
    ) -> None:
        """Add one input channel's taps to ``found``, input row by input row; ``source`` is where, and its pitch."""
        code, size = self.code, self.size
        uses, columns = row_uses(self.rows, size, phase), column_uses(self.cols)
        here, (pointer, pitch), width = 0, source, self.shape.kernel[1]
        for delta in sorted(uses):
            for place, shift in sorted(columns):
                target = delta * self.cols.sources + place
                if target != here:
                    pointer = code.at(pointer, code.mul(pitch, target - here))
                    here = target
                vectors = [code.load(code.at(pointer, shift + k * code.lanes)) for k in range(v)]
                for r, ky in uses[delta]:
                    for p, kx in columns[place, shift]:
                        for o in range(size.channels):
                            weight = code.broadcast(code.at(weights, (ky * width + kx) * size.channels + o))
                            for k in range(v):
                                key = (o, r, p, k)
                                found[key] = code.fma(vectors[k], weight, found[key])
                code.fence()

    def _put(self, channel: Value, y: Value, x: str, values: dict[tuple[int, int], str]) -> None:
        code, arg, phases = self.code, self.arg, self.cols.targets
        n, v = code.lanes, len(values) // phases
        kind = "i8" if self.shape.bytes else None
        row = code.at("%out", code.add(code.mul(arg["out_channel"], channel), code.mul(y, arg["out_pitch"])), kind)
        column = code.mul(x, phases)
        pointer = code.at(row, column, kind)
        vectors = [each for k in range(v) for each in code.interleave([values[p, k] for p in range(phases)])]
        left = code.sub(arg["out_width"], column)
        whole = code.set(f"icmp sge i64 {left}, {len(vectors) * n}")
        factor = self.shape.factor
        line = Leaves(code, factor, "%factor", channel).row(y, column) if factor else None

        def scaled(each: str, place: int, mask: str = "") -> str:
            if line is None or factor is None:
                return each
            slope = evaluate(code, factor, line.vectors(place, mask), factor.wanted[0]).slope
            return code.real2("fmul", each, slope) if slope else "zeroinitializer"

        def put(each: str, place: int, mask: str = "") -> None:
            value, to = scaled(each, place, mask), code.at(pointer, place, kind)
            if self.shape.store is not None:
                value = evaluate(code, self.shape.store, [value]).value
            if kind:
                code.store_mask(value, to, mask)
            elif mask:
                code.store_where(mask, value, to)
            else:
                code.store(value, to)

        with code.when(whole):
            for i, each in enumerate(vectors):
                put(each, i * n)
        with code.unless(whole):
            for i, each in enumerate(vectors):
                put(each, i * n, code.lanes_within(0, code.sub(left, i * n)))

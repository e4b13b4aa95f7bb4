"""Copies rows of a map into scratch memory as kernels want them: zeros beyond its ends, strided columns taken apart.

With stride s, column ``s j + p`` goes to place j of phase p, so that a tap of a strided convolution reads neighbours.
One band of rows is staged at a time and stays in the cache while it is used. What is copied may be computed on the way:
a :class:`~wholegrad.kernels.expression.Program` over several tensors of the map's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wholegrad.kernels.emit import Code, Value
from wholegrad.kernels.expression import EACH, IDENTITY, MAP, ONE, Leaf, Program, evaluate

ARGUMENTS = (
    "ptr %to, ptr %leaves, ptr %sums, i64 %skip, "
    "i64 %channel, i64 %first, i64 %rows, i64 %height, i64 %width, i64 %column, i64 %places"
)
"""Rows ``[first, first + rows)`` of a channel of a map ``height`` x ``width`` go to ``to``: ``stride`` phases of
``places`` elements a row (a multiple of the lanes). Column ``column`` goes to place 0 of phase 0. A function that sums
adds all but the first ``skip`` rows to a vector of float64 at ``sums``."""

LEAF = 3  # 64-bit integers that say where a leaf is: address, elements from channel to channel, and from row to row


class Part(NamedTuple):
    """So many channels of a kernel's input, each computed by ``program`` from its leaves' same channel."""

    program: Program
    channels: int


class Area(NamedTuple):
    """The rows to stage of a map, its size, the column that is staged first, and the places of a row in scratch."""

    first: Value
    rows: Value
    height: Value
    width: Value
    column: Value
    places: Value


def parts_of(parts: Sequence[Part], channels: int) -> tuple[Part, ...]:
    """``parts``, or one that takes a tensor as it is."""
    return tuple(parts) or (Part(IDENTITY, channels),)


def in_place(parts: Sequence[Part], channels: int, direct: Sequence[bool]) -> int:
    """How many channels are read where they lie."""
    return sum(part.channels for part, there in zip(parts_of(parts, channels), direct, strict=False) if there)


def stages(
    real: str,
    lanes: int,
    stride: int,
    parts: Sequence[Part],
    name: str,
    summed: bool = False,
    direct: Sequence[bool] = (),
) -> str:
    """The text of the functions that :func:`fill` calls: one a part that is not ``direct``."""
    return "".join(
        stage(f"stage_{name}{i}", Code(real, lanes), stride, part.program, summed)
        for i, part in enumerate(parts)
        if not (direct and direct[i])
    )


def fill(
    code: Code,
    parts: Sequence[Part],
    name: str,
    leaves: str,
    area: Area,
    scratch: tuple[str, Value],
    sums: tuple[str, Value] | None = None,
    direct: Sequence[bool] = (),
) -> None:
    """Stage an area of every channel.

    Args:
        scratch: where, and how many elements a channel takes there.
        sums: where each channel's sum is kept, and how many rows do not count, if the functions sum.
        direct: which parts are left where they are.
    """
    before = 0
    for i, part in enumerate(parts):
        if direct and direct[i]:
            continue
        table = code.at(leaves, LEAF * sum(len(each.program.leaves) for each in parts[:i]), "i64")
        with code.loop(0, part.channels) as channel:
            to = code.at(scratch[0], code.mul(code.add(channel.index, before), scratch[1]))
            values = ", ".join(f"i64 {value}" for value in (channel.index, *area))
            place, skip = "null", sums[1] if sums else 0
            if sums:
                place = code.at(sums[0], code.mul(code.add(channel.index, before), code.lanes), "double")
            code.do(f"call void @stage_{name}{i}(ptr {to}, ptr {table}, ptr {place}, i64 {skip}, {values})")
        before += part.channels


PLACE = 2  # 64-bit integers: an address, elements from row to row


def places(
    code: Code,
    parts: Sequence[Part],
    direct: Sequence[bool],
    leaves: str,
    area: Area,
    scratch: tuple[str, Value],
    table: str,
) -> None:
    """Note in ``table`` where an area's first row is of every channel: in scratch, or of a direct part in its map."""
    before = staged = 0
    for i, part in enumerate(parts):
        leaf = code.at(leaves, LEAF * sum(len(each.program.leaves) for each in parts[:i]), "i64")
        with code.loop(0, part.channels) as channel:
            pitch: Value
            if direct[i]:
                address, step, pitch = (code.integer(leaf, k) for k in range(LEAF))
                offset = code.add(code.add(code.mul(channel.index, step), code.mul(area.first, pitch)), area.column)
            else:
                address, pitch = code.set(f"ptrtoint ptr {scratch[0]} to i64"), area.places
                offset = code.mul(code.add(channel.index, staged), scratch[1])
            at = code.at(table, code.mul(code.add(channel.index, before), PLACE), "i64")
            for k, value in enumerate((code.add(address, code.mul(offset, code.bytes)), pitch)):
                code.do(f"store i64 {value}, ptr {code.at(at, k, 'i64')}")
        before += part.channels
        staged += 0 if direct[i] else part.channels


def place(code: Code, table: str, channel: Value) -> tuple[str, str]:
    """Where :func:`places` noted that a channel is, and elements from row to row."""
    at = code.at(table, code.mul(channel, PLACE), "i64")
    address, pitch = (code.integer(at, k) for k in range(PLACE))
    return code.set(f"inttoptr i64 {address} to ptr"), pitch


RUN = 16  # places of a row that a lane sums before the sum is added to a float64 total, as in pointwise passes

NOTE = 3  # 64-bit integers: an address, bytes from row to row, bytes of an element


def note(code: Code, parts: Sequence[Part], leaves: str, notes: str, row: Value, column: Value) -> None:
    """Note for every channel where ``row`` of its first map lies, so that it can be fetched without regard to parts."""
    before = 0
    for i, part in enumerate(parts):
        table = code.at(leaves, LEAF * sum(len(each.program.leaves) for each in parts[:i]), "i64")
        number = next(k for k, leaf in enumerate(part.program.leaves) if leaf.kind == MAP)
        size = part.program.leaves[number].bytes or code.bytes
        address, step, pitch = (code.integer(table, LEAF * number + k) for k in range(LEAF))
        start = code.add(address, code.mul(code.add(code.mul(row, pitch), column), size))
        with code.loop(0, part.channels) as channel:
            at = code.at(notes, code.mul(code.add(channel.index, before), NOTE), "i64")
            here = code.add(start, code.mul(code.mul(channel.index, step), size))
            for k, value in enumerate((here, code.mul(pitch, size), size)):
                code.do(f"store i64 {value}, ptr {code.at(at, k, 'i64')}")
        before += part.channels


def item_size(code: Code, parts: Sequence[Part]) -> int:
    """Bytes of an element of every channel's first map; 0 where they differ."""
    firsts = [next(leaf for leaf in part.program.leaves if leaf.kind == MAP) for part in parts]
    sizes = {leaf.bytes or code.bytes for leaf in firsts}
    return sizes.pop() if len(sizes) == 1 else 0


class Note:
    """What :func:`note` noted of a channel; ``size`` is that of an element where it is the same for all, else 0."""

    def __init__(self, code: Code, notes: str, channel: Value, size: int) -> None:
        self.code = code
        at = code.at(notes, code.mul(channel, NOTE), "i64")
        self.address, self.pitch = (code.integer(at, k) for k in range(2))
        self.size: Value = size or code.integer(at, 2)

    def at(self, row: Value, column: Value) -> str:
        code = self.code
        offset = code.add(code.mul(row, self.pitch), code.mul(column, self.size))
        return code.set(f"inttoptr i64 {code.add(self.address, offset)} to ptr")

    def below(self, pointer: str) -> str:
        return self.code.at(pointer, self.pitch, "i8")

    def fetch(self, pointer: str, first: int, elements: int) -> None:
        """Ask for so many elements of a row from the ``first`` one after ``pointer``, a cache line at a time."""
        code = self.code
        if isinstance(self.size, int):
            step = max(1, LINE // self.size)
            places: list[Value] = [k * self.size for k in range(first, first + elements, step)]
        else:
            places = [code.mul(k, self.size) for k in range(first, first + elements, code.lanes)]
        for place in places:
            code.fetch(code.at(pointer, place, "i8"))


LINE = 64  # bytes of a cache line
APART = (2, 4, 8)  # strides by which bytes come apart as they are loaded


def stage(name: str, code: Code, stride: int, program: Program, summed: bool) -> str:
    """The text of function ``name``; ``code`` is empty yet."""
    reach = stride * code.lanes  # columns that fill one vector of every phase
    before = code.set(f"sdiv i64 {code.sub(reach - 1, '%column')}, {reach}")
    before = code.least(code.mul(code.most(before, 0), code.lanes), "%places")
    after = code.set(f"sdiv i64 {code.most(code.sub('%width', '%column'), 0)}, {reach}")
    after = code.most(code.least(code.mul(after, code.lanes), "%places"), before)
    reader = Leaves(code, program, "%leaves", "%channel")
    with code.loop(0, "%rows") as row:
        y = code.add("%first", row.index)
        to = code.at("%to", code.mul(row.index, code.mul("%places", stride)))
        phases = [code.at(to, code.mul("%places", phase)) for phase in range(stride)]
        inside = code.both(code.set(f"icmp sge i64 {y}, 0"), code.less(y, "%height"))
        with code.unless(inside), code.loop(0, code.mul("%places", stride), code.lanes) as loop:
            code.store("zeroinitializer", code.at(to, loop.index))
        with code.when(inside):
            line = reader.row(y, "%column")
            counts = code.set(f"icmp sge i64 {row.index}, %skip") if summed else ""
            for low, high, edge in ((0, before, True), (after, "%places", True), (before, after, False)):
                with code.loop(low, high, RUN * code.lanes) as run:
                    end = code.least(high, code.add(run.index, RUN * code.lanes))
                    with code.loop(run.index, end, code.lanes, ["zeroinitializer"] * summed) as loop:
                        vectors = (_edge if edge else _inner)(code, line, stride, loop.index)
                        for phase, each in zip(phases, vectors, strict=True):
                            code.store(each, code.at(phase, loop.index))
                        loop.after = [_added(code, loop.values[0], vectors)] if summed else []
                    if summed:
                        with code.when(counts):
                            code.add_wide("%sums", loop.values[0])
    return code.function(name, ARGUMENTS, internal=True)


def _inner(code: Code, line: Line, stride: int, place: str) -> list[str]:
    """The vectors that fill one place of every phase, all columns of the map."""
    return line.apart(code.mul(place, stride), stride)


def _edge(code: Code, line: Line, stride: int, place: str) -> list[str]:
    """The same where not every column is of the map: zeros elsewhere."""
    lanes, offset = code.lanes, code.mul(place, stride)
    x = code.add("%column", offset)
    vectors = []
    for k in range(stride):
        mask = code.lanes_within(code.sub(-k * lanes, x), code.sub(code.sub("%width", x), k * lanes))
        vectors.append(line.read(code.add(offset, k * lanes), mask))
    return code.part(vectors)


def _added(code: Code, total: str, vectors: Sequence[str]) -> str:
    for each in vectors:
        total = code.real2("fadd", total, each)
    return total


class Leaves:
    """The tensors that a program reads, for one channel; small values are read at once."""

    def __init__(self, code: Code, program: Program, table: str, channel: Value) -> None:
        self.code, self.program = code, program
        self.starts: list[str] = []
        self.pitches: list[str] = []
        self.small: dict[int, str] = {}
        for i, leaf in enumerate(program.leaves):
            address, step, pitch = (code.integer(table, LEAF * i + k) for k in range(LEAF))
            start = code.set(f"inttoptr i64 {address} to ptr")
            start = code.at(start, 0 if leaf.kind == ONE else code.mul(channel, step), self._kind(leaf))
            self.starts.append(start)
            self.pitches.append(pitch)
            if leaf.kind != MAP:
                self.small[i] = code.broadcast(start)

    def _kind(self, leaf: Leaf) -> str:
        return "i8" if leaf.bytes else self.code.real

    def row(self, y: Value, column: Value) -> Line:
        """Row ``y``, places counted from ``column``."""
        code = self.code
        pointers = {
            i: code.at(self.starts[i], code.add(code.mul(y, self.pitches[i]), column), self._kind(leaf))
            for i, leaf in enumerate(self.program.leaves)
            if leaf.kind == MAP
        }
        return Line(self, pointers)


class Line:
    """A row of a channel."""

    def __init__(self, leaves: Leaves, pointers: dict[int, str]) -> None:
        self.leaves, self.pointers = leaves, pointers

    def vectors(self, place: Value, mask: str = "") -> list[str]:
        """A vector of every leaf; zero where a mask is given and off."""
        code, result = self.leaves.code, []
        for i, leaf in enumerate(self.leaves.program.leaves):
            if leaf.kind in (EACH, ONE):
                result.append(self.leaves.small[i])
                continue
            pointer = code.at(self.pointers[i], place, "i8" if leaf.bytes else None)
            if leaf.bytes:
                result.append(code.load_small(pointer, mask))
            else:
                result.append(code.load_where(mask, pointer) if mask else code.load(pointer))
        return result

    def read(self, place: Value, mask: str = "") -> str:
        """The program's value; zero where a mask is given and off."""
        code, program = self.leaves.code, self.leaves.program
        value = evaluate(code, program, self.vectors(place, mask)).value
        return code.select(mask, value, "zeroinitializer") if mask and not program.plain else value

    def apart(self, place: Value, stride: int) -> list[str]:
        """The program's value at every ``stride``-th place, from each of the first ``stride`` on."""
        code, program, parts = self.leaves.code, self.leaves.program, []
        for i, leaf in enumerate(program.leaves):
            if leaf.kind != MAP:
                parts.append([self.leaves.small[i]] * stride)
            elif leaf.bytes and stride in APART:
                parts.append(code.load_small_apart(code.at(self.pointers[i], place, "i8"), stride))
            else:
                kind = "i8" if leaf.bytes else None
                pointers = [code.at(self.pointers[i], code.add(place, k * code.lanes), kind) for k in range(stride)]
                parts.append(code.part([(code.load_small if leaf.bytes else code.load)(each) for each in pointers]))
        return [evaluate(code, program, each).value for each in zip(*parts, strict=True)]


def declarations(real: str, lanes: int) -> str:
    """What every module declares."""
    code = Code(real, lanes)
    mask, vector, small = f"<{lanes} x i1>", code.vector, f"<{lanes} x i8>"
    return "\n".join(
        [
            f"declare {vector} @llvm.fma.{code.suffix}({vector}, {vector}, {vector})",
            f"declare {vector} @llvm.rint.{code.suffix}({vector})",
            f"declare {vector} @llvm.masked.load.{code.suffix}.p0(ptr, i32 immarg, {mask}, {vector})",
            f"declare {small} @llvm.masked.load.v{lanes}i8.p0(ptr, i32 immarg, {mask}, {small})",
            f"declare void @llvm.masked.store.{code.suffix}.p0({vector}, ptr, i32 immarg, {mask})",
            f"declare void @llvm.masked.store.v{lanes}i8.p0({small}, ptr, i32 immarg, {mask})",
            "declare void @llvm.prefetch.p0(ptr, i32 immarg, i32 immarg, i32 immarg)",
            "declare i64 @llvm.smin.i64(i64, i64)",
            "declare i64 @llvm.smax.i64(i64, i64)",
            "declare double @exp(double)",
            "declare double @log1p(double)",
            "",
        ]
    )

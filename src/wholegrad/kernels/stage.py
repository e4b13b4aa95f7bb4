"""Copies rows of a map into scratch memory as kernels want them: zeros beyond its ends, strided columns taken apart.

With stride s, column ``s j + p`` goes to place j of phase p, so that a tap of a strided convolution reads neighbours.
One band of rows is staged at a time and stays in the cache while it is used.
"""

from __future__ import annotations

from wholegrad.kernels.emit import Code

ARGUMENTS = "ptr %to, ptr %from, i64 %first, i64 %rows, i64 %height, i64 %width, i64 %pitch, i64 %column, i64 %places"
"""Rows ``[first, first + rows)`` of a map ``height`` x ``width``, ``pitch`` elements a row, go to ``to``: ``stride``
phases of ``places`` elements a row (a multiple of the lanes). Column ``column`` goes to place 0 of phase 0."""


def stage(real: str, lanes: int, stride: int) -> str:
    """The text of function ``stage<stride>``."""
    code = Code(real, lanes)
    reach = stride * lanes  # columns that fill one vector of every phase
    before = code.set(f"sdiv i64 {code.sub(reach - 1, '%column')}, {reach}")
    before = code.least(code.mul(code.most(before, 0), lanes), "%places")
    after = code.set(f"sdiv i64 {code.most(code.sub('%width', '%column'), 0)}, {reach}")
    after = code.most(code.least(code.mul(after, lanes), "%places"), before)
    with code.loop(0, "%rows") as row:
        y = code.add("%first", row.index)
        to = code.at("%to", code.mul(row.index, code.mul("%places", stride)))
        phases = [code.at(to, code.mul("%places", phase)) for phase in range(stride)]
        source = code.at("%from", code.add(code.mul(y, "%pitch"), "%column"))
        inside = code.both(code.set(f"icmp sge i64 {y}, 0"), code.less(y, "%height"))
        with code.unless(inside), code.loop(0, code.mul("%places", stride), lanes) as loop:
            code.store("zeroinitializer", code.at(to, loop.index))
        with code.when(inside):
            for low, high in ((0, before), (after, "%places")):
                with code.loop(low, high, lanes) as loop:
                    _edge(code, source, phases, loop.index)
            with code.loop(before, after, lanes) as loop:
                start = code.at(source, code.mul(loop.index, stride))
                _put(code, [code.load(code.at(start, k * lanes)) for k in range(stride)], phases, loop.index)
    return code.function(f"stage{stride}", ARGUMENTS, internal=True)


def _put(code: Code, vectors: list[str], phases: list[str], place: str) -> None:
    for phase, each in zip(phases, code.part(vectors), strict=True):
        code.store(each, code.at(phase, place))


def _edge(code: Code, source: str, phases: list[str], place: str) -> None:
    """A vector of each phase where not every column is of the map."""
    stride, lanes = len(phases), code.lanes
    offset = code.mul(place, stride)
    x, start = code.add("%column", offset), code.at(source, offset)
    some = code.both(code.less(-stride * lanes, x), code.less(x, "%width"))
    with code.when(some):
        masks = [
            code.lanes_within(code.sub(-k * lanes, x), code.sub(code.sub("%width", x), k * lanes))
            for k in range(stride)
        ]
        vectors = [code.load_where(mask, code.at(start, k * lanes)) for k, mask in enumerate(masks)]
        _put(code, vectors, phases, place)
    with code.unless(some):
        _put(code, ["zeroinitializer"] * stride, phases, place)


def declarations(real: str, lanes: int) -> str:
    """What every module declares."""
    code = Code(real, lanes)
    mask, vector = f"<{lanes} x i1>", code.vector
    return "\n".join(
        [
            f"declare {vector} @llvm.fma.{code.suffix}({vector}, {vector}, {vector})",
            f"declare {vector} @llvm.masked.load.{code.suffix}.p0(ptr, i32 immarg, {mask}, {vector})",
            f"declare void @llvm.masked.store.{code.suffix}.p0({vector}, ptr, i32 immarg, {mask})",
            "declare void @llvm.prefetch.p0(ptr, i32 immarg, i32 immarg, i32 immarg)",
            "declare i64 @llvm.smin.i64(i64, i64)",
            "declare i64 @llvm.smax.i64(i64, i64)",
            "",
        ]
    )

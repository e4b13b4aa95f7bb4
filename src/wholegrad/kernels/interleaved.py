"""The pass of :mod:`wholegrad.kernels.pointwise` over maps whose channels lie next to each other in memory.

Wide convolutions give and take such maps. Lanes run along the channels of a pixel, so that what has one value a channel
is a vector that a run of pixels shares, and a channel's sum is a lane's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wholegrad.kernels import stage
from wholegrad.kernels.emit import Code, Value
from wholegrad.kernels.expression import EACH, MAP, Leaf

RUN = 16  # pixels that a lane sums before the sum is added to a float64 total

Vectors = list[str]
Work = Callable[[Sequence[str], str], tuple[Vectors, Vectors]]
"""From a vector of every leaf, and one of the gradient, to what is stored and what is summed."""


def write(code: Code, leaves: Sequence[Leaf], grad: Leaf | None, counts: tuple[int, int], work: Work) -> str:
    """The module whose function ``walk`` does ``work``.

    Args:
        counts: how many maps are stored, and how many sums are taken.
    """
    n = code.lanes
    channels, height, width = (code.integer("%sizes", i) for i in range(3))
    whole = code.mul(code.set(f"sdiv i64 {channels}, {n}"), n)
    padded = code.mul(code.set(f"sdiv i64 {code.add(channels, n - 1)}, {n}"), n)
    given = _Leaves(code, leaves, "%leaves")
    by = _Leaves(code, [grad] if grad else [], "%grad")
    made = _Leaves(code, [Leaf()] * counts[0], "%outputs")
    with code.loop(0, height) as row:
        for each in (given, by, made):
            each.row(row.index)
        with code.loop(0, width, RUN) as run:
            end = code.least(width, code.add(run.index, RUN))

            def block(channel: Value, mask: str = "") -> None:
                small = given.small(channel, mask), by.small(channel, mask)
                with code.loop(run.index, end, 1, ["zeroinitializer"] * counts[1]) as pixel:
                    read = given.vectors(pixel.index, channel, mask, small[0])
                    factor = by.vectors(pixel.index, channel, mask, small[1])
                    stored, added = work(read, factor[0] if factor else "")
                    made.store(pixel.index, channel, mask, stored)
                    pixel.after = [code.real2("fadd", a, b) for a, b in zip(pixel.values, added, strict=True)]
                for i, total in enumerate(pixel.values):
                    kept = code.select(mask, total, "zeroinitializer") if mask else total
                    code.add_wide(code.at("%totals", code.add(code.mul(padded, i), channel), "double"), kept)

            with code.loop(0, whole, n) as channel:
                block(channel.index)
            with code.when(code.less(whole, channels)):
                block(whole, code.lanes_within(0, code.sub(channels, whole)))
    body = code.function("walk", "ptr %sizes, ptr %leaves, ptr %outputs, ptr %grad, ptr %totals")
    return stage.declarations(code.real, n) + body


class _Leaves:
    """Tensors by a table of addresses, elements from pixel to pixel, and from row to row."""

    def __init__(self, code: Code, leaves: Sequence[Leaf], table: str) -> None:
        self.code, self.leaves = code, leaves
        self.starts: list[str] = []
        self.steps: list[str] = []
        self.pitches: list[str] = []
        self.rows: list[str] = []
        self.one: dict[int, str] = {}
        for i, leaf in enumerate(leaves):
            address, step, pitch = (code.integer(table, stage.LEAF * i + k) for k in range(stage.LEAF))
            self.starts.append(code.set(f"inttoptr i64 {address} to ptr"))
            self.steps.append(step)
            self.pitches.append(pitch)
            if leaf.kind not in (MAP, EACH):
                self.one[i] = code.broadcast(self.starts[i])

    def row(self, y: Value) -> None:
        """Go to row ``y``."""
        code = self.code
        self.rows = [code.at(start, code.mul(y, pitch)) for start, pitch in zip(self.starts, self.pitches, strict=True)]

    def _load(self, pointer: str, mask: str) -> str:
        return self.code.load_where(mask, pointer) if mask else self.code.load(pointer)

    def small(self, channel: Value, mask: str) -> dict[int, str]:
        """The vectors that are no map's, at a channel."""
        each = [i for i, leaf in enumerate(self.leaves) if leaf.kind == EACH]
        return self.one | {i: self._load(self.code.at(self.starts[i], channel), mask) for i in each}

    def _place(self, i: int, pixel: Value, channel: Value) -> str:
        code = self.code
        return code.at(self.rows[i], code.add(code.mul(pixel, self.steps[i]), channel))

    def vectors(self, pixel: Value, channel: Value, mask: str, small: dict[int, str]) -> Vectors:
        """A vector of every leaf."""
        return [
            small[i] if i in small else self._load(self._place(i, pixel, channel), mask)
            for i in range(len(self.leaves))
        ]

    def store(self, pixel: Value, channel: Value, mask: str, values: Sequence[str]) -> None:
        for i, value in enumerate(values):
            place = self._place(i, pixel, channel)
            if mask:
                self.code.store_where(mask, value, place)
            else:
                self.code.store(value, place)

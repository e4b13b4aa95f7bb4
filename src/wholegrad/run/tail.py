"""The tail of a segment on a tile: rows and columns of each convolution in each block, and what the blocks leave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import ceil

import numpy as np
import numpy.typing as npt
import torch

from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.inline import Inlined
from wholegrad.graph.layout import Role
from wholegrad.graph.programs import Reading
from wholegrad.graph.rules.reduction import wide
from wholegrad.graph.segment import reduction_rule
from wholegrad.graph.strips import needs
from wholegrad.graph.tails import Tail
from wholegrad.kernels.calls import OUT, Schedule
from wholegrad.kernels.calls import run as run_calls
from wholegrad.kernels.expression import MAP
from wholegrad.kernels.strips import Lying
from wholegrad.kernels.tail import Axis, Places, Terms, Wants, Writer, channel_shape, total_shape
from wholegrad.run.spans import op_name
from wholegrad.run.strips import Convolutions, as_read, lying

MULTIPLES = (8, 16)  # of rows and of columns that blocks are, so that few kernels serve all


@dataclass
class Left:
    """What a tile's blocks left.

    Attributes:
        sums: of each reduction, in the dtype that its state has.
        roots: tensors and their gradients, as :class:`~wholegrad.run.tile.TileRun` has them.
    """

    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    roots: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


class Blocks:
    """Runs the tail of a segment, tile after tile; threads share it.

    Args:
        small: a small value in the graph's dtype.
        shares: the gradient of each sum, one value, as far as there is one.
        again: whether this is a forward run for the second time.
    """

    def __init__(
        self,
        graph: Graph,
        how: Inlined,
        small: Callable[[Ref], torch.Tensor],
        shares: Mapping[int, torch.Tensor],
        again: bool = False,
    ) -> None:
        assert how.tail is not None
        self.graph, self.how, self.tail = graph, how, how.tail
        self.leaves = self.tail.leaves(how)
        self.wanted = self.tail.wanted(how) if shares else ()
        self.shares = {index: share for index, share in shares.items() if index in self.tail.sums}
        self.chain = Convolutions(graph, how, self.tail.nodes, self.leaves)
        self.writer = self._writer(small, again)
        self._lock = threading.Lock()
        self._axes: dict[tuple[Role, Interval, tuple[int, ...]], list[tuple[Axis, list[int]]]] = {}
        self._schedules: dict[tuple[Axis, Axis, tuple[Lying, ...]], Schedule] = {}

    def _writer(self, small: Callable[[Ref], torch.Tensor], again: bool) -> Writer:
        graph, layers = self.graph, self.chain.layers(small)
        wants = [self._wants(index) for index in self.tail.nodes]
        count = len(self.leaves)

        def numbers(chosen: list[int]) -> dict[int, int]:
            nonlocal count
            found = {each: count + k for k, each in enumerate(chosen)}
            count += len(chosen)
            return found

        maps = numbers([self.leaves.index(ref) for ref in self.wanted])
        weights = numbers([k for k, each in enumerate(wants) if each.weight])
        biases = numbers([k for k, each in enumerate(wants) if each.bias])
        sums = numbers(list(self.tail.sums))
        shares = numbers(list(self.shares))
        terms = []
        for index, reading in self.tail.sums.items():
            (part,) = reading.parts
            assert part.channels == graph.spec(self.tail.out).shape[1]
            node = graph.nodes[index]
            name = op_name(node), node.path or "loss"
            terms.append(Terms(name, part, self._term_sources(reading), shares.get(index)))
        places = Places(maps, weights, biases, tuple(sums.values()), count)
        names = [graph.nodes[index].path or "model" for index in self.tail.nodes]
        return Writer(layers, wants, terms, places, names, "recompute" if again else "forward")

    def _wants(self, index: int) -> Wants:
        node = self.graph.nodes[index]
        of = [self.graph.nodes[ref.node].needs_grad and bool(self.shares) for ref in node.operands]
        return Wants(node.needs_grad and bool(self.shares), of[1], len(of) > 2 and of[2])

    def _term_sources(self, reading: Reading) -> tuple[int, ...]:
        last = ~(len(self.tail.nodes) - 1)
        return tuple(last if ref == self.tail.out else self.leaves.index(ref) for ref in reading.leaves)

    def run(self, box: Box, boxes: Mapping[int, Box], value: Callable[[Ref], torch.Tensor]) -> Left:
        """Sums and gradients of a tile.

        Args:
            box: of the sums' terms, those that the tile owns.
            boxes: of every node on the tile.
            value: of a leaf or a parameter, on its box.
        """
        leaves = [value(ref) for ref in self.leaves]
        given = [as_read(self.graph, ref, each.detach()) for ref, each in zip(self.leaves, leaves, strict=True)]
        places, dtype = self.writer.places, self.writer.dtype
        grads = {k: torch.zeros(given[k].shape, dtype=dtype) for k in places.maps}
        weights = {k: _zeros(total_shape(self.writer.layers[k])) for k in places.weights}
        biases = {k: _zeros(channel_shape(self.writer.layers[k].outputs, dtype)) for k in places.biases}
        sums = [_zeros(channel_shape(each.part.channels, dtype)) for each in self.writer.terms]
        shares = [share.to(dtype).contiguous() for share in self.shares.values()]
        given += [*grads.values(), *weights.values(), *biases.values(), *sums, *shares]
        with self._lock:
            schedules, offsets = self._blocks(box, boxes, [lying(tensor) for tensor in given])
        starts = [0] * (OUT + 1) + [tensor.data_ptr() for tensor in given]
        bases = np.array(starts, dtype=np.int64) + np.pad(offsets, ((0, 0), (OUT + 1, 0)))
        run_calls(schedules, bases)
        left = Left()
        for index, total in zip(self.tail.sums, sums, strict=True):
            node = self.graph.nodes[index]
            made = node.outputs[0]
            left.sums[index] = total.sum().to(wide(made.dtype)).reshape(made.shape)
        left.roots += [(leaves[k], grad) for k, grad in grads.items() if leaves[k].requires_grad]
        for number, found in ((1, weights), (2, biases)):
            for k, total in found.items():
                parameter = value(self.graph.nodes[self.tail.nodes[k]].operands[number])
                if parameter.requires_grad:
                    left.roots.append((parameter, total.sum(-1).to(parameter.dtype).reshape(parameter.shape)))
        return left

    def _blocks(
        self, box: Box, boxes: Mapping[int, Box], given: list[Lying]
    ) -> tuple[list[Schedule], npt.NDArray[np.int64]]:
        """The calls of each block of a tile, and where in bytes the block's part of each tensor given starts."""
        starts = [boxes.get(ref.node, box) for ref in self.leaves]
        rows = self._axis(Role.ROW, box.rows, tuple(each.y0 for each in starts))
        cols = self._axis(Role.COL, box.cols, tuple(each.x0 for each in starts))
        lies, schedules = tuple(given), []
        for (row, _), (col, _) in product(rows, cols):
            if (row, col, lies) not in self._schedules:
                self._schedules[row, col, lies] = self.writer.schedule(row, col, lies)
            schedules.append(self._schedules[row, col, lies])
        pitches, sizes = (np.array([each[k] for each in given], dtype=np.int64) for k in (1, 2))
        down, across = (np.array([self._everywhere(o) for _, o in axis], dtype=np.int64) for axis in (rows, cols))
        offsets = (down * pitches * sizes)[:, None] + (across * sizes)[None, :]
        return schedules, offsets.reshape(len(schedules), -1)

    def _everywhere(self, offsets: list[int]) -> list[int]:
        """Offsets of all that is given: gradients of maps start where these maps do, everything else is the same."""
        found = offsets + [0] * (self.writer.places.given - len(offsets))
        for source, place in self.writer.places.maps.items():
            found[place] = offsets[source]
        return found

    def _axis(self, role: Role, mine: Interval, starts: tuple[int, ...]) -> list[tuple[Axis, list[int]]]:
        """Every block's part along one axis of a tile, and where it starts in each leaf."""
        key = (role, mine, starts)
        if key not in self._axes:
            number = 0 if role is Role.ROW else 1
            ends = cuts(mine, self.tail.edges[number], MULTIPLES[number])
            self._axes[key] = [self._block(role, Interval(lo, hi), starts) for lo, hi in pairwise(ends)]
        return self._axes[key]

    def _block(self, role: Role, mine: Interval, starts: tuple[int, ...]) -> tuple[Axis, list[int]]:
        held = needs(self.graph, self.how, self.tail.nodes, role, mine)
        spans = [self.chain.span(role, index, held, {}, starts) for index in self.tail.nodes]
        readings = [self.how.convolutions[index] for index in self.tail.nodes]
        terms = [
            tuple(
                0 if source < 0 else mine.lo - starts[source] for source in maps(reading, self._term_sources(reading))
            )
            for reading in self.tail.sums.values()
        ]
        found: dict[int, list[int]] = {}
        each_span = zip(readings, spans, strict=True)
        read = [maps(each, self.chain.sources(each)) if span.offsets else [] for each, span in each_span]
        read += [maps(each, self._term_sources(each)) for each in self.tail.sums.values()]
        every = [*(span.offsets for span in spans), *terms]
        for sources, offsets in zip(read, every, strict=True):
            for source, offset in zip(sources, offsets, strict=True):
                found.setdefault(source, []).append(offset)
        first = [min(found[k]) if k in found else 0 for k in range(len(self.leaves))]

        def within(sources: Sequence[int], offsets: Sequence[int]) -> tuple[int, ...]:
            each = zip(sources, offsets, strict=True)
            return tuple(offset - first[source] if source >= 0 else offset for source, offset in each)

        count = len(spans)
        spans = [span._replace(offsets=within(read[k], span.offsets)) for k, span in enumerate(spans)]
        ends = tuple(within(read[count + k], each) for k, each in enumerate(terms))
        return Axis(tuple(spans), ends), first


def maps(reading: Reading, sources: Sequence[int]) -> list[int]:
    """The sources of leaves that are maps."""
    kinds = [leaf.kind for part in reading.parts for leaf in part.program.leaves]
    return [source for source, kind in zip(sources, kinds, strict=True) if kind == MAP]


def cuts(mine: Interval, edge: int, multiple: int) -> list[int]:
    """Where blocks of nearly equal size, at most ``edge``, begin and end."""
    count = ceil(mine.size / edge)
    step = multiple * ceil(mine.size / count / multiple)
    return [*range(mine.lo, mine.hi, step), mine.hi]


def _zeros(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def shares_of(
    graph: Graph, tail: Tail, grads: Mapping[int, tuple[torch.Tensor | None, ...]]
) -> dict[int, torch.Tensor]:
    """The gradient of each term of the tail's sums, as far as one reaches them, given those of reductions' outputs."""
    found = {}
    for index in tail.sums:
        node, given = graph.nodes[index], grads.get(index, ())
        if node.needs_grad and given and given[0] is not None:
            spec = graph.spec(node.operands[0])
            one = torch.empty((1,) * len(spec.shape), dtype=spec.dtype)
            nowhere = Box(0, 1, 0, 1)
            found[index] = reduction_rule(graph, index).pull(node, spec, one, nowhere, (), given).reshape(())
    return found

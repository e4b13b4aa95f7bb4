"""Predict peak memory before anything runs: arithmetic over spans, no tensors.

Words as in the documentation: *reserved* is what interpreter, libraries and allocator hold whatever the plan;
*projected* is reserved plus boundaries, their gradients, parameters' gradients, readers' caches and the largest working
set of a tile. A tile's working set follows the order in which the executor runs and frees: in the forward sweep a
value dies after its last reader, in the backward sweep values stay until the pull-back has passed them.

What the arithmetic does not see was measured (``benchmarks/memory_grid``). ``KERNELS`` and ``LIBRARY`` are what code
takes once it has run. ``SLACK`` covers the heap, which between tiles of unequal size comes apart into pieces that do
not fit the next request; ``LIBRARY_SLACK`` also PyTorch's own copies and scratch space, in segments that run its
convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

from wholegrad.graph.graph import READERS, Graph, Kind, Node, Ref
from wholegrad.graph.inline import Inlined
from wholegrad.graph.recall import recallable
from wholegrad.graph.rules import rule_for
from wholegrad.graph.rules.fill import FILLS
from wholegrad.graph.rules.random import is_random
from wholegrad.graph.segment import Segment
from wholegrad.kernels.choice import suits
from wholegrad.plan.storage import stored_bytes
from wholegrad.plan.tiles import AxisTiles

SLACK = 1.5
LIBRARY_SLACK = 2.0
KERNELS = 104 << 20  # LLVM, our own kernels' code, thread stacks, autograd and decoders
LIBRARY = 84 << 20  # beside that: oneDNN's code and what it keeps for each thread
LIBRARIES = KERNELS + LIBRARY
LEFTOVER = 12 << 20  # what each further segment leaves in pieces of the heap that cannot be given back
DOUBLE = 8
aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


class Reserved(int):
    """Bytes taken whatever the plan, and what they are made of.

    Attributes:
        interpreter: what the process holds already: Python, PyTorch, the model, the captured graph.
        libraries: what they will load or make once they run (``LIBRARIES``).
        readers: caches and decoders of images and targets.
    """

    interpreter: int
    libraries: int
    readers: int

    def __new__(cls, interpreter: int, libraries: int = 0, readers: int = 0) -> Reserved:
        made = super().__new__(cls, interpreter + libraries + readers)
        made.interpreter, made.libraries, made.readers = interpreter, libraries, readers
        return made


@dataclass(frozen=True)
class Working:
    """Bytes that one tile of a segment needs at its largest; ``slack`` is the factor in them for what is not seen."""

    forward: int
    backward: int
    slack: float = 1.0


def libraries(graph: Graph) -> int:
    """Bytes of code that this graph makes or loads once it runs."""
    return LIBRARIES if any(_by_library(graph, node) for node in graph.nodes) else KERNELS


def _by_library(graph: Graph, node: Node) -> bool:
    """Whether PyTorch's convolutions or products of matrices run a node."""
    if node.op is not aten.convolution.default:
        return node.op in PRODUCTS
    weight = graph.spec(node.operands[1])
    return not suits(weight.shape, weight.dtype, node.args[3], node.args[8])


def leftover(segments: int) -> int:
    """Bytes that all but the first of so many segments leave behind in the heap."""
    return LEFTOVER * max(segments - 1, 0)


def node_bytes(graph: Graph, index: int, rows: AxisTiles, cols: AxisTiles) -> int:
    """The largest that a node's outputs get on one tile, in bytes."""
    area = rows.largest.get(index, 0) * cols.largest.get(index, 0)
    return area * sum(spec.pixel_bytes for spec in graph.nodes[index].outputs)


def working(
    graph: Graph, segment: Segment, how: Inlined, rows: AxisTiles, cols: AxisTiles, slack: float | None = None
) -> Working:
    """What the largest tile of a segment needs, forward only and forward with pull-back.

    Args:
        slack: of a device with memory of its own, where what a reader reads lies elsewhere; None for the host.
    """
    tile = _Tile(graph, segment, how, rows, cols)
    if slack is not None:
        forward, backward = tile.forward() + tile.made(), tile.backward() + tile.pulled()
        return Working(int(forward * slack), int(backward * slack), slack)
    alien = any(i not in how.convolutions and _by_library(graph, graph.nodes[i]) for i in how.nodes)
    slack = LIBRARY_SLACK if alien else SLACK
    forward, backward = tile.forward() + tile.made(), tile.backward() + tile.pulled()
    return Working(int((tile.raw + forward) * slack), int((tile.raw + backward) * slack), slack)


def arriving(graph: Graph, segment: Segment, raw: Set[Ref], rows: AxisTiles, cols: AxisTiles) -> int:
    """Bytes of images and targets that the largest tile reads, on their way to a device; ``raw`` ones go as bytes."""
    total = 0
    for ref in segment.maps:
        spec = graph.spec(ref)
        if graph.nodes[ref.node].kind in READERS:
            pixel = spec.pixel_bytes // spec.dtype.itemsize if ref in raw else spec.pixel_bytes
            total += rows.largest.get(ref.node, 0) * cols.largest.get(ref.node, 0) * pixel
    return total


def returning(graph: Graph, segment: Segment, how: Inlined, rows: AxisTiles, cols: AxisTiles) -> int:
    """Bytes that the largest tile hands on, in either sweep."""
    tile = _Tile(graph, segment, how, rows, cols)
    return max(tile.made(), tile.pulled())


class _Tile:
    """The largest tile of a segment: ``sizes`` are bytes of what exists, by node index."""

    def __init__(self, graph: Graph, segment: Segment, how: Inlined, rows: AxisTiles, cols: AxisTiles) -> None:
        self.graph, self.segment, self.how = graph, segment, how
        self.sizes = {i: node_bytes(graph, i, rows, cols) for i in (*how.nodes, *(ref.node for ref in segment.maps))}
        if how.strip is not None:
            out = how.strip.out.node
            self.sizes[out] = rows.largest.get(out, 0) * cols.largest.get(out, 0) * how.pixel_bytes(graph, out)
        for ref in how.raw:
            if ref.node in self.sizes:
                floats, spec = self.sizes[ref.node], graph.spec(ref)
                self.sizes[ref.node] = floats // spec.dtype.itemsize + (floats if ref in how.floats else 0)
        self.inputs = sum(self.sizes[ref.node] for ref in segment.maps)
        # The reader's own copies of boxes, before they become tensors.
        self.raw = sum(self.sizes[ref.node] for ref in segment.maps if graph.nodes[ref.node].kind in READERS)

    def _readers(self, index: int) -> list[int]:
        """The maps that a node reads and that exist, by node index."""
        return [ref.node for ref in self.how.reads(self.graph, index) if ref.node in self.sizes]

    def _copies(self, index: int) -> int:
        """Padded or cropped copies that a rule makes of a node's input and output, and the library's own."""
        node = self.graph.nodes[index]
        rule = rule_for(node.op)
        if rule is None or rule.copies == (0, 0) or index in self.how.convolutions:
            return 0
        transposed = node.op is torch.ops.aten.convolution.default and node.args[6]
        inputs, outputs = rule.copies
        return inputs * self.sizes[node.operands[0].node] + (outputs or transposed) * self.sizes[index]

    def _rearranged(self, index: int) -> int:
        """Gradients of a library convolution's output and input that are laid out anew for it and for its neighbour."""
        node = self.graph.nodes[index]
        if (
            index in self.how.convolutions
            or not _by_library(self.graph, node)
            or node.operands[0].node not in self.sizes
        ):
            return 0
        return self.sizes[index] + self.sizes[node.operands[0].node]

    def _drawing(self, index: int) -> int:
        """What random numbers take while they are drawn: a counter, a shifted copy and the result, 64 bits each."""
        node = self.graph.nodes[index]
        size = self.sizes[index] // max(node.outputs[0].dtype.itemsize, 1)
        return 3 * DOUBLE * size if node.op is not None and is_random(node.op) else 0

    def made(self) -> int:
        """What a tile hands on in the forward sweep, which may wait while its worker runs another."""
        return sum(self.sizes.get(ref.node, 0) for ref in self.segment.outputs)

    def pulled(self) -> int:
        """The same in the backward sweep: gradients of the boundaries that it read."""
        refs, nodes = self.segment.maps, self.graph.nodes
        return sum(self.sizes[ref.node] for ref in refs if nodes[ref.node].needs_grad)

    def forward(self) -> int:
        """Peak of a walk that frees every value after its last reader."""
        last = {ref: index for index in self.how.nodes for ref in self._readers(index)}
        kept = {ref.node for reading in self.how.sums.values() for ref in reading.leaves}
        live = peak = self.inputs
        for index in self.how.nodes:
            live += self.sizes[index]
            peak = max(peak, live + self._copies(index) + self._drawing(index))
            live -= sum(self.sizes[ref] for ref in set(self._readers(index)) if last[ref] == index and ref not in kept)
        return peak + DOUBLE * self._widest()

    def _widest(self) -> int:
        """Pixels of the largest map that a reduction sums: room for one temporary in float64."""
        graph, sums = self.graph, self.how.sums
        found = [graph.nodes[i].operands[0] for i in self.segment.reductions if i not in sums]
        return max((self.sizes[ref.node] // max(graph.spec(ref).dtype.itemsize, 1) for ref in found), default=0)

    def backward(self) -> int:
        """Peak of forward with everything kept, then the walk back with gradients coming and going."""
        graph, sizes, how = self.graph, self.sizes, self.how
        needs = {i: graph.nodes[i].needs_grad for i in sizes}
        kept = {i: sizes[i] + self._copies(i) for i in how.nodes if needs[i]}
        live = self.inputs + sum(sizes[i] for i in how.nodes if not needs[i]) + sum(kept.values())
        peak = live + max(DOUBLE * self._widest(), max((self._drawing(i) for i in how.nodes), default=0))
        grads = {ref.node: sizes[ref.node] for ref in self.segment.owned(graph) if ref.node in sizes}
        for reading in how.sums.values():
            grads |= {ref.node: sizes[ref.node] for ref in reading.leaves if ref.node in sizes and needs[ref.node]}
        for index in reversed(how.nodes):
            if index not in kept:
                continue
            grads.setdefault(index, sizes[index])
            fresh = 0
            for ref in self._readers(index):
                if needs[ref]:  # a second contribution is a tensor of its own until it is added
                    fresh += sizes[ref] if ref in grads else 0
                    grads[ref] = sizes[ref]
            peak = max(peak, live + sum(grads.values()) + fresh + self._copies(index) + self._rearranged(index))
            live -= kept[index]
            del grads[index]
        return peak


@dataclass
class Kept:
    """Bytes of boundaries in host memory while a segment runs forward and backward, and of their gradients then."""

    forward: int = 0
    backward: int = 0
    gradients: int = 0


def kept(
    graph: Graph, segments: Sequence[Segment], hosts: Sequence[Ref], dtype: torch.dtype | None, backward: bool
) -> list[Kept]:
    """For each segment what is held of boundaries while it runs.

    Args:
        hosts: the boundaries that live in host memory.
        dtype: in which they are stored; None for the graph's own.
        backward: whether a backward sweep follows, which reads boundaries again.
    """
    made = {ref: k for k, segment in enumerate(segments) for ref in segment.outputs}
    read: dict[Ref, list[int]] = {ref: [] for ref in made}
    for k, segment in enumerate(segments):
        for ref in segment.maps:
            if ref in read:
                read[ref].append(k)
    found = [Kept() for _ in segments]
    for ref in hosts:
        size, last = stored_bytes(graph.spec(ref), dtype), max(read[ref], default=made[ref])
        for i in range(made[ref], len(segments) if backward else last + 1):
            found[i].forward += size
        if not backward:
            continue
        again = recallable(graph, segments[made[ref]], {ref})
        for i in range(made[ref] if again else min(read[ref], default=last + 1), len(segments)):
            found[i].backward += size
        if graph.nodes[ref.node].needs_grad:
            for i in range(made[ref], last + 1):
                found[i].gradients += graph.spec(ref).nbytes
    return found


def gradient_accumulators(graph: Graph) -> int:
    """Parameters' gradients in float64 and once more in their own dtype."""
    return sum(
        node.outputs[0].nbytes + node.outputs[0].nbytes // node.outputs[0].dtype.itemsize * DOUBLE
        for node in graph.of_kind(Kind.PARAMETER)
    )


def held_whole(graph: Graph) -> int:
    """Bytes of small values (those of dense regions above all, rule 10) and of their gradients, all held at once."""
    kinds = (Kind.SMALL, Kind.REDUCTION)
    values = sum(spec.held_bytes for node in graph.of_kind(*kinds) for spec in node.outputs if node.op not in FILLS)
    grads = sum(spec.held_bytes for node in graph.of_kind(*kinds) for spec in node.outputs if node.needs_grad)
    return values + (grads if graph.loss is not None else 0)


def largest_whole(graph: Graph) -> Node | None:
    """The node with the largest value that is held whole."""
    nodes = [node for node in graph.of_kind(Kind.SMALL, Kind.REDUCTION) if node.op not in FILLS]
    return max(nodes, key=lambda node: sum(spec.held_bytes for spec in node.outputs), default=None)


def whole_image(graph: Graph) -> int:
    """Bytes that autograd on the whole image would hold: every map that a gradient needs, and the largest gradient."""
    maps = [
        sum(spec.nbytes for spec in node.outputs)
        for node in graph.nodes
        if node.outputs[0].is_map and (node.needs_grad or node.kind in READERS) and not _is_view(node.op)
    ]
    return sum(maps) + 2 * max(maps, default=0) + gradient_accumulators(graph)


def _is_view(op: object) -> bool:
    schema = getattr(op, "_schema", None)
    return any(found.alias_info is not None for found in schema.returns) if schema else False

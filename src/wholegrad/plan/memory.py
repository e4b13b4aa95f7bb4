"""Predict peak memory before anything runs: what is held beside the working set of a tile (:mod:`wholegrad.plan.walk`).

Words as in the documentation: *reserved* is what interpreter, libraries and allocator hold whatever the plan;
*projected* is reserved plus boundaries, their gradients, parameters' gradients, readers' caches and the largest working
set of a tile.

What the arithmetic does not see was measured (``benchmarks/memory_grid``). ``KERNELS`` and ``LIBRARY`` are what code
takes once it has run. ``SLACK`` covers the heap, which between tiles of unequal size comes apart into pieces that do
not fit the next request; ``LIBRARY_SLACK`` also PyTorch's own copies and scratch space, in segments that run its
convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from wholegrad.graph.graph import READERS, Graph, Kind, Node, Ref
from wholegrad.graph.recall import recallable
from wholegrad.graph.rules.fill import FILLS
from wholegrad.graph.segment import Segment
from wholegrad.kernels.choice import suits
from wholegrad.plan.storage import stored_bytes

SLACK = 1.5
LIBRARY_SLACK = 2.0
PAGED = 1 << 25  # bytes of a block that has pages of its own, which go back to the system when it is freed
NEW_SLACK = 1.15  # of such blocks, and of a heap that has not come apart yet, in place of ``SLACK``
WORN = 256  # tiles of each worker after which it has; half of it after sixteen
FEW = 2  # segments, of which the heap comes apart only as their own tiles make it: the first often counts labels
STEPS = 16  # after so many steps in the same heap it hardly comes apart any more
HEAP = 48 << 20  # bytes by which it has grown then beside
KERNELS = 56 << 20  # LLVM, our own kernels' code, thread stacks, autograd and decoders
LIBRARY = 84 << 20  # beside that: oneDNN's code and what it keeps for each thread
LIBRARIES = KERNELS + LIBRARY
PIECES = 2  # one byte beside every so many of readers' caches: decoded tiles come and go among a step's own blocks
LEFTOVER = 16 << 20  # what each further segment leaves in pieces of the heap that cannot be given back,
LEAVING = 5  # up to so many of them: then the same pieces serve again, and free pages go back near the projected peak
DOUBLE = 8
aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


class Reserved(int):
    """Bytes taken whatever the plan, and what they are made of.

    Attributes:
        interpreter: what the process holds already: Python, PyTorch, the model, the captured graph.
        libraries: what they will load or make once they run (``LIBRARIES``).
        readers: caches and decoders of images and targets.
        exchange: what it takes to bring the gradients of several slides together.
    """

    interpreter: int
    libraries: int
    readers: int
    exchange: int

    def __new__(cls, interpreter: int, libraries: int = 0, readers: int = 0, exchange: int = 0) -> Reserved:
        made = super().__new__(cls, interpreter + libraries + readers + exchange)
        made.interpreter, made.libraries, made.readers, made.exchange = interpreter, libraries, readers, exchange
        return made


@dataclass(frozen=True)
class Working:
    """Bytes that one tile of a segment needs at its largest; ``slack`` is the factor in them for what is not seen."""

    forward: int
    backward: int
    slack: float = 1.0


def libraries(graph: Graph) -> int:
    """Bytes of code that this graph makes or loads once it runs."""
    return LIBRARIES if any(by_library(graph, node) for node in graph.nodes) else KERNELS


def of_readers(cache_bytes: int) -> int:
    """Bytes that readers hold, and what their caches leave in pieces of the heap."""
    return cache_bytes + cache_bytes // PIECES


def by_library(graph: Graph, node: Node) -> bool:
    """Whether PyTorch's convolutions or products of matrices run a node."""
    if node.op is not aten.convolution.default:
        return node.op in PRODUCTS
    weight = graph.spec(node.operands[1])
    return not suits(weight.shape, weight.dtype, node.args[3], node.args[8])


def wear(tiles: npt.NDArray[np.int64], workers: int, steps: bool) -> npt.NDArray[np.float64]:
    """How far the heap comes apart while so many tiles come and go on so many workers: from 0 to 1.

    A worker's first tile finds the heap in one piece; what later ones leave behind fits the next ones ever worse.

    Args:
        steps: whether one step after another runs in the same heap.
    """
    rounds = np.maximum(-(-tiles // workers), 1) * (STEPS if steps else 1)
    found: npt.NDArray[np.float64] = np.clip(np.log2(rounds) / np.log2(WORN), 0.0, 1.0)
    return found


def leftover(segments: int) -> int:
    """Bytes that so many segments leave behind in the heap: those after the first, up to ``LEAVING`` of them."""
    return LEFTOVER * min(max(segments - 1, 0), LEAVING)


@dataclass
class Kept:
    """Bytes of boundaries in host memory while a segment runs forward and backward, and of their gradients then."""

    forward: int = 0
    backward: int = 0
    gradients: int = 0


def kept(
    graph: Graph,
    segments: Sequence[Segment],
    hosts: Sequence[Ref],
    dtype: torch.dtype | None,
    backward: bool,
    here: Callable[[Ref, int], int] = lambda ref, size: size,
) -> list[Kept]:
    """For each segment what is held of boundaries while it runs.

    Args:
        hosts: the boundaries that live in host memory.
        dtype: in which they are stored; None for the graph's own.
        backward: whether a backward sweep follows, which reads boundaries again.
        here: what lies in this process of a boundary of so many bytes.
    """
    made = {ref: k for k, segment in enumerate(segments) for ref in segment.outputs}
    read: dict[Ref, list[int]] = {ref: [] for ref in made}
    for k, segment in enumerate(segments):
        for ref in segment.maps:
            if ref in read:
                read[ref].append(k)
    found = [Kept() for _ in segments]
    for ref in hosts:
        size, last = here(ref, stored_bytes(graph.spec(ref), dtype)), max(read[ref], default=made[ref])
        for i in range(made[ref], len(segments) if backward else last + 1):
            found[i].forward += size
        if not backward:
            continue
        again = recallable(graph, segments[made[ref]], {ref})
        for i in range(made[ref] if again else min(read[ref], default=last + 1), len(segments)):
            found[i].backward += size
        if graph.nodes[ref.node].needs_grad:
            for i in range(made[ref], last + 1):
                found[i].gradients += here(ref, graph.spec(ref).nbytes)
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

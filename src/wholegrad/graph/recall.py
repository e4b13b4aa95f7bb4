"""What the backward sweep need not compute again: convolutions whose outputs are boundaries.

A tile's segment runs again before it is pulled back. But the gradients of a convolution need its input and its weight,
not its output; and an output that is a boundary lies in a store, where what does need it (the statistics of a
norm) can read it. So in the backward sweep such a convolution takes its values from the store: a convolution's forward
run, a third of its cost, happens once a step.

The store appears in the graph of the backward sweep as one more map that the segment reads, and as one more operand of
the convolution (:class:`wholegrad.graph.rules.window.Convolution`). Convolutions of few channels are computed again:
reading would cost as much.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from wholegrad.graph.graph import Graph, Kind, Node, Ref
from wholegrad.graph.segment import Segment
from wholegrad.kernels.choice import THIN, suits

aten = torch.ops.aten
T = TypeVar("T")
FEW = 12  # channels on one side of a weight, up to which a convolution costs about what reading its output does


def recallable(graph: Graph, segment: Segment, stored: Set[Ref]) -> tuple[Ref, ...]:
    """The outputs of ``segment`` that its backward run takes from a store, where ``stored`` maps lie."""
    return tuple(ref for ref in segment.outputs if ref in stored and is_wide(graph, graph.nodes[ref.node]))


def is_wide(graph: Graph, node: Node) -> bool:
    """A convolution that costs more than reading its output: of PyTorch's, whose maps lie as it wants them."""
    if node.op is not aten.convolution.default:
        return False
    weight, channels = graph.spec(node.args[1]), node.outputs[0].shape[1]
    thin = suits(weight.shape, weight.dtype, node.args[3], node.args[8])
    return min(weight.shape[:2]) > FEW and channels > THIN and not thin


@dataclass(frozen=True)
class Recall:
    """A segment as the backward sweep runs it.

    Attributes:
        graph: the graph with a source for each map that is recalled.
        segment: the segment, which reads these sources too.
        sources: for each source, the node whose output it stands for.
    """

    graph: Graph
    segment: Segment
    sources: dict[int, int]

    def original(self, ref: Ref) -> Ref:
        """The map in the true graph that a tile reads as ``ref``."""
        return Ref(self.sources.get(ref.node, ref.node), ref.out)

    def boxes(self, boxes: dict[int, T]) -> dict[int, T]:
        """A tile's boxes with those of the sources."""
        return {**boxes, **{source: boxes[node] for source, node in self.sources.items() if node in boxes}}


def recall(graph: Graph, segment: Segment, stored: Set[Ref]) -> Recall:
    """How ``segment`` runs in the backward sweep when ``stored`` maps lie in stores."""
    refs = recallable(graph, segment, stored)
    nodes = list(graph.nodes)
    sources: dict[int, int] = {}
    for ref in refs:
        node, source = graph.nodes[ref.node], len(nodes)
        nodes.append(Node(source, f"{node.name}_kept", Kind.KEPT, None, (), {}, (), node.outputs, node.path, False))
        nodes[ref.node] = replace(node, operands=(*node.operands, Ref(source)))
        sources[source] = ref.node
    maps = (*segment.maps, *(Ref(source) for source in sources))
    return Recall(replace(graph, nodes=tuple(nodes)), replace(segment, maps=maps), sources)

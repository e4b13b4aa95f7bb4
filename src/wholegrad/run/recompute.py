"""One step that recomputes activations on whole maps: chunks of the graph, whose inputs alone are kept.

Chen et al., "Training deep nets with sublinear memory cost" (2016): the forward sweep keeps what passes from chunk to
chunk; the backward sweep runs each chunk again with autograd on, last first, and pulls it back. The last one runs once.

Ops are PyTorch's own on whole tensors (:mod:`wholegrad.run.whole`), so norms run as the graph has them: taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from wholegrad.graph.graph import SOURCES, Graph, Kind, Node, Ref
from wholegrad.graph.rules.base import CPU
from wholegrad.run.whole import meaning
from wholegrad.run.whole_image import Outcome

Chunks = Sequence[tuple[int, int]]
Values = dict[Ref, torch.Tensor]
Meaning = Callable[[Node, Mapping[Ref, torch.Tensor], int], tuple[torch.Tensor, ...]]


class Recompute:
    """One step.

    Args:
        chunks: ``(first, last + 1)`` node indices, in order, that share out the graph.
        tensors: parameters, buffers, images and targets by the names that the graph has for them.
        seed: of random ops.
        progress: called after each chunk, with the sweep.
        run: what a node does; for rehearsals, which draw no numbers.
        device: where tensors lie.
    """

    def __init__(
        self,
        graph: Graph,
        chunks: Chunks,
        tensors: Mapping[str, torch.Tensor],
        seed: int,
        progress: Callable[[str], None] = lambda sweep: None,
        run: Meaning | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.graph, self.chunks, self.seed, self.progress = graph, chunks, seed, progress
        self.run = run or partial(meaning, device=device)
        self.values: Values = {
            Ref(node.index): (graph.constants if node.kind is Kind.CONSTANT else tensors)[node.name].detach().to(device)
            for node in graph.of_kind(*SOURCES)
        }
        self.grads: Values = {}
        self.last = {ref: node.index for node in graph.nodes for ref in node.operands}
        assert graph.loss is not None
        self.results = {graph.loss, *graph.metrics.values(), *graph.updates.values()}

    def step(self) -> Outcome:
        """Loss, gradients, written buffers and metrics."""
        for chunk in self.chunks[:-1]:
            with torch.no_grad():
                self._run(chunk, self.values, grad=False)
            self.progress("forward")
        for i, chunk in reversed(list(enumerate(self.chunks))):
            self._pull_back(chunk, last=i == len(self.chunks) - 1)
            self.progress("backward")
        graph, values = self.graph, self.values
        assert graph.loss is not None
        trained = [node for node in graph.of_kind(Kind.PARAMETER) if node.needs_grad]
        return Outcome(
            values[graph.loss].detach().reshape(()),
            {node.name: self.grads[Ref(node.index)] for node in trained if Ref(node.index) in self.grads},
            {name: values[ref].detach() for name, ref in graph.updates.items()},
            {name: values[ref].detach() for name, ref in graph.metrics.items()},
        )

    def _run(self, chunk: tuple[int, int], values: Values, grad: bool) -> None:
        """Run a chunk's nodes; values that nobody reads later are dropped on the way."""
        for node in self.graph.nodes[chunk[0] : chunk[1]]:
            if node.kind in SOURCES:
                continue
            with torch.set_grad_enabled(grad and node.needs_grad):
                values.update(zip(node.refs, self.run(node, values, self.seed), strict=True))
            for ref in (*node.operands, *node.refs):
                if self.last.get(ref, -1) <= node.index and ref not in self.results and not self._held(ref, chunk):
                    values.pop(ref, None)

    def _held(self, ref: Ref, chunk: tuple[int, int]) -> bool:
        """Whether a value came from before the chunk: it is dropped when that is pulled back."""
        return ref.node < chunk[0] or self.graph.nodes[ref.node].kind in SOURCES

    def _pull_back(self, chunk: tuple[int, int], last: bool) -> None:
        """Run a chunk with autograd on, and pull back what later chunks found; then drop what it made."""
        inside = [node for node in self.graph.nodes[chunk[0] : chunk[1]] if node.kind not in SOURCES]
        read = dict.fromkeys(ref for node in inside for ref in node.operands)
        local = {ref: self.values[ref].detach() for ref in read if self._held(ref, chunk)}
        leaves = {ref: value for ref, value in local.items() if self.graph.nodes[ref.node].needs_grad and _real(value)}
        for value in leaves.values():
            value.requires_grad_()
        if not last:  # these were for later chunks, which are done; they come again
            self._drop(self.values, inside)
        self._run(chunk, local, grad=True)
        if last:
            assert self.graph.loss is not None
            self.grads[self.graph.loss] = torch.ones_like(local[self.graph.loss])
            self.values.update({ref: local[ref].detach() for ref in self.results if ref in local})
        made = [ref for node in inside for ref in node.refs]
        roots = {ref: local[ref] for ref in made if ref in self.grads and local[ref].requires_grad}
        found: Sequence[torch.Tensor | None] = ()
        if roots and leaves:
            given = [self.grads.pop(ref) for ref in roots]
            del local
            found = torch.autograd.grad(list(roots.values()), list(leaves.values()), given, allow_unused=True)
        for ref, grad in zip(leaves, found, strict=False):
            if grad is not None:
                self.grads[ref] = self.grads[ref] + grad if ref in self.grads else grad
        for ref in made:
            self.grads.pop(ref, None)

    def _drop(self, values: Values, made: Sequence[Node]) -> None:
        for ref in (ref for node in made for ref in node.refs if ref not in self.results):
            values.pop(ref, None)


def _real(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()

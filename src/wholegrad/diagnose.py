"""Find what makes a plan's result differ from whole-image autograd: the model, an op's rule, the capture, or the plan.

In this order, since each step trusts what the ones before have shown:

1. The model is run twice on one input; if the results differ, nothing can agree with it.
2. The graph is run node by node on whole tensors, in execution order, and each op's rule is tried by itself on boxes
   (:mod:`wholegrad.run.opcheck`), those of the plan that failed among them. The first that fails is responsible.
3. What the nodes gave is compared with what the modules of the model gave: the capture may have missed something.
4. So are the gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from wholegrad.given import Given
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import SOURCES, Graph, Kind, Node
from wholegrad.plan.plan import Plan
from wholegrad.run.opcheck import OpCheck, difference, tolerance, uneven
from wholegrad.run.reference import buffers, gradients, parts
from wholegrad.run.watched import Seen, Watched
from wholegrad.run.whole import given_values, gradients_whole
from wholegrad.signature import joint_tensors

PLAN_BOXES = 24  # boxes of the plan's own tiles on which each op is tried
REPEATS = 1e-12  # two runs of a deterministic model agree to this
SAMPLE = 64  # elements that are looked at before whole tensors are compared


def diagnose(
    model: nn.Module, loss_fn: Callable[..., torch.Tensor], inputs: Given, plan: Plan, seed: int = 0
) -> str | None:
    """What is responsible for a mismatch, in one line that starts with module path and op where it is an op.

    Args:
        model, loss_fn: in float64, as they were before the step; copied.
        inputs: image and target.
        plan: whose result was wrong; its graph is examined, and its tiles are among the boxes tried.
        seed: of the step.

    Returns:
        None if the model repeats itself, every op agrees by itself, and the graph does what the model does.
    """
    eager = _Eager(model, loss_fn, inputs, seed)
    if eager.unsteady is not None:
        return eager.unsteady
    graph = plan.graph
    tensors = {
        **joint_tensors(eager.model, eager.loss_fn, None),
        **{name: source.whole() for name, source in inputs.sources.items()},
        **inputs.values,
    }
    walk = _Walk(plan, tensors, eager.first.seen, seed)
    return walk.fault or walk.missed(eager) or _lost_gradient(graph, tensors, eager, seed)


class _Eager:
    """Two runs of copies of model and loss on the whole image, both from the same state."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., torch.Tensor], inputs: Given, seed: int) -> None:
        self.model, self.loss_fn = copy.deepcopy((model, loss_fn))
        held = [part for _, part in parts(self.model, self.loss_fn)]
        start = copy.deepcopy([part.state_dict() for part in held])
        args, kwargs, target = inputs.whole()
        self.first = Watched(self.model, self.loss_fn, *copy.deepcopy((args, kwargs, target)), seed)
        self.first.forget_graph()
        self.buffers = buffers(self.model, self.loss_fn)
        for part, state in zip(held, start, strict=True):
            part.load_state_dict(state)
            part.zero_grad(set_to_none=True)
        second = Watched(self.model, self.loss_fn, args, kwargs, target, seed, self.first)
        self.own_backward = second.own_backward
        self.unsteady = _unsteady(self._results(self.first, self.buffers), second, self._results(second, None))
        if self.unsteady is None and second.loss.requires_grad:
            second.loss.backward()  # type: ignore[no-untyped-call]
        self.grads = gradients(self.model, self.loss_fn)
        for part, state in zip(held, start, strict=True):
            part.load_state_dict(state)

    def _results(self, run: Watched, after: Mapping[str, torch.Tensor] | None) -> list[torch.Tensor]:
        held = buffers(self.model, self.loss_fn) if after is None else after
        return [leaf for leaf in tree_leaves((run.output, run.loss, dict(held))) if isinstance(leaf, torch.Tensor)]

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(self.first.output) if isinstance(leaf, torch.Tensor)]


def _unsteady(one: list[torch.Tensor], second: Watched, other: list[torch.Tensor]) -> str | None:
    """What to say of two runs whose results differ."""
    apart = max((difference(b, a) for a, b in zip(one, other, strict=False)), default=0.0)
    if apart <= REPEATS:
        return None
    seen = second.different
    where = f"{_named(seen)}: {seen.what} is the first to differ; " if seen is not None else ""
    return (
        f"{where}the model gives two results for one input, {apart:.2g} apart: it keeps state outside of its buffers "
        "or draws random numbers that are not PyTorch's"
    )


def _named(seen: Seen) -> str:
    return seen.path or "model"


class _Walk:
    """The graph on whole tensors, node by node: every op's rule tried, every module's results looked for."""

    def __init__(self, plan: Plan, tensors: Mapping[str, torch.Tensor], seen: list[Seen], seed: int) -> None:
        self.graph, self.seen, self.seed = plan.graph, seen, seed
        self.boxes = _boxes(plan)
        self.found = [False] * len(seen)  # among the values of the nodes
        self.looked = [False] * len(seen)  # whether a value had the shape
        self.values = given_values(self.graph, tensors)
        self.fault: str | None = None
        self._last = {ref: node.index for node in self.graph.nodes for ref in node.operands}
        self._kept = {
            *self.graph.outputs,
            *self.graph.updates.values(),
            *([self.graph.loss] if self.graph.loss else []),
        }
        self._run()

    def _run(self) -> None:
        for node in self.graph.nodes:
            if node.kind not in SOURCES:
                check = OpCheck(self.graph, node, self.values, self._boxes_of(node), self.seed)
                if check.fault is not None:
                    self.fault = str(check.fault)
                    return
                self.values.update(zip(node.refs, check.outputs, strict=True))
            for ref in node.refs:
                self._look(node, self.values[ref])
            for ref in (*node.operands, *node.refs):
                if self._last.get(ref, node.index) == node.index and ref not in self._kept:
                    self.values.pop(ref, None)

    def _boxes_of(self, node: Node) -> list[Box]:
        """Boxes on which to try a node: the plan's own and uneven ones; those of a reduction share its operand out."""
        if node.kind is Kind.MAP:
            own = [box for box in self.boxes.get(node.index, []) if box.area]
            return list(dict.fromkeys([*own, *uneven(node.outputs[0])]))
        return uneven(self.graph.spec(node.operands[0])) if node.kind is Kind.REDUCTION else []

    def _look(self, node: Node, value: torch.Tensor) -> None:
        """Whether this value is one that passed between modules."""
        limit = max(tolerance(node.outputs), 1e-9)
        for i, seen in enumerate(self.seen):
            inside = not seen.within or node.path == seen.within or node.path.startswith(f"{seen.within}.")
            if self.found[i] or not inside or seen.tensor.shape != value.shape:
                continue
            self.looked[i] = True
            self.found[i] = _near(value, seen.tensor, limit)

    def missed(self, eager: _Eager) -> str | None:
        """Where the capture went wrong, if the graph's outputs or loss are not the model's."""
        graph = self.graph
        pairs = [(self.values[ref], wanted) for ref, wanted in zip(graph.outputs, eager.outputs, strict=False)]
        if graph.loss is not None:
            pairs.append((self.values[graph.loss].reshape(()), eager.first.loss.reshape(())))
        after = {
            f"{'' if name.startswith('loss.') else 'model.'}{name}": value for name, value in eager.buffers.items()
        }
        pairs += [(self.values[ref], after[name]) for name, ref in graph.updates.items() if name in after]
        limit = max(1e-9, *(tolerance(node.outputs) for node in graph.nodes))
        apart = max((difference(found, wanted) for found, wanted in pairs), default=0.0)
        if apart <= limit and len(graph.outputs) == len(eager.outputs):
            return None
        for seen, found, looked in zip(self.seen, self.found, self.looked, strict=True):
            if looked and not found:
                return f"{_named(seen)} (capture): {seen.what} is not what the captured graph computes there"
        return f"model (capture): the captured graph gives another result than the model, {apart:.2g} apart"


def _near(value: torch.Tensor, wanted: torch.Tensor, limit: float) -> bool:
    size = max(wanted.abs().max().item(), 1e-300) if wanted.numel() else 0.0
    first = difference(value.flatten()[:SAMPLE], wanted.flatten()[:SAMPLE], size)
    return first <= limit and difference(value, wanted) <= limit


def _boxes(plan: Plan) -> dict[int, list[Box]]:
    """The boxes of each node in some tiles of the plan, first and last among them."""
    found: dict[int, list[Box]] = {}
    for i in range(len(plan.segments)):
        tiles = list(plan.grid(i))
        step = max(1, -(-len(tiles) // PLAN_BOXES))
        for tile in dict.fromkeys([*range(0, len(tiles), step), len(tiles) - 1]):
            for index, box in tiles[tile].boxes.items():
                found.setdefault(index, []).append(box)
    return found


def _lost_gradient(graph: Graph, tensors: Mapping[str, torch.Tensor], eager: _Eager, seed: int) -> str | None:
    """Whether the graph, whose every value is right, has other gradients than the model."""
    if graph.loss is None:
        return None
    found = {name.removeprefix("model."): grad for name, grad in gradients_whole(graph, tensors, seed).items()}
    limit = max(1e-9, *(tolerance(node.outputs) for node in graph.nodes))
    largest = max((grad.abs().max().item() for grad in eager.grads.values() if grad.numel()), default=0.0)
    for name, wanted in eager.grads.items():
        grad = found.get(name, torch.zeros_like(wanted))
        if difference(grad, wanted, 1e-3 * largest) > limit:
            return _own_backward(eager, name)
    return None


def _own_backward(eager: _Eager, name: str) -> str:
    if eager.own_backward:
        path, function = eager.own_backward[-1]
        return f"{path or 'model'} (capture): the backward of {function} is not captured"
    return f"{name} (capture): the captured graph gives its gradient another value than the model does"


def coarse(graph: Graph) -> tuple[torch.dtype, str] | None:
    """The coarsest dtype that a float64 model computes in, and the first op that does."""
    found: dict[torch.dtype, str] = {}
    for node in graph.nodes:
        spec = node.outputs[0]
        if node.kind not in SOURCES and spec.dtype.is_floating_point and spec.dtype.itemsize < 8:
            found.setdefault(spec.dtype, node.place)
    return max(found.items(), key=lambda item: torch.finfo(item[0]).eps, default=None)

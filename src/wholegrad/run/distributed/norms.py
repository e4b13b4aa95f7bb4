"""Batch norms over slides that are on ranks of their own: statistics as if all slides were one batch.

With ``n`` elements of this slide and ``N`` of all, mean and squared distances are merged over slides (Chan), in their
order; what follows here sees a state of ``n`` elements with the batch's mean and variance. Gradients with respect to
mean and variance are added up over slides before they are pulled back, and count ``n / N`` of what a slide's own would:
``g_mean / N + g_var 2 (x - mean) / N`` for each element. Slides meet once for each segment that has such norms, in each
sweep, so all slides' plans must take norms in the same order (:attr:`BatchNorms.order`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wholegrad.errors import PlanError
from wholegrad.graph.graph import Graph, Kind
from wholegrad.graph.rules import State
from wholegrad.graph.rules.reduction import node_dims
from wholegrad.graph.rules.variance import merged
from wholegrad.plan.plan import Plan
from wholegrad.run.distributed.packed import packed, unpacked
from wholegrad.run.distributed.sums import added
from wholegrad.run.distributed.wire import Wire

aten = torch.ops.aten
Grads = tuple[torch.Tensor | None, ...]


def batch_norms(model: nn.Module, graph: Graph) -> dict[int, str]:
    """The reductions that are statistics of batch norms in training mode, with the path of each one's module.

    Raises:
        PlanError: one normalizes what is no map, so that it has none.
    """
    modules = {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    used = {path: each for path, each in modules.items() if each.training or each.running_mean is None}
    found = {
        node.index: node.path
        for node in graph.of_kind(Kind.REDUCTION)
        if node.op is aten.var_mean.correction and node.path in used
    }
    reached = {node.path for node in graph.nodes}
    for path, module in used.items():
        if list(found.values()).count(path) > 1:
            raise PlanError(path, "is called more than once", 'use statistics="slide"')
        if path in reached and path not in found.values():
            raise PlanError(path, "normalizes values that are held whole", 'use statistics="slide"')
        if module.momentum is None and module.track_running_stats:
            raise PlanError(path, "has no momentum", 'give it one, or use statistics="slide"')
    return found


class BatchNorms:
    """Those of one step.

    Args:
        wire: between the ranks of different slides.
        norms: the path of each norm's module by its reduction.
    """

    def __init__(self, wire: Wire, plan: Plan, norms: Mapping[int, str]) -> None:
        self.wire, self.graph, self.norms = wire, plan.graph, norms
        self.shares: dict[int, tuple[float, float]] = {}  # elements of this slide, and of all

    @staticmethod
    def order(plan: Plan, norms: Mapping[int, str]) -> list[list[str]]:
        """The norms that are met for together, in the order of the forward sweep: the same on every slide."""
        each = [[norms[index] for index in part.segment.reductions if index in norms] for part in plan.segments]
        return [names for names in each if names]

    def joined(self, reductions: Sequence[int], totals: Mapping[int, State]) -> dict[int, State]:
        """The state of each norm among these reductions, as if this slide had the batch's mean and variance."""
        mine = [index for index in reductions if index in self.norms]
        if not mine:
            return {}
        states = [totals[index] for index in mine]
        told = packed({f"{k}.{j}": value for k, state in enumerate(states) for j, value in enumerate(state)})
        parts = [unpacked(each.cpu()) for each in self.wire.meet(told)]
        found: dict[int, State] = {}
        for k, (index, own) in enumerate(zip(mine, states, strict=True)):
            every = [tuple(part[f"{k}.{j}"].to(own[0].device) for j in range(len(own))) for part in parts]
            total = every[0]
            for other in every[1:]:
                total = merged(total, other)
            (count, mean, m2), size = total, own[0]
            self.shares[index] = float(size), float(count)
            found[index] = (size, mean, m2 * (size / count))
        return found

    def gathered(self, reductions: Sequence[int], grads: Mapping[int, Grads]) -> dict[int, Grads]:
        """What the loss of all slides gives to mean and variance, for tiles of this one."""
        mine = [index for index in reductions if index in self.norms and self.graph.nodes[index].needs_grad]
        if not mine:
            return {}
        own = {
            f"{k}.{j}": grad
            for k, index in enumerate(mine)
            for j, grad in enumerate(grads.get(index, ()))
            if grad is not None
        }
        device = next(iter(own.values())).device if own else torch.device("cpu")
        total, found = added(self.wire, own, device), {}
        for k, index in enumerate(mine):
            size, count = self.shares[index]
            each = [total.get(f"{k}.{j}") for j in range(len(self.graph.nodes[index].outputs))]
            found[index] = tuple(None if grad is None else grad * (size / count) for grad in each)
        return found

    def corrected(
        self, model: nn.Module, updates: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Running variances with the batch's ``N / (N - 1)`` in place of the slide's ``n / (n - 1)``."""
        found = dict(updates)
        for index, path in self.norms.items():
            name, module = f"model.{path}.running_var" if path else "model.running_var", model.get_submodule(path)
            if name not in found:
                continue
            spec, rate = self.graph.spec(self.graph.nodes[index].operands[0]), cast(_BatchNorm, module).momentum
            count = prod(spec.shape[dim] for dim in node_dims(self.graph.nodes[index], len(spec.shape)))
            _, every = self.shares[index]
            old = before[name].double() * (1 - (rate or 0.0))
            moved = (found[name].double() - old) * (every / (every - 1)) / (count / max(count - 1, 1))
            found[name] = (old + moved).to(found[name].dtype)
        return found

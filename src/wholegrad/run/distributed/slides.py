"""Several slides, one on each rank (or on each group of ranks): gradients averaged or added, buffers averaged.

Running statistics are updated linearly, so the average of what each slide would leave is what their average statistic
would leave. Integers (counts of batches) are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wholegrad.run.distributed.sums import added, summed
from wholegrad.run.distributed.wire import Wire
from wholegrad.run.whole_image import Outcome


def combined(wire: Wire, outcome: Outcome, trained: Mapping[str, torch.Tensor], combine: str) -> Outcome:
    """The step of all slides together.

    Args:
        outcome: this slide's own, whose gradients are taken out of it; its metrics stay that.
        trained: all parameters that may have a gradient, the same on every rank.
        combine: ``"mean"`` or ``"sum"``, of losses and gradients.
    """
    share = 1 / wire.size if combine == "mean" else 1.0
    floats = {name: _wide(value) for name, value in outcome.updates.items() if value.is_floating_point()}
    has = torch.tensor([name in outcome.grads for name in trained], dtype=torch.float64)
    found = added(wire, {"loss": _wide(outcome.loss).reshape(()), "has": has, **floats})
    updates = {
        name: (found[name] / wire.size).to(value.device, value.dtype) if name in floats else value
        for name, value in outcome.updates.items()
    }
    names = [name for name, count in zip(trained, found["has"].tolist(), strict=True) if count]
    sizes = [trained[name].numel() for name in names]

    def own(k: int) -> torch.Tensor:
        grad = outcome.grads.pop(names[k], None)  # so that each is held once
        return torch.zeros(sizes[k], dtype=torch.float64) if grad is None else _wide(grad)

    sums = {names[k]: grad.mul_(share) for k, grad in summed(wire, sizes, own)}
    grads = {name: grad.view(trained[name].shape) for name, grad in sums.items()}
    return Outcome(found["loss"] * share, grads, updates, outcome.metrics)


def _wide(value: torch.Tensor) -> torch.Tensor:
    """In float64, in the host's memory: not every device has it."""
    return value.detach().to("cpu").double()

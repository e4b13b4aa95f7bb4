"""Several slides, one on each rank (or on each group of ranks): gradients averaged or added, buffers averaged.

Running statistics are updated linearly, so the average of what each slide would leave is what their average statistic
would leave. Integers (counts of batches) are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wholegrad.run.distributed.sums import added, added_up
from wholegrad.run.distributed.wire import Wire
from wholegrad.run.whole_image import Outcome


def combined(wire: Wire, outcome: Outcome, trained: Mapping[str, torch.Tensor], combine: str) -> Outcome:
    """The step of all slides together.

    Args:
        outcome: this slide's own; its metrics stay that.
        trained: all parameters that may have a gradient, the same on every rank.
        combine: ``"mean"`` or ``"sum"``, of losses and gradients.
    """
    share = 1 / wire.size if combine == "mean" else 1.0
    floats = {name: value.double() for name, value in outcome.updates.items() if value.is_floating_point()}
    has = torch.tensor([name in outcome.grads for name in trained], dtype=torch.float64)
    found = added(wire, {"loss": outcome.loss.detach().double().reshape(()), "has": has, **floats})
    updates = {
        name: (found[name] / wire.size).to(value.device, value.dtype) if name in floats else value
        for name, value in outcome.updates.items()
    }
    grads: dict[str, torch.Tensor] = {}
    for (name, parameter), count in zip(trained.items(), found["has"].tolist(), strict=True):
        if count:
            own = outcome.grads.get(name)
            flat = (
                torch.zeros(parameter.numel(), dtype=torch.float64) if own is None else own.double().reshape(-1).clone()
            )
            added_up(wire, flat)
            grads[name] = (flat * share).view(parameter.shape)
    return Outcome(found["loss"] * share, grads, updates, outcome.metrics)

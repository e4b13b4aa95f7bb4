"""Running statistics of the slides of one update, as if the slides had come one after the other.

A norm in training mode reads none of them, so it does not matter for gradients that every slide of an update starts
from the same ones. What it makes of them is a step of a known length towards the slide's own statistics; so from what
each slide left, the slide's own follow, and the steps are taken again, in order, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from wholegrad.errors import ConfigError

Buffers = dict[str, torch.Tensor]


def buffers_of(model: nn.Module) -> Buffers:
    """The buffers themselves, by name."""
    return dict(model.named_buffers())


def kept(buffers: Mapping[str, torch.Tensor]) -> Buffers:
    """A copy."""
    return {name: value.detach().clone() for name, value in buffers.items()}


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Buffers:
    """Copies of what differs."""
    return {name: value.detach().clone() for name, value in after.items() if not torch.equal(before[name], value)}


@torch.no_grad()
def put(buffers: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Fill buffers with values of the same names."""
    for name, value in values.items():
        buffers[name].copy_(value)


@torch.no_grad()
def replay(model: nn.Module, slides: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Bring the buffers of ``model`` to where the slides lead, in order.

    Args:
        slides: what each slide changed, starting from the model's buffers as they are.

    Raises:
        ConfigError: a buffer is written that belongs to no norm, so that nobody knows how slides add up in it.
    """
    own, rates, found = buffers_of(model), _rates(model), Buffers()
    for name in sorted({name for slide in slides for name in slide}):
        before = own[name].detach().clone()
        if not before.is_floating_point():  # a counter
            found[name] = before + sum(slide[name] - before for slide in slides if name in slide)
            continue
        if name not in rates:
            cause = "is written by each slide, and belongs to no norm of torch.nn"
            remedy = "train on one rank: only the network knows how slides add up in it"
            raise ConfigError(f"buffer {name}", cause, remedy)
        old, rate = before.double(), rates[name]
        value = old.clone()
        for slide in slides:
            step = slide.get(name, before).double() - old * (1 - rate)  # not there: it came out as it was
            value = value * (1 - rate) + step
        found[name] = value
    put(own, found)


def _rates(model: nn.Module) -> dict[str, float]:
    """The length of the step that each norm takes, by the names of its statistics."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and module.momentum is not None:
            for name in ("running_mean", "running_var"):
                found[f"{path}.{name}" if path else name] = float(module.momentum)
    return found

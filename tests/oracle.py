"""The oracle that every change answers to: whole-image autograd in float64, compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import wholegrad as wg
from wholegrad.api import image_source, target_source
from wholegrad.run.reference import whole_image
from wholegrad.verify import EXACT, relative_error, whole_output


def errors(
    model: nn.Module, loss_fn: Callable[..., torch.Tensor], image: torch.Tensor, target: Any, **fixed: Any
) -> dict[str, float]:
    """Relative error of loss, output and each parameter's gradient under the plan that ``fixed`` describes.

    ``model`` is in float64. A gradient that only one side has counts as infinitely wrong.
    """
    source, labels = image_source(image, torch.float64), target_source(target)
    wanted = whole_image(model, loss_fn, source.whole(), None if labels is None else labels.whole(), torch.float64)
    model.zero_grad(set_to_none=True)
    plan = wg.plan(model, loss_fn, image, target, **fixed)
    found = {"loss": wg.backward(model, loss_fn, image, target, plan=plan)}
    found["output"] = whole_output(model, image, fixed.get("tile"))
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    truth = {"loss": wanted.loss, "output": wanted.output, **wanted.grads}
    both = found.keys() & truth.keys()
    return {name: relative_error(found[name], truth[name]) if name in both else float("inf") for name in
            found.keys() | truth.keys()}  # fmt: skip


def assert_exact(
    model: nn.Module, loss_fn: Callable[..., torch.Tensor], image: torch.Tensor, target: Any, **fixed: Any
) -> None:
    """Every tensor agrees to 1e-12 (rule 5)."""
    found = errors(model, loss_fn, image, target, **fixed)
    wrong = {name: error for name, error in found.items() if not error <= EXACT}
    assert not wrong, f"relative errors above {EXACT}: {wrong} under {fixed}"

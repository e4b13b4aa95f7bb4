"""The oracle that every change answers to: whole-image autograd in float64, compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from wholegrad.given import given
from wholegrad.graph.capture import capture
from wholegrad.graph.graph import Graph
from wholegrad.run.reference import Reference, whole_image
from wholegrad.verify import EXACT, Case
from wholegrad.verify import errors as every_error

SEED = 11  # of random ops


def reference(model: nn.Module, loss_fn: Callable[..., torch.Tensor], image: Any, target: Any) -> Reference:
    """Whole-image autograd in float64."""
    args, kwargs, labels = given(image, target, torch.float64).whole()
    return whole_image(model, loss_fn, args, kwargs, labels, torch.float64, SEED)


def captured(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Graph:
    """The graph of the model alone on an image ``(N, C, H, W)``."""
    return capture(model, None, given(np.broadcast_to(np.uint8(0), shape), None, dtype).inputs)


def errors(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor],
    image: Any,
    target: Any,
    wanted: Reference | None = None,
    **fixed: Any,
) -> dict[str, float]:
    """Relative error of loss, outputs, buffers and each parameter's gradient under the plan that ``fixed`` describes.

    ``model`` is in float64. A tensor that only one side has counts as infinitely wrong.
    """
    truth = (wanted or reference(model, loss_fn, image, target)).tensors
    case = Case(model, loss_fn, image, target, torch.float64, SEED)
    found = case.run(case.plan(**fixed), fixed.get("tile"))
    return every_error(found, truth)


def assert_exact(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor],
    image: Any,
    target: Any,
    wanted: Reference | None = None,
    **fixed: Any,
) -> None:
    """Every tensor agrees to 1e-12 (rule 5)."""
    found = errors(model, loss_fn, image, target, wanted, **fixed)
    wrong = {name: error for name, error in found.items() if not error <= EXACT}
    assert not wrong, f"relative errors above {EXACT}: {wrong} under {fixed}"

"""Tiles on a device with memory of its own: exact, nothing mixed, nothing crossing that need not, within its budget.

No GPU is asked for: the device is a pretended one (:mod:`pretend`). ``test_gpu.py`` has what only a real one can show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pretend
import wholegrad as wg
from oracle import SEED, reference
from pretend import LEDGER, MixedError
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.proof import random_labels
from wholegrad.verify import EXACT, Case, errors

pretend.install()
Data = tuple[torch.nn.Module, torch.Tensor, torch.Tensor]


def case(height: int, width: int, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, dtype=torch.float64, generator=generator)
    return unet4492(seed=seed).double(), image, random_labels((height, width), seed)


def device_errors(data: Data, loss: Any, **fixed: Any) -> dict[str, float]:
    """Relative errors of a run on the device against whole-image autograd."""
    tried = Case(data[0], loss, *data[1:], torch.float64, SEED, pretend.device())
    found = tried.run(tried.plan(**fixed), fixed.get("tile"))
    return errors(found, reference(data[0], loss, *data[1:]).tensors)


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    there = torch.ones(2, 3).to("pretend")
    with pytest.raises(MixedError):
        there + torch.ones(2, 3)
    with pytest.raises(MixedError):
        torch.nn.functional.conv2d(there.view(1, 1, 2, 3), torch.ones(1, 1, 1, 1))
    assert torch.equal((there * 2).cpu(), torch.full((2, 3), 2.0))


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("tile", [(37, 53), (500, 500)])
def test_every_loss_is_exact(loss: str, tile: tuple[int, int]) -> None:
    found = device_errors(case(96, 112), LOSSES[loss], tile=tile)
    assert max(found.values()) <= EXACT, found


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
@pytest.mark.parametrize("boundaries", [["middle"], ["down1", "down2", "middle", "up2", "fuse2", "up1", "head"]])
def test_boundaries_are_exact_wherever_they_live(placement: str, boundaries: list[str]) -> None:
    for loss in ("bce", "dice"):
        found = device_errors(case(96, 112), LOSSES[loss], tile=(40, 48), boundaries=boundaries, placement=placement)
        assert max(found.values()) <= EXACT, found

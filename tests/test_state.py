"""Buffers that a model writes: running statistics as PyTorch leaves them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import wholegrad as wg
from oracle import assert_exact, errors
from wholegrad.errors import CaptureError
from wholegrad.verify import EXACT


def square(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output**2).mean()


def image(batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 20, 26, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Remembers(nn.Module):
    """A running mean, written in place or bound anew."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 1, 1), how
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        with torch.no_grad():
            if self.how == "bound anew":
                self.mean = 0.9 * self.mean + 0.1 * y.mean()
            elif self.how == "in place":
                self.mean.mul_(0.9).add_(0.1 * y.mean())
            else:
                self.mean = y.mean((0, 1))
        return y * (1 + self.mean.sum())


@pytest.mark.parametrize("strategy", ["auto", "stream", "in-core", "recompute", "offload"])
@pytest.mark.parametrize("how", ["in place", "bound anew"])
def test_a_running_mean_is_written_back(how: str, strategy: str) -> None:
    torch.manual_seed(0)
    model = Remembers(how).double()
    assert_exact(model, square, image(), None, tile=(7, 9))
    wg.backward(model, square, image(), strategy=strategy)
    torch.testing.assert_close(model.mean, 0.1 * model.conv(image()).mean().reshape(1).detach())


def test_a_buffer_that_becomes_a_map_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"model\.mean: is written while the model runs"):
        wg.plan(Remembers("as a map").double(), square, image())


def normed(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, nn.Tanh(), nn.Conv2d(4, 2, 3)).double()


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, momentum 0.3, no affine": lambda: nn.BatchNorm2d(4, momentum=0.3, affine=False),
    "batch, no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(4),
    "instance, affine, running": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "group, no affine": lambda: nn.GroupNorm(4, 4, affine=False),
    "layer over everything": lambda: nn.LayerNorm([4, 20, 26]),
    "batch after batch": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_exact_and_leave_the_statistics_that_pytorch_leaves(name: str, mode: str) -> None:
    model = normed(NORMS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    model(image(2))  # running statistics that differ from zero and one
    model.train(mode == "train")
    for fixed in ({"tile": (7, 9)}, {"tile": (64, 64)}, {"tile": (5, 26), "boundaries": ["0"]}):
        assert_exact(model, square, image(2), None, **fixed)


def test_statistics_of_a_large_mean_and_a_small_spread_are_exact() -> None:
    """Chan's formula, where the sum of squares minus the square of the sum would lose every digit in float32."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).float()
    pixels = (1000 + 0.01 * image()).float()
    wg.backward(model, square, pixels, plan=wg.plan(model, square, pixels, tile=(7, 9)))
    wanted = pixels.double().var((0, 2, 3)) * 0.1 + 0.9
    torch.testing.assert_close(model[0].running_var.double(), wanted, rtol=1e-6, atol=0)
    spread = (model[0].running_var.double() - 0.9) / 0.1
    assert ((spread - pixels.double().var((0, 2, 3))).abs() < 1e-5).all()


def test_counting_batches_twice_and_evaluation_leaves_them_alone() -> None:
    model = normed(nn.BatchNorm2d(4))
    for _ in range(2):
        wg.backward(model, square, image())
    assert model[1].num_batches_tracked.item() == 2
    kept = model[1].running_mean.clone()
    wg.backward(model.eval(), square, image())
    assert torch.equal(model[1].running_mean, kept) and model[1].num_batches_tracked.item() == 2


def test_a_step_that_fails_leaves_statistics_as_they_were() -> None:
    from wholegrad.errors import NumericsError

    model, pixels = normed(nn.BatchNorm2d(4)), image()
    before = model[1].running_mean.clone()
    pixels[0, 0, 3, 3] = float("nan")
    with pytest.raises(NumericsError):
        wg.backward(model, square, pixels)
    assert torch.equal(model[1].running_mean, before) and model[1].num_batches_tracked.item() == 0


def test_the_oracle_sees_statistics_that_are_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    from wholegrad.graph.rules.variance import Variance

    model = normed(nn.BatchNorm2d(4))
    assert max(errors(model, square, image(), None, tile=(7, 9)).values()) <= EXACT
    monkeypatch.setattr(Variance, "merge", lambda self, node, spec, total, part, box: part)
    assert max(errors(normed(nn.BatchNorm2d(4)), square, image(), None, tile=(7, 9)).values()) > 1e-6

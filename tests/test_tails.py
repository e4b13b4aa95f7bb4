"""Convolutions and losses that run forward and back block by block give whole-image gradients, wherever blocks end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wholegrad as wg
from noted import note
from oracle import assert_exact
from wholegrad.graph import tails
from wholegrad.graph.graph import Graph
from wholegrad.graph.tails import Tail
from wholegrad.kernels.host import host
from wholegrad.kernels.tail import _Life, arranged
from wholegrad.losses import bce_loss, dice_loss, focal_loss
from wholegrad.nets import unet4492

pytestmark = pytest.mark.skipif(host() is None, reason="no kernels on this machine")
BUDGET = "8GiB"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Graph, Tail | None]]:
    """Blocks are small, no boundary is stored; the list fills with what segments were found to have."""
    return note(monkeypatch, tails, "find_tail", 8, 16)


class Chain(nn.Module):
    """Strides, dilation, a transposed convolution, no bias, small values among what is read, a crop at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 5, stride=2, padding=2, output_padding=1)
        self.one = nn.Conv2d(6, 2, 3, padding=2, dilation=2, bias=False)
        self.two = nn.Conv2d(2, 3, (1, 5), padding=(0, 2))
        self.register_buffer("scale", torch.rand(2, 1, 1) + 0.5)
        self.head = nn.Conv2d(3, 1, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = torch.relu(self.up(F.leaky_relu(self.down(x))))
        one = F.leaky_relu(self.one(torch.cat([up, 1 - x], 1))) * self.scale
        result: torch.Tensor = self.head(self.two(one).square())
        return result[..., : x.shape[2] - 1, : x.shape[3] - 3]


class Growing(nn.Module):
    """Ends in a transposed convolution; what the tail reads from outside is read by two of its members."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Conv2d(3, 3, 3, stride=3, padding=1)
        self.pool = nn.Conv2d(3, 2, 3, padding=1)
        self.mix = nn.Conv2d(5, 2, 3, padding=1)
        self.up = nn.ConvTranspose2d(5, 2, 4, stride=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.low(x)
        pooled = F.max_pool2d(self.pool(low), 3, 1, 1)
        mix = F.leaky_relu(self.mix(torch.cat([low, pooled], 1)), 0.2)
        result: torch.Tensor = self.up(torch.cat([mix, torch.relu(low)], 1))
        return result


def square_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - 0.3).square().mean() + 0 * target.sum()


def two_sums(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Two sums of one map, both with gradients."""
    return bce_loss(output, target) + 0.1 * output.square().sum() / 1000


def combined(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return dice_loss(output, target) + focal_loss(output, target)


def inputs(high: int, wide: int, labels: tuple[int, int] | None = None) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    target = random.integers(0, 2, (1, *(labels or (high, wide))), np.uint8)
    return random.integers(0, 256, (3, high, wide), np.uint8), target


@pytest.mark.parametrize("tile", [(1000, 1000), (40, 70), (29, 33)])
@pytest.mark.parametrize(
    ("make", "loss", "together"),
    [(unet4492, bce_loss, 3), (unet4492, two_sums, 3), (unet4492, combined, 3), (Chain, square_loss, 4)],
)
def test_gradients_are_those_of_the_whole_image(
    make: Callable[[], nn.Module],
    loss: Callable[..., torch.Tensor],
    together: int,
    tile: tuple[int, int],
    found: list[tuple[Graph, Tail | None]],
) -> None:
    torch.manual_seed(0)
    model = make().double()
    image, target = inputs(90, 118, (89, 115) if make is Chain else None)
    assert_exact(model, loss, image, target, tile=tile, budget=BUDGET)
    assert any(tail is not None and len(tail.nodes) == together for _, tail in found)


@pytest.mark.parametrize("tile", [(1000, 1000), (31, 44)])
def test_maps_from_outside_get_every_blocks_share(
    tile: tuple[int, int], found: list[tuple[Graph, Tail | None]]
) -> None:
    torch.manual_seed(1)
    image, target = inputs(93, 120)
    model = Growing().double()
    assert_exact(model, square_loss, image, target[:, :92, :119], tile=tile, budget=BUDGET)
    tail = found[-1][1]
    assert tail is not None and len(tail.nodes) >= 1


@pytest.mark.parametrize("frozen", ["head", "fuse1", "up1", "down1"])
def test_frozen_parameters_get_no_gradient(frozen: str, found: list[tuple[Graph, Tail | None]]) -> None:
    model = unet4492(seed=3).double()
    for parameter in getattr(model, frozen).parameters():
        parameter.requires_grad_(False)
    image, target = inputs(64, 96)
    assert_exact(model, bce_loss, image, target, tile=(40, 48), budget=BUDGET)
    assert found[-1][1] is not None
    wg.backward(model.float(), bce_loss, image, target, budget=BUDGET)
    assert all(parameter.grad is None for parameter in getattr(model, frozen).parameters())


def test_everything_before_the_head_may_be_frozen(found: list[tuple[Graph, Tail | None]]) -> None:
    model = unet4492(seed=3).double().requires_grad_(False)
    model.head.requires_grad_(True)
    image, target = inputs(64, 96)
    assert_exact(model, bce_loss, image, target, tile=(40, 48), budget=BUDGET)


def test_blocks_and_threads_change_rounding_only(
    found: list[tuple[Graph, Tail | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, target = inputs(128, 208)
    model, before = unet4492(seed=2), torch.get_num_threads()

    def step(tile: tuple[int, int]) -> list[torch.Tensor]:
        model.zero_grad()
        plan = wg.plan(model, bce_loss, image, target, tile=tile, budget=BUDGET)
        loss = wg.backward(model, bce_loss, image, target, plan=plan)
        return [
            loss.detach(),
            *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None),
        ]

    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(step((32, 48)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # the same bits
    monkeypatch.setattr(tails, "HEIGHTS", (40,))
    monkeypatch.setattr(tails, "WIDTHS", (96,))
    for a, b in zip(results[0], step((128, 208)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_a_map_that_others_read_is_no_part_of_a_tail(found: list[tuple[Graph, Tail | None]]) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            result: torch.Tensor = self.second(x + F.avg_pool2d(x, 3, 1, 1))
            return result

    torch.manual_seed(4)
    image, target = inputs(50, 60)
    assert_exact(Pooled().double(), square_loss, image, target, tile=(21, 40), budget=BUDGET)
    assert found[-1][1] is not None and len(found[-1][1].nodes) == 1


def test_a_loss_that_reads_two_maps_has_no_tail(found: list[tuple[Graph, Tail | None]]) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 1, 3, padding=1), nn.Conv2d(3, 1, 5, padding=2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.one(x), self.two(x)

    def loss(output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return (output[0] * output[1]).mean() + 0 * target.sum()

    torch.manual_seed(5)
    image, target = inputs(40, 48)
    assert_exact(Twins().double(), loss, image, target, tile=(21, 40), budget=BUDGET)
    assert found and all(tail is None for _, tail in found)


def test_buffers_that_are_there_together_do_not_overlap() -> None:
    random = np.random.default_rng(6)
    for _ in range(50):
        lives = []
        for _ in range(random.integers(1, 9)):
            first = int(random.integers(0, 8))
            lives.append(_Life(64 * int(random.integers(1, 9)), first, first + int(random.integers(0, 5))))
        starts, total = arranged(lives)
        assert total <= sum(each.size for each in lives)
        for i, a in enumerate(lives):
            assert starts[i] + a.size <= total
            for j, b in enumerate(lives[:i]):
                if a.first <= b.last and b.first <= a.last:
                    assert starts[i] + a.size <= starts[j] or starts[j] + b.size <= starts[i]

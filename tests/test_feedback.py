"""Reductions that feed back into maps, or sum a boundary: gates and norms written by hand. And their mutant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wholegrad as wg
from oracle import assert_exact, errors
from wholegrad.graph.segment import Cutter
from wholegrad.plan import cuttings
from wholegrad.run import executor


def gate(y: torch.Tensor) -> torch.Tensor:
    return y * torch.sigmoid(y.mean((2, 3), keepdim=True))


def norm(y: torch.Tensor) -> torch.Tensor:
    mean = y.mean((0, 2, 3), keepdim=True)
    variance = ((y - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (y - mean) / (variance + 1e-3).sqrt()


class Feedback(nn.Module):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        # no biases: before a norm their true gradient is zero, and a relative error says nothing
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 3, stride=2, bias=False)
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.b(self.first(self.a(x)).tanh()))
        return result


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        for _ in range(2):
            y = y * self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))).sigmoid()
        return y


def square(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output**2).mean() + output.mean() ** 2


def images(batch: int = 2) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.rand(batch, 3, 24, 31, dtype=torch.float64)


MODELS = {
    "gate, gate": lambda: Feedback(lambda y: gate(gate(y)), gate),
    "norm, gate": lambda: Feedback(norm, gate),
    "norm, norm": lambda: Feedback(norm, lambda y: norm(y) * 0.5),
    "squeeze and excite": SqueezeExcite,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("boundaries", [None, [], ["a"]])
@pytest.mark.parametrize("tile", [(7, 9), (100, 100)])
def test_reductions_that_feed_back_are_exact(name: str, boundaries: list[str] | None, tile: tuple[int, int]) -> None:
    torch.manual_seed(1)
    assert_exact(MODELS[name]().double(), square, images(), None, tile=tile, boundaries=boundaries)


def smooth(output: torch.Tensor, target: Any) -> torch.Tensor:
    """Reads the boundary with a halo in the same segment that sums it."""
    kernel = torch.ones(1, 1, 5, 5, dtype=output.dtype) / 25
    return (F.conv2d(output, kernel, padding=2) ** 2).mean() + output.mean() ** 2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_sum_over_a_boundary_is_pulled_back_once_whatever_the_caller_and_the_threads(threads: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 1, 3)).double()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            plan = wg.plan(model, smooth, images(1), tile=(3, 4), boundaries=["0"])
            loss = wg.backward(model, smooth, images(1), plan=plan)
    finally:
        torch.set_num_threads(2)
    wanted = smooth(model(images(1)), None)
    grads = torch.autograd.grad(wanted, list(model.parameters()))
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-12, atol=1e-15)


def test_the_oracle_fails_when_a_segment_pulls_back_a_boundary_that_it_only_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = executor.pull_back

    def greedy(graph: Any, segment: Any, *rest: Any) -> Any:
        from dataclasses import replace

        return true(graph, replace(segment, outputs=segment.owned(graph)), *rest)

    def apart(graph: Any, apart: bool) -> Cutter:
        return Cutter(graph, apart=True)  # as where boundaries are rounded: summed in a later segment

    torch.manual_seed(1)
    model, fixed = Feedback(gate, gate).double(), {"tile": (7, 9), "boundaries": ["a"]}
    monkeypatch.setattr(cuttings, "Cutter", apart)
    assert max(errors(model, square, images(), None, **fixed).values()) <= 1e-12
    monkeypatch.setattr(executor, "pull_back", greedy)
    assert max(errors(model, square, images(), None, **fixed).values()) > 1e-6

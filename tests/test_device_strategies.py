"""Strategies on whole maps where tensors lie on a device: exact, within both budgets; explore's cells there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import pretend
import wholegrad as wg
from oracle import SEED, reference
from pretend import LEDGER
from test_device import Data, case
from wholegrad.errors import BudgetError, PlanError, TooLargeError
from wholegrad.explore import step
from wholegrad.explore.cells import DONE, IMPOSSIBLE, REFUSED, Cell, Settings
from wholegrad.explore.run import kinds
from wholegrad.losses import LOSSES
from wholegrad.plan.strategies import Strategy
from wholegrad.run import offload
from wholegrad.run.device import Device
from wholegrad.verify import EXACT, Case, errors

pretend.install()
WHOLE = ("in-core", "recompute", "offload", "managed")


class Noisy(torch.nn.Module):
    """Batch norm, dropout and a constant of the forward pass's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.norm = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        self.b, self.drop = torch.nn.Conv2d(4, 1, 3, padding=1), torch.nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.b(self.drop(torch.relu(self.norm(self.a(x))))) + 0.5 * x[:, :1]
        return found


def cases() -> dict[str, Data]:
    net, image, target = case(90, 130)
    return {"published": (net, image, target), "norm and dropout": (Noisy().double(), image, target)}


@pytest.mark.parametrize("name", ["published", "norm and dropout"])
@pytest.mark.parametrize("strategy", WHOLE)
def test_each_strategy_is_exact_there(strategy: str, name: str) -> None:
    model, image, target = cases()[name]
    plan = wg.plan(model, LOSSES["dice"], image, target, device=pretend.device(), strategy=strategy)
    assert plan.strategy == strategy and plan.device == "pretend:0" and "on pretend:0" in str(plan)
    tried = Case(model, LOSSES["dice"], image, target, torch.float64, SEED, pretend.device())
    found = errors(tried.run(plan, None), reference(model, LOSSES["dice"], image, target).tensors)
    assert max(found.values()) <= EXACT, found
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("strategy", WHOLE)
def test_what_tensors_hold_there_stays_within_the_projection(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1 << 12)
    model, image, target = case(400, 600)
    device = pretend.device()
    plan = wg.plan(model, LOSSES["bce"], image, target, device=device, strategy=strategy)
    device.forget_peak()
    wg.backward(model, LOSSES["bce"], image, target, plan=plan)
    beside = plan.projected - plan.reserved
    assert LEDGER.peak <= beside + LEDGER.now <= 3 * LEDGER.peak
    with pytest.raises(BudgetError, match=f"too small for strategy {strategy}"):
        wg.plan(model, LOSSES["bce"], image, target, device=device, strategy=strategy, budget=plan.reserved + (1 << 20))


def test_offload_leaves_the_device_what_in_core_keeps_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1 << 12)
    model, image, target = case(400, 600)
    device, peaks = pretend.device(), {}
    for strategy in ("in-core", "offload"):
        device.forget_peak()
        wg.backward(model, LOSSES["bce"], image, target, device=device, strategy=strategy)
        peaks[strategy] = LEDGER.peak
        if strategy == "offload":
            assert LEDGER.down > 3 * image.numel() * 8, "activations cross"
    assert peaks["offload"] < 0.8 * peaks["in-core"]


def test_the_hosts_budget_and_the_devices_limit_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, target = case(400, 600)
    asked: dict[str, Any] = {"strategy": "in-core"}
    with pytest.raises(BudgetError, match=r"host budget 100\.0 MiB: too small for strategy in-core"):
        wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(), host_budget="100MiB", **asked)
    monkeypatch.setattr(pretend.PretendDevice, "most_bytes", 1 << 20)
    with pytest.raises(TooLargeError, match="pretend:0 takes fewer than 1048576"):
        wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(), **asked)


def test_no_strategy_moves_activations_where_memory_is_shared() -> None:
    assert kinds(["in-core", "offload", "managed", "stream"], ["mps"]) == [("in-core", "mps"), ("stream", "mps")]
    assert kinds([*WHOLE, "stream"], ["cpu"]) == [
        (name, "cpu") for name in ("in-core", "recompute", "offload", "stream")
    ]
    every = [(name, "cuda") for name in (*WHOLE, "stream")]
    assert kinds([*WHOLE, "stream"], ["cuda"]) == every


def cell(strategy: str, capsys: pytest.CaptureFixture[str], limit: int = 8 << 30) -> dict[str, Any]:
    """What a cell's process says, run here."""
    step._measure(Cell(strategy, "pretend", 96, 384), Settings("unet4492", "bce", "labels", limit, 60.0))
    found: dict[str, Any] = {}
    for line in capsys.readouterr().out.splitlines():
        found.update(json.loads(line))
    return found


@pytest.mark.parametrize("strategy", [*WHOLE, "stream"])
def test_a_cell_is_measured_there(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    LEDGER.forget()
    found = cell(strategy, capsys)
    assert found["outcome"] == DONE and found["seconds"] > 0 and Strategy(strategy)
    assert 0 < found["peak"] <= found["projected"], "of the device, not of the process"
    assert found["peak"] < 64 << 20


def test_a_cell_whose_process_would_be_too_large_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    found = cell("in-core", capsys, limit=50 << 20)
    assert found["outcome"] == REFUSED and "host budget 50.0 MiB" in found["said"]


def test_a_cell_that_is_refused_there_is_impossible_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretend.PretendDevice, "check_managed", Device.check_managed)
    found = cell("managed", capsys)
    assert found["outcome"] == IMPOSSIBLE and found["said"].startswith("strategy managed: needs a GPU of NVIDIA's")


def test_strategies_are_refused_where_they_make_no_sense() -> None:
    model, image, target = case(90, 130)
    with pytest.raises(PlanError, match="holds maps whole and takes no tile"):
        wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(), strategy="in-core", tile=(32, 32))

"""How weights move: as torch's own optimisers and schedules move them, and the same after a restart."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from wholegrad.errors import ConfigError
from wholegrad.train.config import check_config, optimizers, schedules
from wholegrad.train.optim import Mover
from wholegrad.train.tables import TrainConfig

ARGS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]},
    "CosineAnnealingLR": {"T_max": "total"},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "ExponentialLR": {"gamma": 0.8},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": "total"},
    "ReduceLROnPlateau": {"patience": 0},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def settings(**given: Any) -> TrainConfig:
    return check_config({"data": {"train": ["a"]}, "train": {"steps": 8, **given}}, "test").train


def see(model: nn.Module, number: int) -> None:
    """Add the gradient of a made-up batch."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
    model(x).square().mean().backward()


def walk(model: nn.Module, mover: Mover, start: int, stop: int) -> None:
    for number in range(start, stop):
        see(model, number)
        mover.add()
        mover.move()
        mover.scored(0.5 - 0.01 * number)


def restarted(model: nn.Module, mover: Mover, train: TrainConfig) -> tuple[nn.Module, Mover]:
    """A model and mover anew, everything through what a checkpoint holds."""
    other = network()
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    made = Mover(other, train, 8)
    values = json.loads(json.dumps(mover.values()))
    made.restore({name: value.detach().clone() for name, value in mover.tensors().items()}, values)
    return other, made


@pytest.mark.parametrize("name", [name for name in optimizers() if name != "Muon"])
def test_each_optimiser_continues_to_the_same_bits(name: str) -> None:
    train = settings(optimizer=name, lr=0.02, ema=0.8)
    model = network()
    mover = Mover(model, train, 8)
    walk(model, mover, 0, 4)
    other, other_mover = restarted(model, mover, train)
    for each, its in ((model, mover), (other, other_mover)):
        walk(each, its, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert mover.average is not None and other_mover.average is not None
    assert all(torch.equal(mover.average[key], other_mover.average[key]) for key in mover.average)
    assert not torch.equal(mover.average["0.weight"], model.state_dict()["0.weight"])


@pytest.mark.parametrize("name", schedules())
@pytest.mark.parametrize("warmup", [0, 3])
def test_each_schedule_is_torchs_and_continues(name: str, warmup: int) -> None:
    given = {"name": name, "args": ARGS.get(name, {})}
    train = settings(optimizer="SGD", lr=0.05, schedule=given, warmup=warmup)
    model = network()
    mover = Mover(model, train, 8)
    plain = torch.optim.SGD(network().parameters(), lr=0.05)
    made = {key: 8 if value == "total" else value for key, value in ARGS.get(name, {}).items()}
    plateau = name == "ReduceLROnPlateau"
    schedule = getattr(torch.optim.lr_scheduler, name)(plain, **made, **({"mode": "max"} if plateau else {}))
    for number in range(8):
        if number == 4:
            model, mover = restarted(model, mover, train)
        warm = min(1.0, (number + 1) / warmup) if warmup else 1.0
        assert mover.rate == pytest.approx(plain.param_groups[0]["lr"] * warm, rel=1e-12)
        walk(model, mover, number, number + 1)
        plain.step()
        schedule.step(0.5 - 0.01 * number) if plateau else schedule.step()


@pytest.mark.parametrize("more", [False, True])
def test_several_slides_make_one_update_by_their_mean(more: bool) -> None:
    train = settings(optimizer="SGD", lr=0.1)
    model, plain = network(), network()
    mover = Mover(model, train, 8)
    before = model[0].weight.detach().clone()
    for number in range(3):
        see(model, number)
        mover.add(more)
        assert torch.equal(model[0].weight, before)
    mover.move()
    for number in range(3):
        see(plain, number)
    expected = before - 0.1 * plain[0].weight.grad / 3
    torch.testing.assert_close(model[0].weight.detach(), expected)
    assert mover.updates == 1 and mover.move() is None


def test_gradients_that_wait_survive_a_restart() -> None:
    train = settings(optimizer="SGD")
    model = network()
    mover = Mover(model, train, 8)
    see(model, 0)
    mover.add(more=True)
    assert model[0].weight.grad is None
    other, other_mover = restarted(model, mover, train)
    for each, its in ((model, mover), (other, other_mover)):
        walk(each, its, 1, 2)
    assert torch.equal(model[0].weight, other[0].weight)


def test_clipping_is_torchs() -> None:
    model, plain = network(), network()
    mover = Mover(model, settings(optimizer="SGD", lr=1.0, clip=0.01), 8)
    see(model, 0)
    see(plain, 0)
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    mover.add()
    assert mover.move() == pytest.approx(float(norm), rel=1e-6)
    moved = model[0].weight.detach() - network()[0].weight.detach()
    torch.testing.assert_close(moved, -plain[0].weight.grad, rtol=1e-4, atol=1e-8)


def test_averaged_weights_are_torchs_and_swap() -> None:
    model = network()
    mover = Mover(model, settings(optimizer="SGD", lr=0.1, ema=0.7), 8)
    average = torch.optim.swa_utils.AveragedModel(
        network(), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7), use_buffers=True
    )
    average.update_parameters(model)  # the first one copies
    for number in range(4):
        walk(model, mover, number, number + 1)
        average.update_parameters(model)
    last = {name: value.clone() for name, value in model.state_dict().items()}
    mover.swap()
    torch.testing.assert_close(model[0].weight, average.module[0].weight)
    mover.swap()
    assert all(torch.equal(last[name], value) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_is_seen_by_its_norm() -> None:
    model = network()
    mover = Mover(model, settings(), 8)
    see(model, 0)
    model[0].weight.grad[0, 0] = math.inf
    mover.add()
    norm = mover.move()
    assert norm is not None and not math.isfinite(norm)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": "AdamX"}, "train.optimizer is 'AdamX', which is not known; did you mean 'Adam"),
        ({"optimizer": "LBFGS"}, "train.optimizer is 'LBFGS', which is not known"),
        ({"schedule": "LambdaLR"}, "train.schedule is 'LambdaLR', which is not known"),
        ({"schedule": {"name": "cosine", "args": {"x": 1}}}, "train.schedule cosine takes no args; remove them"),
        ({"optimizer": {"name": "Adam", "args": {"lr": 1}}}, "lr in train.optimizer.args; set train.lr"),
    ],
)
def test_each_unknown_name_is_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings(**given)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": {"name": "Adam", "args": {"momentum": 1}}}, "Adam takes no 'momentum'; choose from betas, eps"),
        ({"optimizer": {"name": "Adam", "args": {"eps": -1}}}, "Adam says: Invalid epsilon value: -1"),
        ({"schedule": "StepLR"}, "StepLR says: "),
        ({"schedule": {"name": "StepLR", "args": {"step": 3}}}, "StepLR takes no 'step'; choose from step_size"),
    ],
)
def test_arguments_that_torch_refuses_are_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Mover(network(), settings(**given), 8)
    assert said in str(error.value) and "\n" not in str(error.value)

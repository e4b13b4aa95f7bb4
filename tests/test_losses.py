"""Losses and metrics against the formulas written out in NumPy, ignore labels and empty maps included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from wholegrad.errors import ShapeError
from wholegrad.losses import (
    LOSSES,
    bce_dice_loss,
    bce_loss,
    dice_counts,
    dice_from_counts,
    dice_loss,
    focal_loss,
)

Array = npt.NDArray[np.float64]


def draw(seed: int = 0, ignore: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (2, 1, 13, 17)).astype(np.uint8)
    labels[rng.random(labels.shape) < ignore] = 255
    return torch.from_numpy(3 * rng.standard_normal(labels.shape)), torch.from_numpy(labels)


def numpy_bce(o: Array, t: Array, w: tuple[float, float] = (1, 1)) -> float:
    p, k = 1 / (1 + np.exp(-o)), t != 255
    weight = np.where(t == 1, w[1], w[0])[k]
    term = -np.where(t == 1, np.log(p), np.log(1 - p))[k]
    return float((term * weight).sum() / weight.sum())


def numpy_focal(o: Array, t: Array, gamma: float = 2) -> float:
    p, k = 1 / (1 + np.exp(-o)), t != 255
    right = np.where(t == 1, p, 1 - p)[k]
    return float((-((1 - right) ** gamma) * np.log(right)).mean())


def numpy_dice(o: Array, t: Array, smooth: float = 1) -> float:
    k = t != 255
    p, y = (1 / (1 + np.exp(-o)))[k], (t == 1)[k]
    return float(1 - (2 * p[y].sum() + smooth) / (p.sum() + y.sum() + smooth))


CASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[[Array, Array], float]]] = {
    "bce": (bce_loss, numpy_bce),
    "weighted bce": (
        lambda o, t: bce_loss(o, t, weights=(0.5, 3.0)),
        lambda o, t: numpy_bce(o, t, (0.5, 3.0)),
    ),
    "dice": (dice_loss, numpy_dice),
    "rough dice": (lambda o, t: dice_loss(o, t, smooth=20.0), lambda o, t: numpy_dice(o, t, 20.0)),
    "bce+dice": (bce_dice_loss, lambda o, t: numpy_bce(o, t) + numpy_dice(o, t)),
    "focal": (focal_loss, numpy_focal),
    "focal 1": (lambda o, t: focal_loss(o, t, gamma=1.0), lambda o, t: numpy_focal(o, t, 1)),
}


@pytest.mark.parametrize("ignore", [0.0, 0.2, 0.95])
@pytest.mark.parametrize("name", CASES)
def test_against_the_formula(name: str, ignore: float) -> None:
    ours, formula = CASES[name]
    output, target = draw(seed=1, ignore=ignore)
    assert ours(output, target).item() == pytest.approx(formula(output.numpy(), target.numpy()), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right_and_ignored_pixels_have_none(name: str) -> None:
    output, target = draw(seed=2)
    output.requires_grad_()
    small = output.detach()[:1, :, :5, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda o: LOSSES[name](o, target[:1, :, :5, :5]), (small,))
    LOSSES[name](output, target).backward()
    assert output.grad is not None
    assert (output.grad[target == 255] == 0).all()
    assert (output.grad[target != 255] != 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_map_where_nothing_counts_has_loss_and_gradient_zero(name: str) -> None:
    output, target = draw(ignore=1.1)
    output.requires_grad_()
    loss = LOSSES[name](output, target)
    loss.backward()
    assert loss.item() == 0
    assert output.grad is not None
    assert (output.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_logits_stay_finite(name: str, sign: int) -> None:
    output, target = draw()
    output = (sign * 1e4 * output.sign()).float().requires_grad_()
    loss = LOSSES[name](output, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_target_that_would_broadcast_is_refused(name: str) -> None:
    output, target = draw()
    with pytest.raises(ShapeError, match=r"output is \(2, 1, 13, 17\) and target \(2, 13, 17\); make both"):
        LOSSES[name](output, target[:, 0])


def test_counts_add_up_over_parts() -> None:
    output, target = draw(seed=3)
    whole = dice_counts(output, target)
    parts = dice_counts(output[..., :5], target[..., :5]) + dice_counts(output[..., 5:], target[..., 5:])
    assert whole.dtype == torch.float64
    assert torch.equal(whole, parts)
    assert whole.sum() == (target != 255).sum()


def test_dice_of_counts() -> None:
    output, target = draw(seed=4)
    counted = (target != 255).numpy()
    said, truth = (output.numpy() > 0) & counted, (target.numpy() == 1) & counted
    expected = 2 * (said & truth).sum() / (said.sum() + truth.sum())
    assert dice_from_counts(dice_counts(output, target)) == pytest.approx(expected, rel=1e-15)


def test_dice_where_nothing_is_tissue() -> None:
    assert dice_from_counts(torch.tensor([0.0, 0.0, 0.0, 9.0])) == 1
    assert dice_from_counts(torch.tensor([0.0, 1.0, 0.0, 9.0])) == 0

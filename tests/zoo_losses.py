"""Losses as PyTorch and MONAI have them, on one small network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from monai.losses import (
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    TverskyLoss,
)
from monai.networks.utils import one_hot
from torch import nn
from torch.nn import functional as F

from zoo import Entry, Maker, always, both, labels, mask, pixels, shares
from zoo_networks import seeded


def net(classes: int) -> Callable[[], nn.Module]:
    """Convolutions down and up again, to a map of logits of the image's size."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(4, classes, 2, 2),
        )
    )  # fmt: skip


def slide_net(classes: int) -> Callable[[], nn.Module]:
    """One row of logits a slide."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
        )
    )


def bce_of_sigmoid(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy(torch.sigmoid(output), target)


def divergence(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.kl_div(F.log_softmax(output, 1), target, reduction="batchmean")


def gaussian(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What F.gaussian_nll_loss computes once it has looked at the variance's values, which no tracing can."""
    variance = (F.softplus(output[:, 1:]) + 0.01).clamp(min=1e-6)
    return 0.5 * (variance.log() + (output[:, :1] - target) ** 2 / variance).mean()


def weighted(output: torch.Tensor, target: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """U-Net's: a weight for each pixel, beside its label."""
    classes, weights = target
    return (F.cross_entropy(output, classes, reduction="none") * weights).sum() / weights.sum()


def lovasz_slopes(truth: torch.Tensor) -> torch.Tensor:
    """The Jaccard loss's differences, for true labels in the order of their errors."""
    both, either = truth.sum() - truth.cumsum(0), truth.sum() + (1 - truth).cumsum(0)
    jaccard = 1 - both / either
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def lovasz_hinge(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Berman, Rannen Triki and Blaschko, "The Lovasz-softmax loss" (2018), for two classes."""
    logits, truth = output.flatten(), target.flatten()
    errors, order = torch.sort(1 - logits * (2 * truth - 1), descending=True)
    return torch.dot(F.relu(errors), lovasz_slopes(truth[order]))


def lovasz_softmax(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same for several classes."""
    shares, found = output.softmax(1), []
    for i in range(output.shape[1]):
        truth = (target == i).to(output.dtype).flatten()
        errors, order = torch.sort((truth - shares[:, i].flatten()).abs(), descending=True)
        found.append(torch.dot(errors, lovasz_slopes(truth[order])))
    return torch.stack(found).mean()


def weights(height: int, width: int) -> torch.Tensor:
    result: torch.Tensor = pixels(2, 1, 9)(height, width).squeeze(1).abs() + 0.2
    return result


class Uncertainty(nn.Module):
    """Two tasks, each weighed by an uncertainty that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor([0.2, -0.3], dtype=torch.float64))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        tasks = torch.stack(
            [F.binary_cross_entropy_with_logits(output[:, :1], target), F.mse_loss(output[:, 1:], target)]
        )
        return (torch.exp(-self.log_variance) * tasks + self.log_variance).sum()


class Double(nn.Module):
    """A loss of MONAI's in float64 throughout: some cast to float32 whatever they are given."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        in_double = partial(one_hot, dtype=torch.float64)
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), ExitStack() as stack:
            for name in ("dice", "focal_loss", "tversky"):
                stack.enter_context(mock.patch(f"monai.losses.{name}.one_hot", in_double))
            result: torch.Tensor = self.loss(output, target)
        return result


class ClassWeights(nn.CrossEntropyLoss):
    """Cross-entropy with weights in float64."""

    def __init__(self, **options: Any) -> None:
        super().__init__(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), **options)


SIZE = (46, 60)
IMAGES = pixels(2)


def entry(name: str, loss: Callable[..., torch.Tensor], classes: int, target: Maker) -> Entry:
    return Entry(name, net(classes), loss, IMAGES, target, SIZE, 2)


def of_slides(name: str, loss: Callable[..., torch.Tensor], classes: int, target: torch.Tensor) -> Entry:
    return Entry(name, slide_net(classes), loss, IMAGES, always(target), SIZE, 1)


def classes(height: int, width: int) -> torch.Tensor:
    """Three classes ``(2, 1, H, W)``, as MONAI's losses take them."""
    result: torch.Tensor = labels(2, 3)(height, width).unsqueeze(1)
    return result


LOSSES = [
    entry("BCE with logits", nn.BCEWithLogitsLoss(), 1, mask(2)),
    entry(
        "BCE with logits, positive weight",
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([[[2.5]], [[0.5]]], dtype=torch.float64)), 2, mask(2, 2),
    ),
    entry("BCE of a sigmoid", bce_of_sigmoid, 1, mask(2)),
    entry("cross-entropy", nn.CrossEntropyLoss(), 3, labels(2, 3)),
    entry("cross-entropy, sum", nn.CrossEntropyLoss(reduction="sum"), 3, labels(2, 3)),
    entry("cross-entropy, class weights", ClassWeights(), 3, labels(2, 3)),
    entry("cross-entropy, ignored labels", nn.CrossEntropyLoss(ignore_index=255), 3, labels(2, 3, True)),
    entry("cross-entropy, smoothed labels", nn.CrossEntropyLoss(label_smoothing=0.1), 3, labels(2, 3)),
    entry(
        "cross-entropy, all of these", ClassWeights(ignore_index=255, label_smoothing=0.1), 3, labels(2, 3, True)
    ),
    entry("cross-entropy, soft targets", nn.CrossEntropyLoss(), 3, shares(2, 3)),
    entry("cross-entropy, soft targets, class weights", ClassWeights(label_smoothing=0.1), 3, shares(2, 3)),
    entry("MSE", nn.MSELoss(), 3, IMAGES),
    entry("L1", nn.L1Loss(), 3, IMAGES),
    entry("Huber", nn.HuberLoss(delta=0.3), 3, IMAGES),
    entry("smooth L1", nn.SmoothL1Loss(beta=0.4), 3, IMAGES),
    entry("KL divergence", divergence, 3, shares(2, 3)),
    entry("Gaussian", gaussian, 2, pixels(2, 1)),
    entry("monai Dice, sigmoid", Double(DiceLoss(sigmoid=True)), 1, mask(2)),
    entry("monai Dice, softmax", Double(DiceLoss(softmax=True, to_onehot_y=True)), 3, classes),
    entry(
        "monai Dice, softmax, foreground of the batch, squared",
        Double(DiceLoss(softmax=True, to_onehot_y=True, include_background=False, batch=True, squared_pred=True)),
        3, classes,
    ),
    entry("monai Dice, Jaccard", Double(DiceLoss(sigmoid=True, jaccard=True)), 1, mask(2)),
    entry("monai Dice and cross-entropy", Double(DiceCELoss(softmax=True, to_onehot_y=True)), 3, classes),
    entry("monai Dice and BCE", Double(DiceCELoss(sigmoid=True)), 1, mask(2)),
    entry("monai Dice and focal", Double(DiceFocalLoss(sigmoid=True)), 1, mask(2)),
    entry("monai Dice and focal, softmax", Double(DiceFocalLoss(softmax=True, to_onehot_y=True)), 3, classes),
    entry(
        "monai Dice, class weights",
        Double(DiceLoss(softmax=True, to_onehot_y=True, weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))),
        3, classes,
    ),
    entry(
        "monai Dice and cross-entropy, class weights",
        Double(DiceCELoss(softmax=True, to_onehot_y=True, weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))),
        3, classes,
    ),
    entry(
        "monai Dice and focal, class weights",
        Double(DiceFocalLoss(softmax=True, to_onehot_y=True, weight=[0.5, 1.0, 2.0])), 3, classes,
    ),
    entry(
        "monai focal, class weights", Double(FocalLoss(use_softmax=True, to_onehot_y=True, weight=[0.5, 1.0, 2.0])),
        3, classes,
    ),
    entry("monai Tversky", Double(TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7)), 1, mask(2)),
    entry("monai generalised Dice", Double(GeneralizedDiceLoss(softmax=True, to_onehot_y=True)), 3, classes),
    entry("monai focal", Double(FocalLoss(gamma=2.0, alpha=0.25)), 1, mask(2)),
    entry("monai focal, softmax", Double(FocalLoss(use_softmax=True, to_onehot_y=True)), 3, classes),
    entry("Lovasz hinge", lovasz_hinge, 1, mask(2)),
    Entry("Lovasz softmax", net(3), lovasz_softmax, pixels(2, seed=22), labels(2, 3), SIZE, 2),
    entry("a weight for each pixel", weighted, 3, both(labels(2, 3), weights)),
    entry("learnt uncertainty", Uncertainty(), 2, mask(2)),
    of_slides("BCE of slides", nn.BCEWithLogitsLoss(), 1, torch.tensor([[1.0], [0.0]], dtype=torch.float64)),
    of_slides("cross-entropy of slides", nn.CrossEntropyLoss(label_smoothing=0.1), 3, torch.tensor([2, 0])),
]  # fmt: skip

"""Segmentation losses with an ignore label, and the counts that Dice is made of, in plain PyTorch.

Each loss takes logits ``(N, 1, H, W)`` and labels ``(N, 1, H, W)`` (0 background, 1 tissue, 255 ignore) and
returns a 0-dim tensor. Each is written in sums over the map, so that wholegrad finds its reductions (rules 3
and 4), and is 0 with zero gradients where no pixel counts. None needs wholegrad to run them: they work on any
tensors. Output and target of different shapes are a ``ShapeError``, since broadcasting would hide the
mistake.

Soft Dice: Milletari et al., "V-Net" (3DV 2016), with plain instead of squared sums. Focal: Lin et al., "Focal
loss for dense object detection" (ICCV 2017).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from wholegrad.errors import ShapeError
from wholegrad.metrics.counts import IGNORE as IGNORE
from wholegrad.metrics.counts import Counts

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def bce_loss(output: torch.Tensor, target: torch.Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> torch.Tensor:
    """Binary cross-entropy with logits: the weighted mean over counted pixels.

    Args:
        output: logits ``(N, 1, H, W)``.
        target: labels ``(N, 1, H, W)``, any dtype.
        weights: of background and of tissue; (1, 1) is the plain mean.
    """
    truth, counted = _truth(output, target)
    weight = _weighted(truth, counted, weights)
    term = F.binary_cross_entropy_with_logits(output, truth, reduction="none")
    return _mean(term, weight)


def focal_loss(
    output: torch.Tensor,
    target: torch.Tensor,
    gamma: float = 2.0,
    weights: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Focal loss: each pixel's cross-entropy times ``(1 - p_t) ** gamma``, then the mean as in ``bce_loss``.

    ``p_t`` is the probability given to the pixel's own class, so that confident pixels fade out; ``gamma`` of
    at least 1 keeps the gradient finite where ``p_t`` rounds to 1.
    """
    truth, counted = _truth(output, target)
    weight = _weighted(truth, counted, weights)
    term = F.binary_cross_entropy_with_logits(output, truth, reduction="none")
    miss = torch.sigmoid(output * (1 - 2 * truth))  # 1 - p_t
    return _mean(term * miss**gamma, weight)


def dice_loss(output: torch.Tensor, target: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """Soft Dice over the whole map: ``1 - (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth)``.

    Args:
        output: logits ``(N, 1, H, W)``; ``p`` is their sigmoid, ``y`` the truth, both 0 where not counted.
        target: labels ``(N, 1, H, W)``, any dtype.
        smooth: in pixels; keeps the ratio defined, and 0 loss right, on a map without tissue.
    """
    truth, counted = _truth(output, target)
    probability = torch.sigmoid(output) * counted
    both, either = (probability * truth).sum(), probability.sum() + truth.sum()
    return 1 - (2 * both + smooth) / (either + smooth)


def bce_dice_loss(
    output: torch.Tensor,
    target: torch.Tensor,
    weights: tuple[float, float] = (1.0, 1.0),
    smooth: float = 1.0,
) -> torch.Tensor:
    """``bce_loss`` plus ``dice_loss``: one gives every pixel a gradient, the other minds small tissue."""
    return bce_loss(output, target, weights) + dice_loss(output, target, smooth)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "bce": bce_loss,
    "dice": dice_loss,
    "bce+dice": bce_dice_loss,
    "focal": focal_loss,
}


def dice_counts(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Counted pixels by kind, float64 ``(4,)``: true positive, false positive, false negative, true negative.

    A pixel is called tissue where its logit is above 0. Sums only: counts of parts of a map, or of several
    maps, add up to the counts of the whole.
    """
    _check(output, target)
    counted = target != IGNORE
    said, truth = (output > 0) & counted, (target == 1) & counted
    kinds = (said & truth, said & ~truth, ~said & truth, counted & ~said & ~truth)
    return torch.stack([kind.sum(dtype=torch.float64) for kind in kinds])


def dice_from_counts(counts: torch.Tensor) -> float:
    """``2 tp / (2 tp + fp + fn)`` of counts as ``dice_counts`` gives them; 1 where nothing is tissue."""
    return Counts(*(int(count) for count in counts)).dice


def _check(output: torch.Tensor, target: torch.Tensor) -> None:
    if output.shape != target.shape:
        raise ShapeError(
            "loss or metric",
            f"output is {tuple(output.shape)} and target {tuple(target.shape)}",
            "make both (N, 1, H, W): one logit and one label a pixel",
        )


def _truth(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tissue is and which pixels count, both 0 or 1 in the output's dtype."""
    _check(output, target)
    return (target == 1).to(output.dtype), (target != IGNORE).to(output.dtype)


def _weighted(truth: torch.Tensor, counted: torch.Tensor, weights: tuple[float, float]) -> torch.Tensor:
    background, tissue = weights
    if background == tissue == 1:
        return counted
    return counted * (background + (tissue - background) * truth)


def _mean(term: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean of ``term``; 0 where all weights are."""
    total = weight.sum()
    return (term * weight).sum() / torch.where(total > 0, total, torch.ones_like(total))

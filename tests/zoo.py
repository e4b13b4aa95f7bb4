"""What an entry of the zoo is, and the pixels and labels that its entries share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Loss = Callable[..., torch.Tensor]
Maker = Callable[[int, int], Any]


@dataclass(frozen=True)
class Entry:
    """One network with its loss and data.

    Attributes:
        build: the network in float64 and in the mode in which it runs; the same weights at each call.
        loss: of ``(output, target)``.
        image: float64 ``(N, C, H, W)``, or a tuple of them, from height and width.
        target: what the loss gets, from height and width of the image.
        size: height and width for tests.
        multiple: of which both must be multiples.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Loss
    image: Maker
    target: Maker
    size: tuple[int, int]
    multiple: int = 1

    def __str__(self) -> str:
        return self.name


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(batch: int = 1, channels: int = 3, seed: int = 0) -> Maker:
    """Random colours on a slow wave, each image darker than the one before: no two regions or images look alike."""

    def make(height: int, width: int) -> torch.Tensor:
        noise = torch.rand(batch, channels, height, width, generator=_generator(seed), dtype=torch.float64)
        rows = torch.linspace(0, 5, height, dtype=torch.float64).sin().view(-1, 1)
        shade = torch.linspace(1, 0.3, batch, dtype=torch.float64).view(-1, 1, 1, 1)
        return shade * (0.7 * noise + 0.3 * rows * torch.linspace(0, 4, width, dtype=torch.float64).cos())

    return make


def labels(batch: int = 1, classes: int = 2, ignored: bool = False) -> Maker:
    """Classes ``(N, H, W)``; some 255 where ``ignored``."""

    def make(height: int, width: int) -> torch.Tensor:
        drawn = torch.randint(0, classes + ignored, (batch, height, width), generator=_generator(1))
        return torch.where(drawn == classes, 255, drawn)

    return make


def mask(batch: int = 1, channels: int = 1) -> Maker:
    """Zeros and ones ``(N, channels, H, W)`` in float64."""

    def make(height: int, width: int) -> torch.Tensor:
        return torch.randint(0, 2, (batch, channels, height, width), generator=_generator(2)).double()

    return make


def shares(batch: int = 1, channels: int = 2) -> Maker:
    """Class probabilities ``(N, channels, H, W)``, none of them zero."""

    def make(height: int, width: int) -> torch.Tensor:
        drawn = torch.rand(batch, channels, height, width, generator=_generator(3), dtype=torch.float64) + 0.1
        return drawn / drawn.sum(1, keepdim=True)

    return make


def both(*makers: Maker) -> Maker:
    """A tuple of what each makes."""
    return lambda height, width: tuple(maker(height, width) for maker in makers)


def always(value: Any) -> Maker:
    """The same at every size: a slide's label."""
    return lambda height, width: value

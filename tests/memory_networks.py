"""Networks of many kinds of ops whose memory is measured in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from wholegrad.losses import LOSSES


def _block(cin: int, cout: int, norm: nn.Module, pad: str = "zeros") -> nn.Module:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, padding_mode=pad), norm, nn.ReLU())


class Pyramid(nn.Module):
    """A U-Net with pooling, bilinear upsampling and a norm."""

    def __init__(self, norm: Callable[[int], nn.Module], pad: str = "zeros") -> None:
        super().__init__()
        self.down1, self.down2 = _block(3, 8, norm(8), pad), _block(8, 16, norm(16), pad)
        self.up, self.head = _block(24, 8, norm(8), pad), nn.Conv2d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down1(x)
        deep = self.down2(F.max_pool2d(skip, 2))
        up = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        result: torch.Tensor = self.head(self.up(torch.cat([skip, up], 1)))
        return result


class Attention(nn.Module):
    """An encoder, attention between all of its positions, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 16, 4, 4))
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.decode = nn.ConvTranspose2d(16, 1, 32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.encode(x)
        tokens = y.flatten(2).transpose(1, 2)
        mixed = self.attend(tokens, tokens, tokens, need_weights=False)[0]
        result: torch.Tensor = self.decode(y + mixed.transpose(1, 2).reshape(y.shape))
        return result


class Classifier(nn.Module):
    """An encoder with batch norm and a head on pooled features; dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.GELU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.head = nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x).mean((2, 3)))
        return result


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "batch norm": (lambda: Pyramid(nn.BatchNorm2d), LOSSES["bce"], None),
    "group norm, reflect": (lambda: Pyramid(lambda c: nn.GroupNorm(2, c), "reflect"), LOSSES["bce+dice"], None),
    "instance norm": (lambda: Pyramid(nn.InstanceNorm2d), LOSSES["focal"], None),
    "attention": (Attention, LOSSES["bce"], None),
    "classifier": (Classifier, F.cross_entropy, torch.tensor([1])),
}

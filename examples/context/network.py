"""The network of this example: a small U-Net of high stride whose lowest map is scaled by what its mean says.

Plain ``torch.nn``: nothing in here knows of wholegrad. Sees whatever it is given: a whole slide, or a patch.
"""

from __future__ import annotations

import math

import torch
from torch import nn

GAIN = 32  # of the mean: what matters covers a few per cent of a slide


class ContextUNet(nn.Module):
    """One channel in, one logit a pixel out; height and width are multiples of 16.

    The lowest map (a sixteenth of each side) is averaged over all of its pixels; two small layers turn that mean into
    a factor for each channel (Perez et al., "FiLM", AAAI 2018), which is how one end of a slide can say what the other
    means. Everything else is local.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 6, 8, stride=4, padding=2)
        self.down2 = nn.Conv2d(6, 12, 8, stride=4, padding=2)
        self.middle = nn.Conv2d(12, 12, 3, padding=1)
        self.context1 = nn.Linear(12, 16)
        self.context2 = nn.Linear(16, 12)
        self.up2 = nn.ConvTranspose2d(12, 6, 8, stride=4, padding=2)
        self.fuse2 = nn.Conv2d(12, 4, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(4, 2, 8, stride=4, padding=2)
        self.fuse1 = nn.Conv2d(3, 2, 3, padding=1)
        self.head = nn.Conv2d(2, 1, 3, padding=1)
        self.act = nn.LeakyReLU(0.1)
        generator = torch.Generator().manual_seed(seed)
        for layer in self.children():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=1.4 / math.sqrt(_fan_in(layer)), generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, 1, H, W)`` of an image ``(N, 1, H, W)`` with values in [0, 1]."""
        ink = 4 * (0.47 - image)  # 0 on what is plain, -0.8 to 0.8 on stripes
        low1 = self.act(self.down1(ink))  # (N, 6, H/4, W/4)
        low2 = self.act(self.down2(low1))  # (N, 12, H/16, W/16)
        deep = self.act(self.middle(low2))  # (N, 12, H/16, W/16)
        said = self.context2(self.act(self.context1(GAIN * deep.mean(dim=(2, 3)))))  # (N, 12)
        deep = deep * (1 + said[:, :, None, None])
        up2 = self.act(self.up2(deep))  # (N, 6, H/4, W/4)
        mid = self.act(self.fuse2(torch.cat([up2, low1], dim=1)))  # (N, 4, H/4, W/4)
        up1 = self.act(self.up1(mid))  # (N, 2, H, W)
        logits: torch.Tensor = self.head(self.act(self.fuse1(torch.cat([up1, ink], dim=1))))
        return logits


def _fan_in(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> float:
    """How many weights feed one output value."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    taps: float = math.prod(layer.kernel_size)
    return layer.in_channels * (taps / math.prod(layer.stride) if isinstance(layer, nn.ConvTranspose2d) else taps)

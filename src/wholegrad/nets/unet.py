"""The 4492-parameter U-Net for gigapixel slides: few channels, large kernels, high strides, full size out.

A *reconstruction*: Remedios et al., "Exploring shared memory architectures for end-to-end gigapixel deep
learning" (MIDL 2023) publish the constraints of their network, not its layer list: 4492 parameters, large
kernels, high stride, a mask at full resolution, over 100 GB when trained whole on 16000 x 64000 pixels in
Keras. This one meets all of them (4492 exactly; about 115 bytes a pixel in Keras).

With two to six channels a layer of plain ReLUs can die whole, and then nothing below it learns. Hence the
leaky ReLU, and an initialisation that keeps the signal's variance through strided and transposed convolutions
(He et al., ICCV 2015, with the fan-in that an output pixel really has). ``benchmarks/ten_seeds`` shows both.

Plain ``torch.nn`` only: nothing in here knows of wholegrad.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

STRIDE = 16  # of the lowest map: two downs of stride 4


class GigapixelUNet(nn.Module):
    """Tissue against background: RGB in, one logit a pixel out.

    Args:
        slope: of the leaky ReLU on its negative side.
        seed: of the initial weights; None draws from torch's global generator.
    """

    def __init__(self, slope: float = 0.1, seed: int | None = None) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 3, 8, stride=4, padding=2)
        self.down2 = nn.Conv2d(3, 6, 8, stride=4, padding=2)
        self.middle = nn.Conv2d(6, 6, 5, padding=2)
        self.up2 = nn.ConvTranspose2d(6, 3, 8, stride=4, padding=2)
        self.fuse2 = nn.Conv2d(6, 3, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(3, 2, 8, stride=4, padding=2)
        self.fuse1 = nn.Conv2d(5, 2, 3, padding=1)
        self.head = nn.Conv2d(2, 1, 5, padding=2)
        self.act: nn.Module = nn.LeakyReLU(slope)
        self._initialise(slope, seed)

    def _initialise(self, slope: float, seed: int | None) -> None:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for layer in self.children():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                gain = 1.0 if layer is self.head else math.sqrt(2 / (1 + slope**2))
                nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in(layer)), generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, 1, H, W)`` of an image ``(N, 3, H, W)`` with values in [0, 1]; any height and width.

        The image is turned into ink, 1 - image, so that the zeros with which convolutions pad, and with which
        the map is filled up to a multiple of 16 at the bottom and right, mean clean glass. The logits are
        cropped back to H x W: a loss sees real pixels only.
        """
        height, width = image.shape[-2:]
        ink = 1 - image
        if height % STRIDE or width % STRIDE or torch.compiler.is_exporting():  # a file serves every size
            ink = F.pad(ink, (0, -width % STRIDE, 0, -height % STRIDE))
        low1 = self.act(self.down1(ink))  # (N, 3, H/4, W/4)
        low2 = self.act(self.down2(low1))  # (N, 6, H/16, W/16)
        deep = self.act(self.middle(low2))  # (N, 6, H/16, W/16)
        up2 = self.act(self.up2(deep))  # (N, 3, H/4, W/4)
        mid = self.act(self.fuse2(torch.cat([up2, low1], dim=1)))  # (N, 3, H/4, W/4)
        up1 = self.act(self.up1(mid))  # (N, 2, H, W)
        full = self.act(self.fuse1(torch.cat([up1, ink], dim=1)))  # (N, 2, H, W)
        logits: torch.Tensor = self.head(full)  # (N, 1, H, W)
        return logits[..., :height, :width]


def unet4492(slope: float = 0.1, seed: int | None = None) -> GigapixelUNet:
    """The published experiment's network, as reconstructed: 4492 parameters exactly."""
    return GigapixelUNet(slope=slope, seed=seed)


def fan_in(layer: nn.Conv2d | nn.ConvTranspose2d) -> float:
    """How many weights feed one output value: a transposed convolution's taps share ``stride`` phases."""
    taps: float = math.prod(layer.kernel_size)
    if isinstance(layer, nn.ConvTranspose2d):
        taps /= math.prod(layer.stride)
    return layer.in_channels // layer.groups * taps

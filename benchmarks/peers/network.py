"""What every peer trains on: a seeded ResNet-18, a slide label, and a smooth random image of 8-bit pixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

LABEL = torch.tensor([1])
CLASSES = 2


class Block(nn.Module):
    """ResNet's basic block; the activations are modules of their own, which lightstream asks for."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu2(out)


class Head(nn.Module):
    """Mean over the map, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(512, CLASSES)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc(features.mean((2, 3)))


class Classifier(nn.Module):
    """ResNet-18: an encoder that gives a map of 512 channels at a stride of 32, and a head."""

    def __init__(self) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        stages = [nn.Sequential(Block(a, b, stride), Block(b, b, 1)) for a, b, stride in widths]
        self.encoder = nn.Sequential(*stem, *stages)
        self.head = Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def classifier(train_norms: bool) -> Classifier:
    """The same weights for every peer; norms in eval mode, with running statistics that are not 0 and 1.

    Args:
        train_norms: train the scales and shifts of the norms too.
    """
    torch.manual_seed(0)
    model = Classifier().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.7, 1.4)
            nn.init.uniform_(module.weight, 0.6, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.requires_grad_(train_norms)
    return model


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """``(3, height, width)`` uint8: random fields of three scales, and a little noise."""
    random = np.random.default_rng(seed)
    image = random.normal(128, 3, (3, height, width)).astype(np.float32)
    for step, amplitude in ((256, 40.0), (32, 20.0), (8, 10.0)):
        coarse = random.standard_normal((1, 3, height // step + 2, width // step + 2), dtype=np.float32)
        field = nn.functional.interpolate(torch.from_numpy(coarse), (height, width), mode="bilinear")
        image += amplitude * field[0].numpy()
    return image.clip(0, 255).astype(np.uint8)

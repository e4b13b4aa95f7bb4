"""A small network with everything that a resumed run could get wrong: running statistics, counters and dropout."""

from torch import nn


def forgetful() -> nn.Module:
    """Convolutions with batch norm and dropout, a logit a pixel."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(6, 6, 5, padding=2),
        nn.LeakyReLU(0.1),
        nn.Conv2d(6, 1, 3, padding=1),
    )

"""Runs what was exported beside the network itself: whole, at several sizes and batches, and by tiles as the card says.

The measure is rounding's own: float64 arithmetic on the same weights is the truth, and the file may be off by a few
times what PyTorch's own float32 run is.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from wholegrad.errors import WholegradError
from wholegrad.export.formats import Array, Run
from wholegrad.export.tiles import run_tiled

TIMES, ROUNDINGS = 4.0, 64  # of PyTorch's own error, and of the largest output, that the file may be off by
MOST = 1 << 22  # pixels of an image to try tiles on


class MismatchError(WholegradError):
    """What was exported does not compute what the network does."""


@dataclass(frozen=True)
class Compared:
    """The largest differences from float64: of the file, and of PyTorch's own run in the network's dtype."""

    file: float
    torch: float
    allowed: float

    @property
    def ok(self) -> bool:
        return math.isfinite(self.file) and self.file <= self.allowed


REFUSED = Compared(math.inf, 0.0, 0.0)


class Truth:
    """A network in its own dtype and in float64."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, channels: int) -> None:
        self.model, self.dtype, self.channels = model, dtype, channels
        self.exact = copy.deepcopy(model).double()
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def image(self, batch: int, height: int, width: int) -> torch.Tensor:
        """Pixels in [0, 1], the same at every call of this size."""
        generator = torch.Generator().manual_seed(height * 65537 + width)
        return torch.rand(batch, self.channels, height, width, generator=generator, dtype=torch.float64).to(self.dtype)

    @torch.no_grad()
    def own(self, image: torch.Tensor) -> torch.Tensor:
        """What the network makes of an image in its own dtype; the last answer is kept."""
        if self._last is None or self._last[0] is not image:
            self._last = (image, self.model(image))
        return self._last[1]

    @torch.no_grad()
    def compare(self, image: torch.Tensor, found: Array) -> Compared:
        """What the file made of an image with what the network makes of it."""
        own, exact = self.own(image), self._exact(image)
        if found.shape != tuple(own.shape):
            return REFUSED
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        theirs = _apart(torch.from_numpy(np.asarray(found)), exact)
        ours = _apart(own, exact)
        return Compared(theirs, ours, TIMES * ours + ROUNDINGS * torch.finfo(own.dtype).eps * largest)

    def _exact(self, image: torch.Tensor) -> torch.Tensor:
        """In float64; the network's own dtype where its code knows no other."""
        try:
            out: torch.Tensor = self.exact(image.double())
        except RuntimeError:
            out = self.model(image)
        return out.double()


def _apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    gap = (found.double() - exact).abs()
    return float("inf") if not torch.isfinite(gap).all() else float(gap.max()) if gap.numel() else 0.0


def agrees(truth: Truth, run: Run, batch: int, height: int, width: int) -> Compared | None:
    """How far the file is from the network on one image; None if either refuses that size."""
    image = truth.image(batch, height, width)
    try:
        truth.own(image)
        found = run(image.numpy())
    except Exception:  # each runtime has its own, and the network's code
        return None
    return truth.compare(image, found)


def by_tiles(truth: Truth, run: Run, card: dict[str, Any], multiple: tuple[int, int]) -> Compared | None:
    """The same by tiles on two strips, one cut in each direction.

    None if an image would be too large to try; ``REFUSED`` if the file does not take such tiles.
    """
    found = []
    for cut in (0, 1):
        size, tile = zip(*(_sizes(card, axis, axis == cut, multiple[axis]) for axis in (0, 1)), strict=True)
        if size[0] * size[1] > MOST:
            return None
        image = truth.image(1, *size)
        try:
            made = run_tiled(run, image.numpy(), card, tile)
        except Exception:  # each runtime has its own
            return REFUSED
        found.append(truth.compare(image, made))
    return max(found, key=lambda each: each.file / max(each.allowed, 1e-300))


def _sizes(card: dict[str, Any], axis: int, cut: bool, multiple: int) -> tuple[int, int]:
    """Pixels of the image and of what a tile owns along one axis.

    Where it is cut, tiles lie there whose halos end before the image does, on both sides, and there is a bit of a tile
    more at the end.
    """
    stride, halo, before, after = (int(card["tiling"][each][axis]) for each in ("stride", "halo", "before", "after"))
    own = max(halo, stride, 32) if cut else 1 << 20
    size = 2 * halo + 3 * own + stride // 2 + 1 if cut else max(64, before + after + 4 * stride)
    return -(-size // multiple) * multiple, own

"""Convolutions that run strip by strip give what they give one after the other, wherever strips and panels end."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wholegrad as wg
from noted import note
from wholegrad.graph import strips
from wholegrad.graph.graph import Graph
from wholegrad.graph.strips import Strip
from wholegrad.kernels.host import host
from wholegrad.nets import unet4492

pytestmark = pytest.mark.skipif(host() is None, reason="no kernels on this machine")


class Tail(nn.Module):
    """Convolutions of many kinds at full resolution, two of which read one map."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 5, stride=2, padding=2, output_padding=1)
        self.one = nn.Conv2d(6, 2, 3, padding=2, dilation=2, bias=False)
        self.two = nn.Conv2d(2, 2, (1, 5), padding=(0, 2))
        self.register_buffer("scale", torch.rand(2, 1, 1) + 0.5)
        self.head = nn.Conv2d(4, 1, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = torch.relu(self.up(F.leaky_relu(self.down(x))))
        one = F.leaky_relu(self.one(torch.cat([up, 1 - x], 1))) * self.scale
        result: torch.Tensor = self.head(torch.cat([self.two(one), one], 1))
        return result[..., : x.shape[2] - 1, : x.shape[3] - 3]


class Strided(nn.Module):
    """The result has fewer pixels than the map before it, which has fewer than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 2, 3, padding=1)
        self.less = nn.Conv2d(2, 3, (3, 4), stride=(2, 3))
        self.last = nn.Conv2d(3, 2, 2, stride=(3, 1), padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(F.leaky_relu(self.less(self.wide(x)), 0.2))
        return result


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Graph, Strip | None]]:
    """Strips and panels are small, no boundary is stored; the list fills with what segments were found to have."""
    return note(monkeypatch, strips, "find", 7, 32)


@pytest.mark.parametrize("tile", [(1000, 1000), (40, 70), (29, 33)])
@pytest.mark.parametrize(
    ("make", "together"), [(unet4492, 3), (Tail, 4), (Strided, 3), (lambda: nn.Conv2d(3, 13, 3), 1)]
)
def test_maps_are_those_of_the_whole_image(
    make: Callable[[], nn.Module], together: int, tile: tuple[int, int], found: list[tuple[Graph, Strip | None]]
) -> None:
    torch.manual_seed(0)
    model, pixels = make().double(), np.random.default_rng(0).integers(0, 256, (3, 96, 122), np.uint8)
    result = wg.predict(model, pixels, kind="logits", tile=tile)
    with torch.no_grad():
        wanted = model(torch.from_numpy(pixels)[None].double() / 255)[0]
    assert result is not None
    np.testing.assert_allclose(result, wanted, rtol=1e-12, atol=1e-13)
    strip = found[-1][1]
    assert strip is not None and len(strip.nodes) == together


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_is_stored_as_such(
    dtype: torch.dtype, found: list[tuple[Graph, Strip | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("wholegrad.predict"), "decide", None)  # nothing is left to do
    torch.manual_seed(1)
    model, pixels = Tail().to(dtype), np.random.default_rng(1).integers(0, 256, (3, 90, 132), np.uint8)
    with torch.no_grad():
        model.head.bias -= model(torch.from_numpy(pixels)[None].to(dtype) / 255).median()
        wanted = model(torch.from_numpy(pixels)[None].to(dtype) / 255)[0]
    mask = wg.predict(model, pixels, threshold=0.5, tile=(41, 60))
    clear = (wanted.abs() > 1e-5).numpy()
    assert mask is not None and mask.dtype == np.uint8 and 0.4 < mask.mean() < 0.6 and clear.mean() > 0.99
    np.testing.assert_array_equal(mask[clear], (wanted > 0).numpy()[clear])


def test_tiles_change_rounding_only_and_threads_nothing(found: list[tuple[Graph, Strip | None]]) -> None:
    model, pixels = unet4492(seed=2), np.random.default_rng(2).integers(0, 256, (3, 128, 208), np.uint8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(wg.predict(model, pixels, kind="logits", tile=(32, 48)))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(results[0], results[1])


def test_a_map_that_others_read_is_no_part_of_a_strip(found: list[tuple[Graph, Strip | None]]) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            result: torch.Tensor = self.second(x + F.avg_pool2d(x, 3, 1, 1))
            return result

    model, pixels = Pooled().double(), np.random.default_rng(3).random((3, 50, 60))
    result = wg.predict(model, pixels, kind="logits", tile=(21, 40))
    with torch.no_grad():
        np.testing.assert_allclose(result, model(torch.from_numpy(pixels)[None])[0], rtol=1e-12, atol=1e-13)  # type: ignore[arg-type]
    assert found[-1][1] is not None and len(found[-1][1].nodes) == 1

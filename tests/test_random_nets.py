"""Random small networks, losses and plans against the oracle: shapes, kernels, strides, dilations, groups, skips."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from oracle import assert_exact

ACTIVATIONS = [F.relu, F.silu, F.gelu, torch.tanh, lambda x: F.leaky_relu(x, 0.2), F.softplus]


@st.composite
def convolutions(draw: st.DrawFn, channels: int, height: int, width: int) -> tuple[nn.Module, int]:
    """A convolution or transposed convolution that fits on a map of this size."""
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
    out = groups * draw(st.integers(1, 3))
    bias = draw(st.booleans())
    if draw(st.booleans()):
        pad = [
            draw(st.integers(-(-max(0, r + 1 - n) // 2), r + 1)) for r, n in zip(reach, (height, width), strict=True)
        ]
        return nn.Conv2d(channels, out, kernel, stride, tuple(pad), dilation, groups, bias), out
    least = [(n - 1) * s + r + 1 for n, s, r in zip((height, width), stride, reach, strict=True)]
    pad = [draw(st.integers(0, min((size - 1) // 2, r))) for size, r in zip(least, reach, strict=True)]
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    return nn.ConvTranspose2d(channels, out, kernel, stride, tuple(pad), tuple(extra), groups, bias, dilation), out


class RandomNet(nn.Module):
    """A chain of convolutions with activations; where sizes allow, an earlier map is added or concatenated."""

    def __init__(self, layers: list[nn.Module], activations: list[Any], joins: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activations, self.joins = activations, joins

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x]
        for layer, act, join in zip(self.layers, self.activations, self.joins, strict=True):
            x = act(layer(x))
            other = next((m for m in seen if m.shape == x.shape), None)
            if other is not None and join == "add":
                x = x + other
            seen.append(x)
        same = [m for m in seen if m.shape[-2:] == x.shape[-2:]]
        return torch.cat(same, 1) if self.joins[-1] == "cat" else x * 0.5


@st.composite
def nets(draw: st.DrawFn) -> tuple[RandomNet, torch.Tensor, int]:
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    channels = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    image = torch.rand(draw(st.integers(1, 2)), channels, height, width, dtype=torch.float64)
    layers: list[nn.Module] = []
    x = image
    for _ in range(draw(st.integers(1, 4))):
        layer, channels = draw(convolutions(channels, *x.shape[-2:]))
        y = layer.double()(x)
        if max(y.shape[-2:]) > 80:
            break
        layers.append(layer)
        x = y
    if not layers:
        layers = [nn.Conv2d(image.shape[1], 2, 3, padding=1).double()]
    acts = [draw(st.sampled_from(ACTIVATIONS)) for _ in layers]
    joins = [draw(st.sampled_from(["", "add", "cat"])) for _ in layers]
    return RandomNet(layers, acts, joins).double(), image, seed


def mean_square(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output**2).mean() + output.sum() * 0.01


def flat_ratio(output: torch.Tensor, target: Any) -> torch.Tensor:
    """A loss of sums over a flattened map, in the manner of Dice: its gradient depends on the sums."""
    flat = torch.sigmoid(output).reshape(output.shape[0], -1)
    top = (flat * flat).sum(1)
    return (1 - (top + 1) / (flat.sum(1) + 2)).mean()


@settings(max_examples=60)
@given(
    nets(),
    st.sampled_from([mean_square, flat_ratio]),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.data(),
)
def test_random_networks_are_exact(
    made: tuple[RandomNet, torch.Tensor, int], loss: Any, tile: tuple[int, int], data: st.DataObject
) -> None:
    net, image, _ = made
    names = [f"layers.{i}" for i in range(len(net.layers))]
    boundaries = data.draw(st.none() | st.lists(st.sampled_from(names), unique=True))
    if max(image.shape[-2:]) > 6 * min(tile):
        tile = (max(tile[0], image.shape[-2] // 5 + 1), max(tile[1], image.shape[-1] // 5 + 1))
    assert_exact(net, loss, image, None, tile=tile, boundaries=boundaries)

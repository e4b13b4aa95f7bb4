"""The published network: its layers to the parameter, any size of image, and no layer that can die."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wholegrad.nets import GigapixelUNet, unet4492
from wholegrad.nets.unet import fan_in

# layer: (in channels, out channels, kernel, stride, padding, parameters)
TABLE = {
    "down1": (3, 3, 8, 4, 2, 579),
    "down2": (3, 6, 8, 4, 2, 1158),
    "middle": (6, 6, 5, 1, 2, 906),
    "up2": (6, 3, 8, 4, 2, 1155),
    "fuse2": (6, 3, 3, 1, 1, 165),
    "up1": (3, 2, 8, 4, 2, 386),
    "fuse1": (5, 2, 3, 1, 1, 92),
    "head": (2, 1, 5, 1, 2, 51),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_layer_is_as_published(name: str) -> None:
    layer = unet4492().get_submodule(name)
    assert isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))
    into, out, kernel, stride, padding, parameters = TABLE[name]
    assert (layer.in_channels, layer.out_channels) == (into, out)
    assert (layer.kernel_size, layer.stride, layer.padding) == (
        (kernel, kernel),
        (stride, stride),
        (padding, padding),
    )
    assert sum(p.numel() for p in layer.parameters()) == parameters


def test_4492_parameters_in_all() -> None:
    assert sum(p.numel() for p in unet4492().parameters()) == 4492


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (17, 31), (64, 48), (50, 3)])
def test_any_height_and_width(size: tuple[int, int]) -> None:
    logits = unet4492(seed=0)(torch.rand(2, 3, *size))
    assert logits.shape == (2, 1, *size)


def test_padding_is_white_glass() -> None:
    """An image of odd size means the same as that image on a larger white ground, cropped."""
    net = unet4492(seed=1).double()
    image = torch.rand(1, 3, 37, 53, dtype=torch.float64)
    larger = F.pad(image, (0, 11, 0, 11), value=1.0)
    assert torch.equal(net(image), net(larger)[..., :37, :53])


@pytest.mark.parametrize("seed", range(10))
def test_every_parameter_learns_from_the_first_step(seed: int) -> None:
    net = unet4492(seed=seed)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    net(image).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        dead = (parameter.grad == 0).flatten(1).all(1) if parameter.dim() > 1 else parameter.grad == 0
        assert not dead.any(), f"{name} has channels without a gradient at seed {seed}"


def test_the_signal_keeps_its_size_through_the_layers() -> None:
    torch.manual_seed(0)
    sizes = []
    for seed in range(20):
        net = GigapixelUNet(seed=seed)
        net.head.register_forward_hook(lambda _layer, into, _out: sizes.append(into[0].square().mean().sqrt()))
        net(torch.rand(1, 3, 64, 64))
    assert 0.1 < torch.stack(sizes).median() < 3


def test_fan_in_counts_what_one_output_value_sums() -> None:
    net = unet4492()
    assert fan_in(net.down1) == 3 * 64
    assert fan_in(net.up2) == 6 * 4  # 8x8 taps, stride 4: two by two of them meet at one output


def test_a_seed_gives_the_same_weights() -> None:
    first, again, other = (unet4492(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["down1.weight"], other["down1.weight"])

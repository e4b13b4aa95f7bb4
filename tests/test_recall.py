"""Boundaries that convolutions make are read back in the backward sweep, not computed again; gradients stay exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oracle import assert_exact, captured
from wholegrad.graph.graph import Kind, Ref
from wholegrad.graph.recall import is_wide, recall, recallable
from wholegrad.graph.rules import convolve
from wholegrad.graph.segment import cut

BOUNDARIES = ["first", "second", "third", "fourth"]


class Wide(nn.Module):
    """Convolutions of 16 channels: strided, dilated, transposed; a skip, and norms over the map in between."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 24, 3, stride=2, padding=1)
        self.third = nn.Conv2d(24, 24, (3, 2), padding=(2, 1), dilation=2)
        self.fourth = nn.ConvTranspose2d(24, 24, 3, stride=2, padding=1, output_padding=1)
        self.norms = nn.ModuleList(norm(24, affine=True) for _ in range(4))
        self.head = nn.Conv2d(24, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.leaky_relu(self.norms[0](self.first(x)), 0.1)
        y = self.second(x)
        x = nn.functional.leaky_relu(self.norms[1](y), 0.1)
        x = torch.tanh(self.norms[2](self.third(x)))
        x = x + y.mean(1, keepdim=True)[..., : x.shape[-2], : x.shape[-1]]
        return self.head(torch.tanh(self.norms[3](self.fourth(x))))


def mean_square(output: torch.Tensor, target: None) -> torch.Tensor:
    return (output**2).mean()


def wide(norm: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return Wide(norm).double().train()


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("placement", ["host", "disk"])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_are_exact(norm: type[nn.Module], placement: str, batch: int) -> None:
    image = torch.rand(batch, 3, 37, 42, dtype=torch.float64)
    assert_exact(wide(norm), mean_square, image, None, tile=(9, 11), boundaries=BOUNDARIES, placement=placement)


def test_a_boundary_is_read_back_where_a_convolution_of_many_channels_makes_it() -> None:
    graph = captured(wide(nn.BatchNorm2d), (1, 3, 37, 42))
    made = {node.path: Ref(node.index) for node in graph.of_kind(Kind.MAP) if node.path in BOUNDARIES}
    segments = cut(graph, frozenset(made.values()))
    found = {ref for segment in segments for ref in recallable(graph, segment, set(made.values()))}
    assert found == {made["second"], made["third"], made["fourth"]}  # the first reads three channels: computed again
    again = recall(graph, next(s for s in segments if made["second"] in s.outputs), set(made.values()))
    assert [again.original(ref) for ref in again.segment.maps][-1] == made["second"]


@pytest.mark.parametrize(
    ("into", "out", "groups", "worth"),
    [
        (24, 24, 1, True),
        (16, 64, 1, True),
        (128, 128, 8, True),
        (16, 16, 1, False),  # the thin kernels'
        (64, 16, 1, False),  # lies planar
        (3, 64, 1, False),  # as quick as reading
    ],
)
def test_what_is_worth_reading_back(into: int, out: int, groups: int, worth: bool) -> None:
    graph = captured(nn.Conv2d(into, out, 3, groups=groups).double(), (1, into, 30, 30))
    assert any(is_wide(graph, node) for node in graph.nodes) == worth


def test_statistics_are_taken_in_the_pass_that_makes_the_map() -> None:
    graph = captured(wide(nn.BatchNorm2d), (1, 3, 37, 42))
    made = {Ref(node.index) for node in graph.of_kind(Kind.MAP) if node.path in BOUNDARIES}
    summing = [segment for segment in cut(graph, frozenset(made)) if segment.reductions]
    assert len(summing) == 4 and all(segment.outputs for segment in summing)


@pytest.mark.parametrize(
    ("k", "stride", "dilation", "groups"), [(3, 2, 1, 1), (4, 3, 2, 2), (2, 2, 1, 1), (5, 1, 1, 1)]
)
def test_a_transposed_convolution_is_the_gradient_that_it_is_computed_as(
    k: int, stride: int, dilation: int, groups: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((2, 32, 9, 7), (32, 16, k, k), (16 * groups,)))
    settings = convolve.Settings((stride,) * 2, (0, 0), (dilation,) * 2, True, (0, 0), groups)
    found = convolve._forward(convolve.interleaved(x), weight, bias, settings)
    wanted = torch.ops.aten.convolution(x.double(), weight.double(), bias.double(), *settings)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


class Viewed(nn.Module):
    """A view of the shape that was there, taken without gradient or written through."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.written = nn.Conv2d(3, 4, 3, padding=1), written

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        with torch.set_grad_enabled(self.written):
            y = x.view(x.shape)
        if self.written:
            y.add_(1.0)
        return x * y


@pytest.mark.parametrize("written", [False, True])
def test_a_view_that_changes_nothing_still_cuts_gradients_and_shares_memory(written: bool) -> None:
    image = torch.rand(1, 3, 20, 30, dtype=torch.float64)
    assert_exact(Viewed(written).double(), lambda o, t: o.square().mean(), image, None, tile=(9, 11))

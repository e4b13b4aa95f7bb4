"""Passes over maps whose channels lie next to each other, against PyTorch; and that wide networks run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import nn

import wholegrad as wg
from oracle import assert_exact
from wholegrad.graph.inline import inline
from wholegrad.graph.rules.thin import chain
from wholegrad.graph.rules.variance import Variance, _one_pass, _passed, _pulled, _state
from wholegrad.kernels import pointwise
from wholegrad.kernels.emit import Code
from wholegrad.kernels.expression import EACH, MAP, ONE, Leaf, Program, Step
from wholegrad.kernels.host import Host, host
from wholegrad.kernels.stage import Part
from wholegrad.kernels.thin import Mixed

pytestmark = pytest.mark.skipif(host() is None, reason="no kernels for this processor")
NORM_PRELU = (Step("sub", (0, 1)), Step("mul", (6, 2)), Step("add", (7, 3)), Step("prelu", (8, 4)), Step("add", (9, 5)))
PASS = Program(tuple(Leaf(kind, grad=True) for kind in (MAP, EACH, EACH, EACH, ONE, MAP)), NORM_PRELU)
LAST, PLANAR = torch.channels_last, torch.contiguous_format


def formula(x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, slope: torch.Tensor,
            more: torch.Tensor) -> torch.Tensor:  # fmt: skip
    normed = (x - mean) * scale + shift
    return torch.where(normed > 0, normed, slope * normed) + more


def leaves(channels: int, forms: tuple[torch.memory_format, ...], width: int = 18) -> list[torch.Tensor]:
    """Crops of larger maps, along rows, columns and channels, and small values."""
    draw = torch.Generator().manual_seed(channels)
    maps = [
        torch.rand(2, channels + 3, 6, width + 2, generator=draw, dtype=torch.float64).contiguous(memory_format=form)
        for form in forms
    ]
    x, more = (each[:, 2:-1, 1:5, 1:-1] for each in maps)
    small = [torch.rand(1, channels, 1, 1, generator=draw, dtype=torch.float64) + 0.1 for _ in range(3)]
    return [x, *small, torch.tensor([0.3], dtype=torch.float64), more]


def errors(given: list[torch.Tensor], form: torch.memory_format) -> dict[str, float]:
    """Of a pass forward, and of every gradient, relative to the largest element."""
    ours, theirs = ([each.detach().requires_grad_() for each in given] for _ in range(2))
    found = chain(Mixed((Part(PASS, given[0].shape[1]),), tuple(ours)), torch.float64)
    wanted = formula(*theirs)
    grad = torch.rand(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.contiguous(memory_format=form)
    pairs = zip(torch.autograd.grad(found, ours, grad), torch.autograd.grad(wanted, theirs, grad), strict=True)
    named = {"value": (found, wanted)} | {f"gradient {i}": pair for i, pair in enumerate(pairs)}
    return {name: float(((a - b).abs().max() / b.abs().max()).detach()) for name, (a, b) in named.items()}


@pytest.mark.parametrize("forms", list(product((LAST, PLANAR), repeat=3)), ids=str)
def test_a_pass_is_exact_however_maps_lie(forms: tuple[torch.memory_format, ...]) -> None:
    for channels in (1, 2, 7, 8, 9, 16, 21):
        found = errors(leaves(channels, forms[:2]), forms[2])
        assert max(found.values()) <= 1e-13, (channels, found)


@pytest.mark.parametrize("machine", [Host(16, 32, ""), Host(32, 16, "")])
def test_a_pass_with_narrower_vectors(machine: Host, narrow: Callable[[Host], None]) -> None:
    narrow(machine)
    for channels in (2, 3, 4, 5, 18):
        assert max(errors(leaves(channels, (LAST, LAST)), LAST).values()) <= 1e-13


def test_maps_keep_lying_as_they_lay() -> None:
    x = Mixed((Part(PASS, 9),), tuple(leaves(9, (LAST, LAST))))
    value = pointwise.values(x, torch.float64)
    grads = pointwise.pull(x, torch.ones_like(value))
    assert all(pointwise.lies_interleaved(each) for each in (value, grads[0], grads[5]))


def test_nothing_is_written_beyond_the_channels() -> None:
    x = Mixed((Part(PASS, 9),), tuple(leaves(9, (LAST, LAST))))
    before = [each.clone() for each in x.leaves]
    pointwise.pull(x, torch.ones(2, 9, 4, 18, dtype=torch.float64))
    assert all(a.equal(b) for a, b in zip(before, x.leaves, strict=True))


# Statistics.


def states(dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, list[int]]]:
    for batch, form, dims in ((1, LAST, [0, 2, 3]), (3, LAST, [0, 2, 3]), (1, PLANAR, [2, 3])):
        x = torch.randn(batch, 21, 40, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 50
        x[:, :, 0] = 0.5  # a row unlike the others
        yield x.to(dtype).contiguous(memory_format=form), dims


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_statistics_in_one_pass(dtype: torch.dtype, most: float) -> None:
    for x, dims in states(dtype):
        assert _one_pass(x, dims)
        count, mean, m2 = _passed(x, (21,))
        wanted = _state(x.double(), dims)
        assert count == wanted[0]
        for found, right in ((mean, wanted[1]), (m2, wanted[2])):
            assert float(((found - right.reshape(21)) / right.reshape(21)).abs().max()) <= most


def test_their_gradient_in_one_pass_is_added_to_another() -> None:
    x, more = leaves(21, (LAST, LAST))[0], leaves(21, (LAST, PLANAR))[5]
    mean, slope, shift = (each.reshape(-1) for each in leaves(21, (LAST, LAST))[1:4])
    wanted = (x - mean.view(1, -1, 1, 1)) * slope.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    assert torch.allclose(_pulled(x, None, mean, slope, shift), wanted, rtol=1e-13)
    assert torch.allclose(_pulled(x, more, mean, slope, shift), wanted + more, rtol=1e-13)


# In networks.


def wide(norm: type[nn.Module], activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 14, 3, padding=1), norm(14, affine=True), activation, nn.Conv2d(14, 13, 3, padding=1)]
    return nn.Sequential(*layers, norm(13, affine=True), activation, nn.Conv2d(13, 1, 1)).double()


def mean_square(output: torch.Tensor, target: None) -> torch.Tensor:
    return (output * output).mean()


@pytest.mark.parametrize("activation", [nn.PReLU(), nn.LeakyReLU(0.1), nn.ReLU()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_gradients_are_exact(norm: type[nn.Module], activation: nn.Module) -> None:
    image = torch.rand(1, 3, 37, 42, dtype=torch.float64)
    assert_exact(wide(norm, activation), mean_square, image, None, tile=(16, 20))


def test_norm_and_activation_are_one_pass() -> None:
    plan = wg.plan(wide(nn.InstanceNorm2d, nn.PReLU()), mean_square, torch.zeros(3, 64, 64, dtype=torch.float64), None)
    graph = plan.graph
    hows = [inline(graph, part.segment) for part in plan.segments]
    ran = [graph.nodes[i] for how in hows for i in how.nodes if i not in how.convolutions]
    alone = {node.op for node in ran} - {torch.ops.aten.convolution.default, torch.ops.aten._prelu_kernel.default}
    assert not alone and any(how.chains for how in hows)


# Mutants.


def test_lanes_beyond_the_channels_are_noticed(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    whole = Code.lanes_within
    monkeypatch.setattr(Code, "lanes_within", lambda self, low, high: whole(self, low, self.sub(high, 1)))
    assert max(errors(leaves(16, (LAST, LAST)), LAST).values()) <= 1e-13  # whole vectors alone
    assert errors(leaves(17, (LAST, LAST)), LAST)["gradient 1"] > 1e-3  # a sum, which no memory left over changes


def test_a_gradient_of_the_variance_that_is_dropped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pull = Variance.pull_onto
    monkeypatch.setattr(
        Variance, "pull_onto", lambda self, more, *rest: 0 * pull(self, None, *rest) if more is None else more
    )
    image = torch.rand(1, 3, 37, 42, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_exact(wide(nn.BatchNorm2d, nn.ReLU()), mean_square, image, None, tile=(16, 20))

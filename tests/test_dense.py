"""Rule 10: what has no locality runs on maps held whole, and is refused with the sizes where they are too large."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wholegrad as wg
from oracle import assert_exact, captured
from wholegrad.commands.common import blank
from wholegrad.errors import BudgetError, UnsupportedOpError
from wholegrad.graph.decompose import table
from wholegrad.graph.graph import Kind
from wholegrad.verify import EXACT

Function = Callable[[torch.Tensor], torch.Tensor]


class Between(nn.Module):
    """A convolution, a function of the whole map, and another convolution where its result is a map."""

    def __init__(self, function: Function, tail: bool = True) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(3, 4, 3, padding=1), function
        self.last = nn.Conv2d(4, 2, 3, padding=1) if tail else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.function(self.first(x).tanh()))
        return result


def square(output: torch.Tensor, target: object) -> torch.Tensor:
    return (output**2).mean() + (output**3).sum() * 0.01


def image(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 12, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


MAPS: dict[str, Function] = {
    "sum along columns": lambda x: x - x.mean(3, keepdim=True),
    "softmax along a row": lambda x: torch.softmax(x, -1),
    "cumulative sum": lambda x: x.cumsum(2),
    "a tensor along the image": lambda x: x * torch.linspace(0, 1, 12 * 14, dtype=x.dtype).reshape(12, 14),
    "one column": lambda x: x * torch.linspace(0, 1, 12, dtype=x.dtype).reshape(12, 1),
    "blocks by views": lambda x: (
        x.reshape(2, 4, 6, 2, 7, 2).mean((3, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    ),
    "attention": lambda x: x + _attention(x),
    "resampled by a grid": lambda x: F.grid_sample(x, _grid(x), align_corners=False),
    "a Fourier filter": lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real,
    "the best pixel": lambda x: x * x.flatten(1).max(1)[0].view(-1, 1, 1, 1),
}


def _attention(x: torch.Tensor) -> torch.Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    weights = torch.softmax(tokens @ tokens.transpose(1, 2), -1)
    return (weights @ tokens).transpose(1, 2).reshape(x.shape)


def _grid(x: torch.Tensor) -> torch.Tensor:
    theta = torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.8, 0.1]], dtype=x.dtype).expand(x.shape[0], 2, 3)
    return F.affine_grid(theta, list(x.shape), align_corners=False)


@pytest.mark.parametrize("name", MAPS)
def test_functions_of_the_whole_map_are_exact(name: str) -> None:
    torch.manual_seed(0)
    model = Between(MAPS[name]).double()
    for tile in ((5, 4), (20, 20)):
        assert_exact(model, square, image(), None, tile=tile)


VECTORS: dict[str, Function] = {
    "flattened": lambda x: x.flatten(1)[:, ::7],
    "a Gram matrix": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2),
    "pooled by attention": lambda x: torch.softmax(x[:, :1].flatten(2), -1) @ x.flatten(2).transpose(1, 2),
    "log-softmax over all pixels": lambda x: torch.log_softmax(x.flatten(2), -1).mean((0, 2)),
    "largest and smallest": lambda x: x.amax((2, 3)) - x.amin((2, 3)),
    "spread": lambda x: torch.cat([x.std((2, 3)), x.var((0, 2, 3), keepdim=True).flatten(1).expand(2, 4)]),
    "norms": lambda x: x.norm(dim=(2, 3)) + torch.linalg.vector_norm(x, 1, dim=(2, 3)),
    "sorted": lambda x: x.flatten(1).sort(1)[0][:, ::11],
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_made_from_the_whole_map_are_exact(name: str) -> None:
    torch.manual_seed(0)
    model = Between(VECTORS[name], tail=False).double()
    for tile in ((5, 4), (20, 20)):
        assert_exact(model, square, image(), None, tile=tile)


BINS: dict[str, Function] = {
    "average": lambda x: F.adaptive_avg_pool2d(x, (2, 1)),
    "average, bins that overlap": lambda x: (
        F.adaptive_avg_pool2d(x, (1, 2))[..., :1] + F.adaptive_avg_pool2d(x, (2, 1))
    ),
    "maximum": lambda x: F.adaptive_max_pool2d(x, (2, 1)),
    "maximum to one": lambda x: F.adaptive_max_pool2d(x, 1),
    "maximum of ties": lambda x: F.adaptive_max_pool2d((x * 2).round() * 0.5 + x * 0, (2, 1)),
    "a pyramid": lambda x: x * F.interpolate(F.adaptive_avg_pool2d(x, (1, 2)), (13, 17), mode="bilinear"),
}


@pytest.mark.parametrize("name", BINS)
def test_few_large_bins_are_reductions_and_exact(name: str) -> None:
    torch.manual_seed(0)
    model = Between(BINS[name], tail=False).double()
    pixels = torch.rand(2, 3, 13, 17, dtype=torch.float64)
    assert any("adaptive" in str(node.op) for node in captured(model, pixels.shape).of_kind(Kind.REDUCTION))
    for tile in ((5, 4), (20, 20)):
        assert_exact(model, square, pixels, None, tile=tile)


def test_pooling_a_gigapixel_map_to_a_few_bins_takes_little_memory() -> None:
    model = Between(lambda x: F.adaptive_avg_pool2d(x, (3, 4)), tail=False)
    assert wg.plan(model, square, blank(3, 16000, 64000), budget="2GiB").projected < 2 << 30


@pytest.mark.parametrize("name", ["pooled by attention", "log-softmax over all pixels", "largest and smallest"])
def test_pooling_by_attention_holds_no_map_whole(name: str) -> None:
    graph = wg.plan(Between(VECTORS[name], tail=False), square, blank(3, 4000, 4000)).graph
    assert max(node.outputs[0].numel for node in graph.of_kind(Kind.SMALL, Kind.REDUCTION)) < 1000


def test_tied_maxima_share_the_gradient() -> None:
    model = Between(lambda x: (x * 4).round().amax((2, 3)) + x.amax((2, 3)), tail=False).double()
    pixels = torch.zeros(1, 3, 12, 14, dtype=torch.float64)  # away from the border every pixel is equal
    assert_exact(model, square, pixels, None, tile=(5, 4))


def test_a_map_too_large_to_hold_is_refused_with_path_op_sizes_and_remedy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Between(lambda x: x.cumsum(-1), tail=False))
    model[1].first = nn.Conv2d(4, 4, 1)
    with pytest.raises(UnsupportedOpError) as caught:
        wg.plan(model, square, blank(3, 30000, 30000))
    text = str(caught.value)
    assert text.startswith("1 (aten.cumsum.default): works along rows or columns")
    assert "(1, 4, 29998, 29998)" in text and "2**31" in text and "register a rule" in text and "\n" not in text


def test_attention_between_all_pixels_of_a_large_map_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match=r"compares every pixel with every other.*2\*\*31"):
        wg.plan(Between(lambda x: x + _attention(x)), square, blank(3, 1000, 1000))


def test_a_dense_region_beyond_the_budget_is_refused_with_its_sizes() -> None:
    model = Between(lambda x: x.cumsum(3))
    with pytest.raises(BudgetError) as caught:
        wg.plan(model, square, blank(3, 8000, 8000), budget="1.2GiB")
    assert "held whole" in str(caught.value) and "aten.cumsum" in str(caught.value)
    assert wg.plan(model, square, blank(3, 8000, 8000), budget="16GiB").projected < 16 << 30


@pytest.mark.parametrize("pads", [(2, 3, 1, 4), (0, 5, 0, 0), (14, 14, 12, 12)])
def test_circular_padding_is_exact_and_reads_no_map_from_end_to_end(pads: tuple[int, ...]) -> None:
    model = Between(lambda x: F.pad(x, pads, mode="circular")).double()
    for fixed in ({"tile": (5, 4)}, {"tile": (20, 20)}, {"tile": (3, 30), "boundaries": ["first"]}):
        assert_exact(model, square, image(), None, **fixed)


def test_circular_padding_of_a_gigapixel_map_takes_little_memory() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(4, 1, 1))
    assert wg.plan(model, square, blank(3, 16000, 64000), budget="2GiB").projected < 2 << 30


def test_rolling_and_mirroring_a_gigapixel_map_takes_little_memory() -> None:
    rolled = Between(lambda x: x + x.roll((3, -5), (2, 3)))
    mirrored = Between(lambda x: x.flip(3))
    for model in (rolled, mirrored):
        plan = wg.plan(model, square, blank(3, 16000, 64000), budget="2GiB")
        assert plan.projected < 2 << 30
        assert max(spec.numel for node in plan.graph.nodes for spec in node.outputs if not spec.is_map) < 2**23


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"attn_mask": torch.linspace(-2, 1, 35, dtype=torch.float64).view(5, 7)},
    "scaled": {"scale": 0.7},
}


@pytest.mark.parametrize("how", HOW)
def test_attention_taken_apart_is_attention(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64).requires_grad_() for n in (5, 7, 7)
    ]  # query, key, value
    found = []
    for attention in (FLASH, table()[FLASH]):
        result, logs = attention(*leaves, **HOW[how])
        slope = torch.linspace(1, 2, result.numel(), dtype=torch.float64).view(result.shape)
        found.append((result, logs, *torch.autograd.grad((result * slope).sum(), leaves)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=EXACT, atol=EXACT)


class Attention(nn.Module):
    """Two heads over pooled pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.heads, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 24), nn.Conv2d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.avg_pool2d(self.first(x).tanh(), 4)
        tokens = pooled.flatten(2).mT
        parts = self.heads(tokens).view(*tokens.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(tokens.shape)
        result: torch.Tensor = self.last(F.interpolate(mixed.mT.reshape(pooled.shape), scale_factor=4))
        return result


def test_attention_under_autocast_is_as_good_as_whole_image_autocast() -> None:
    torch.manual_seed(0)
    model, pixels = Attention(), torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))

    def whole(autocast: bool) -> list[torch.Tensor]:
        dtype = torch.float32 if autocast else torch.float64
        other = copy.deepcopy(model).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = square(other(pixels.to(dtype)), None)
        return [grad.double() for grad in torch.autograd.grad(loss, list(other.parameters()))]

    wanted, theirs = whole(False), whole(True)
    with torch.autocast("cpu", torch.bfloat16):
        plan = wg.plan(model, square, pixels, tile=(13, 11))
        wg.backward(model, square, pixels, plan=plan)
    assert any(spec.dtype == torch.bfloat16 for node in plan.graph.of_kind(Kind.MAP) for spec in node.outputs)
    for (name, parameter), exact, other in zip(model.named_parameters(), wanted, theirs, strict=True):
        assert parameter.grad is not None
        ours, own = ((grad.double() - exact).abs().max() / exact.abs().max() for grad in (parameter.grad, other))
        assert ours <= 2 * max(own, 2.0**-8), name

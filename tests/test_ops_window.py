"""Pooling, resampling, border padding and shuffles: exact in a network, and reading no less than autograd says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from oracle import assert_exact, captured, errors
from wholegrad.errors import UnsupportedOpError
from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Graph, Kind, Node
from wholegrad.graph.layout import Role
from wholegrad.graph.rules import MapRule, ReductionRule, Tile, rule_for
from wholegrad.graph.rules.interpolate import Axis, nearest, nearest_exact
from wholegrad.graph.rules.reduction import GATHER
from wholegrad.run.tile import operand_boxes
from wholegrad.verify import EXACT

aten = torch.ops.aten


class Around(nn.Module):
    """conv -> function -> conv, so that gradients pass through the function to parameters before it."""

    def __init__(self, function: Any, channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.function = function
        self.first = nn.Conv2d(2, channels, 3, padding=1)
        with torch.no_grad():
            made = function(torch.zeros(1, channels, 19, 22)).shape[1]
        self.last = nn.Conv2d(made, 2, 3, padding=1)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.function(self.first(x)))
        return result


def mean_square(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output**2).mean() + output.sum() * 0.01


def picture(height: int, width: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, height, width, dtype=torch.float64, generator=generator)


def resize(mode: str, **how: Any) -> Any:
    return lambda x: F.interpolate(x, mode=mode, **how)


def coarse(x: torch.Tensor) -> torch.Tensor:
    """Steps of a quarter, so that windows have ties, through which gradients pass."""
    return x + ((x * 4).round() / 4 - x).detach()


def weighted_indices(x: torch.Tensor) -> torch.Tensor:
    """Values weighted by where they were found."""
    value, index = F.max_pool2d(coarse(x), 3, 2, 1, return_indices=True)
    return value * (index % 7 + 1)


def there_and_back(kernel: int, stride: int, pad: int) -> Any:
    """Pooling, something in between, unpooling to the size of before."""

    def function(x: torch.Tensor) -> torch.Tensor:
        value, index = F.max_pool2d(x, kernel, stride, pad, return_indices=True)
        return F.max_unpool2d(torch.tanh(value) + 1, index, kernel, stride, pad, output_size=list(x.shape[-2:]))

    return function


def unbatched(function: Any) -> Any:
    return lambda x: torch.cat([function(x[i]).unsqueeze(0) for i in range(len(x))])


OPS = {
    "max pool 2": lambda x: F.max_pool2d(x, 2),
    "max pool, overlapping, padded": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool, dilated, ceil": lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 1), (2, 3), ceil_mode=True),
    "max pool, ties": lambda x: F.max_pool2d(coarse(x), 3, 1, 1),
    "max pool, indices": weighted_indices,
    "max pool, (C, H, W)": unbatched(lambda x: F.max_pool2d(x, 3, 2, 1)),
    "unpool 2": there_and_back(2, 2, 0),
    "unpool 3": there_and_back(3, 3, 1),
    "unpool, overlapping": there_and_back(3, 2, 1),
    "avg pool 2": lambda x: F.avg_pool2d(x, 2),
    "avg pool, padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg pool, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg pool, ceil": lambda x: F.avg_pool2d(x, (3, 4), (2, 3), (1, 2), ceil_mode=True),
    "avg pool, ceil, not counted": lambda x: F.avg_pool2d(x, 4, 3, 1, ceil_mode=True, count_include_pad=False),
    "avg pool, own divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, divisor_override=5),
    "avg pool, (C, H, W)": unbatched(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)),
    "lp pool": lambda x: F.lp_pool2d(x * x + 0.1, 2, 3),
    "adaptive avg (3, 5)": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive avg (1, 4)": lambda x: F.adaptive_avg_pool2d(x, (1, 4)),
    "adaptive avg, (C, H, W)": unbatched(lambda x: F.adaptive_avg_pool2d(x, (4, 7))),
    "adaptive avg, larger": lambda x: F.adaptive_avg_pool2d(x, (25, 31)),
    "adaptive max 1": lambda x: F.adaptive_max_pool2d(x, 1),
    "adaptive max (3, 5)": lambda x: F.adaptive_max_pool2d(coarse(x), (3, 5)),
    "adaptive max, larger": lambda x: F.adaptive_max_pool2d(x, (25, 31)),
    "nearest 2": resize("nearest", scale_factor=2),
    "nearest (3, 1)": resize("nearest", scale_factor=(3, 1)),
    "nearest 1.5": resize("nearest", scale_factor=1.5),
    "nearest 1/2": resize("nearest", scale_factor=0.5),
    "nearest to a size": resize("nearest", size=(37, 13)),
    "nearest-exact 2": resize("nearest-exact", scale_factor=2),
    "nearest-exact 1/3": resize("nearest-exact", scale_factor=1 / 3),
    "nearest-exact to a size": resize("nearest-exact", size=(13, 41)),
    "bilinear 2": resize("bilinear", scale_factor=2),
    "bilinear (3, 4)": resize("bilinear", scale_factor=(3, 4)),
    "bilinear (1, 2)": resize("bilinear", scale_factor=(1, 2)),
    "bilinear 2, corners": resize("bilinear", scale_factor=2, align_corners=True),
    "bilinear 1.7": resize("bilinear", scale_factor=1.7),
    "bilinear 0.4": resize("bilinear", scale_factor=0.4),
    "bilinear to a size": resize("bilinear", size=(37, 13)),
    "bilinear to a size, corners": resize("bilinear", size=(8, 47), align_corners=True),
    "bilinear to one pixel, corners": resize("bilinear", size=(1, 1), align_corners=True),
    "bicubic 2": resize("bicubic", scale_factor=2),
    "bicubic 2, corners": resize("bicubic", scale_factor=2, align_corners=True),
    "bicubic 1.3": resize("bicubic", scale_factor=1.3),
    "bicubic to a size": resize("bicubic", size=(11, 40)),
    "area": resize("area", size=(7, 30)),
    "reflect": lambda x: F.pad(x, (3, 2, 1, 4), mode="reflect"),
    "reflect and crop": lambda x: F.pad(x, (-3, 2, 1, -4), mode="reflect"),
    "reflect all that there is": lambda x: F.pad(x, (x.shape[3] - 1, 0, 0, x.shape[2] - 1), mode="reflect"),
    "reflect, (C, H, W)": unbatched(lambda x: F.pad(x, (3, 2, 1, 4), mode="reflect")),
    "replicate": lambda x: F.pad(x, (3, 2, 1, 30), mode="replicate"),
    "replicate and crop": lambda x: F.pad(x, (3, -2, -1, 2), mode="replicate"),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "flip channels": lambda x: x.flip(1),
    "mirrored rows": lambda x: x.flip(2),
    "mirrored rows and columns": lambda x: x.flip(-1, 1, -2),
    "average of three channels": lambda x: F.avg_pool3d(x, (3, 1, 1), (2, 1, 1), (1, 0, 0)),
    "roll channels": lambda x: torch.roll(x, (1, 1), (1, 0)),
}


@pytest.mark.parametrize("name", OPS)
def test_each_op_is_exact_in_a_network(name: str) -> None:
    model, image = Around(OPS[name]), picture(13, 15)
    assert_exact(model, mean_square, image, None, tile=(6, 4), boundaries=[])
    assert_exact(model, mean_square, image, None, tile=(13, 1), boundaries=["first"])


@pytest.mark.parametrize("name", ["max pool, dilated, ceil", "avg pool, ceil", "bilinear 1.7", "bicubic 2", "reflect"])
@pytest.mark.parametrize(("size", "tile"), [((7, 9), (1, 1)), ((16, 24), (3, 16)), ((8, 5), (64, 64))])
def test_other_sizes_and_tiles(name: str, size: tuple[int, int], tile: tuple[int, int]) -> None:
    assert_exact(Around(OPS[name]), mean_square, picture(*size, batch=1), None, tile=tile)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_convolutions_that_pad_with_pixels(mode: str) -> None:
    model = Around(nn.Conv2d(4, 3, 5, padding=2, padding_mode=mode), 4)
    assert_exact(model, mean_square, picture(13, 15), None, tile=(7, 6))


def test_float32_stays_float32() -> None:
    for name in ("avg pool, ceil", "bilinear 1.7", "bicubic 1.3", "adaptive avg (3, 5)"):
        model, image = Around(OPS[name]).float(), picture(13, 15).float()
        whole = model(image)
        graph = captured(model, tuple(image.shape), torch.float32)
        assert graph.spec(graph.outputs[0]).dtype == whole.dtype == torch.float32


# Random windows.


@st.composite
def pools(draw: st.DrawFn) -> tuple[Any, tuple[int, int]]:
    size = (draw(st.integers(3, 20)), draw(st.integers(3, 20)))
    maximum = draw(st.booleans())
    kernel = tuple(draw(st.integers(1, min(4, n))) for n in size)
    dilation = tuple(draw(st.integers(1, max(1, (n - 1) // max(k - 1, 1)))) for n, k in zip(size, kernel, strict=True))
    dilation = tuple(min(d, 3) for d in dilation) if maximum else (1, 1)
    stride = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    pad = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    ceil = draw(st.booleans())
    if maximum:
        return lambda x: F.max_pool2d(coarse(x), kernel, stride, pad, dilation, ceil), size
    include, divisor = draw(st.booleans()), draw(st.none() | st.integers(1, 7))
    return lambda x: F.avg_pool2d(x, kernel, stride, pad, ceil, include, divisor), size


@settings(max_examples=30)
@given(pools(), st.tuples(st.integers(1, 12), st.integers(1, 12)), st.booleans())
def test_random_pools_are_exact(made: tuple[Any, tuple[int, int]], tile: tuple[int, int], boundary: bool) -> None:
    function, size = made
    tile = (max(tile[0], size[0] // 5 + 1), max(tile[1], size[1] // 5 + 1))
    assert_exact(
        Around(function), mean_square, picture(*size), None, tile=tile, boundaries=["first"] if boundary else []
    )


SIZES = st.tuples(st.integers(1, 14), st.integers(1, 14))


@settings(max_examples=30)
@given(
    st.sampled_from(["bilinear", "bicubic", "area", "corners"]),
    SIZES,
    st.tuples(st.integers(1, 30), st.integers(1, 30)) | st.tuples(st.floats(0.3, 3.5), st.floats(0.3, 3.5)),
    SIZES,
)
def test_random_resampling_is_exact(mode: str, size: tuple[int, int], to: tuple[Any, Any], tile: Any) -> None:
    if isinstance(to[0], float):
        if min(int(n * s) for n, s in zip(size, to, strict=True)) < 1:
            return
        how: dict[str, Any] = {"scale_factor": to}
        sizes = [int(n * s) for n, s in zip(size, to, strict=True)]
        # Where both sizes stay and a scale is given, PyTorch's bicubic gradient is not that of its own forward.
        if mode == "bicubic" and (sizes[0] == size[0] and sizes[1] == size[1]):
            return
    else:
        how = {"size": to}
    if mode == "corners":
        mode, how = "bilinear", how | {"align_corners": True}
    if mode == "area" and "size" in how and to == (1, 1):
        return
    tile = (max(tile[0], size[0] // 3 + 1), max(tile[1], size[1] // 3 + 1))
    model = Around(nn.Identity())
    model.function = Resize(mode, how)
    assert_exact(model, mean_square, picture(*size), None, tile=tile)


class Resize(nn.Module):
    def __init__(self, mode: str, how: dict[str, Any]) -> None:
        super().__init__()
        self.mode, self.how = mode, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, mode=self.mode, **self.how)


# Nearest: the very pixels that PyTorch picks.


def picked(n: int, m: int, scale: float | None, exact: bool, channels: int) -> np.ndarray[Any, Any]:
    """What PyTorch's forward kernel picks: planar for one channel, channels last in memory for more."""
    row = torch.arange(n, dtype=torch.float32).view(1, 1, 1, n).repeat(1, channels, 1, 1)
    op = aten._upsample_nearest_exact2d if exact else aten.upsample_nearest2d
    row = row.contiguous(memory_format=torch.channels_last) if channels > 1 else row
    found: np.ndarray[Any, Any] = op(row, [1, m], None, scale)[0, 0, 0].long().numpy()
    return found


def times_picked(n: int, m: int, scale: float | None, exact: bool, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """How often PyTorch's backward kernel says that each input was picked."""
    op = aten._upsample_nearest_exact2d_backward if exact else aten.upsample_nearest2d_backward
    found: np.ndarray[Any, Any] = op(torch.ones(1, 1, 1, m, dtype=dtype), [1, m], [1, 1, 1, n], None, scale).numpy()
    return found[0, 0, 0]


@settings(max_examples=150)
@given(
    st.integers(1, 40) | st.integers(1, 90_000),
    st.integers(1, 60)
    | st.integers(1, 200_000)
    | st.floats(0.05, 5.0)
    | st.sampled_from([1.0, 1.05, 2.0, 2.1, 1 / 3, 0.7]),
    st.booleans(),
)
def test_nearest_picks_what_pytorch_picks(n: int, to: int | float, exact: bool) -> None:
    m, scale = (to, None) if isinstance(to, int) else (int(n * to), to)
    if m < 1:
        return
    found = (nearest_exact if exact else nearest)(Axis(n, m, scale, False), np.arange(m))
    assert (found == picked(n, m, scale, exact, 8)).all()
    for dtype in (torch.float32, torch.float64):
        assert (np.bincount(found, minlength=n) == times_picked(n, m, scale, exact, dtype)).all()


@pytest.mark.parametrize("times", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 17, 1000, 60_001])
def test_at_whole_scales_memory_format_does_not_matter(times: int, size: int) -> None:
    for exact in (False, True):
        found = (nearest_exact if exact else nearest)(Axis(size, size * times, None, False), np.arange(size * times))
        assert (found == picked(size, size * times, None, exact, 1)).all()
        assert (found == np.arange(size * times) // times).all()


@pytest.mark.parametrize("times", [3, 7, 41, 47, 49])
def test_whole_scales_whose_reciprocal_is_rounded(times: int) -> None:
    x = torch.randn(1, 8, 3, 11).contiguous(memory_format=torch.channels_last)
    for op in (aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default):
        assert_tiles_agree(op, x, (3 * times, 11 * times))


def assert_tiles_agree(op: Any, x: torch.Tensor, to: tuple[int, int]) -> None:
    graph = captured(Lone(lambda x: op(x, list(to))), tuple(x.shape), x.dtype)
    node = graph.of_kind(Kind.MAP)[0]
    whole = op(x, list(to))
    for box in (Box(0, to[0], 0, to[1]), Box(1, to[0] - 1, 5, to[1] // 2 + 3), Box(4, 5, to[1] - 9, to[1])):
        assert torch.equal(on_tile(graph, node, x, box)[0], whole[..., box.y0 : box.y1, box.x0 : box.x1])


# Rules alone: on tiles, and against what autograd reaches.


class Lone(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def on_tile(graph: Graph, node: Node, x: torch.Tensor, box: Box) -> tuple[torch.Tensor, ...]:
    rule = rule_for(node.op)
    assert isinstance(rule, MapRule)
    wanted = operand_boxes(graph, node, box)
    specs = tuple(graph.spec(ref) for ref in node.operands)
    assert wanted[0] is not None and Box(0, specs[0].rows, 0, specs[0].cols).holds(wanted[0])
    rows, cols = wanted[0].slices()
    return rule.run(node, [x[..., rows, cols]], Tile(box, wanted, specs, node.outputs))


def pooled(graph: Graph, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The graph's only reduction, put together from tiles of 3 x 2."""
    (node,) = graph.of_kind(Kind.REDUCTION)
    rule, spec = rule_for(node.op), graph.spec(node.operands[0])
    assert isinstance(rule, ReductionRule)
    total = None
    for y0 in range(0, spec.rows, 3):
        for x0 in range(0, spec.cols, 2):
            box = Box(y0, min(y0 + 3, spec.rows), x0, min(x0 + 2, spec.cols))
            rows, cols = box.slices()
            total = rule.merge(node, spec, total, rule.partial(node, x[..., rows, cols]), box)
    assert total is not None
    return rule.finish(node, spec, total)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: aten.max_pool2d_with_indices(x, [3, 2], [2, 3], [1, 1], [2, 1], True),
        lambda x: aten.adaptive_max_pool2d(x, [4, 7]),
        lambda x: aten.adaptive_max_pool2d(x, [1, 1]),
        lambda x: aten.adaptive_max_pool2d(x, [1, 2]),
        lambda x: aten.adaptive_max_pool2d(x, [19, 30]),
    ],
)
def test_indices_count_in_the_whole_plane(function: Any, layout: torch.memory_format) -> None:
    x = torch.randint(-2, 3, (2, 5, 13, 17)).double()
    x[0, 0, :3, :3] = -torch.inf
    x[1, 2, 6, 5:9] = torch.nan
    x = x.contiguous(memory_format=layout)
    graph = captured(Lone(lambda x: function(x)[0]), tuple(x.shape), x.dtype)
    whole = function(x)
    if not graph.of_kind(Kind.MAP):
        for mine, all_of_it in zip(pooled(graph, x), whole, strict=True):
            torch.testing.assert_close(mine, all_of_it, rtol=0, atol=0, equal_nan=True)
        return
    node = graph.of_kind(Kind.MAP)[0]
    height, width = whole[0].shape[-2:]
    for y0 in range(0, height, 3):
        for x0 in range(0, width, 2):
            box = Box(y0, min(y0 + 3, height), x0, min(x0 + 2, width))
            found = on_tile(graph, node, x, box)
            for mine, all_of_it in zip(found, whole, strict=True):
                part = all_of_it[..., box.y0 : box.y1, box.x0 : box.x1]
                torch.testing.assert_close(mine, part, rtol=0, atol=0, equal_nan=True)


LOOSE = ("max", "unpool", "adaptive max", "nearest", "roll", "flip", "channel", "lp")
TIGHT = [name for name in OPS if not name.startswith(LOOSE) and "(C, H, W)" not in name]
REACH = 1e-9  # of a gradient that is more than rounding


@pytest.mark.parametrize("name", TIGHT)
def test_an_output_needs_the_inputs_that_its_gradient_reaches(name: str) -> None:
    function = OPS[name]
    graph = captured(Lone(function), (1, 4, 11, 13), torch.float64)
    x = torch.zeros(1, 4, 11, 13, dtype=torch.float64, requires_grad=True)
    y = function(x)
    for k in range(max(y.shape[2:])):
        i, j = k % y.shape[2], k % y.shape[3]
        (grad,) = torch.autograd.grad(y[0, :, i, j].sum(), x, retain_graph=True)
        reached = (grad[0].abs().sum(0) > REACH).nonzero()
        rows, cols = needed(graph, Role.ROW, i), needed(graph, Role.COL, j)
        assert len(reached)
        lo, hi = reached.min(0).values, reached.max(0).values + 1
        assert rows.holds(Interval(int(lo[0]), int(hi[0]))) and cols.holds(Interval(int(lo[1]), int(hi[1])))
        slack = 1 if "bilinear" in name else 3 if "bicubic" in name else 0  # taps of weight zero
        assert rows.size <= hi[0] - lo[0] + slack and cols.size <= hi[1] - lo[1] + slack


def needed(graph: Graph, role: Role, at: int) -> Interval:
    span = Interval(at, at + 1)
    for node in reversed(graph.of_kind(Kind.MAP)):
        rule = rule_for(node.op)
        assert rule is not None
        span = rule.needs(node, [graph.spec(ref) for ref in node.operands], 0, role, span)
    return span


def test_unpooling_with_indices_from_elsewhere_is_refused() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        value, index = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(value, index.flip(1) * 0, 2)

    with pytest.raises(UnsupportedOpError, match="far from where"):
        errors(Around(function), mean_square, picture(16, 16), None, tile=(4, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.cumsum(2),
        lambda x: torch.roll(x, 1),
        lambda x: x.flatten(2).flip(2),
        lambda x: x[:, :, torch.tensor([3, 1])],
        lambda x: F.avg_pool3d(x, (1, 2, 2)),
        lambda x: F.max_pool2d(x.transpose(2, 3), 2),
        lambda x: F.avg_pool2d(x.permute(0, 2, 3, 1), 2),
    ],
)
def test_what_has_no_locality_runs_on_whole_maps(function: Any) -> None:
    graph = captured(Lone(function), (1, 4, 8, 8))
    assert any(node.op is GATHER for node in graph.nodes)
    with pytest.raises(UnsupportedOpError, match=r"2\*\*31"):
        captured(Lone(function), (1, 4, 40000, 40000))


@pytest.mark.parametrize("name", ["max pool, overlapping, padded", "avg pool, padded", "bicubic 1.3", "reflect"])
def test_the_oracle_fails_on_a_halo_one_short(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, image = Around(OPS[name]), picture(13, 15)
    graph = captured(model, tuple(image.shape), torch.float64)
    (node,) = (node for node in graph.of_kind(Kind.MAP) if node.op is not aten.convolution.default)
    kind = type(rule_for(node.op))
    true = kind.needs

    def short(self: Any, node: Any, specs: Any, operand: int, role: Any, out: Interval) -> Interval:
        found = true(self, node, specs, operand, role, out)
        return Interval(found.lo, found.hi - 1) if role is Role.ROW and out.lo and found.size > 1 else found

    monkeypatch.setattr(kind, "needs", short)
    try:
        wrong = max(errors(model, mean_square, image, None, tile=(5, 8)).values()) > EXACT
    except (RuntimeError, IndexError):
        wrong = True
    assert wrong


@pytest.mark.parametrize("channels", [4, 64])
def test_tiles_that_see_nothing_but_padding(channels: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=50), nn.ReLU(), nn.Conv2d(channels, 1, 1)).double()
    image = torch.rand(1, 3, 30, 40, dtype=torch.float64)
    found = errors(model, lambda output, target: output.square().mean(), image, None, tile=(32, 32))
    assert max(found.values()) <= 1e-12, found

"""Rules against brute force: what an output depends on is found by asking PyTorch's autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from wholegrad.given import given as inputs_of
from wholegrad.graph.capture import capture
from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.graph import Graph, Kind
from wholegrad.graph.layout import Axis, Role, broadcast, map_layout, plain, regroup
from wholegrad.graph.rules import MapRule, register, registered, rule_for
from wholegrad.graph.rules.convolve import Settings, interleaved, weight_gradient
from wholegrad.graph.rules.shape import clip, place

aten = torch.ops.aten


class Call(nn.Module):
    """A module that calls one function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.function(x)
        return result


def graph_of(function: Any, shape: tuple[int, ...]) -> Graph:
    return capture(Call(function), None, inputs_of(torch.empty(shape), None, torch.float64).inputs)


WINDOWS = [
    lambda x: F.conv2d(x, torch.ones(1, 1, 3, 3, dtype=x.dtype), padding=1),
    lambda x: F.conv2d(x, torch.ones(1, 1, 4, 2, dtype=x.dtype), stride=(3, 2), padding=(2, 1)),
    lambda x: F.conv2d(x, torch.ones(1, 1, 3, 3, dtype=x.dtype), dilation=(2, 3), padding=(5, 0)),
    lambda x: F.conv_transpose2d(x, torch.ones(1, 1, 8, 8, dtype=x.dtype), stride=4, padding=2),
    lambda x: F.conv_transpose2d(x, torch.ones(1, 1, 2, 3, dtype=x.dtype), stride=(3, 2), output_padding=(2, 1)),
    lambda x: F.pad(x, (2, -1, -3, 4), value=0.5),
    lambda x: x[:, :, 1:-2:2, 3:],
]


DILATED = 2  # at the map's end a dilated window's first tap may lie in the padding, and the interval is not tight


@pytest.mark.parametrize(("function", "tight"), [(function, i != DILATED) for i, function in enumerate(WINDOWS)])
def test_an_output_needs_exactly_the_inputs_that_its_gradient_reaches(function: Any, tight: bool) -> None:
    graph = graph_of(function, (1, 1, 11, 13))
    x = torch.zeros(1, 1, 11, 13, dtype=torch.float64, requires_grad=True)
    y = function(x)
    chain = graph.of_kind(Kind.MAP)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            (grad,) = torch.autograd.grad(y[0, 0, i, j], x, retain_graph=True)
            reached = grad[0, 0].nonzero()
            span = {Role.ROW: Interval(i, i + 1), Role.COL: Interval(j, j + 1)}
            for node in reversed(chain):
                rule = rule_for(node.op)
                assert rule is not None
                specs = [graph.spec(ref) for ref in node.operands]
                span = {role: rule.needs(node, specs, 0, role, interval) for role, interval in span.items()}
            if len(reached):
                lo, hi = reached.min(0).values, reached.max(0).values + 1
                rows, cols = Interval(int(lo[0]), int(hi[0])), Interval(int(lo[1]), int(hi[1]))
                assert span[Role.ROW].holds(rows) and span[Role.COL].holds(cols)
                if tight:
                    assert (span[Role.ROW], span[Role.COL]) == (rows, cols)


@given(st.integers(0, 6), st.integers(1, 6), st.integers(-8, 12), st.integers(1, 8))
def test_place_crops_and_fills(lo: int, size: int, start: int, length: int) -> None:
    have, want = Interval(lo, lo + size), Interval(start, start + length)
    tile = torch.arange(have.lo, have.hi).double().view(1, -1) + 100
    found = place(tile, have, want, 1, fill=-1.0)
    assert found.tolist() == [[float(100 + i) if have.lo <= i < have.hi else -1.0 for i in range(want.lo, want.hi)]]


@given(st.integers(-10, 20), st.integers(0, 9), st.integers(1, 12))
def test_clip_is_inside_and_never_empty(lo: int, length: int, size: int) -> None:
    found = clip(Interval(lo, lo + length), size)
    assert 0 <= found.lo < found.hi <= size
    for i in range(max(lo, 0), min(lo + length, size)):
        assert found.lo <= i < found.hi


def test_boxes() -> None:
    box = Box(2, 5, 1, 9)
    assert (box.height, box.width, box.area) == (3, 8, 24)
    assert box.union(Box(0, 3, 4, 10)) == Box(0, 5, 1, 10)
    assert box.holds(Box(2, 3, 1, 2)) and not box.holds(Box(1, 3, 1, 2))
    assert box.slices(Box(1, 9, 1, 9)) == (slice(1, 4), slice(0, 8))


def test_layouts_follow_rows_and_columns_through_views() -> None:
    layout = map_layout((2, 6, 5, 7))
    row, col = Axis(5, Role.ROW), Axis(7, Role.COL)
    assert regroup(layout, (420,)) == ((Axis(2), Axis(6), row, col),)
    assert regroup(layout, (2, 2, 3, 35)) == ((Axis(2),), (Axis(2),), (Axis(3),), (row, col))
    assert regroup(layout, (2, 6, 7, 5)) is None
    assert regroup(layout, (12, 5, 1, 7)) == ((Axis(2), Axis(6)), (row,), (), (col,))
    assert broadcast([layout, plain((6, 1, 1))], (2, 6, 5, 7)) == layout
    square = map_layout((2, 6, 5, 5))
    assert broadcast([square, (*square[:2], square[3], square[2])], (2, 6, 5, 5)) is None


def test_a_rule_is_registered_once_and_for_an_overload() -> None:
    with pytest.raises(ValueError, match="has a rule already"):
        register(aten.convolution.default)(MapRule)
    with pytest.raises(TypeError, match="ATen overloads"):
        register(aten.convolution)(MapRule)
    assert aten.cat.default in registered()
    assert rule_for(aten.sigmoid.default) is not None
    assert rule_for(aten.rrelu_with_noise.default) is None and rule_for(aten.fft_fft.default) is None


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 4), st.integers(1, 3), st.integers(5, 20))
def test_window_and_sources_are_each_others_mirror(k: int, s: int, p: int, d: int, n: int) -> None:
    from wholegrad.graph.rules.window import reach, sources, window

    for out in range(n):
        read = window(Interval(out, out + 1), k, s, p, d)
        assert read == Interval(out * s - p, out * s - p + d * (k - 1) + 1)
        for i in range(-3, n):
            written = {i * s - p + d * t for t in range(k)}
            if out in written:
                assert sources(Interval(out, out + 1), k, s, p, d).holds(Interval(i, i + 1))
        written = [out * s - p + d * t for t in range(k)]
        assert reach(Interval(out, out + 1), k, s, p, d) == Interval(min(written), max(written) + 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weights_gradient_is_summed_more_carefully_than_by_pytorch(transposed: bool) -> None:
    torch.manual_seed(0)
    read, sat = torch.rand(1, 2, 900, 900), torch.rand(1, 1, 900, 900)  # all of one sign: the sums grow
    settings = Settings([1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)
    weight = torch.zeros(1, 2, 3, 3)
    found = weight_gradient(sat, read, weight, settings)
    wanted = weight_gradient(sat.double(), read.double(), weight.double(), settings)
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 3e-6
    plain = settings._replace(transposed=False)
    whole = aten.convolution_backward(interleaved(sat), interleaved(read), weight, None, *plain, [False, True, False])[
        1
    ]
    assert (whole - wanted).abs().max() > 5 * (found - wanted).abs().max()

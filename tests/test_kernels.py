"""Thin kernels against PyTorch: every window, stride, dilation, padding and size; threads; what is kept on disk."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from wholegrad.graph.rules import thin as rules
from wholegrad.graph.rules.convolve import convolve
from wholegrad.kernels import compile as compiling
from wholegrad.kernels import correlate, rows, slide, taps, thin
from wholegrad.kernels.choice import THICK, THIN, serves
from wholegrad.kernels.expression import EACH, MAP, ONE, Leaf, Program, Step
from wholegrad.kernels.host import Host, host
from wholegrad.kernels.stage import Part
from wholegrad.kernels.thin import Mixed

pytestmark = pytest.mark.skipif(host() is None, reason="no kernels for this processor")
EXACT = 1e-12
FLOAT32 = 2e-6  # sixteen roundings, as in rule 5


class Window(NamedTuple):
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    size: tuple[int, int]
    batch: int


pairs = st.tuples(st.integers(1, 5), st.integers(1, 5))
windows = st.builds(
    Window,
    inputs=st.integers(1, 13),
    outputs=st.integers(1, THIN),
    kernel=st.one_of(pairs, st.sampled_from([(8, 8), (1, 7), (2, 9)])),
    stride=st.one_of(st.just((1, 1)), pairs),
    dilation=st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 3), st.integers(1, 3))),
    padding=st.tuples(*[st.integers(-2, 5)] * 4),
    size=st.tuples(st.integers(1, 24), st.one_of(st.integers(1, 40), st.integers(90, 150))),
    batch=st.integers(1, 2),
)


def fits(window: Window) -> bool:
    """Whether the window has an output, and padding crops less than there is."""
    pads = (sum(window.padding[:2]), sum(window.padding[2:]))
    least = [min(0, window.padding[2 * i]) + min(0, window.padding[2 * i + 1]) for i in (0, 1)]
    return all(
        window.size[i] + pads[i] >= window.dilation[i] * (window.kernel[i] - 1) + 1 and window.size[i] + least[i] > 0
        for i in (0, 1)
    )


def tensors(window: Window, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(hash(window) % 2**31)
    x = torch.randn(window.batch, window.inputs, *window.size, generator=draw, dtype=torch.float64)
    weight = torch.randn(window.outputs, window.inputs, *window.kernel, generator=draw, dtype=torch.float64)
    bias = torch.randn(window.outputs, generator=draw, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def output_gradient(out: torch.Tensor) -> torch.Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)


def by_torch(window: Window, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    top, bottom, left, right = window.padding
    padded = F.pad(x, (left, right, top, bottom))
    out = F.conv2d(padded, weight, bias, window.stride, dilation=window.dilation)
    of_x, of_weight = torch.autograd.grad(out, (x, weight), output_gradient(out))
    return {"forward": out.detach(), "input": of_x, "weight": of_weight}


def by_kernels(window: Window, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    where = (window.stride, window.padding, window.dilation)
    out = thin.forward(x, weight, bias, *where)
    grad = output_gradient(out)
    return {
        "forward": out,
        "input": thin.input_gradient(grad, weight, window.size, *where),
        "weight": thin.weight_gradient(grad, x, window.kernel, *where),
    }


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the largest element, or to the size of one term where terms cancelled."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


@settings(max_examples=60)
@given(windows.filter(fits))
def test_every_window_is_exact_in_float64(window: Window) -> None:
    wanted = by_torch(window, *tensors(window, torch.float64))
    found = by_kernels(window, *tensors(window, torch.float64))
    for name in wanted:
        assert error(found[name], wanted[name]) <= EXACT, (name, window)


@settings(max_examples=30)
@given(windows.filter(fits))
def test_float32_is_as_good_as_torch(window: Window) -> None:
    given_ = tensors(window, torch.float32)
    truth, theirs = exact_from_float32(window, given_), by_torch(window, *given_)
    found = by_kernels(window, *given_)
    for name in truth:
        allowed = max(FLOAT32, 2 * error(theirs[name], truth[name]))
        assert error(found[name], truth[name]) <= allowed, (name, window)


def exact_from_float32(window: Window, given_: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The float64 results for exactly the numbers that the float32 run sees, output gradient included."""
    x, weight, bias = (each.double() for each in given_)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    top, bottom, left, right = window.padding
    out = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, window.stride, dilation=window.dilation)
    of_x, of_weight = torch.autograd.grad(out, (x, weight), output_gradient(out.float()).double())
    return {"forward": out.detach(), "input": of_x, "weight": of_weight}


@settings(max_examples=30)
@given(windows, st.booleans())
def test_convolve_is_the_same_by_either_path(window: Window, biased: bool) -> None:
    """Transposed too, where cropping by less than nothing adds pixels that no input reaches."""
    x, weight, bias = tensors(window, torch.float64)
    weight = weight.transpose(0, 1).contiguous()
    reach = [(window.size[i] - 1) * window.stride[i] + window.dilation[i] * (window.kernel[i] - 1) + 1 for i in (0, 1)]
    crop = tuple(min(pad, (reach[i // 2] - 1) // 2) for i, pad in enumerate(window.padding))
    results = []
    for groups in (1, 2):  # two groups are never thin; the second is all zeros
        one = [each.clone().requires_grad_() for each in (x, weight, bias)]
        a, w, b = one
        if groups == 2:
            a, w, b = torch.cat([a, torch.zeros_like(a)], 1), torch.cat([w, torch.zeros_like(w)]), torch.cat([b, b])
        assert serves(a, w, window.stride, groups) == (groups == 1)
        given_bias = b if biased else None
        out = convolve(a, w, given_bias, list(window.stride), crop, list(window.dilation), True, groups)
        out = out[:, : window.outputs]
        leaves = one if biased else one[:2]
        assert tuple(out.shape[2:]) == tuple(n - crop[2 * i] - crop[2 * i + 1] for i, n in enumerate(reach))
        results.append([out, *torch.autograd.grad(out, leaves, output_gradient(out))])
    for found, wanted in zip(*results, strict=True):
        assert error(found, wanted) <= EXACT, window


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_are_read_where_they_lie(dtype: torch.dtype) -> None:
    whole = torch.randn(2, 5, 40, 70, dtype=dtype)
    x = whole[:, 1:4, 3:31, 5:60]
    weight = torch.randn(2, 3, 3, 3, dtype=dtype)
    where = ((1, 1), (1, 1, 1, 1), (1, 1))
    assert thin.forward(x, weight, None, *where).equal(thin.forward(x.contiguous(), weight, None, *where))
    across = x.transpose(2, 3)  # columns lie apart
    assert thin.forward(across, weight, None, *where).equal(thin.forward(across.contiguous(), weight, None, *where))
    grad = torch.ones((), dtype=dtype).expand(2, 2, 28, 55)
    full = thin.weight_gradient(grad.contiguous(), x.contiguous(), (3, 3), *where)
    assert thin.weight_gradient(grad, x, (3, 3), *where).equal(full)


def test_long_sums_are_kept_in_float64() -> None:
    """Beyond 2**24 float32 cannot count: every term of this gradient is one."""
    x, grad = torch.ones(1, 1, 4100, 4100), torch.ones(1, 1, 4100, 4100)
    found = thin.weight_gradient(grad, x, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    assert found.dtype == torch.float64 and found.item() == 4100**2 > 2**24


def test_no_window_reads_infinity_beyond_its_reach() -> None:
    x = torch.ones(1, 1, 9, 33)
    x[..., 8, :] = x[..., 32] = math.inf  # the last row and column are cropped off
    found = thin.weight_gradient(torch.ones(1, 1, 8, 32), x, (1, 1), (1, 1), (0, -1, 0, -1), (1, 1))
    assert found.item() == 256


def test_threads_get_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They meet at the first call, which compiles, and use scratch memory side by side."""
    monkeypatch.setenv("WHOLEGRAD_CACHE", str(tmp_path))
    thin.slide_kernel.cache_clear()
    thin.correlate_kernel.cache_clear()
    compiling._loaded.clear()
    cases = [Window(3, 3, (8, 8), (4, 4), (1, 1), (2, 2, 2, 2), (64 + 4 * i, 200), 1) for i in range(8)]
    inputs = [tensors(case, torch.float32) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: by_kernels(pair[0], *pair[1]), zip(cases, inputs, strict=True)))
    for case, given_, result in zip(cases, inputs, found, strict=True):
        again = by_kernels(case, *given_)
        assert all(again[name].equal(result[name]) for name in again)
    assert len(list((tmp_path / "kernels").iterdir())) == 3


def test_machine_code_is_kept_and_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    window = Window(2, 1, (2, 3), (1, 1), (1, 1), (0, 0, 0, 0), (9, 30), 1)
    given_ = tensors(window, torch.float64)
    monkeypatch.setenv("WHOLEGRAD_CACHE", str(tmp_path))

    def afresh() -> dict[str, torch.Tensor]:
        thin.slide_kernel.cache_clear()
        thin.correlate_kernel.cache_clear()
        compiling._loaded.clear()
        return by_kernels(window, *given_)

    first = afresh()
    files = sorted((tmp_path / "kernels").iterdir())
    assert len(files) == 3
    monkeypatch.setattr(compiling, "_compiled", lambda text: pytest.fail("compiled again"))
    second = afresh()
    monkeypatch.undo()
    monkeypatch.setenv("WHOLEGRAD_CACHE", str(tmp_path))
    files[0].write_bytes(files[0].read_bytes()[:-1])  # not whole: compiled again
    third = afresh()
    monkeypatch.setenv("WHOLEGRAD_CACHE", "/dev/null/nowhere")  # cannot be written: works without
    fourth = afresh()
    for name in first:
        assert first[name].equal(second[name]) and first[name].equal(third[name]) and first[name].equal(fourth[name])


# Inputs that are computed while they are staged.

PARTS = (
    Part(Program((Leaf(MAP, 1),), (Step("u8", (0,)), Step("constant", (), (1.0,)), Step("sub", (2, 1)))), 2),
    Part(Program((Leaf(grad=True), Leaf()), (Step("leaky", (0,), (0.1,)), Step("mul", (2, 1)))), 1),
    Part(Program((Leaf(grad=True), Leaf(EACH), Leaf(ONE)), (Step("mul", (0, 1)), Step("add", (3, 2)))), 3),
)
MIXED_WINDOWS = {
    "three by three": rules.Window((1, 1), (1, 1, 1, 1), (1, 1), None),
    "strides, dilation, a crop": rules.Window((3, 2), (1, 0, -1, 3), (1, 2), None),
    "stride four": rules.Window((4, 4), (2, 2, 2, 2), (1, 1), None),
    "transposed": rules.Window((2, 3), (1, 0, 1, 2), (1, 1), (40, 121)),
}


def leaves_of_parts(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The same numbers in every precision."""
    draw = torch.Generator().manual_seed(0)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    pixels = torch.randint(0, 256, (2, 2, 20, 41), generator=draw, dtype=torch.uint8)
    crop = real(2, 3, 23, 50)[:, :, 2:22, 5:46]
    return pixels, real(2, 1, 20, 41), real(2, 1, 20, 41), crop, real(3, 1, 1), real(1)


def mixed_by_torch(leaves: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    pixels, x, factor, y, each, one = leaves
    return torch.cat([1 - pixels.to(dtype) / 255, F.leaky_relu(x, 0.1) * factor, y * each + one], 1)


def mixed_results(window: rules.Window, dtype: torch.dtype, kernels: bool) -> list[torch.Tensor]:
    """The output, the weight's and the bias's gradient, and those of the two maps that want one."""
    draw = torch.Generator().manual_seed(1)
    shape = (2, 6, 3, 4) if window.size is None else (6, 2, 3, 4)
    weight, bias = (torch.randn(each, generator=draw).to(dtype) for each in (shape, (2,)))
    leaves = leaves_of_parts(dtype)
    wanted = [weight.requires_grad_(), bias.requires_grad_(), leaves[1].requires_grad_(), leaves[3].requires_grad_()]
    if kernels:
        out = rules.convolve(Mixed(PARTS, leaves), weight, bias, window)
    else:
        x, (top, bottom, left, right) = mixed_by_torch(leaves, dtype), window.padding
        if window.size is None:
            x = F.pad(x, (left, right, top, bottom))
            out = F.conv2d(x, weight, bias, window.stride, dilation=window.dilation)
        else:
            whole = F.conv_transpose2d(x, weight, bias, window.stride)
            out = whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]
            assert tuple(out.shape[2:]) == window.size
    return [out.detach(), *torch.autograd.grad(out, wanted, output_gradient(out.float()).to(dtype))]


@pytest.mark.parametrize("name", list(MIXED_WINDOWS))
def test_inputs_computed_while_staged(name: str) -> None:
    window = MIXED_WINDOWS[name]
    truth = mixed_results(window, torch.float64, False)
    assert all(error(a, b) <= EXACT for a, b in zip(mixed_results(window, torch.float64, True), truth, strict=True))
    found, theirs = (mixed_results(window, torch.float32, kernels) for kernels in (True, False))
    for a, b, exact in zip(found, theirs, truth, strict=True):
        assert error(a, exact) <= max(FLOAT32, 2 * error(b, exact))


@pytest.mark.parametrize("machine", [Host(16, 32, ""), Host(32, 16, "")])
def test_inputs_computed_in_narrower_vectors(machine: Host, narrow: Callable[[Host], None]) -> None:
    narrow(machine)
    for window in (MIXED_WINDOWS["stride four"], MIXED_WINDOWS["transposed"]):
        found, wanted = (mixed_results(window, torch.float64, kernels) for kernels in (True, False))
        assert all(error(a, b) <= EXACT for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8])
def test_bytes_are_taken_apart_by_stride(stride: int, dtype: torch.dtype) -> None:
    """Each tap of one window alone, so that outputs are pixels, over rows of several vectors of every phase."""
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (1, 2, 9, 37 * stride + 5), generator=draw, dtype=torch.uint8)
    part = Part(Program((Leaf(MAP, 1),), (Step("u8", (0,)),)), 2)
    window = rules.Window((1, stride), (0, 0, 1, 0), (1, 1), None)
    weight = torch.eye(2 * stride, dtype=dtype).view(2 * stride, 2, 1, stride)
    wanted = F.conv2d(F.pad(pixels.to(dtype) / 255, (1, 0)), weight, None, (1, stride))
    assert rules.convolve(Mixed((part,), (pixels,)), weight, None, window).equal(wanted)


@pytest.mark.parametrize(
    ("row_bytes", "reach", "rows"),
    [(1 << 10, 2, 254), (1 << 15, 2, 12), (1 << 17, 2, 12), (1 << 18, 2, 6), (1 << 20, 2, 1), (1 << 22, 4, 1)],
)
def test_few_rows_of_a_band_are_staged_again(row_bytes: int, reach: int, rows: int) -> None:
    """As many as the cache holds, or six for each that is, or as many as fit."""
    assert thin._band(row_bytes, reach) == rows


@pytest.mark.parametrize("size", [None, (4, 10_000)], ids=["convolution", "transposed"])
def test_equal_gradients_of_a_bias_are_summed_as_exactly_as_pytorch_does(size: tuple[int, int] | None) -> None:
    """Blank glass: rounding errors of equal terms do not cancel."""
    x, weight, bias = (
        torch.rand(1, 1, 4, 10_000),
        torch.rand(1, 1, 1, 1).requires_grad_(),
        torch.zeros(1).requires_grad_(),
    )
    out = rules.convolve(x, weight, bias, rules.Window((1, 1), (0, 0, 0, 0), (1, 1), size))
    grad = torch.full_like(out, 0.1)
    _, found = torch.autograd.grad(out, (weight, bias), grad)
    truth = grad.double().sum()
    assert abs(found.item() - truth) <= 2 * abs(grad.sum() - truth)


def test_rows_of_a_file_lie_where_they_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    content = bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).tolist())
    path.write_bytes(content)
    file = os.open(path, os.O_RDONLY)
    try:
        for offset, step, size, count, pitch in ((0, 10, 10, 500, 10), (7, 100, 33, 49, 40), (4999, 1, 1, 1, 1)):
            to = (ctypes.c_uint8 * (count * pitch + 1))(*[1] * (count * pitch + 1))
            assert rows.read_rows(file, offset, step, size, count, ctypes.addressof(to), pitch)
            for i in range(count):
                row = content[offset + i * step :][:size]
                assert bytes(to[i * pitch : (i + 1) * pitch]) == row + b"\x01" * (pitch - size)
            assert to[count * pitch] == 1
        to = (ctypes.c_uint8 * 100)()
        assert not rows.read_rows(file, 4970, 10, 11, 3, ctypes.addressof(to), 20)  # the file ends first
        assert not rows.read_rows(file, 6000, 10, 10, 1, ctypes.addressof(to), 10)
    finally:
        os.close(file)
    assert not rows.read_rows(file, 0, 10, 10, 1, ctypes.addressof(to), 10)  # it is closed


def shifted(axis: taps.Axis) -> taps.Axis:
    """A mutant: the last tap one place too far."""
    return axis._replace(taps=(*axis.taps[:-1], axis.taps[-1]._replace(shift=axis.taps[-1].shift + 1)))


@pytest.mark.parametrize("where", [slide, correlate])
def test_a_tap_out_of_place_is_noticed(where: Any, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    window = Window(2, 2, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), (21, 43), 1)
    given_ = tensors(window, torch.float64)
    whole = where.axis
    monkeypatch.setattr(where, "axis", lambda *args: shifted(whole(*args)))
    found, wanted = by_kernels(window, *given_), by_torch(window, *given_)
    wrong = [name for name in found if error(found[name], wanted[name]) > 1e-3]
    assert wrong == (["forward", "input"] if where is slide else ["weight"])


@pytest.mark.parametrize("machine", [Host(16, 32, ""), Host(32, 16, "")])
def test_narrower_vectors_are_exact(machine: Host, narrow: Callable[[Host], None]) -> None:
    narrow(machine)
    for window in (
        Window(3, 3, (8, 8), (4, 4), (1, 1), (2, 2, 2, 2), (37, 61), 1),
        Window(5, 7, (3, 2), (3, 2), (1, 2), (1, 0, -1, 3), (20, 45), 2),
    ):
        given_ = tensors(window, torch.float64)
        found, wanted = by_kernels(window, *given_), by_torch(window, *given_)
        assert all(error(found[name], wanted[name]) <= EXACT for name in wanted)


@pytest.mark.parametrize("machine", [Host(64, 32, ""), Host(32, 16, ""), Host(16, 32, "")])
def test_blocks_fit_every_processor(machine: Host) -> None:
    for channels in (1, 2, 3, 5, 12, THICK):
        for kernel, stride in ((1, 1), (3, 1), (5, 1), (8, 4), (3, 2)):
            for transposed in (False, True):
                shape = slide.Shape(3, channels, (kernel,) * 2, (stride,) * 2, (1, 1), transposed, (0, 0), "float")
                block = slide.block(shape, machine)
                held = block.channels * block.rows * block.vectors * shape.axes()[1].targets
                assert held < machine.registers
                covered = {g + o for g in block.groups(channels) for o in range(block.channels)}
                assert covered == set(range(channels))


def test_serves_thin_convolutions_only() -> None:
    def asked(i: int, o: int, k: int = 3, groups: int = 1, dtype: torch.dtype = torch.float32) -> bool:
        return serves(torch.empty(1, i, 4, 4, dtype=dtype), torch.empty(o, i, k, k, dtype=dtype), (1, 1), groups)

    assert asked(1, 1) and asked(THIN, THIN) and asked(3, THICK) and asked(THICK, 1) and asked(3, 3, 8)
    assert not (asked(THIN + 1, THIN + 1) or asked(3, THICK + 1) or asked(2, 2, groups=2) or asked(3, 3, 16))
    assert not asked(3, 3, dtype=torch.bfloat16) and asked(3, 3, dtype=torch.float64)

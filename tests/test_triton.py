"""The Triton kernels for thin convolutions against PyTorch in float64; without a GPU in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.nn import functional as F

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton looks at when it is imported
pytest.importorskip("triton", reason="Triton is not installed")

from wholegrad.graph.rules.convolve import convolve  # noqa: E402
from wholegrad.kernels import choice, triton_thin  # noqa: E402
from wholegrad.kernels.triton_thin import Window  # noqa: E402

WHERE = "cuda" if GPU else "cpu"
SHAPES = [  # N, I, H and W; outputs, kernel, stride, padding (top, bottom, left, right), dilation
    ((1, 3, 9, 10), 4, (8, 8), (4, 4), (2, 2, 2, 2), (1, 1)),
    ((1, 2, 5, 19), 1, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1)),
    ((2, 1, 7, 21), 3, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    ((2, 5, 8, 11), 2, (3, 2), (2, 3), (1, 0, 2, 1), (2, 1)),
    ((1, 3, 7, 20), 3, (3, 3), (1, 1), (-1, 2, 0, -2), (1, 2)),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(WHERE)


def padded(x: torch.Tensor, padding: tuple[int, int, int, int]) -> torch.Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lanes", [16, 512])
def test_all_three_are_what_pytorch_computes(monkeypatch: pytest.MonkeyPatch, lanes: int, shape: Any) -> None:
    size, outputs, kernel, stride, padding, dilation = shape
    monkeypatch.setattr(triton_thin, "LANES", lanes)  # several programs a row, and one
    monkeypatch.setattr(triton_thin, "ROWS", 3)
    x, weight, bias = random(*size), random(outputs, size[1], *kernel, seed=1), random(outputs, seed=2)
    x.requires_grad_()
    weight.requires_grad_()
    wanted = F.conv2d(padded(x, padding), weight, bias, stride, 0, dilation)
    grad = random(*wanted.shape, seed=3)
    of_x, of_weight = torch.autograd.grad(wanted, [x, weight], grad)
    window = Window(stride, padding, dilation)
    with torch.no_grad():
        torch.testing.assert_close(triton_thin.forward(x, weight, bias, window), wanted, rtol=1e-12, atol=1e-12)
        found = triton_thin.input_gradient(grad, weight, size[2:], window)
        torch.testing.assert_close(found, of_x, rtol=1e-12, atol=1e-12)
        found = triton_thin.weight_gradient(grad, x, kernel, window)
        torch.testing.assert_close(found, of_weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_maps_are_summed_in_float32_at_least(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter has no bfloat16")
    x, weight = random(1, 3, 6, 17), random(2, 3, 5, 5, seed=1)
    window = Window((1, 1), (2, 2, 2, 2), (1, 1))
    wanted = F.conv2d(x, weight, None, 1, 2)
    found = triton_thin.forward(x.to(dtype), weight.to(dtype), None, window)
    assert found.dtype == dtype
    allowed = 1e-6 if dtype == torch.float32 else 2e-2
    assert (found.double() - wanted).abs().max() <= allowed * wanted.abs().max()
    summed = triton_thin.weight_gradient(found, x.to(dtype), (5, 5), window)
    assert summed.dtype == torch.float64


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("padding", [(1, 2, 0, 1), (0, 0, 0, 0), (-1, 0, 2, -1)])
def test_the_rule_of_convolutions_differentiates_them(transposed: bool, padding: tuple[int, int, int, int]) -> None:
    """The engine's own entry, with the kernels chosen, against the same with PyTorch's."""
    shape = (3, 4, 4, 4) if transposed else (4, 3, 4, 4)
    given = random(1, 3, 7, 8), random(*shape, seed=1), random(4, seed=2)
    found = []
    for use in (False, True):
        leaves = [t.clone().requires_grad_() for t in given]
        with choice.using_triton(use, anywhere=True):
            out = convolve(*leaves, [2, 3], padding, [1, 1], transposed, 1)
            grads = torch.autograd.grad((out * random(*out.shape, seed=4)).sum(), leaves)
        assert ("Triton" in type(out.grad_fn).__name__) == use
        found.append((out, *grads))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_they_are_chosen_for_few_channels_on_a_gpu_and_only_if_asked() -> None:
    x, weight = random(1, 3, 9, 9), random(4, 3, 3, 3)
    assert not choice.triton_serves(x, weight, 1)
    with choice.using_triton(True):
        assert choice.triton_serves(x, weight, 1) == GPU
    with choice.using_triton(True, anywhere=True):
        assert choice.triton_serves(x, weight, 1)
        assert not choice.triton_serves(x, random(64, 3, 3, 3), 1)
        assert not choice.triton_serves(x, random(4, 1, 3, 3), 3)
    assert not choice.triton_serves(x, weight, 1)

"""Which convolutions the thin kernels compute: those where they were measured to beat PyTorch's.

``benchmarks/kernels`` on 2026-11-25 (AMD EPYC Zen 4 with AVX-512, torch 2.13.0, one thread): for C -> C channels
forward and both gradients together are 17 times faster than oneDNN's at C = 2, 4.6 at 4, 2.1 at 8, 1.6 at 12 (3x3) and
as fast at 16; 1x1, 5x5 and strided windows are alike. Where one side is thin and the other has 16 or 32 channels they
are 1.3 to 7 times faster. The input gradient of 3 -> 64 channels (7x7) was half as exact in float32 as oneDNN's.

16 channels count as thin for the sake of what is around a convolution: its input may be computed as it is read, and its
maps need not change between planar and interleaved. MONAI's UNet (16 channels first) takes 0.84 to 0.91 of the time so,
its boundaries planar too; with 32 as thin it took 1.05 of it (``benchmarks/wide``, 2026-11-29). Triton's kernels, which
never ran on a GPU, go by the same number until a calibration of the device finds a smaller one (:func:`triton_suits`);
how boundaries lie goes by ``THIN`` whatever it finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch

from wholegrad.kernels.host import host

THIN = 16  # channels on one side
THICK = 32  # channels on the other; float32 sums over more lose to oneDNN's
MOST_TAPS = 128  # of a window: all are unrolled
MOST_STRIDE = 8  # so many phases of a row share the registers


def suits(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int], groups: int) -> bool:
    """Whether :mod:`wholegrad.kernels.thin` should compute a convolution with a weight of this shape, on a CPU."""
    return (
        groups == 1
        and len(shape) == 4
        and min(shape[:2]) <= THIN
        and max(shape[:2]) <= THICK
        and prod(shape[2:]) <= MOST_TAPS
        and max(stride) <= MOST_STRIDE
        and dtype in (torch.float32, torch.float64)
        and host() is not None
    )


def serves(x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], groups: int) -> bool:
    """Whether it should compute this convolution, transposed or not, and its gradients."""
    here = x.device.type == weight.device.type == "cpu"
    return here and x.dtype == weight.dtype and suits(weight.shape, weight.dtype, stride, groups)


class _Triton:
    """Whether Triton's kernels may run: off unless a device asks for them, since nobody measured them yet."""

    on = False
    anywhere = False  # on CPU tensors too: in Triton's interpreter
    up_to = THIN


@contextmanager
def using_triton(use: bool, anywhere: bool = False, up_to: int = THIN) -> Iterator[None]:
    """While open, the Triton kernels serve thin convolutions and programs on a GPU, or not; for all threads.

    Args:
        anywhere: on the CPU too, where Triton's interpreter runs them, for tests.
        up_to: channels of the thinner side that count as thin.
    """
    before = _Triton.on, _Triton.anywhere, _Triton.up_to
    _Triton.on, _Triton.anywhere, _Triton.up_to = use, anywhere, up_to
    try:
        yield
    finally:
        _Triton.on, _Triton.anywhere, _Triton.up_to = before


def triton_runs(x: torch.Tensor) -> bool:
    """Whether Triton's kernels may run on this tensor."""
    return _Triton.on and (x.device.type == "cuda" or _Triton.anywhere)


def triton_suits(shape: Sequence[int], groups: int, up_to: int) -> bool:
    """Whether Triton's kernels should compute a convolution with a weight of this shape, on a GPU.

    Args:
        up_to: channels of the thinner side at most: as many as a calibration found, or ``THIN``.
    """
    thin = groups == 1 and len(shape) == 4 and min(shape[:2]) <= min(up_to, THIN) and max(shape[:2]) <= THICK
    return thin and prod(shape[2:]) <= MOST_TAPS


def triton_serves(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether Triton's kernels should compute this convolution, transposed or not."""
    return triton_runs(x) and triton_suits(weight.shape, groups, _Triton.up_to) and x.dtype == weight.dtype

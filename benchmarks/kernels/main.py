"""Thin kernels against PyTorch's (oneDNN, channels last), one thread: forward, input gradient, weight gradient.

    python benchmarks/kernels/main.py                   the table of the README
    python benchmarks/kernels/main.py --network         the layers of the 4492-parameter U-Net alone

Both sides get tensors in the layout that they like best, and reuse memory. Every figure is GFLOP/s, two a multiply-add,
of the run with the least processor time, since other jobs may share the machine. Results are compared before they are
timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from wholegrad.graph.rules import convolve
from wholegrad.kernels import thin
from wholegrad.run.process import reuse_memory

aten = torch.ops.aten


class Case(NamedTuple):
    """A layer ``inputs -> outputs``; ``transposed`` is the layer's own direction."""

    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    transposed: bool = False

    def __str__(self) -> str:
        step = f" stride {self.stride}" if self.stride > 1 else ""
        turned = "transposed " if self.transposed else ""
        return f"{turned}{self.kernel}x{self.kernel}{step} {self.inputs}->{self.outputs}"


NETWORK = [
    Case(2, 1, 5), Case(5, 2, 3), Case(3, 3, 8, 4), Case(3, 6, 8, 4), Case(6, 6, 5), Case(6, 3, 3),
    Case(3, 2, 8, 4, True), Case(6, 3, 8, 4, True),
]  # fmt: skip
CHANNELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
GRID = [
    *(Case(c, c, 3) for c in CHANNELS),
    *(Case(c, c, 1) for c in (2, 4, 8, 16, 32)),
    *(Case(c, c, 5) for c in (2, 4, 8, 16, 32)),
    *(Case(c, c, 3, 2) for c in (2, 4, 8, 16, 32)),
    *(Case(a, b, 3) for a, b in ((3, 16), (3, 32), (3, 64), (16, 1), (32, 1), (64, 1), (64, 3), (8, 16), (16, 8))),
    *(Case(c, c, 2, 2, True) for c in (2, 4, 8, 16, 32)),
]


def seconds(call: Callable[[], object], least: float) -> float:
    """Processor time of the fastest run; runs go on for ``least`` seconds."""
    call()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < least:
        before = time.thread_time()
        call()
        best = min(best, time.thread_time() - before)
    return best


def calls(
    case: Case, size: tuple[int, int]
) -> tuple[list[Callable[[], torch.Tensor]], list[Callable[[], torch.Tensor]], float]:
    """The three functions as thin kernels and as PyTorch runs them, and their multiply-adds."""
    s, k = case.stride, case.kernel
    pad = max(0, k - s) // 2
    sat, read = (case.inputs, case.outputs) if case.transposed else (case.outputs, case.inputs)
    low_size = [(n + 2 * pad - k) // s + 1 for n in size]
    high = [(n - 1) * s + k - 2 * pad for n in low_size]
    wide, low = torch.randn(1, read, *high), torch.randn(1, sat, *low_size)
    weight = torch.randn(sat, read, k, k)
    padding, stride, one = (pad,) * 4, (s, s), (1, 1)
    down = lambda: thin.forward(wide, weight, None, stride, padding, one)  # noqa: E731
    up = lambda: thin.input_gradient(low, weight, (high[0], high[1]), stride, padding, one)  # noqa: E731
    correlate = lambda: thin.weight_gradient(low, wide, (k, k), stride, padding, one)  # noqa: E731
    ours = [up, down, correlate] if case.transposed else [down, up, correlate]
    settings = convolve.Settings([s, s], [pad, pad], [1, 1], False, [0, 0], 1)
    wide_, low_ = convolve.interleaved(wide), convolve.interleaved(low)
    down_ = lambda: aten.convolution(wide_, weight, None, *settings)  # noqa: E731
    up_ = lambda: aten.convolution_backward(low_, wide_, weight, None, *settings, [True, False, False])[0]  # noqa: E731
    correlate_ = lambda: convolve.weight_gradient(low_, wide_, weight, settings)  # noqa: E731
    theirs = [up_, down_, correlate_] if case.transposed else [down_, up_, correlate_]
    return ours, theirs, float(sat * read * k * k * low_size[0] * low_size[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="store_true", help="only the layers of the U-Net")
    parser.add_argument("--size", default="384x768", help="rows x columns of the layer's larger map")
    parser.add_argument("--seconds", type=float, default=0.15, help="for each figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = tuple(map(int, args.size.split("x")))
    print("| layer | forward | | input gradient | | weight gradient | | all three, times faster |")
    print("|---|---|---|---|---|---|---|---|")
    with reuse_memory():
        for case in NETWORK if args.network else [*NETWORK, *GRID]:
            ours, theirs, macs = calls(case, (size[0], size[1]))
            row, spent = [], [0.0, 0.0]
            for mine, other in zip(ours, theirs, strict=True):
                found, wanted = mine(), other()
                assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), f"{case} is wrong"
                times = [seconds(call, args.seconds) for call in (mine, other)]
                spent = [a + b for a, b in zip(spent, times, strict=True)]
                row += [f"{2e-9 * macs / each:.0f}" for each in times]
            print(f"| {case} | {' | '.join(row)} | {spent[1] / spent[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()

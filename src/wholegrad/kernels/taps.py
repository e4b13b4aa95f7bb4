"""Where the taps of a window lie along one axis, once inputs or outputs are taken apart by stride.

A convolution's output ``o`` reads padded inputs ``s o + d t``: place ``o + (d t) // s`` of input phase ``(d t) mod s``.
A transposed convolution's output ``y = s q + p`` hears from inputs i with ``s i + d t = y + pad``: taps with
``d t = pad + p (mod s)``, at input place ``q + (pad + p - d t) / s``. Either way a tap reads neighbours for
neighbouring outputs of its phase, and one kernel serves both.
"""

from __future__ import annotations

from typing import NamedTuple


class Tap(NamedTuple):
    """Tap ``number`` adds input place ``o + shift`` of phase ``source`` to output place o of phase ``target``."""

    number: int
    source: int
    target: int
    shift: int


class Axis(NamedTuple):
    """A window along one axis. ``sources`` and ``targets`` count the phases of inputs and outputs.

    Attributes:
        taps: every shift at least 0.
        lead: input place that shift 0 stands for, beyond what the caller's padding says.
    """

    sources: int
    targets: int
    taps: tuple[Tap, ...]
    lead: int

    @property
    def reach(self) -> int:
        """The largest shift."""
        return max(tap.shift for tap in self.taps)


def axis(kernel: int, stride: int, dilation: int, transposed: bool, residue: int) -> Axis:
    """The taps of a window; ``residue`` is the padding modulo the stride, of a transposed convolution only."""
    steps = [dilation * t for t in range(kernel)]
    if not transposed:
        return Axis(stride, 1, tuple(Tap(t, d % stride, 0, d // stride) for t, d in enumerate(steps)), 0)
    targets = [(d - residue) % stride for d in steps]
    shifts = [(residue + p - d) // stride for p, d in zip(targets, steps, strict=True)]
    lead = min(shifts)
    taps = zip(range(kernel), targets, shifts, strict=True)
    return Axis(1, stride, tuple(Tap(t, 0, p, shift - lead) for t, p, shift in taps), lead)

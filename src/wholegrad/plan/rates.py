"""How fast the machine is, in seconds of one thread while all others work too: what predicted times are made of.

The figures here stand where a machine was never calibrated (:mod:`wholegrad.run.calibrate`): they are those of the
machine on which they were measured (AMD EPYC Zen 4 with AVX-512, 2 threads, torch 2.13.0, float32).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

CHANNELS = (1, 8, 16, 32, 64, 128)  # of the thinner side of a convolution, up to which a rate of ``wide`` holds
FEW = (2, 4, 16)  # the same for the project's own kernels


@dataclass(frozen=True)
class Rates:
    """Seconds of one thread.

    Attributes:
        wide: of a multiply-add of PyTorch's convolutions: forward, for the input's gradient and for the weight's, by
            channels of the thinner side (``CHANNELS``; the last one also beyond).
        thin: the same of the project's own kernels, by ``FEW``.
        product: of a multiply-add of a matrix product.
        made: of a byte that PyTorch's op makes, its input read.
        passed: of a byte that a pass of the project's own kernels makes.
        summed: of a byte that PyTorch's op sums (a norm's statistics).
        backward: how many times that again a byte that is made costs to pull back.
        fresh: what a byte costs more in memory that the system hands over anew.
        stored: of a byte of a boundary that is written to host memory; its gradient is added to and read.
        disk: of a byte that is written to the temporary folder or read from it, past the page cache, on the clock.
        pixels: of a byte of an image or target that is read.
        row: of a row of one channel of a tile that is read.
        call: of an op on a tile, whatever its size.
        parameter: of an element of a parameter for each tile that adds to its gradient.
        step: of a step whatever its plan: what it looks at before, threads, the optimiser.
    """

    wide: tuple[tuple[float, float, float], ...] = (
        (9e-11, 1.05e-10, 1.5e-10),
        (2.2e-11, 4.3e-11, 3.3e-11),
        (2.3e-11, 2.35e-11, 3.1e-11),
        (2e-11, 2e-11, 2.5e-11),
        (1.8e-11, 1.8e-11, 2.15e-11),
        (1.8e-11, 1.8e-11, 2.2e-11),
    )
    thin: tuple[tuple[float, float, float], ...] = (
        (5e-11, 5.5e-11, 4.6e-11),
        (3.5e-11, 3.5e-11, 3.9e-11),
        (2.2e-11, 2.2e-11, 2.6e-11),
    )
    product: float = 2.2e-11
    made: float = 5e-10
    passed: float = 1e-10
    summed: float = 1e-10
    backward: float = 2.5
    fresh: float = 4e-10
    stored: float = 1.2e-10
    disk: float = 2.4e-9
    pixels: float = 6e-11
    row: float = 1.2e-6
    call: float = 3e-5
    parameter: float = 4e-9
    step: float = 0.01

    def convolution(self, channels: int, own: bool) -> tuple[float, float, float]:
        """Seconds of a multiply-add forward, for the input's gradient and for the weight's."""
        steps, rates = (FEW, self.thin) if own else (CHANNELS, self.wide)
        return rates[min(bisect_left(steps, channels), len(rates) - 1)]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Those that :meth:`to_json` wrote.

        Raises:
            ValueError: something else is there.
        """
        names = {field.name: field.default for field in fields(cls)}
        if values.keys() != names.keys():
            raise ValueError("other rates than these")
        made: dict[str, Any] = {
            name: tuple(tuple(float(v) for v in row) for row in value) if isinstance(value, list) else float(value)
            for name, value in values.items()
        }
        found = cls(**made)
        flat = [v for value in made.values() for v in (sum(value, ()) if isinstance(value, tuple) else (value,))]
        if len(found.wide) != len(CHANNELS) or len(found.thin) != len(FEW) or not all(0 <= v < 1e3 for v in flat):
            raise ValueError("rates that cannot be")
        return found


BUILT_IN = Rates()

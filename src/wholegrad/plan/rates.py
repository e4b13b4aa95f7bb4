"""How fast the machine is, in seconds of one thread while all others work too: what predicted times are made of.

The figures here stand where a machine was never calibrated (:mod:`wholegrad.run.calibrate`): they are those of the
machine on which they were measured (AMD EPYC Zen 4 with AVX-512, 2 threads, torch 2.13.0, float32).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from typing import Any

CHANNELS = (1, 8, 16, 32, 64, 128)  # of the thinner side of a convolution, up to which a rate of ``wide`` holds
FEW = (2, 4, 12)  # the same for the project's own kernels


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
        backward: how many times that again a byte costs to pull back: of either.
        fresh: what a byte costs more in memory that the system hands over anew.
        stored: of a byte of a boundary, written to host memory or read from there.
        disk: what a byte of a boundary costs more on disk, written and read through the page cache.
        pixels: of a byte of an image or target that is read.
        row: of a row of one channel of a tile that is read.
        call: of an op on a tile, whatever its size.
    """

    wide: tuple[tuple[float, float, float], ...] = ((4e-10, 4e-10, 8e-10), (6e-11, 6e-11, 8e-11), (3e-11, 3e-11, 4e-11),
        (1.8e-11, 1.8e-11, 2.2e-11), (1.8e-11, 1.8e-11, 2e-11), (1.8e-11, 1.8e-11, 2e-11))  # fmt: skip
    thin: tuple[tuple[float, float, float], ...] = ((2.7e-11, 3e-11, 3e-11),) * len(FEW)
    product: float = 2e-11
    made: float = 1.5e-10
    passed: float = 1e-10
    backward: float = 2.5
    fresh: float = 1e-9
    stored: float = 1.5e-10
    disk: float = 5e-10
    pixels: float = 1.5e-10
    row: float = 8e-7
    call: float = 3e-5

    def convolution(self, channels: int, own: bool) -> tuple[float, float, float]:
        """Seconds of a multiply-add forward, for the input's gradient and for the weight's."""
        steps, rates = (FEW, self.thin) if own else (CHANNELS, self.wide)
        return rates[min(bisect_left(steps, channels), len(rates) - 1)]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(values: dict[str, Any]) -> Rates:
        """Those that :meth:`to_json` wrote.

        Raises:
            ValueError: something else is there.
        """
        names = {field.name: field.default for field in fields(Rates)}
        if values.keys() != names.keys():
            raise ValueError("other rates than these")
        made: dict[str, Any] = {
            name: tuple(tuple(float(v) for v in row) for row in value) if isinstance(value, list) else float(value)
            for name, value in values.items()
        }
        found = Rates(**made)
        flat = [v for value in made.values() for v in (sum(value, ()) if isinstance(value, tuple) else (value,))]
        if len(found.wide) != len(CHANNELS) or len(found.thin) != len(FEW) or not all(0 <= v < 1e3 for v in flat):
            raise ValueError("rates that cannot be")
        return found


BUILT_IN = Rates()

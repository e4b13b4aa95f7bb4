"""Apple's GPUs, by construction: nothing here was ever run on one.

Metal's tensors have fewer than 2**32 bytes (rule 8), and no float64: sums are held in float32 there. Tiles run one at a
time, since PyTorch's queue for this device is one; there are no recordings and no Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from wholegrad.errors import PlanError
from wholegrad.plan.devices import Apart
from wholegrad.run.device import Device, Options, Room

MOST_BYTES = 1 << 32


class MpsDevice(Device):
    """Apple's GPU."""

    most_bytes = MOST_BYTES

    def __init__(self, where: torch.device, options: Options = Options()) -> None:  # noqa: B008
        if not torch.backends.mps.is_available():
            raise PlanError(f"device {where}", "is not there: PyTorch finds no GPU of Apple's", "give device='cpu'")
        super().__init__(torch.device("mps", 0), replace(options, at_once=1, graphs=False, triton=False))
        self._most = 0

    def room(self) -> Room:
        total, held = torch.mps.recommended_max_memory(), torch.mps.current_allocated_memory()
        self._most = max(self._most, held)
        return Room(total, held, max(total - held, 0))

    def peak(self) -> int:
        """The most that was held whenever somebody looked: this device keeps no peak."""
        return max(self._most, int(torch.mps.current_allocated_memory()))

    def forget_peak(self) -> None:
        self._most = 0

    def finish(self) -> None:
        torch.mps.synchronize()

    @contextmanager
    def running(self, plan: Apart | None = None) -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.options.deterministic)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

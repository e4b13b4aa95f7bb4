"""What takes an output's boxes where the caller wants them, and what is made of their values before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wholegrad.graph.geometry import Box
from wholegrad.kernels.expression import Program


@dataclass(frozen=True)
class Sink:
    """Where an output goes.

    Attributes:
        take: gets each box of the output with what was made of its values, in tile order, in the caller's thread.
        make: makes of an output's values what ``take`` wants; runs in the thread that computed them.
        store: the same as a program of one leaf, for a kernel that can store what it makes of its results.
    """

    take: Callable[[Box, torch.Tensor], None]
    make: Callable[[torch.Tensor], torch.Tensor] | None = None
    store: Program | None = None

    @property
    def masks(self) -> bool:
        """Whether a kernel may store bytes instead of the output's values."""
        return self.store is not None and self.store.mask

    def made(self, value: torch.Tensor) -> torch.Tensor:
        """What ``take`` gets for this value."""
        return value if self.make is None else self.make(value)

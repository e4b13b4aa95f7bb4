"""Counts of pixels by true and predicted label, which add up over bands."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from wholegrad.metrics.counts import IGNORE, Counts


class Tally:
    """How often each true label met each predicted one: int64 ``table[true, predicted]``, added up over bands."""

    def __init__(self) -> None:
        self.table = np.zeros((256, 256), np.int64)

    def add(self, predicted: npt.NDArray[Any], true: npt.NDArray[Any]) -> None:
        """Count two bands ``(h, W)`` of uint8."""
        _count(np.ascontiguousarray(predicted), np.ascontiguousarray(true), self.table)

    def labels(self) -> list[int]:
        """Labels but 0 that either map has where pixels count."""
        counted = self.table[:IGNORE]
        return [k for k in range(1, IGNORE) if counted[k].any() or counted[:, k].any()]

    def of(self, label: int) -> Counts:
        """That class against all others."""
        counted = self.table[:IGNORE]
        tp, true, predicted = int(counted[label, label]), int(counted[label].sum()), int(counted[:, label].sum())
        return Counts(tp, predicted - tp, true - tp, int(counted.sum()) - predicted - true + tp)


@numba.njit(cache=True)
def _count(predicted, true, table):  # type: ignore[no-untyped-def]
    for y in range(true.shape[0]):
        x = 0
        while x < true.shape[1]:  # a run at a time: maps are mostly runs
            t, p, start = true[y, x], predicted[y, x], x
            while x < true.shape[1] and true[y, x] == t and predicted[y, x] == p:
                x += 1
            table[t, p] += x - start

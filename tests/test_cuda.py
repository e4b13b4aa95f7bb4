"""What the code for CUDA does around PyTorch's own calls, with stand-ins for those: no GPU is asked for."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wholegrad.run import cuda
from wholegrad.run.cuda import CudaDevice
from wholegrad.run.device import Options


class Mode:
    """PyTorch's setting for ops that make the host wait, which warns when it is first used."""

    def __init__(self) -> None:
        self.now, self.said = 0, False

    def get(self) -> int:
        return self.now

    def set(self, mode: int | str) -> None:
        self.now = {"default": 0, "error": 2}[mode] if isinstance(mode, str) else mode
        if not self.said:
            self.said = True
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    def wait(self) -> None:
        if self.now == 2:
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Mode:
    made = Mode()
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", made.get)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", made.set)
    return made


def test_work_that_waits_is_told_from_work_that_does_not(mode: Mode) -> None:
    assert not cuda._waits_for_nothing(mode.wait) and mode.now == 0
    assert cuda._waits_for_nothing(lambda: None) and mode.now == 0


def test_the_setting_is_put_back_whatever_happens(mode: Mode) -> None:
    def fail() -> None:
        raise RuntimeError("expected scalar type Double")

    with pytest.raises(RuntimeError, match="scalar type"):
        cuda._waits_for_nothing(fail)
    assert mode.now == 0
    mode.now = 1
    assert cuda._waits_for_nothing(lambda: None) and mode.now == 1, "the caller's own"


class Graph:
    """One whose recording ended, or did not."""

    def __init__(self, ended: bool) -> None:
        self.ended, self.resets = ended, 0

    def pool(self) -> tuple[int, int]:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return 0, 1

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("refuses", [True, False])
def test_a_pool_is_released_once(monkeypatch: pytest.MonkeyPatch, ended: bool, refuses: bool) -> None:
    """By the graph if its recording ended, else in its place; then nothing is recorded any more."""
    said: list[Any] = []

    def end(index: int, pool: Any) -> None:
        said.append(("end", index, pool))
        if refuses:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    broken: list[Any] = []
    monkeypatch.setattr(cuda, "_broken", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: said.append("done"))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *given: said.append(("release", *given)), raising=False)
    device = CudaDevice.__new__(CudaDevice)
    device.torch, device.options, device._pools = torch.device("cuda", 1), Options(), {0: "ours", 3: "pool"}
    graph = Graph(ended)
    device._break_off(graph, 3)
    if ended:
        assert said == ["done"] and graph.resets == 1 and not broken and 3 in device._pools
        return
    assert said == ["done", ("end", 1, "pool"), ("release", 1, "pool")]
    assert broken == [graph] and graph.resets == 0 and device._pools == {0: "ours"}
    assert device.recorded(lambda: pytest.fail("it ran"), 0) is None


def test_memory_beyond_tensors_counts_in_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: 5)
    device = CudaDevice.__new__(CudaDevice)
    device.torch, device._recorded_bytes, device._pools = torch.device("cuda", 0), 7, {0: SimpleNamespace()}
    assert device.peak() == 12
    device.forget_recordings()
    assert device.peak() == 5 and not device._pools

"""Rates of the machine: measured on demand, kept for it, and part of what a run decides at its start."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import wholegrad as wg
from wholegrad.commands.common import blank
from wholegrad.graph.geometry import Box
from wholegrad.kernels.choice import THIN
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan.rates import BUILT_IN, Rates
from wholegrad.run import calibrate, spill_file
from wholegrad.run.store import HostStore
from wholegrad.train.plans import Conditions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHOLEGRAD_CACHE", str(tmp_path))
    return tmp_path


def test_rates_survive_json() -> None:
    assert Rates.of(json.loads(BUILT_IN.to_json())) == BUILT_IN
    values = json.loads(BUILT_IN.to_json())
    with pytest.raises(ValueError, match="other rates"):
        Rates.of({key: value for key, value in values.items() if key != "call"})
    with pytest.raises(ValueError, match="cannot be"):
        Rates.of({**values, "call": -1.0})


def test_more_channels_take_no_more_time_for_each_multiply_add_and_every_count_has_a_rate() -> None:
    assert BUILT_IN.convolution(1, False) == BUILT_IN.wide[0]
    assert BUILT_IN.convolution(16, False) == BUILT_IN.wide[2] and BUILT_IN.convolution(17, False) == BUILT_IN.wide[3]
    assert BUILT_IN.convolution(4096, False) == BUILT_IN.wide[-1]
    assert BUILT_IN.convolution(3, True) == BUILT_IN.thin[1] and BUILT_IN.convolution(16, True) == BUILT_IN.thin[2]


def test_what_was_measured_is_kept_for_this_machine_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate.rates() == BUILT_IN
    monkeypatch.setattr(calibrate, "TRIES", 1)
    found = calibrate.calibrate()
    assert found != BUILT_IN and calibrate.rates() == found
    assert all(0 < value < 1e-7 for row in (*found.wide, *found.thin) for value in row)
    assert 0 < found.passed < found.made < 1e-7
    assert [path.name for path in folder.iterdir() if path.is_file()] == [calibrate.rates_file().name]
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert calibrate.rates() == BUILT_IN


def test_a_broken_file_counts_as_none(folder: Path) -> None:
    for text in ("", "{}", '{"key": 1, "rates": 2}', json.dumps({"key": calibrate.key(), "rates": {}})):
        calibrate.rates_file().write_text(text)
        assert calibrate.rates() == BUILT_IN


def test_plans_follow_the_rates_that_they_are_given() -> None:
    case = (unet4492(seed=0), LOSSES["bce"], blank(3, 2000, 3000), blank(1, 2000, 3000))
    slow = Rates(thin=tuple((1e-8, 1e-8, 1e-8) for _ in BUILT_IN.thin))
    tiles, slower = (wg.plan(*case, budget="8GiB", rates=rates, strategy="stream") for rates in (BUILT_IN, slow))
    assert slower.seconds > 10 * tiles.seconds
    assert wg.plan(*case, budget="8GiB", rates=slow).strategy == "in-core"  # PyTorch's kernels are as fast as before
    wide = tuple((100 * a, 100 * b, 100 * c) for a, b, c in BUILT_IN.wide)
    assert wg.plan(*case, budget="8GiB", rates=replace(slow, wide=wide)).strategy == "stream"


def test_a_run_keeps_the_rates_of_its_start(tmp_path: Path) -> None:
    kept = Conditions(1 << 30, 1 << 28, 2, Rates(call=5e-5))
    path = tmp_path / "run.json"
    path.write_text(kept.to_json())
    assert Conditions.read(path) == kept
    old = {key: value for key, value in json.loads(kept.to_json()).items() if key != "rates"}
    path.write_text(json.dumps(old))
    assert Conditions.read(path).rates == BUILT_IN


def test_what_an_own_convolution_writes_is_part_of_its_multiply_adds() -> None:
    image = blank(3, 2000, 2000)
    step = torch.nn.Conv2d(3, 1, 3, padding=1), lambda output, target: (output * target).mean(), image, image[:1]
    quick, slow = (
        wg.plan(*step, budget="4GiB", strategy="stream", rates=replace(BUILT_IN, passed=rate, made=rate)).seconds
        for rate in (1e-10, 1.0)
    )
    assert quick == slow > 0


class Normed(torch.nn.Module):
    """Convolutions with norms between them, whose inputs are worth keeping wherever that costs little."""

    def __init__(self) -> None:
        super().__init__()
        self.first, *self.rest = (torch.nn.Conv2d(a, 24, 3, padding=1) for a in (3, 24, 24, 24))
        self.more = torch.nn.ModuleList(self.rest)
        self.norms = torch.nn.ModuleList(torch.nn.InstanceNorm2d(24) for _ in range(4))
        self.last = torch.nn.Conv2d(24, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip((self.first, *self.more), self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        found: torch.Tensor = self.last(x)
        return found


def test_a_slow_disk_is_used_less() -> None:
    case = (Normed(), LOSSES["bce"], blank(3, 4000, 8000), blank(1, 4000, 8000))
    rates = [replace(BUILT_IN, disk=disk) for disk in (0.0, BUILT_IN.disk, 1e-6)]
    free, usual, slow = (wg.plan(*case, budget="4GiB", strategy="stream", rates=each) for each in rates)
    assert free.on_disk > usual.on_disk > slow.on_disk == 0
    assert free.seconds < usual.seconds < slow.seconds and free.recompute < usual.recompute < slow.recompute


def test_the_disk_is_timed_by_the_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Slow(spill_file.SpillFile):
        def read(self, data: memoryview, offset: int) -> None:
            super().read(data, offset)
            time.sleep(0.01)

    monkeypatch.setattr(calibrate, "ON_DISK", 16 << 20)
    usual = calibrate.disk(tmp_path)
    assert 0 < usual < 1e-6
    monkeypatch.setattr(spill_file, "SpillFile", Slow)
    assert calibrate.disk(tmp_path) > 0.04 / (32 << 20)
    assert calibrate.disk(tmp_path / "none") == BUILT_IN.disk


def test_what_is_timed_of_boundaries_is_a_copy_between_like_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposition would take several times as long."""
    strides: list[tuple[bool, bool]] = []

    def noted(store: HostStore, box: Box, tile: torch.Tensor) -> None:
        pixels = store._box(box)
        strides.append((pixels.stride(3) == 1, store._pixels(tile).stride(3) == 1))
        write(store, box, tile)

    write = HostStore.write
    monkeypatch.setattr(HostStore, "write", noted)
    work, units = calibrate._storing()
    work()
    height, width = calibrate.WIDE_MAP
    assert strides and set(strides) == {(True, True)} and units == 4 * (THIN + 8) * height * width

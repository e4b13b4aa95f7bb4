"""The profile: it changes nothing, counts every convolution's work, never counts time twice, and is off by default."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wholegrad as wg
from wholegrad import clock
from wholegrad.errors import WholegradError
from wholegrad.kernels import choice
from wholegrad.losses import bce_dice_loss, bce_loss
from wholegrad.nets import unet4492
from wholegrad.plan.cost import pixel_macs
from wholegrad.run import roofline
from wholegrad.run.profile import LONGEST, Profile, recording
from wholegrad.run.roofline import Roofline, measure

aten = torch.ops.aten
SIZE = (150, 210)
RATES = Roofline(5e10, 1e10)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SECONDS", 0.01)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Wide(nn.Module):
    """Channels that the thin kernels leave to PyTorch, and an op between them that is neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 40, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(40, 40, 3, padding=1)
        self.back = nn.ConvTranspose2d(40, 1, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.back(self.second(self.pool(self.first(x))))
        return found


def case() -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (3, *SIZE), np.uint8), rng.integers(0, 2, (1, *SIZE), np.uint8)


def planned(model: nn.Module, loss: Any = bce_loss, boundaries: list[str] | None = None) -> wg.Plan:
    return wg.plan(model, loss, *case(), tile=(64, 96), boundaries=boundaries or [])


def profiled(model: nn.Module, plan: wg.Plan, loss: Any = bce_loss) -> Profile:
    profile = Profile(RATES)
    with profile.step():
        wg.backward(model, loss, *case(), plan=plan)
    return profile


def test_a_profiled_step_gives_the_same_bits() -> None:
    model = unet4492(seed=0)
    plan = planned(model, bce_dice_loss, ["middle"])
    found = []
    for profile in (Profile(RATES), None):
        model.zero_grad()
        if profile is None:
            loss = wg.backward(model, bce_dice_loss, *case(), plan=plan)
        else:
            with profile.step():
                loss = wg.backward(model, bce_dice_loss, *case(), plan=plan)
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 17
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def work(plan: wg.Plan, runs: str) -> dict[str, float]:
    """Multiply-adds of each convolution by module path over the tiles of segments that run so."""
    graph, found = plan.graph, defaultdict(float)
    macs = pixel_macs(graph)
    for i, part in enumerate(plan.segments):
        if runs in ("gradient", "fused" if part.fused else "apart"):
            for tile in plan.grid(i):
                for index in set(part.segment.nodes) & set(tile.boxes):
                    if graph.nodes[index].op is aten.convolution.default:
                        box = tile.boxes[index]
                        found[graph.nodes[index].path] += macs[index] * box.height * box.width
    return dict(found)


def counted(profile: Profile, stage: str) -> dict[str, float]:
    return {entry.where: entry.macs for entry in profile.entries() if entry.stage == stage and entry.macs}


NETWORKS = {
    # What of an input has a gradient: none of the image, two of five channels where ink is concatenated.
    "thin": (lambda: unet4492(seed=0), "middle", {"down1": 0.0, "fuse1": 0.4}, {"slide", "correlate"}),
    "double": (lambda: unet4492(seed=0).double(), "middle", {"down1": 0.0, "fuse1": 0.4}, {"slide", "correlate"}),
    "wide": (Wide, "pool", {"first": 0.0}, {"PyTorch convolution"}),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kept", [False, True])
def test_every_convolution_shows_up_with_its_multiply_adds(name: str, kept: bool) -> None:
    make, boundary, shares, kernels = NETWORKS[name]
    model = make()
    plan = planned(model, bce_loss, [boundary] if kept else None)
    profile = profiled(model, plan)
    paths = {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)}
    apart, fused, gradients = (work(plan, runs) for runs in ("apart", "fused", "gradient"))
    forward = {path: apart.get(path, 0) + fused.get(path, 0) for path in paths}
    assert forward.keys() == gradients.keys() == paths
    assert bool(apart) == kept, "a boundary's segment runs twice"
    assert counted(profile, "forward") == pytest.approx(forward)
    assert counted(profile, "recompute") == pytest.approx(apart)
    assert counted(profile, "weight gradient") == pytest.approx(gradients)
    of_inputs = {path: macs * shares.get(path, 1.0) for path, macs in gradients.items()}
    assert counted(profile, "input gradient") == pytest.approx({path: macs for path, macs in of_inputs.items() if macs})
    bias = {entry.where for entry in profile.entries() if entry.stage == "bias gradient"}
    assert bias == paths if name == "wide" else bias <= paths, "thin kernels sum it beside the weight's gradient"
    if name == "wide" or choice.host() is not None:
        assert {entry.op for entry in profile.entries() if entry.macs} == kernels


def test_everything_else_is_there_too() -> None:
    profile = profiled(Wide(), planned(Wide(), bce_loss, ["pool"]))
    found = {(entry.stage, entry.op) for entry in profile.entries()}
    assert {
        ("reading", "image"), ("reading", "target"), ("reading", "boundary"), ("writing", "boundary"),
        ("reading", "boundary's gradient"), ("writing", "boundary's gradient"), ("forward", "max_pool2d_with_indices"),
        ("recompute", "max_pool2d_with_indices"), ("backward", "PyTorch's own"), ("sums", "sum"), ("merging", "sums"),
        ("merging", "gradients"), ("small values", "forward"), ("small values", "backward"), ("between ops", "fused"),
        ("between ops", "forward"), ("between ops", "backward"), ("waiting", ""),
    } <= found  # fmt: skip


def test_images_and_targets_are_counted_in_bytes() -> None:
    model = unet4492(seed=0)
    plan = planned(model)
    profile = profiled(model, plan)
    read = sum(
        3 * box.height * box.width
        for i, part in enumerate(plan.segments)
        for tile in plan.grid(i)
        for ref in part.segment.maps
        if plan.graph.nodes[ref.node].kind == "image" and (box := tile.boxes[ref.node])
    )
    found = next(entry for entry in profile.entries() if entry.op == "image")
    assert found.bytes == (2 * read if choice.host() is not None else found.bytes)


def test_no_time_is_counted_twice(threads: int) -> None:
    model = unet4492(seed=0)
    profile = profiled(model, planned(model, bce_dice_loss), bce_dice_loss)
    summary = profile.summary()
    callers = int(threads > 1)  # the calling thread merges while others run tiles
    assert summary.workers == threads
    assert all(entry.seconds >= 0 for entry in profile.entries())
    assert summary.threads <= (threads + callers) * summary.seconds
    whole = sum(entry.seconds for entry in profile.entries())
    assert whole == pytest.approx(max(threads * summary.seconds, summary.threads))
    assert summary.reading + summary.arithmetic + summary.other == pytest.approx(1)


def test_a_span_leaves_out_those_within_it() -> None:
    profile = Profile(RATES)
    with profile.step(), clock.span("outer", "a"):
        sleep(0.01)
        with clock.span("inner", "b"):
            sleep(0.03)
    found = {entry.stage: entry.seconds for entry in profile.entries()}
    assert 0.01 <= found["outer"] <= profile.seconds - found["inner"]
    assert found["inner"] >= 0.03


def test_it_is_off_by_default_and_after_an_error() -> None:
    assert clock.recorder is None
    assert clock.span("a", "b") is clock.OFF
    assert clock.label("slide") is None
    assert clock.gradient_span(None, "a", "b") is clock.OFF
    with pytest.raises(ValueError, match="no"), Profile(RATES).step():
        raise ValueError("no")
    assert clock.recorder is None


def test_one_recording_at_a_time() -> None:
    with (
        recording(1),
        pytest.raises(WholegradError, match="profile: another one is being recorded; end that recording first"),
        Profile(RATES).step(),
    ):
        pass
    assert clock.recorder is None


def test_the_table_names_the_longest_rows_and_sums_the_rest() -> None:
    with recording(1) as profile:
        for i in range(LONGEST + 5):
            with clock.span("stage", f"op{i}", "where", size=1e9):
                pass
    lines = profile.table().splitlines()
    assert lines[0].split()[:4] == ["stage", "op", "where", "calls"]
    assert len(lines) == 1 + LONGEST + 1 + len(profile.lines())
    assert sum(" more " in line for line in lines) == 1
    assert sum(entry["bytes"] for entry in profile.as_dict()["rows"]) == pytest.approx(1e9 * (LONGEST + 5))


@pytest.mark.parametrize("kernels", [True, False])
def test_a_roofline_is_measured_with_and_without_kernels(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(roofline, "host", lambda: None)
    before = torch.get_num_threads()
    found = measure(2)
    assert torch.get_num_threads() == before
    assert 1e8 < found.macs < 1e13
    assert 1e8 < found.bytes < 1e13
    assert found.seconds(found.macs, 0.0, 0.0) == pytest.approx(1)
    assert found.seconds(found.macs, found.macs, found.bytes) == pytest.approx(2), "float64 takes twice as long"

"""Several tiles in flight on a device's streams, and tiles recorded once and replayed: exact, in order, the same bits.

The device is a pretended one whose streams raise for what a GPU might do in the wrong order (:mod:`pretend_streams`).
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pretend
import wholegrad as wg
from oracle import SEED, reference
from pretend_streams import RaceError, streamed
from support_cases import named_cases
from wholegrad.errors import PlanError
from wholegrad.losses import LOSSES
from wholegrad.plan import devices
from wholegrad.proof import random_labels
from wholegrad.run import lanes, recordings
from wholegrad.run.cuda import settings
from wholegrad.run.device import Options
from wholegrad.run.recordings import drop_recordings
from wholegrad.verify import EXACT, Case, errors

pretend.install()
FIXED: dict[str, Any] = {"tile": (16, 16), "boundaries": ["down"]}


class Small(nn.Module):
    """Windows with strides there and back, a skip connection, and a boundary between: few ops, many tiles alike."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 4, 2, 1), nn.ConvTranspose2d(4, 2, 4, 2, 1)
        self.head = nn.Conv2d(5, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.cat([x, self.up(self.down(x).relu())], 1))
        return found


def bytes_case(height: int = 64, width: int = 64) -> tuple[nn.Module, np.ndarray, torch.Tensor]:
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    return Small(), pixels, random_labels((height, width), 0)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    torch.set_num_threads(1)  # which are not the device's, as a GPU's are
    yield
    torch.set_num_threads(2)
    drop_recordings()


def step(data: Any, there: Any, loss: str = "bce", steps: int = 1, **fixed: Any) -> list[torch.Tensor]:
    """The loss and every gradient after so many steps of one plan."""
    model, image, target = data
    plan = wg.plan(model, LOSSES[loss], image, target, device=there, **{**FIXED, **fixed})
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        found = wg.backward(model, LOSSES[loss], image, target, plan=plan)
    return [found, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("graphs", [False, True])
def test_no_two_streams_meet_in_no_order(placement: str, graphs: bool) -> None:
    data = bytes_case()
    found = []
    for at_once in (2, 3):
        with streamed(at_once=at_once, graphs=graphs) as there:
            found.append(step(data, there, "dice", placement=placement, steps=2))
    plain = step(data, pretend.device(at_once=1), "dice", placement=placement)
    for other in found:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("missing", ["wait", "used_on"])
def test_a_wait_left_out_is_found(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """The watch itself: without one of the two things that a crossing needs it must complain."""
    monkeypatch.setattr(f"pretend_streams.Streams.{missing}", lambda self, *given: None)
    with pytest.raises(RaceError), streamed(at_once=2) as there:
        step(bytes_case(), there)


def test_a_lane_is_never_far_behind() -> None:
    """However slow the device, at most so many tiles of a lane are asked for: memory that waits for them is bounded."""
    seen = []

    class Counting(lanes.StreamGate):
        def done(self) -> Any:
            mark = super().done()
            seen.append(len(self._own.lane.behind))
            return mark

    with streamed(at_once=2) as there:
        there.gate = lambda: Counting(there.streams, there.lanes)  # type: ignore[method-assign]
        step(bytes_case(), there)
    assert max(seen) == lanes.DEPTH and len(seen) >= 24


@pytest.mark.parametrize("loss", ["bce", "dice"])
def test_replayed_tiles_are_exact(loss: str) -> None:
    model, pixels, target = bytes_case()
    data = model.double(), torch.from_numpy(pixels).double() / 255, target
    wanted = reference(data[0], LOSSES[loss], *data[1:]).tensors
    with streamed(at_once=2, graphs=True) as there:
        tried = Case(data[0], LOSSES[loss], *data[1:], torch.float64, SEED, there)
        found = tried.run(tried.plan(**FIXED), FIXED["tile"])
    assert max(errors(found, wanted).values()) <= EXACT
    assert there.recordings and sum(each.replays for each in there.recordings) >= 4
    assert not there.refused


OPS = {  # and whether several tiles share a recording; "average, ceil" makes a tensor on the host
    "Convolution: 5 x 2, padding (2, 1)": True,
    "Convolution: padding reflect": True,
    "Transposed convolution: transposed 3 x 3": True,
    "Pooling: max 3 with ties": True,
    "Pooling: max, with indices": False,
    "Pooling: average, ceil, not counted": False,
    "Pooling: global average": True,
    "Padding, cropping and joining: pad with a constant, and crop": True,
    "Padding, cropping and joining: concatenate channels": True,
    "Padding, cropping and joining: concatenate rows": False,
    "Interpolation: bilinear 0.4": False,
    "Norms: batch norm, training": True,
    "Over the map: sum": True,
}


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_tiles_of_one_kind_are_computed_alike(monkeypatch: pytest.MonkeyPatch, name: str, at_once: int) -> None:
    """A kind is recorded with its first tile and replayed for all: one that says too little gives wrong values."""
    monkeypatch.setattr(recordings, "FEWEST", 1)
    each = named_cases()[name]
    data = each.build(), each.image(), each.target()
    with streamed(at_once=at_once, graphs=True) as there:
        tried = Case(data[0], each.loss, *data[1:], torch.float64, SEED, there)
        found = tried.run(tried.plan(tile=(4, 4)), (4, 4))
    assert max(errors(found, reference(data[0], each.loss, *data[1:]).tensors).values()) <= EXACT
    assert any(record.replays > 1 for record in there.recordings) == OPS[name] or at_once > 1


def test_recordings_last_from_step_to_step_and_see_new_weights() -> None:
    data = bytes_case()
    model, image, target = data
    found = []
    for graphs in (False, True):
        torch.manual_seed(0)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with streamed(at_once=2, graphs=graphs) as there:
            plan = wg.plan(model, LOSSES["bce"], image, target, device=there, **FIXED)
            optimizer, counts = torch.optim.SGD(model.parameters(), 0.1), []
            for _ in range(3):
                optimizer.zero_grad()
                found.append(wg.backward(model, LOSSES["bce"], image, target, plan=plan))
                optimizer.step()
                counts.append(len(there.recordings))
        assert counts[1] == counts[2] and bool(counts[0]) == graphs
        model.load_state_dict(state)
    assert [float(each) for each in found[:3]] == [float(each) for each in found[3:]]
    assert len({float(each) for each in found}) == 3


def test_what_cannot_be_recorded_runs_as_it_would_without() -> None:
    data = bytes_case()
    with streamed(at_once=2, graphs=True) as there:
        there.fail = True
        found = step(data, there)
    assert there.refused and not there.recordings
    plain = step(data, pretend.device())
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_parameters_that_no_gradient_reaches_get_none() -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = torch.nn.Conv2d(3, 2, 3, padding=1), torch.nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.used(x)
            return y + 0 * self.spare(y).detach()

    model, image, target = Half(), *bytes_case(96, 96)[1:]
    for graphs in (False, True):
        with streamed(at_once=2, graphs=graphs) as there:
            plan = wg.plan(model, lambda out, y: (out - y).square().mean(), image, target, tile=(24, 24), device=there)
            wg.backward(model, lambda out, y: (out - y).square().mean(), image, target, plan=plan)
        assert model.spare.weight.grad is None and model.used.weight.grad is not None
        model.zero_grad()


def test_a_plan_without_recordings_does_not_run_with_them() -> None:
    model, image, target = bytes_case()
    plan = wg.plan(model, LOSSES["bce"], image, target, device=pretend.device())
    with pytest.raises(PlanError, match="without graphs, which take memory; plan again"):
        wg.backward(model, LOSSES["bce"], image, target, plan=plan, device=pretend.device(graphs=True))


def test_no_more_tiles_are_recorded_side_by_side_than_the_plan_counted() -> None:
    """Every one that is in flight keeps memory for recordings, so that eight would pass a peak projected for one."""
    model, image, target = bytes_case()
    plan = wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(at_once=1, graphs=True))
    with pytest.raises(PlanError, match="recordings of 2 tiles in flight, of which 1 are counted; plan again"):
        wg.backward(model, LOSSES["bce"], image, target, plan=plan, device=pretend.device(at_once=2, graphs=True))
    without = wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(at_once=1))
    wg.backward(model, LOSSES["bce"], image, target, plan=without, device=pretend.device(at_once=2))


@pytest.mark.parametrize("where", ["pretend", "streams", "cpu"])
@pytest.mark.parametrize("sweep", ["forward", "backward", "fused"])
def test_no_tile_runs_on_when_a_step_has_failed(where: str, sweep: str) -> None:
    """Whoever keeps the error keeps the frames that took tiles: their threads must end all the same."""
    torch.set_num_threads(3)
    data = bytes_case(96, 96)
    model, image, target = data
    kept: list[BaseException] = []

    def stop(progress: Any) -> None:
        if progress.phase == sweep and progress.done > 3:
            raise KeyError("enough")

    with streamed(at_once=3) as streams:
        there = {"pretend": pretend.device(at_once=3), "streams": streams, "cpu": "cpu"}[where]
        loss = LOSSES["bce" if sweep == "fused" else "dice"]
        plan = wg.plan(model, loss, image, target, device=there, tile=(16, 16), boundaries=["down"])
        for _ in range(3):
            try:
                wg.backward(model, loss, image, target, plan=plan, progress=stop)
            except KeyError as error:
                kept.append(error)
            assert not [each for each in threading.enumerate() if each.name.startswith("wholegrad-tile")]
    assert len(kept) == 3


def allocated(there: Any) -> int:
    return int(there.peak())


@pytest.mark.parametrize("budget", ["300MiB", "600MiB"])
def test_recordings_and_tensors_stay_within_the_projected_peak(budget: str) -> None:
    """Rule 7 with recordings: what they keep counts beside what tensors hold, in every later step too."""
    data = bytes_case(600, 800)
    model, image, target = data
    with streamed(at_once=1, graphs=True) as there:
        plan = wg.plan(model, LOSSES["bce"], image, target, device=there, budget=budget, boundaries=["down"])
        plan_tiles = wg.plan(model, LOSSES["bce"], image, target, device=there, budget=budget, boundaries=["down"],
                             tile=(96, 96))  # fmt: skip
        for each in (plan, plan_tiles):
            there.forget_peak()
            for _ in range(2):
                wg.backward(model, LOSSES["bce"], image, target, plan=each)
            assert allocated(there) <= each.projected - devices.WORKSPACE <= (each.budget or 0) - devices.WORKSPACE
    assert there.recordings and there.kept_bytes > 0
    assert plan_tiles.memory.recordings > 0 and plan_tiles.memory.total == plan_tiles.projected


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_settings_of_precision_are_put_back_whichever_face_was_used(newer: bool, tf32: bool) -> None:
    """PyTorch's older settings cannot be read once the newer ones differ."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision
    try:
        if newer:
            conv.fp32_precision = "ieee"
        now = conv.fp32_precision, matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
        with settings(Options(tf32=tf32)):
            assert conv.fp32_precision == matmul.fp32_precision == ("tf32" if tf32 else "ieee")
            assert torch.backends.cudnn.allow_tf32 == matmul.allow_tf32 == tf32
        assert now == (conv.fp32_precision, matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision)
    finally:
        conv.fp32_precision = before

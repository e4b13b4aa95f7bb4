"""Which convolutions are thin to Triton's kernels: what a calibration finds, a plan carries, and the executor runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton looks at when it is imported

import pretend
import wholegrad as wg
from oracle import reference
from test_rates_device import step
from wholegrad.errors import PlanError
from wholegrad.graph import inline as inlining
from wholegrad.graph.inline import Inlined, inline
from wholegrad.kernels import choice
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan import cost
from wholegrad.plan.devices import ASSUMED, Apart, DeviceRates
from wholegrad.plan.plan import Plan
from wholegrad.plan.rates import FEW
from wholegrad.run import calibrate, calibrate_device
from wholegrad.run.calibrate_device import Convolution
from wholegrad.run.device import Device, Options, Room
from wholegrad.run.executor import Executor
from wholegrad.verify import EXACT

pretend.install()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and works small enough for an interpreter."""
    monkeypatch.setenv("WHOLEGRAD_CACHE", str(tmp_path))
    small = {"TRIES": 1, "CALLS": 1, "TINY_CALLS": 1, "ROWS": 1, "ELEMENTS": 1 << 6, "PRODUCT": 16, "PARAMETERS": 64}
    for name, value in {**small, "SENT": 1 << 10, "TRIED": (1, 2), "FEW": (1, 2, 2)}.items():
        monkeypatch.setattr(calibrate_device, name, value)
    monkeypatch.setattr(calibrate, "ON_DISK", 8 << 20)
    return tmp_path


class Interpreted(Device):
    """A device with memory of its own that is the host's, where Triton's interpreter runs Triton's kernels."""

    @property
    def apart(self) -> bool:
        return True

    @property
    def model(self) -> str:
        return "interpreted"

    def room(self) -> Room:
        return Room(64 << 30, 0, 64 << 30)

    @contextmanager
    def running(self, plan: Apart | None = None) -> Iterator[None]:
        up_to = None if plan is None else plan.triton
        with choice.using_triton(up_to is not None, anywhere=True, up_to=up_to or 0):
            yield


def interpreted(**options: Any) -> Interpreted:
    return Interpreted(torch.device("cpu"), Options(at_once=1, **options))


@pytest.mark.parametrize(
    ("ours", "theirs", "most"),
    [
        ((1, 1, 1, 1, 1), (2, 2, 2, 2, 2), 16),
        ((1, 1, 1, 1, 1), (1, 2, 2, 2, 2), 0),  # as fast is not faster
        ((1, 1, 3, 1, 1), (2, 2, 2, 2, 2), 2),  # and a gap ends it
        ((1, 1, 1, 1, 3), (2, 2, 2, 2, 2), 8),
        ((3, 3, 3, 3, 3), (2, 2, 2, 2, 2), 0),
    ],
)
def test_few_channels_are_those_up_to_which_our_kernels_take_less(
    ours: tuple[float, ...], theirs: tuple[float, ...], most: int
) -> None:
    tried = zip(calibrate_device.TRIED, ours, theirs, strict=True)
    assert calibrate_device.up_to(list(tried)) == most


def test_all_three_parts_of_a_convolution_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins say what each part takes: our forward is quicker at 16 channels, all three together are not."""

    def works(kind: str) -> Callable[..., Convolution]:
        def made(device: Device, channels: int, *rest: int) -> Convolution:
            slow = 5.0 if kind == "ours" and channels == 16 else 0.5
            taken = (0.5, 0.5, slow) if kind == "ours" else (1.0, 1.0, 1.0)
            return Convolution(*(lambda seconds=seconds: seconds for seconds in taken), 1.0)  # type: ignore[misc, arg-type]

        return made

    monkeypatch.setattr(calibrate_device, "_own", works("ours"))
    monkeypatch.setattr(calibrate_device, "_convolution", works("theirs"))
    monkeypatch.setattr(calibrate_device, "triton_runs", lambda x: True)
    monkeypatch.setattr(calibrate_device, "passes", lambda x: None)

    def best(work: Callable[[], Any], units: float) -> float:
        return 0.25 if units > 1 else float(work())

    found = calibrate_device._with_triton(interpreted(triton=True), best, ASSUMED)
    assert found.up_to == 8 and found.passed == 0.25
    assert found.thin == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (0.5, 0.5, 5.0))


def test_triton_is_measured_where_it_runs(folder: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    device = interpreted(triton=True)
    found = calibrate_device.calibrate(device)
    assert calibrate_device.rates(device) == found and found.passed != found.made
    assert len(found.thin) == len(FEW) and all(value > 0 for row in found.thin for value in row)
    assert found.thin != ASSUMED.thin and found.up_to in (0, 1, 2)
    assert calibrate_device.rates(interpreted()) == ASSUMED
    with pytest.raises(PlanError, match="runs no Triton"):
        calibrate_device.measured(pretend.device(triton=True))


def test_what_is_thin_to_triton_goes_by_the_number_and_never_beyond_thin() -> None:
    def served(channels: int, up_to: int, wide: int = 0) -> bool:
        weight = torch.zeros(max(channels, wide), channels, 3, 3)
        with choice.using_triton(True, anywhere=True, up_to=up_to):
            return choice.triton_serves(torch.zeros(1, channels, 4, 4), weight, 1)

    with choice.using_triton(True, anywhere=True, up_to=3):
        assert served(4, 4)
        assert not choice.triton_serves(torch.zeros(1, 4, 4, 4), torch.zeros(4, 4, 3, 3), 1)  # what was before is back
    assert served(4, 4) and not served(5, 4) and served(4, 4, wide=32) and not served(4, 4, wide=33)
    assert not served(1, 0) and served(choice.THIN, 99) and not served(choice.THIN + 1, 99)


class Several(nn.Module):
    """Convolutions whose thinner side has 2, 2, 3 and 1 channels, an activation between each two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.c, self.d = nn.Conv2d(4, 3, (1, 3), padding=(0, 1)), nn.Conv2d(3, 1, 1)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.d(self.act(self.c(self.act(self.b(self.act(self.a(x)))))))
        return found


def thin(each: Sequence[Inlined], plan: Plan) -> str:
    """The convolutions of few channels, by their names."""
    return "".join(sorted({plan.graph.nodes[index].path for how in each for index in how.convolutions}))


@contextmanager
def noted() -> Iterator[tuple[list[Inlined], list[tuple[Inlined, int]]]]:
    """How segments are priced; how they run, and up to how many channels count as few then."""
    planned: list[Inlined] = []
    ran: list[tuple[Inlined, int]] = []
    bill, how = cost.Bill.__init__, Executor._how

    def priced(self: cost.Bill, prices: Any, segment: Any, how: Inlined, *rest: Any) -> None:
        planned.append(how)
        bill(self, prices, segment, how, *rest)

    def run(self: Executor, *given: Any) -> Inlined:
        ran.append((how(self, *given), choice._Triton.up_to))
        return ran[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost.Bill, "__init__", priced)
        patch.setattr(Executor, "_how", run)
        yield planned, ran


@pytest.mark.parametrize(("up_to", "few"), [(16, "abcd"), (3, "abcd"), (2, "abd"), (1, "d"), (0, "")])
def test_what_is_planned_goes_by_the_number(up_to: int, few: str, folder: Path) -> None:
    with noted() as (planned, _):
        options: dict[str, Any] = {"budget": "1GiB", "strategy": "stream", "rates": replace(ASSUMED, up_to=up_to)}
        plan = wg.plan(*step(Several(), (64, 96)), device=pretend.device(triton=True), **options)
    assert plan.apart is not None and plan.apart.triton == up_to
    assert thin(planned, plan) == few
    assert any(how.sums for how in planned)  # chains and sums are Triton's whatever the number


@pytest.mark.parametrize(("up_to", "few"), [(2, "abd"), (0, "")])
def test_the_executor_runs_what_the_plan_inlined(up_to: int, few: str, folder: Path) -> None:
    """Planned, then run through Triton's interpreter: exact, by the same kernels, whatever was kept since."""
    pytest.importorskip("triton", reason="Triton is not installed")
    device, key = interpreted(triton=True), calibrate_device.key(interpreted(triton=True))
    calibrate.keep(key, replace(ASSUMED, up_to=up_to))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 12), dtype=np.uint8)
    target = np.random.default_rng(1).integers(0, 2, (1, 4, 12), dtype=np.uint8)
    torch.manual_seed(0)
    case = Several().double(), LOSSES["bce"], pixels, target
    with noted() as (planned, ran):
        plan = wg.plan(*case, device=device, tile=(4, 6), strategy="stream", budget="1GiB")
        calibrate.keep(key, replace(ASSUMED, up_to=16 - up_to))
        wg.backward(*case, plan=plan)
    assert ran and {number for _, number in ran} == {up_to}
    assert thin(planned, plan) == thin([how for how, _ in ran], plan) == few
    assert all(how in planned for how, _ in ran)
    wanted = reference(*case).tensors
    for name, parameter in case[0].named_parameters():
        assert parameter.grad is not None
        true = next(value for key, value in wanted.items() if key.endswith(name))
        assert float((parameter.grad - true).abs().max()) <= EXACT * float(true.abs().max())


def test_a_plan_is_run_by_the_rule_that_it_was_made_with() -> None:
    case = step(unet4492(seed=0), (64, 96))
    options: dict[str, Any] = {"budget": "2GiB", "strategy": "stream", "rates": replace(ASSUMED, up_to=3)}
    plain, there = (wg.plan(*case, device=pretend.device(triton=on), **options) for on in (False, True))
    assert plain.apart is not None and there.apart is not None
    assert (plain.apart.triton, there.apart.triton) == (None, 3)
    with pytest.raises(PlanError, match=r"was made for pretend:0 with triton; plan again, or open it with triton"):
        wg.backward(*case, plan=there, device=pretend.device())
    with pytest.raises(PlanError, match=r"was made for pretend:0 without triton"):
        wg.backward(*case, plan=plain, device=pretend.device(triton=True))


def test_a_plan_with_triton_predicts_tritons_rates_and_holds_what_one_without_does(folder: Path) -> None:
    case = step(unet4492(seed=0), (2000, 3000))
    options: dict[str, Any] = {"budget": "2GiB", "strategy": "stream", "tile": (512, 1024)}
    slow = tuple((1e-6, 1e-6, 1e-6) for _ in FEW)

    def plan(on: bool, rates: DeviceRates) -> Plan:
        return wg.plan(*case, device=pretend.device(triton=on), rates=rates, **options)

    quick, dear = plan(True, ASSUMED), plan(True, replace(ASSUMED, thin=slow))
    assert dear.seconds > 100 * quick.seconds
    assert plan(False, replace(ASSUMED, thin=slow)).seconds == plan(False, ASSUMED).seconds
    none = plan(True, replace(ASSUMED, thin=slow, up_to=0))
    assert none.seconds < dear.seconds / 100
    assert {each.projected for each in (quick, dear, none)} == {plan(False, ASSUMED).projected}


def test_a_processor_without_kernels_of_ours_takes_none_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = wg.plan(*step(Several(), (64, 96)), budget="1GiB", strategy="stream")
    monkeypatch.setattr(inlining, "host", lambda: None)
    monkeypatch.setattr(choice, "host", lambda: None)
    segment = plan.segments[-1].segment
    none, there = inline(plan.graph, segment), inline(plan.graph, segment, triton=16)
    assert not none.convolutions and not none.sums
    assert thin([there], plan) == "abcd" and there.sums

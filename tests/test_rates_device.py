"""Rates of a device with memory of its own: measured on the pretended one, kept apart, and what plans make of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pretend
import wholegrad as wg
from pretend import LEDGER
from pretend_streams import streamed
from test_rates import Normed
from wholegrad import ranked
from wholegrad.cli import main
from wholegrad.commands.common import blank
from wholegrad.doctor import folders
from wholegrad.doctor.finding import State
from wholegrad.errors import PlanError
from wholegrad.kernels import choice
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan import strategies
from wholegrad.plan.devices import ASSUMED, Apart
from wholegrad.plan.plan import Placement, Plan
from wholegrad.plan.planner import Request
from wholegrad.plan.rates import BUILT_IN, CHANNELS, Rates
from wholegrad.plan.strategies import whole_seconds
from wholegrad.run import calibrate, calibrate_device
from wholegrad.run.device import Device
from wholegrad.train.plans import Conditions
from wholegrad.train.tables import TrainConfig
from wholegrad.train.team import Place

pretend.install()
MEASURED = ("wide", "product", "made", "passed", "summed", "stored", "pixels", "call", "parameter", "across", "disk")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and works small enough for a processor."""
    monkeypatch.setenv("WHOLEGRAD_CACHE", str(tmp_path))
    small = {"TRIES": 1, "CALLS": 1, "TINY_CALLS": 3, "ELEMENTS": 1 << 10, "ROWS": 4, "PRODUCT": 16}
    for name, value in {**small, "PARAMETERS": 64, "SENT": 1 << 10}.items():
        monkeypatch.setattr(calibrate_device, name, value)
    monkeypatch.setattr(calibrate, "ON_DISK", 8 << 20)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("rates-*.json"))


# What is kept.


def test_everything_is_measured_there_kept_and_read_back(folder: Path) -> None:
    device = pretend.device()
    assert calibrate_device.rates(device) == ASSUMED
    found = calibrate_device.calibrate(device)
    assert calibrate_device.rates(pretend.device(at_once=4)) == found
    assert all(0 < value < 1 for row in found.wide for value in row) and len(found.wide) == len(CHANNELS)
    for name in MEASURED:
        assert getattr(found, name) != getattr(ASSUMED, name), name
    assert (found.thin, found.up_to, found.backward) == (ASSUMED.thin, choice.THIN, ASSUMED.backward)
    assert found.passed == found.made  # of PyTorch's ops, where Triton's do not run
    assert [path.name for path in calibrate_device.rates_file(device).parent.glob("rates-*")] == files(folder)


def test_it_measures_with_streams_that_wait_for_each_other_and_without_doubles(folder: Path) -> None:
    with streamed() as device:
        assert calibrate_device.measured(device).across > 0
    with pretend.without_doubles():
        assert calibrate_device.measured(pretend.device()).parameter > 0


def test_what_crosses_is_measured_the_way_that_boundaries_go(folder: Path) -> None:
    """By ops that reach the host's memory where there are such, else through staging."""
    for reached in (True, False):
        LEDGER.forget()
        assert calibrate_device._across(pretend.device(reaches_host=reached)) > 0
        assert (LEDGER.ups, LEDGER.downs) == ((1, 0) if reached else (5, 4)), "but for the tile's own"


def test_they_are_of_one_device_pytorch_and_set_of_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(ASSUMED, call=7e-6)
    device = pretend.device()
    calibrate.keep(calibrate_device.key(device), found)
    assert calibrate_device.rates(device) == found and calibrate.rates() == BUILT_IN
    for options in ({"tf32": True}, {"deterministic": True}, {"triton": True}):
        assert calibrate_device.rates(pretend.device(**options)) == ASSUMED, options
    with monkeypatch.context() as patch:
        patch.setattr(pretend.PretendDevice, "model", "another")
        assert calibrate_device.rates(device) == ASSUMED
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert calibrate_device.rates(device) == ASSUMED


def test_a_broken_file_counts_as_none(folder: Path) -> None:
    device, path = pretend.device(), calibrate_device.rates_file(pretend.device())
    path.parent.mkdir(parents=True, exist_ok=True)
    key, good = calibrate_device.key(device), json.loads(ASSUMED.to_json())
    wrong: list[dict[str, Any]] = [{}, {**good, "up_to": 17}, {**good, "up_to": 2.5}, {**good, "across": -1.0}]
    wrong += [json.loads(BUILT_IN.to_json()), {**good, "call": "fast"}]
    for text in ("", "{}", "[]", '{"key": 1}', *(json.dumps({"key": key, "rates": each}) for each in wrong)):
        path.write_text(text)
        assert calibrate_device.rates(device) == ASSUMED, text
    path.write_text(json.dumps({"key": key, "rates": {**good, "up_to": 4}}))
    assert calibrate_device.rates(device) == replace(ASSUMED, up_to=4)
    path.write_text(json.dumps({"key": "another", "rates": {**good, "up_to": 4}}))
    assert calibrate_device.rates(device) == ASSUMED


def test_the_processor_is_measured_otherwise(folder: Path) -> None:
    with pytest.raises(PlanError, match="is the processor"):
        calibrate_device.measured(Device())


def test_the_command_measures_the_device_that_it_is_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--calibrate", "--device", "pretend", "--shape", "3x500x600", "--json"]) == 0
    said = capsys.readouterr()
    name = calibrate_device.rates_file(pretend.device()).name
    assert files(folder) == [name] and name in said.err.replace("\n", "")
    assert calibrate_device.rates(pretend.device()) != ASSUMED


def test_a_cache_that_takes_nothing_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").write_text("")
    monkeypatch.setattr(calibrate_device, "measured", lambda device: ASSUMED)
    monkeypatch.setattr(calibrate, "cache_folder", lambda: folder / "file" / "kernels")
    assert main(["plan", "--calibrate", "--device", "pretend", "--shape", "3x500x600"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_doctor_says_of_each_accelerator_whether_it_was_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "accelerators", lambda: ["pretend:0"])

    def told() -> folders.Finding:
        return next(each for each in folders.look_at_kernels(True) if each.name == "rates of pretend:0")

    assert told().state is State.ABSENT and told().text == "assumed"
    assert told().mend == "wholegrad plan --calibrate --device pretend:0 measures it, for predicted times"
    calibrate.keep(calibrate_device.key(pretend.device()), ASSUMED)
    assert told().state is State.OK and told().text == "measured without triton"


def test_work_that_was_asked_for_is_done_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at the clock between asking and waiting, and with a run before that does not count."""
    told: list[str] = []

    class Noted(pretend.PretendDevice):
        def finish(self) -> None:
            told.append("finish")

    monkeypatch.setattr(calibrate_device.time, "perf_counter", lambda: told.append("clock") or float(len(told)))
    monkeypatch.setattr(calibrate_device, "TRIES", 1)
    monkeypatch.setattr(calibrate_device, "CALLS", 3)
    found = calibrate_device._best(Noted(torch.device("pretend", 0)), lambda: told.append("work"), 2.0)
    each = ["finish", "clock", *["work"] * 3, "finish", "clock"]
    assert told == ["work"] * 3 + each
    assert found == 5 / (3 * 2.0)


# What plans make of them.


def step(model: nn.Module, size: tuple[int, int]) -> tuple[Any, ...]:
    return model, LOSSES["bce"], blank(3, *size), blank(1, *size)


def places(plan: Plan) -> set[Placement]:
    return set(plan.placements.values())


def test_what_crossing_costs_decides_where_boundaries_live(folder: Path) -> None:
    """One device, three rates of crossing, little room: dear ones keep maps there, or compute them again."""
    device, found = pretend.device(), {}
    for across in (0.0, ASSUMED.across, 1e-3):
        calibrate.keep(calibrate_device.key(device), replace(ASSUMED, across=across))
        options: dict[str, Any] = {"device": device, "budget": "3GiB", "strategy": "stream"}
        found[across] = wg.plan(*step(Normed(), (4000, 8000)), **options)
    free, usual, dear = found.values()
    assert Placement.HOST in places(free)
    assert not places(dear) & {Placement.HOST, Placement.DISK}
    assert free.seconds < usual.seconds < dear.seconds
    assert free.recompute <= usual.recompute <= dear.recompute and free.recompute < dear.recompute


def test_plans_for_a_device_go_by_its_own_rates_alone(folder: Path) -> None:
    case, device = step(unet4492(seed=0), (2000, 3000)), pretend.device()
    options: dict[str, Any] = {"device": device, "budget": "2GiB", "strategy": "stream"}
    assumed = wg.plan(*case, **options).seconds
    calibrate.keep(calibrate.key(), replace(BUILT_IN, call=1.0))
    assert wg.plan(*case, **options).seconds == assumed
    assert wg.plan(*case, **options, rates=replace(BUILT_IN, call=1.0)).seconds == assumed
    slow = replace(ASSUMED, call=1.0)
    calibrate.keep(calibrate_device.key(device), slow)
    assert wg.plan(*case, **options).seconds > 10 + assumed
    assert wg.plan(*case, **options, rates=ASSUMED).seconds == assumed
    assert wg.plan(*case, **options, rates=BUILT_IN).seconds == assumed  # as in a run that began without
    other = {**options, "device": pretend.device(at_once=4)}
    assert wg.plan(*case, **other).seconds > 10 + assumed


def test_tiles_in_flight_share_the_device() -> None:
    """The same tiles, two or four at once: seconds are the device's, not a thread's."""
    case = step(unet4492(seed=0), (2000, 3000))
    options: dict[str, Any] = {"tile": (512, 512), "budget": "4GiB", "strategy": "stream", "rates": ASSUMED}
    two, four = (wg.plan(*case, device=pretend.device(at_once=count), **options).seconds for count in (2, 4))
    assert two == four


def test_an_image_of_bytes_travels_as_bytes_and_becomes_floats_there() -> None:
    case = [*step(unet4492(seed=0), (2000, 3000))]
    options: dict[str, Any] = {"device": pretend.device(), "tile": (2000, 3000), "budget": "8GiB", "strategy": "stream"}

    def seconds(**rates: float) -> float:
        zero = dict.fromkeys(("made", "passed", "summed", "stored", "pixels", "call", "parameter", "product"), 0.0)
        nothing = tuple((0.0, 0.0, 0.0) for _ in CHANNELS)
        return wg.plan(
            *case, **options, rates=replace(ASSUMED, **{**zero, "wide": nothing, "step": 0.0, **rates})
        ).seconds

    area = 2000 * 3000
    whole = seconds(pixels=1.0)
    assert whole == pytest.approx(area * (3 + 1 + 2))  # labels are counted before, which is priced in both sweeps
    bytes_of = case[2]
    case[2] = np.broadcast_to(np.float32(0), bytes_of.shape)
    assert seconds(pixels=1.0) == pytest.approx(area * (3 * 4 + 1 + 2))
    floats = seconds(made=1.0)
    case[2] = bytes_of
    assert seconds(made=1.0) == pytest.approx(floats + area * 2 * 3 * 4)


def test_whole_maps_on_a_device_take_what_its_own_rates_say() -> None:
    graph = wg.plan(*step(nn.Conv2d(3, 1, 3, padding=1), (100, 200)), budget="1GiB", strategy="stream").graph
    apart = Apart("pretend:0", 2)
    area, macs = 100 * 200, 100 * 200 * 27

    def seconds(threads: int = 2, **rates: Any) -> tuple[float, float]:
        zero = dict.fromkeys(("made", "summed", "pixels", "call", "product"), 0.0)
        nothing = tuple((0.0, 0.0, 0.0) for _ in CHANNELS)
        return whole_seconds(graph, threads, replace(ASSUMED, **{**zero, "wide": nothing, **rates}), apart)

    table = ((1.0, 2.0, 4.0), *((9.0, 9.0, 9.0) for _ in CHANNELS[1:]))
    assert seconds(wide=table) == pytest.approx((macs, 4.0 * macs))  # nobody wants the image's gradient
    assert seconds(wide=table, threads=8) == seconds(wide=table)
    assert seconds(pixels=1.0) == pytest.approx((area * (4 * 3 + 1), 0.0))
    made = sum(strategies.made_bytes(node) for node in graph.nodes if node.kind not in strategies.SOURCES)
    assert seconds(made=1.0)[0] == pytest.approx(made)
    assert seconds() == (0.0, 0.0)  # nothing of the processor's constants


def test_offload_to_the_hosts_memory_costs_what_crosses(folder: Path) -> None:
    device, found = pretend.device(), []
    for across in (0.0, 1.0):
        calibrate.keep(calibrate_device.key(device), replace(ASSUMED, across=across))
        options: dict[str, Any] = {"device": device, "strategy": "offload", "budget": "8GiB"}
        found.append(wg.plan(*step(unet4492(seed=0), (1000, 1000)), **options))
    assert found[1].seconds - found[0].seconds == pytest.approx(2.0 * found[0].footprint.moved)


def test_a_step_on_whole_maps_there_goes_by_the_same(folder: Path) -> None:
    case, device = step(unet4492(seed=0), (500, 600)), pretend.device()
    options: dict[str, Any] = {"device": device, "strategy": "in-core", "budget": "8GiB"}
    assumed = wg.plan(*case, **options).seconds
    calibrate.keep(calibrate_device.key(device), replace(ASSUMED, call=1.0))
    assert wg.plan(*case, **options).seconds > 10 + assumed


def test_a_run_starts_with_the_rates_of_where_its_tiles_run(folder: Path) -> None:
    kept = replace(ASSUMED, call=7e-6)
    calibrate.keep(calibrate_device.key(pretend.device()), kept)
    train = TrainConfig(device="pretend", budget="1GiB", steps=1)
    first = Conditions.now(train, Place())
    assert first.rates == kept
    calibrate.keep(calibrate_device.key(pretend.device()), ASSUMED)
    assert Conditions.now(train, Place(size=2, local_size=2), first).rates == kept
    assert Conditions.now(TrainConfig(budget="1GiB", steps=1), Place()).rates == calibrate.rates()


def test_a_run_keeps_the_devices_rates_of_its_start(tmp_path: Path) -> None:
    for rates in (replace(ASSUMED, across=1e-9, up_to=4), Rates(call=5e-5)):
        kept = Conditions(1 << 30, 1 << 28, 2, rates)
        path = tmp_path / "run.json"
        path.write_text(kept.to_json())
        assert Conditions.read(path) == kept and type(Conditions.read(path).rates) is type(rates)


class Alone:
    """A wire on which rank 0 said what it said, and this process is rank 1."""

    def __init__(self, first: Request) -> None:
        self.first = first

    def meet(self, told: torch.Tensor) -> list[torch.Tensor]:
        mine = json.loads(bytes(told.tolist()))
        other = json.dumps(mine | {"rates": asdict(self.first.rates)}).encode()
        return [torch.frombuffer(bytearray(other), dtype=torch.uint8), told]


def asked(device: Any, rates: Rates | None = None) -> Request:
    """What a plan of a small network is asked with there."""
    image, target = torch.rand(3, 32, 32), torch.rand(1, 32, 32)
    made: list[Request] = []

    def caught(graph: Any, request: Request) -> Any:
        made.append(request)
        raise KeyError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("wholegrad.api.make_plan", caught)
        wg.plan(nn.Conv2d(3, 1, 1), LOSSES["bce"], image, target, device=device, rates=rates)
    return made[0]


def test_ranks_on_devices_plan_by_the_first_ones_rates() -> None:
    theirs = replace(ASSUMED, across=3e-10, up_to=2)
    for triton in (False, True):
        first, mine = (asked(pretend.device(triton=triton), rates) for rates in (theirs, ASSUMED))
        found = ranked._agreed(Alone(first), mine)  # type: ignore[arg-type]
        assert found.rates == theirs and found.apart is not None
        assert (found.apart.across, found.apart.triton) == (3e-10, 2 if triton else None)
    with pytest.raises(PlanError, match="ranks: have tiles on processors and on other devices"):
        ranked._agreed(Alone(asked("cpu")), mine)  # type: ignore[arg-type]

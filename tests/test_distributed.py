"""Several ranks share an image: exact, in a part of the memory, never a hang. ``rank_cases.py`` is what they run."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from torch import nn

import wholegrad as wg
from oracle import captured
from wholegrad.errors import BudgetError, PlanError, RankError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Kind
from wholegrad.graph.layout import Role
from wholegrad.graph.segment import reduction_rule
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan.bands import Bands, bands
from wholegrad.plan.check import check_plan
from wholegrad.plan.traffic import Link, traffic
from wholegrad.ranked import layout_of
from wholegrad.run.distributed import sums
from wholegrad.run.distributed.packed import packed, unpacked
from wholegrad.run.distributed.wire import Wire
from wholegrad.verify import EXACT

SCRIPT = Path(__file__).parent / "rank_cases.py"
EVERY = ["down1", "down2", "middle", "up2", "fuse2", "up1", "head"]
WAIT = 280  # seconds for all cases of one test; other work may take most of the machine meanwhile


def together(folder: Path, size: int, *cases: str, **more: str) -> list[dict[str, Any]]:
    """What each of so many ranks reports; of a rank that was killed nothing."""
    paths = [str(Path(wg.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **more}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(size), *cases],
        capture_output=True, text=True, timeout=WAIT, env=env,
    )  # fmt: skip
    found = [folder / f"{rank}.json" for rank in range(size)]
    reports = [json.loads(each.read_text()) if each.exists() else {} for each in found]
    assert set(cases) <= set(reports[0]), run.stderr[-3000:]
    return reports


def test_steps_of_two_three_and_four_ranks_are_exact_and_the_same_bits_on_every_rank(tmp_path: Path) -> None:
    reports = together(tmp_path, 4, "exact", "mutants", "repeated", "single", "volume", "unlike")
    steps = reports[0]["exact"]
    assert len(steps) >= 19
    wrong = {name: (each["error"], each["tensor"]) for name, each in steps.items() if not each["error"] <= EXACT}
    assert not wrong, f"relative errors above {EXACT}: {wrong}"
    for report in reports[1:]:
        for name, each in report["exact"].items():
            assert not each or each["bits"] == steps[name]["bits"], name
    for report in reports[1:3]:
        assert report["unlike"]["bits"] == reports[0]["unlike"]["bits"], "ranks that round otherwise part"
    for name, error in reports[0]["mutants"].items():
        assert error > 1e-6, f"without {name} nothing is wrong"
    assert reports[0]["single"]["ratio"] <= 2, "float32 loses more over ranks than whole-image autograd does"
    assert reports[0]["single"]["rounded"] <= 1e-5, "boundaries in bfloat16 are others over ranks"
    for report in reports:
        assert report["repeated"]["same"], "the same plan twice gave other bits"
        for name, each in report["volume"].items():
            assert each["sent"] == pytest.approx(each["expected"], rel=0.05), name
    quarter = next(each for name, each in steps.items() if "on 4" in name and "(2, 2)" in name and "published" in name)
    assert quarter["held"] < 0.4 * quarter["whole"], "a rank of four holds more than its part and the halo"


def test_ranks_that_do_not_mean_the_same_step_are_told_who_differs_and_in_what(tmp_path: Path) -> None:
    reports = together(tmp_path, 4, "disagreeing", "erring", "two_axes", "apart", "interrupted")
    mine, other = (report["interrupted"] for report in reports[:2])
    assert mine["tile"].startswith("RankError: step: was interrupted (on rank 1)") and other["tile"] == "interrupted"
    assert mine["afterwards"] == other["afterwards"], "the group is not as it was"
    assert other["message"] == "interrupted" and "broke before: a step was interrupted" in other["again"]
    assert mine["message"].startswith("RankError: rank 1: ") and "broke before" in mine["again"]
    for report in reports[:3]:
        told = report["disagreeing"]
        words = {"plan": "plan", "loss": "plan", "seed": "seed", "image": "pixels", "labels": "pixels"}
        for name, word in (words | {"weights": "weights"}).items():
            assert told[name].startswith(f"RankError: rank 2: has other {word} than rank 0"), told[name]
        assert told["another number of ranks"].startswith("PlanError: plan: is for 2 ranks")
        assert told["afterwards"] == reports[0]["disagreeing"]["afterwards"], "the group is not as it was"
        erring = report["erring"]
        assert erring["numerics"].startswith("NumericsError: ") and "not finite" in erring["numerics"]
        assert erring["slide"].startswith("SlideError: slide.svs: is truncated")
        assert erring["untouched"] == "True" and float(erring["afterwards"]) > 0
    assert reports[0]["erring"]["slide"].count("(on rank 1)") == 1
    for report in reports:
        for way, error in (report["two_axes"] | report["apart"]).items():
            assert error <= EXACT, way
    assert len(reports[0]["apart"]) == 12, "on a device with memory of its own"


def test_a_rank_that_is_frozen_or_killed_ends_the_step_with_its_name_and_no_gradient(tmp_path: Path) -> None:
    reports = together(tmp_path, 4, "frozen", "killed", "host_frozen")
    for report in reports[:2]:
        frozen, killed = report["frozen"], report["killed"]
        assert frozen["told"].startswith("RankError: rank 2: has not answered for 3 s"), frozen["told"]
        assert killed["told"].startswith("RankError: rank 3: closed its connection"), killed["told"]
        assert "\n" not in killed["told"] and frozen["untouched"] and killed["untouched"]
        assert "broke before" in frozen["again"] and "broke before" in killed["again"]
    assert reports[1]["host_frozen"]["told"].startswith("RankError: rank 0: has not answered for 2 s")
    for woken in (reports[2]["frozen"], reports[0]["host_frozen"]):
        assert woken["told"].startswith("RankError: ") and woken["untouched"], (
            "who wakes late goes on as if nothing was"
        )


def test_predictions_and_measures_of_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    reports = together(tmp_path, 4, "predicting", RANK_FOLDER=str(tmp_path))
    mine = reports[0]["predicting"]
    wrong = {name: error for name, error in mine.items() if " on " in name and not error <= EXACT}
    assert not wrong and sum(" on " in name for name in mine) == 6
    assert mine["left"] == ["one.npy", "one.ome.tif", "shared.npy", "shared.ome.tif"]
    assert mine["measured"] <= 1e-6
    one, shared = (np.load(tmp_path / f"{name}.npy") for name in ("one", "shared"))
    assert np.abs(one - shared).max() <= 1e-6 and shared.std() > 0
    images = [tifffile.imread(tmp_path / f"{name}.ome.tif", level=0) for name in ("one", "shared")]
    assert np.abs(images[0].astype(int) - images[1].astype(int)).max() <= 1
    for report in reports[:3]:
        told = report["predicting"]
        assert told["slide"].startswith("SlideError: slide.svs: is truncated")
        assert "no/a.npy: cannot be written" in told["folder"]
        assert told["layout"].startswith("PlanError: layout: is (3, 1), and predictions are of bands of columns")
        assert told["disk"].startswith("SlideError: b.tif: cannot be written (no space left")
        assert told["afterwards"] == mine["afterwards"], "the group is not as it was"


@contextmanager
def two_hosts() -> Iterator[list[list[str]]]:
    """Two hosts with addresses of their own on a switch: how to run a program on each, and there."""
    ip, tag = shutil.which("ip"), f"wg{os.getpid() % 100000}"
    if sys.platform != "linux" or ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux, the program ip, and root")
    spaces = [f"{tag}{each}" for each in ("a", "b", "s")]

    def run(*words: str) -> None:
        subprocess.run([ip, *words], check=True, capture_output=True, text=True)

    made: list[str] = []
    try:
        try:
            for space in spaces:
                run("netns", "add", space)
                made.append(space)
            run("-n", spaces[2], "link", "add", "bridge", "type", "bridge")
            run("-n", spaces[2], "link", "set", "bridge", "up")
            for k, space in enumerate(spaces[:2]):
                run("-n", space, "link", "set", "lo", "up")
                run("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{k}", "netns", spaces[2])
                run("-n", space, "address", "add", f"10.77.0.{k + 1}/24", "dev", "eth0")
                run("-n", space, "link", "set", "eth0", "up")
                run("-n", spaces[2], "link", "set", f"port{k}", "master", "bridge", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield [[ip, "netns", "exec", space] for space in spaces]
    finally:
        for space in made:
            subprocess.run([ip, "netns", "delete", space], check=False, capture_output=True)


def test_two_hosts_and_a_link_that_is_cut(tmp_path: Path) -> None:
    """Cut for two seconds a step ends with the bits of an unbroken one; for longer than the time-out, with an error."""
    cases = ("exact", "cut", "cut_off")
    with two_hosts() as hosts:
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "RANK_HOST": "10.77.0.1", "RANK_PORT": "29400",
               "RANK_SWITCH": f"{hosts[2][-1]} port1", "OMP_NUM_THREADS": "1", "RANK_FEW": "1"}  # fmt: skip
        words = [sys.executable, str(SCRIPT), str(tmp_path), "2", *cases]
        runs = [
            subprocess.Popen([*hosts[k], *words], env={**env, "RANK": str(k)}, stderr=subprocess.PIPE, text=True)
            for k in range(2)
        ]
        said = [run.communicate(timeout=WAIT)[1] for run in runs]
    reports = [json.loads((tmp_path / f"{k}.json").read_text()) for k in range(2)]
    for k, report in enumerate(reports):
        assert set(cases) <= set(report), said[k][-3000:]
        assert all(each["error"] <= EXACT for each in report["exact"].values() if each)
        assert report["cut"].get("same"), report["cut"]
        assert report["cut"]["seconds"] > 1.5, "the link was not cut"
        told = report["cut_off"].get("told", "")
        assert told.startswith(f"RankError: rank {1 - k}: has not answered for 3 s"), report["cut_off"]


def image(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.broadcast_to(np.uint8(0), (3, height, width)), np.broadcast_to(np.uint8(0), (1, height, width))


def test_a_plan_for_ranks_is_found_or_refused_at_every_budget_and_one_rank_plans_as_a_process_does() -> None:
    """Where messages alone are too much the same tiles are not chosen again and again."""
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 256, 3, padding=1),
              nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, 2, 1)]  # fmt: skip
    model, loss = nn.Sequential(*layers), nn.CrossEntropyLoss()
    pixels, labels = np.broadcast_to(np.uint8(0), (1, 3, 500, 900)), torch.zeros(1, 500, 900).long()
    alone = wg.plan(model, loss, pixels, labels, budget="16GiB", strategy="stream")
    for count in (1, (2, 2)):
        most = wg.plan(model, loss, pixels, labels, budget="16GiB", ranks=count)
        if count == 1:
            assert [part.tile for part in most.segments] == [part.tile for part in alone.segments]
            assert [part.working for part in most.segments] == [part.working for part in alone.segments]
        with pytest.raises(BudgetError) as refused:
            wg.plan(model, loss, pixels, labels, budget=most.reserved + 1, ranks=count)
        least = refused.value.smallest
        assert least is not None
        for share in (0.0, 0.3, 0.9, 0.999):
            budget = int(least + (64 << 20) + share * (most.projected - least))
            made = wg.plan(model, loss, pixels, labels, budget=budget, ranks=count)
            check_plan(made)
            assert made.memory.total == made.projected <= budget


def test_ranks_of_few_tiles_are_weighed_by_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wholegrad.asked.default_workers", lambda: 4)
    given = {"tile": (512, 256), "boundaries": EVERY, "budget": "16GiB", "placement": "host"}
    plans = [wg.plan(unet4492(), LOSSES["dice"], *image(512, 1024), ranks=count, **given) for count in (1, 2, 4)]
    for few, many in pairwise(plans):
        for one, other in zip(few.segments, many.segments, strict=True):
            ours, alone = (part.working.backward / part.working.slack for part in (other, one))  # tiles alone
            assert ours < 0.75 * alone, "tiles of other ranks are counted"


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (2, 3), (7, 2)])
@pytest.mark.parametrize("placement", ["host", "disk"])
def test_every_plan_for_ranks_keeps_the_rules_and_adds_up(shape: tuple[int, int], placement: str) -> None:
    given = {"tile": (70, 90), "boundaries": EVERY, "placement": placement, "budget": "4GiB"}
    made = wg.plan(unet4492(), LOSSES["dice"], *image(300, 401), ranks=shape, **given)
    check_plan(made)
    assert made.memory.total == made.projected
    assert made.bands is not None and made.bands.shape == shape
    for number in range(len(made.segments)):
        parts = [made.grid(number).part(made.bands.place(rank)) for rank in range(made.bands.ranks)]
        assert sum(len(part) for part in parts) == made.segments[number].tiles
    for ref, halo in made.halos.items():
        spec = made.graph.spec(ref)
        assert sum(box.area for box in halo.owned if box is not None) == spec.rows * spec.cols
        sent = [(rank, peer, box) for rank in range(made.bands.ranks) for peer, box in halo.sent(rank)]
        taken = [(peer, rank, box) for rank in range(made.bands.ranks) for peer, box in halo.received(rank)]
        assert sorted(sent) == sorted(taken), "what is sent is not what is expected"
        for rank in range(made.bands.ranks):
            held = halo.held(rank)
            for _, box in (*halo.sent(rank), *halo.received(rank)):
                assert held is not None and held.holds(box)


def test_more_ranks_need_less_memory_and_time_and_the_published_network_sends_no_map() -> None:
    model, loss = unet4492(), LOSSES["bce"]
    plans = [wg.plan(model, loss, *image(16000, 64000), budget="4GiB", ranks=count) for count in (1, 2, 8, 64)]
    for few, many in pairwise(plans):
        assert many.seconds < 0.6 * few.seconds
    assert traffic(plans[2], 0).halos == 0, "it runs in one pass, from the image's own pixels"
    kept = [wg.plan(model, loss, *image(4000, 16000), boundaries=EVERY, ranks=count) for count in (1, 2, 4)]
    for made, share in zip(kept, (1.0, 0.51, 0.26), strict=True):
        for ref, halo in made.halos.items():
            assert halo.most <= share * made.graph.spec(ref).rows * made.graph.spec(ref).cols
    text = str(kept[2])
    assert "shared by 4 ranks: 4 bands of columns" in text and "a step in" in text
    assert json.loads(kept[2].to_json())["ranks"]["shape"] == [1, 4]


def test_bands_own_what_shares_say_and_layouts_have_the_shortest_cuts() -> None:
    assert bands((100, 400), (1, 4)) == Bands((0, 100), (0, 100, 200, 300, 400))
    assert bands((100, 400), (4, 1), (1, 0, 2, 1)).rows == (0, 25, 25, 75, 100)
    assert bands((100, 400), (4, 1), (1, 0, 2, 1)).widest(Role.ROW, 50) == 25
    assert [layout_of((16000, 64000), count) for count in (1, 2, 4, 16, 7)] == [(1, 1), (1, 2), (1, 4), (2, 8), (1, 7)]
    assert layout_of((64000, 16000), 4) == (4, 1) and layout_of((16000, 16000), 4) == (2, 2)
    assert layout_of((16000, 16000), 4, one_axis=True) == (4, 1)
    for shares in ((1, 2), (1, -1, 1, 1), (0, 0, 0, 0), (1, float("nan"), 1, 1)):
        with pytest.raises(PlanError, match="shares"):
            bands((100, 400), (1, 4), shares)
    with pytest.raises(PlanError, match="2 x 2 blocks"):
        bands((100, 400), (2, 2), (1, 1, 1, 1))
    for ranks in (0, -1, (2, 0), (1, 2, 3), True):
        with pytest.raises(PlanError, match="ranks"):
            wg.plan(unet4492(), LOSSES["bce"], *image(64, 64), ranks=ranks)
    with pytest.raises(RankError, match="no process group"):
        wg.open_ranks(object())
    with pytest.raises(PlanError, match="combine"):
        wg.Ranks(combine="median")
    assert Link(byte=1e-9, message=0.0).byte == 1e-9


def test_tensors_survive_as_bytes() -> None:
    given = {
        "a": torch.randn(3, 5, dtype=torch.float64), "b": torch.tensor(7), "c": torch.randn(3) > 0,
        "d": torch.randn(2, 3).transpose(0, 1), "e": torch.empty(0, 4), "f": torch.randn(2, dtype=torch.complex64),
        "g": torch.randn(5).to(torch.bfloat16),
    }  # fmt: skip
    found = unpacked(packed(given))
    assert list(found) == list(given)
    for name, value in given.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert unpacked(packed({})) == {}


class Threads(Wire):
    """Ranks that are threads, and write to each other through queues."""

    def __init__(self, rank: int, queues: list[list[queue.Queue[torch.Tensor]]]) -> None:
        self.rank, self.size, self.queues = rank, len(queues), queues
        self.device, self.phase, self._broken, self._told = torch.device("cpu"), 0, None, False
        self._global = list(range(self.size))

    def swap(self, out: Sequence[tuple[int, torch.Tensor]], into: Sequence[tuple[int, torch.Tensor]]) -> None:
        for peer, tensor in out:
            self.queues[peer][self.rank].put(tensor.clone())
        for peer, tensor in into:
            tensor.copy_(self.queues[self.rank][peer].get(timeout=60))


@pytest.mark.parametrize("size", [1, 2, 17, 20])
def test_many_ranks_pass_messages_on(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 16 ranks short messages double in each round, and long ones go around a ring."""
    monkeypatch.setattr(sums, "BUCKET", 100)
    queues: list[list[queue.Queue[torch.Tensor]]] = [[queue.Queue() for _ in range(size)] for _ in range(size)]
    wires = [Threads(rank, queues) for rank in range(size)]
    long = 70000

    def talk(wire: Threads) -> tuple[Any, ...]:
        rank = wire.rank
        short = wire.meet(torch.full((rank % 3,), rank, dtype=torch.uint8))
        large = wire.meet(torch.full((long + rank,), rank, dtype=torch.uint8))
        flat = torch.arange(250, dtype=torch.float64) * (rank + 1) / 3
        sums.added_up(wire, flat)
        mine = {"all": torch.tensor([1.0 / (rank + 1)], dtype=torch.float64)}
        mine |= {"one": torch.ones(2)} if rank == 0 else {}
        failed = _refusal(lambda: _step(wire, rank == size - 1))
        return short, large, flat, sums.added(wire, mine), failed

    def _step(wire: Threads, fails: bool) -> None:
        with wire.step():
            if fails:
                raise SlideError("a.svs", "is truncated", "copy it again")
            wire.meet()

    def _refusal(work: Callable[[], None]) -> str:
        try:
            work()
        except wg.WholegradError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(talk, wires))
    for short, large, flat, small, failed in found:
        assert [each.tolist() for each in short] == [[rank] * (rank % 3) for rank in range(size)]
        assert all(len(each) == long + rank and (each == rank).all() for rank, each in enumerate(large))
        assert torch.equal(flat, found[0][2]) and torch.equal(small["all"], found[0][3]["all"])
        assert torch.allclose(flat, torch.arange(250, dtype=torch.float64) * size * (size + 1) / 6, rtol=1e-14)
        assert torch.equal(small["one"], torch.ones(2))
        assert failed.startswith("a.svs: is truncated")


OVER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x.sum((2, 3)),
    "mean": lambda x: x.mean(),
    "largest": lambda x: x.amax((2, 3)),
    "least": lambda x: x.min(),
    "any": lambda x: (x > 2).any(),
    "all": lambda x: (x > -9).all(),
    "variance and mean": lambda x: torch.cat(torch.var_mean(x, (0, 2, 3))),
    "deviation": lambda x: x.std((2, 3)),
    "averages of bins": lambda x: nn.functional.adaptive_avg_pool2d(x, 2),
    "maxima of bins": lambda x: nn.functional.adaptive_max_pool2d(x, 2),
    "gathered": lambda x: x.flatten(1) @ torch.ones(x[0].numel(), 2, dtype=x.dtype),
    "circular": lambda x: nn.functional.pad(x, (2, 3, 1, 2), "circular"),
}


class Over(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OVER[self.name](x)


@pytest.mark.parametrize("name", OVER)
def test_totals_of_two_processes_join_to_what_one_would_have(name: str) -> None:
    graph = captured(Over(name), (1, 3, 24, 30))
    value = torch.randn(1, 3, 24, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = [Box(0, 24, 0, 11), Box(0, 24, 11, 30)]
    tiles = [[Box(y, y + 12, *across) for y in (0, 12) for across in cuts]
             for cuts in ([(0, 7), (7, 11)], [(11, 20), (20, 30)])]  # fmt: skip
    found = 0
    for node in graph.of_kind(Kind.REDUCTION):
        spec, rule = graph.spec(node.operands[0]), reduction_rule(graph, node.index)
        if (spec.rows, spec.cols) != (24, 30):
            continue
        x = (value > 0) if spec.dtype == torch.bool else value

        def total(boxes: list[Box], node: Any = node, spec: Any = spec, rule: Any = rule, x: Any = x) -> Any:
            state = None
            for box in boxes:
                rows, cols = box.slices()
                state = rule.merge(node, spec, state, rule.partial(node, x[..., rows, cols]), box)
            return state

        joined = None
        for mine, box in zip(tiles, shares, strict=True):
            joined = rule.join(node, spec, joined, rule.share(node, spec, total(mine), box), box)
        ours, alone = (rule.finish(node, spec, state) for state in (joined, total([*tiles[0], *tiles[1]])))
        for one, other in zip(ours, alone, strict=True):
            assert torch.allclose(one.double(), other.double(), rtol=1e-14, atol=1e-15)
        found += 1
    assert found, "nothing is summed here"

"""``wholegrad explore`` and ``plan --budgets``: cells, limits, going on, conclusions that follow the figures."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import wholegrad as wg
from wholegrad.cli import main
from wholegrad.errors import ConfigError
from wholegrad.explore import run as running
from wholegrad.explore.cells import (
    DONE,
    FAILED,
    FULL,
    IMPOSSIBLE,
    KILLED,
    REFUSED,
    SLOW,
    UNTIMELY,
    Cell,
    Result,
    Settings,
    Store,
    all_areas,
    area,
    read_areas,
)
from wholegrad.explore.conclude import Machine, conclusions
from wholegrad.explore.pixels import Repeated, stained
from wholegrad.explore.plot import COLOURS
from wholegrad.explore.report import coloured, drawing, table
from wholegrad.explore.tradeoff import Row, planner, read_budgets, trade_off
from wholegrad.explore.tradeoff import drawing as budgets_drawing
from wholegrad.explore.watch import Ended, python, run_limited
from wholegrad.graph.geometry import Box
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan.strategies import WHOLE
from wholegrad.train.made_up import blobs

GIB = 1 << 30
SETTINGS = Settings("unet4492", "bce", "labels", 4 * GIB, 60.0)
HERE = Machine("a machine", 24 * GIB)


def cell(strategy: str, height: int, width: int) -> Cell:
    return Cell(strategy, "cpu", height, width)


def good(strategy: str, height: int, seconds: float, peak: float) -> Result:
    return Result(cell(strategy, height, 4 * height), DONE, seconds=seconds, peak=int(peak * GIB))


def test_areas_go_from_a_quarter_of_a_megapixel_to_the_full_one_each_twice_the_last() -> None:
    found = all_areas()
    assert found[0] == (250, 1000) and found[-1] == FULL
    ratios = [b[0] * b[1] / (a[0] * a[1]) for a, b in pairwise(found)]
    assert min(ratios) > 1.98 and max(ratios) < 2.02
    assert read_areas("1, 300x200,0.25") == [(300, 200), (250, 1000), (500, 2000)]
    for wrong in ("0", "big", "3x", "-1", "nan", "1e400"):
        with pytest.raises(ConfigError, match="is not an area"):
            read_areas(wrong)


def test_made_up_pixels_are_a_repeated_pattern_on_every_box() -> None:
    pattern = stained(blobs(1024, 1024))
    image = Repeated(pattern, 2100, 3000)
    whole = np.tile(pattern, (1, 3, 3))[:, :2100, :3000]
    for box in (Box(0, 2100, 0, 3000), Box(1000, 1030, 2040, 2060), Box(5, 6, 7, 8), Box(2048, 2100, 1023, 1025)):
        assert np.array_equal(image.read(box), whole[:, box.y0 : box.y1, box.x0 : box.x1])


@pytest.mark.slow
def test_each_strategy_is_measured_and_an_impossible_limit_is_a_result(tmp_path: Path) -> None:
    command = ["explore", "--sizes", "64x256", "--budget", "4GiB", "--out", str(tmp_path), "--seconds", "60"]
    assert main([*command, "--report", str(tmp_path / "docs" / "explore.md")]) == 0
    whole = json.loads((tmp_path / "explore.json").read_text())
    assert [each["outcome"] for each in whole["results"]] == [DONE] * 4
    for each in whole["results"]:
        assert each["seconds"] > 0 and len(each["steps"]) == 3
        assert 100 << 20 < each["peak"] <= each["projected"]
    rows = list(csv.DictReader((tmp_path / "explore.csv").read_text().splitlines()))
    assert [row["strategy"] for row in rows] == ["in-core", "recompute", "offload", "stream"]
    assert float(rows[3]["seconds"]) == whole["results"][3]["seconds"]
    page = (tmp_path / "docs" / "explore.md").read_text()
    assert whole["conclusions"] in page and "(explore.svg)" in page
    assert (tmp_path / "docs" / "explore.svg").read_text() == (tmp_path / "explore.svg").read_text()
    assert main(["explore", "--sizes", "64x256", "--budget", "150MiB", "--out", str(tmp_path / "b")]) == 1
    tight = json.loads((tmp_path / "b" / "explore.json").read_text())["results"]
    assert {each["outcome"] for each in tight} <= {KILLED, REFUSED}


def test_a_process_that_passes_its_limit_is_ended_and_says_what_it_held() -> None:
    code = "import json, time; print(json.dumps({'projected': 7}), flush=True)\nkept = []\n"
    code += "while True: kept.append(bytearray(b'x' * (4 << 20))); time.sleep(0.01)"
    ended = run_limited([sys.executable, "-c", code], 100 << 20, 60)
    assert ended.over == "memory"
    assert 100 << 20 < ended.highest < 1 << 30
    result = running._result(cell("in-core", 10, 40), SETTINGS, ended)
    assert (result.outcome, result.peak, result.projected) == (KILLED, ended.highest, 7)


def test_a_process_that_takes_too_long_fails_or_is_killed_is_a_result_too() -> None:
    slow = run_limited([sys.executable, "-c", "import time; time.sleep(60)"], GIB, 0.3)
    assert running._result(cell("stream", 1, 4), SETTINGS, slow).outcome == SLOW
    wrong = run_limited([sys.executable, "-c", "raise ValueError('no such layer')"], GIB, 60)
    failed = running._result(cell("stream", 1, 4), SETTINGS, wrong)
    assert (failed.outcome, failed.said) == (FAILED, "ValueError: no such layer")
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    killed = running._result(cell("stream", 1, 4), SETTINGS, run_limited([sys.executable, "-c", code], GIB, 60))
    assert killed.outcome == KILLED and "by the system" in killed.said


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell("stream", 10 * k, 40 * k) for k in (1, 2, 3)]
    ran: list[Cell] = []

    def measured(each: Cell, settings: Settings, seconds: float) -> Result:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(each)
        return Result(each, FAILED if each.height == 10 else DONE, seconds=1.0, steps=(2.0, 1.0), peak=GIB)

    monkeypatch.setattr(running, "measured", measured)
    store = Store(tmp_path, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        running.explore(cells, SETTINGS, store)
    assert ran == cells[:2]
    ran.clear()
    results = running.explore(cells, SETTINGS, store)
    assert ran == [cells[0], cells[2]]  # what failed is tried again, what is done is not
    assert [each.cell for each in results] == cells
    assert store.find(cells[2]) == results[2]
    assert Store(tmp_path, replace(SETTINGS, limit=GIB)).find(cells[2]) is None
    (tmp_path / "cells" / f"{cells[2].name}.json").write_text("{")
    assert store.find(cells[2]) is None


def test_what_there_is_no_time_for_is_left_to_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that is under way when the time is over is ended, those after it do not start, and neither is kept."""
    clock, cells = [0.0], [cell("stream", 10 * k, 40 * k) for k in (1, 2, 3)]
    allowed: list[float] = []

    def run(command: object, limit: int, seconds: float) -> Ended:
        allowed.append(seconds)
        late = len(allowed) == 2
        clock[0] += seconds if late else 30.0
        said = [] if late else [json.dumps({"outcome": DONE, "seconds": 1.0, "peak": GIB})]
        return Ended(-9 if late else 0, said, [], GIB, "time" if late else "", 0.0)

    monkeypatch.setattr(running, "run_limited", run)
    monkeypatch.setattr(running.time, "monotonic", lambda: clock[0])
    store = Store(tmp_path, SETTINGS)
    results = running.explore(cells, SETTINGS, store, seconds=100.0)
    assert allowed == [100.0, 70.0] and clock[0] == 100.0
    assert [(each.outcome, each.said) for each in results[1:]] == [(SLOW, UNTIMELY)] * 2
    assert [store.find(each) is not None for each in cells] == [True, False, False]
    again = running.explore(cells, SETTINGS, store)
    assert [each.outcome for each in again] == [DONE] * 3 and len(allowed) == 4
    assert allowed[2] == running.STARTING + running.PATIENCE * SETTINGS.seconds


def test_conclusions_say_what_there_was_no_time_for() -> None:
    late = Result(cell("stream", 400, 1600), SLOW, UNTIMELY)
    said = conclusions([good("stream", 200, 0.1, 1), late], 4 * GIB, HERE)
    assert "for 400 x 1600 no time was left." in said and "too slow" not in said


def test_quick_ends_within_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def explore(cells: Any, settings: Any, store: Any, told: Any, seconds: float) -> list[Result]:
        asked.append(seconds)
        return [Result(each, DONE, seconds=1.0, steps=(1.0,), peak=GIB) for each in cells]

    monkeypatch.setattr("wholegrad.commands.explore.explore", explore)
    for more in (["--quick"], []):
        assert main(["explore", "--out", str(tmp_path), "--sizes", "0.01", "--strategies", "stream", *more]) == 0
    assert 240 < asked[0] < 300 and asked[1] == float("inf")


def test_conclusions_follow_the_figures() -> None:
    stream = [good("stream", 1000, 0.06, 0.5), good("stream", 16000, 15.0, 0.8)]
    core = [good("in-core", 500, 0.13, 0.6), good("in-core", 1000, 0.6, 1.0)]
    beyond = Result(cell("in-core", 16000, 64000), IMPOSSIBLE, "too many", projected=96 * GIB)
    said = conclusions([*stream, *core, beyond], 20 * GIB, HERE)
    assert "Stream ran up to 16000 x 64000 (1.02 gigapixels), 15 s a step (14.6 ns a pixel) and 819.2 MiB" in said
    assert "In-core ran up to 1000 x 4000 (4 MP)" in said
    assert "16000 x 64000 would need 96.00 GiB, and 20.00 GiB were allowed" in said
    assert "At 1000 x 4000, in-core took 10 times as long as stream and 2 times its memory." in said
    assert "5.4 times faster" in said
    assert "0.86 % of that" in said
    assert "No strategy that holds maps whole reached that size." in said

    slower = conclusions([good("stream", 16000, 162.0, 0.8), good("in-core", 16000, 324.0, 90.0)], 99 * GIB, HERE)
    assert "2 times slower" in slower
    assert "No strategy that holds maps whole" not in slower
    small = conclusions([good("stream", 250, 0.1, 0.4), replace(core[0], outcome=FAILED)], GIB, HERE)
    assert "In-core ran at no size (failed at 500 x 2000)." in small
    assert "No strategy was run at the full 16000 x 64000 here." in small


def test_pictures_are_valid_and_say_what_was_measured() -> None:
    results = [
        good("stream", 1000, 0.06, 0.5), good("stream", 2000, 0.24, 0.6), good("in-core", 1000, 0.5, 1.0),
        Result(cell("in-core", 16000, 64000), REFUSED, "too small", projected=96 * GIB),
        Result(cell("offload", 1000, 4000), FAILED, "broken"),
    ]  # fmt: skip
    text = drawing(results, 20 * GIB, 24 * GIB)
    root = ElementTree.fromstring(text)
    words = {each.text for each in root.iter() if each.text}
    assert {"in-core", "stream", "paper: over 100 GB", "this machine's memory, 24 GiB"} <= words
    assert all("nan" not in value and "inf" not in value for each in root.iter() for value in each.attrib.values())
    assert "| 16000 x 64000 | 1024 | in-core | does not fit |  |  |  | 96.00 GiB |" in table(results)


def test_every_strategy_of_two_devices_has_a_colour_of_its_own() -> None:
    names = ("in-core", "recompute", "offload", "stream")
    there = [f"{name} on cuda" for name in (*names, "managed")]
    assert list(coloured(names).values()) == [0, 1, 2, 3]
    both = coloured([*names, *there])
    assert [both[name] for name in names] == [0, 1, 2, 3] and len(set(both.values())) == 9
    assert len(set(coloured(there).values())) == 5
    assert max(both.values()) < len(COLOURS)
    rows = table(
        [replace(good("stream", 1000, 1.0, 1.0), cell=Cell(name, "cuda", 9, 9)) for name in WHOLE]
    ).splitlines()
    assert [row.split("|")[3].strip() for row in rows[2:]] == [f"{name} on cuda" for name in WHOLE]


def test_budgets_are_compared_for_every_strategy() -> None:
    assert read_budgets("1GiB..4GiB")[0] == GIB and read_budgets("1GiB..4GiB")[-1] == 4 * GIB
    assert len(read_budgets("1GiB..4GiB")) == 5
    assert read_budgets("2GiB,1GiB") == [GIB, 2 * GIB]
    for wrong in ("4GiB..1GiB", "1..2", "x"):
        with pytest.raises(ConfigError, match="write for example"):
            read_budgets(wrong)
    image = np.broadcast_to(np.uint8(0), (3, 4000, 4000))
    rows = trade_off(planner(unet4492(), LOSSES["bce"], image, image[:1]), [64 << 20, 8 * GIB])
    small = {row.strategy: row for row in rows if row.budget == 64 << 20}
    large = {row.strategy: row for row in rows if row.budget == 8 * GIB}
    assert not any(row.fits for row in small.values()) and all(row.fits for row in large.values())
    with pytest.raises(wg.WholegradError) as refused:
        wg.plan(unet4492(), LOSSES["bce"], image, image[:1], budget=64 << 20, strategy="stream")
    assert small["stream"].said.partition(";")[0] == str(refused.value).partition(";")[0]
    assert large["in-core"].seconds and large["stream"].seconds < large["in-core"].seconds < large["offload"].seconds
    ElementTree.fromstring(budgets_drawing(rows))


def test_the_command_prints_a_table_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--shape", "3x1024x1024", "--loss", "bce", "--budgets", "4GiB,8GiB"]
    assert main([*command, "--plot", str(tmp_path / "b.svg")]) == 0
    said = capsys.readouterr().out
    assert [said.count(name) for name in ("stream", "in-core", "recompute", "offload")] == [2, 1, 1, 1]
    assert main([*command, "--json"]) == 0
    rows = [Row(**row) for row in json.loads(capsys.readouterr().out)]
    assert len(rows) == 8 and all(row.fits for row in rows)
    ElementTree.fromstring((tmp_path / "b.svg").read_text())
    assert main(["plan", "--plot", "x.svg"]) == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sizes", "x"], "size 'x': is not an area"),
        (["--strategies", "fast"], "'fast' is unknown"),
        (["--devices", "tpu"], "device tpu: is not there"),
        (["--budget", "2"], "needs a unit"),
        (["--network", "nowhere:net"], "check module and factory"),
    ],
)
def test_what_cannot_be_explored_is_refused_in_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", "--out", str(tmp_path), *argv]) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1


def test_the_command_of_a_cell_is_of_this_environment() -> None:
    assert python("wholegrad.explore.step", "x") == [sys.executable, "-m", "wholegrad.explore.step", "x"]
    assert area(1024.0) == FULL

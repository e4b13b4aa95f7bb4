"""The report: one file that needs nothing else, with what the run left in it; and copies of the log elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from wholegrad.errors import ConfigError
from wholegrad.train.config import check_config
from wholegrad.train.loop import train
from wholegrad.train.svg import Line, chart, smoothed
from wholegrad.train.track import Tracking, numbers

VOID = {"meta", "img", "line", "circle", "polyline"}


class Balanced(HTMLParser):
    """Notes every address that a page asks for, and tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def settings(tmp_path: Path, write_case: Callable[..., None]) -> dict[str, Any]:
    for seed, name in enumerate("abcd"):
        write_case(tmp_path, name, size=(96, 112), seed=seed)
    data = {"train": ["a"], "val": ["b"], "test": ["c", "d"]}
    return {"data": data, "train": {"steps": 3, "out": "out <&>"}, "validation": {"steps": 2}}


def test_a_report_needs_nothing_else(tmp_path: Path, settings: dict[str, Any]) -> None:
    outcome = train(check_config(settings, "test", tmp_path))
    assert outcome.report == tmp_path / "out <&>/report.html"
    page = outcome.report.read_text()
    read = Balanced()
    read.feed(page)
    assert not read.open
    assert len(read.asked) == 2 and all(each.startswith("data:image/jpeg;base64,") for each in read.asked)
    assert "<script" not in page and "url(" not in page
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    text = " ".join(read.text)
    for said in ("mean Dice", "best validation Dice", "Best: ", "Worst: ", "projected", "whole-image autograd", "lr",
                 "torch", "out <&>", "1 slide to choose by"):  # fmt: skip
        assert said in text, said
    for score in outcome.scores:
        assert f"{score.dice:.3f}" in text
    assert page.count("<svg") == 6
    assert "prefers-color-scheme: dark" in page


def test_charts_leave_out_what_is_not_finite_and_thin_long_lines() -> None:
    assert chart("empty", [Line("x", "c1", [1.0], [float("nan")])]) == ""
    text = chart("long", [Line("x", "c1", list(range(5000)), [1 + i % 7 for i in range(5000)])])
    assert text.count(",") < 900
    one = chart("one", [Line("x", "c1", [3], [2.0])])
    assert "<circle" in one
    inside = [float(v) for v in re.findall(r'y[12]="([-\d.]+)"', text)]
    assert all(0 <= v <= 250 for v in inside)


def test_smoothing_is_a_mean_of_the_last() -> None:
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert smoothed([], 3) == []


def test_numbers_of_a_line() -> None:
    line = {"kind": "validation", "step": 4, "dice": 0.5, "slides": {"b": 0.5}, "best": True, "stale": 0}
    assert numbers(line) == {"validation/dice": 0.5, "validation/stale": 0, "validation/dice/b": 0.5}
    assert numbers({"kind": "skip", "step": 1, "slide": "a", "reason": "gone"}) == {"train/skipped": 1.0}


def test_a_missing_package_is_one_line(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    settings["track"] = {"mlflow": "file:x"}
    with pytest.raises(ConfigError, match=r"track\.mlflow: needs the package mlflow-skinny; pip install mlflow-skinny"):
        train(check_config(settings, "test", tmp_path))
    assert not (tmp_path / "out <&>").exists()


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    class Failing:
        def start(self, config: object, step: int) -> None: ...
        def note(self, line: dict[str, Any]) -> None:
            raise OSError("no\nroute")

    said: list[str] = []
    tracking = Tracking(check_config(settings, "test", tmp_path), said.append)
    tracking.trackers.append(Failing())  # type: ignore[arg-type]
    tracking.note({"kind": "step", "step": 0})
    tracking.note({"kind": "step", "step": 1})
    assert said == ["Failing is left out from here on: OSError: no route"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_numbers(tmp_path: Path, settings: dict[str, Any]) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings["track"] = {"tensorboard": True}
    settings["train"]["panels"] = False
    train(check_config(settings, "test", tmp_path))
    found = loading.EventAccumulator(str(tmp_path / "out <&>/tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [0, 1, 2]
    assert [event.step for event in found.Scalars("validation/dice")] == [2, 3]
    assert {"test/dice/mean", "train/lr", "train/peak"} <= set(found.Tags()["scalars"])

"""A run killed by SIGKILL, in the middle of a tile or of writing a file, ends with the bits of an unbroken one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from wholegrad.errors import ConfigError
from wholegrad.train.config import Config, check_config
from wholegrad.train.events import Watch
from wholegrad.train.loop import train

CONFIG = """
[data]
train = ["a", "b", "c"]
val = ["d"]
test = ["e"]
crop = [100, 90]
pad = true
[augment]
flip = true
turn = true
contrast = 0.1
[train]
steps = 7
optimizer = "AdamW"
schedule = { name = "OneCycleLR", args = { max_lr = 0.02, total_steps = "total" } }
accumulate = 2
clip = 1.0
ema = 0.9
checkpoint_minutes = 0
budget = "2GiB"
panels = false
[validation]
steps = 3
"""
CHILD = """
import os, signal, sys
from pathlib import Path
from wholegrad.train.config import load_config
from wholegrad.train.events import Watch
from wholegrad.train.loop import train

config, out, moment, left = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def count(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

fsync, replace = os.fsync, Path.replace
if moment == "before fsync":
    os.fsync = lambda handle: (count(), fsync(handle))[1]
if moment == "before rename":
    Path.replace = lambda path, to: (count(), replace(path, to))[1]
watch = Watch(on_tile=count) if moment == "tile" else Watch()
train(load_config(config, [f"train.out={out}"]), watch, resume=True)
"""
MEASURED = ("seconds", "rss", "peak", "projected")


@pytest.fixture
def slides(tmp_path: Path, write_case: Callable[..., None]) -> Path:
    for seed, name in enumerate("abcde"):
        write_case(tmp_path, name, size=(96, 112), seed=seed)
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path


def child(folder: Path, out: str, moment: str = "", count: int = 0) -> int:
    command = [sys.executable, "-c", CHILD, str(folder / "run.toml"), out, moment, str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def log(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in found]


@pytest.mark.slow
def test_killed_and_resumed_is_unbroken(slides: Path) -> None:
    assert child(slides, "whole") == 0
    kills = (("before fsync", 2), ("tile", 9), ("before rename", 3))
    assert [child(slides, "broken", *kill) for kill in kills] == [-signal.SIGKILL] * len(kills)
    assert child(slides, "broken") == 0
    for name in ("weights", "best", "checkpoint"):
        whole, broken = (load_file(slides / out / f"{name}.safetensors") for out in ("whole", "broken"))
        assert whole.keys() == broken.keys()
        assert all(torch.equal(whole[key], broken[key]) for key in whole), name
    assert log(slides / "whole") == log(slides / "broken")
    assert [line["step"] for line in log(slides / "whole") if line["kind"] == "step"] == list(range(7))
    assert [line["step"] for line in log(slides / "whole") if line["kind"] == "validation"] == [3, 6, 7]
    assert not list((slides / "broken").glob(".*"))


def configure(folder: Path, **settings: Any) -> Config:
    return check_config(
        {
            "data": {"train": ["a", "b"], "val": settings.pop("val", [])},
            "train": {"steps": 2, "panels": False, "out": "out", **settings},
        },
        "test",
        folder,
    )


def test_a_resumed_run_keeps_its_slides_and_says_what_changed(slides: Path) -> None:
    notes: list[str] = []
    train(configure(slides))
    split = (slides / "out/split.json").read_text()
    train(configure(slides, steps=3, lr=0.5), Watch(on_note=notes.append), resume=True)
    assert (slides / "out/split.json").read_text() == split
    assert notes == ["resumed with train.lr = 0.5, which was 0.01", "resumed with train.steps = 3, which was 2"]
    assert [line["step"] for line in log(slides / "out")] == [0, 1, 2]


def test_a_resumed_run_that_has_nothing_left_to_do_says_so(slides: Path) -> None:
    notes: list[str] = []
    train(configure(slides))
    train(configure(slides, steps=1), Watch(on_note=notes.append), resume=True)
    said = "nothing is left to train: 2 steps are done and 1 are asked for; ask for more with --steps or --epochs"
    assert notes == ["resumed with train.steps = 1, which was 2", said]
    assert [line["step"] for line in log(slides / "out")] == [0, 1]


def test_a_log_that_lost_lines_is_not_continued(slides: Path) -> None:
    train(configure(slides))
    (slides / "out/log.jsonl").write_text("")
    with pytest.raises(
        ConfigError, match=r"log\.jsonl: has 0 bytes, and the checkpoint was written after \d+; restore"
    ):
        train(configure(slides, steps=3), resume=True)


def test_another_optimiser_is_refused(slides: Path) -> None:
    train(configure(slides))
    with pytest.raises(ConfigError, match="is of another optimiser or schedule"):
        train(configure(slides, steps=3, optimizer="SGD"), resume=True)

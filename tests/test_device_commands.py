"""Training and the command line on a device with memory of its own: the pretended one of :mod:`pretend`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pretend
import wholegrad as wg
from pretend import LEDGER
from wholegrad.cli import main
from wholegrad.errors import PlanError
from wholegrad.nets import unet4492
from wholegrad.run.device import Options
from wholegrad.train.config import Config, check_config
from wholegrad.train.loop import train
from wholegrad.train.metrics import METRICS, score
from wholegrad.train.state import load_model

pretend.install()


@pytest.fixture
def slides(tmp_path: Path, write_case: Callable[..., None]) -> Path:
    for number, name in enumerate(("a", "b")):
        write_case(tmp_path, name, size=(96, 112), seed=number)
    return tmp_path


def configure(folder: Path, **settings: Any) -> Config:
    given = {"lr": 0.01, "panels": True, "device": "pretend", "budget": "1GiB", "threads": 1, **settings}
    data = {"root": ".", "train": ["a"], "test": ["b"]}
    return check_config({"data": data, "network": {"args": {"seed": 0}}, "train": given}, "test", folder)


def test_a_run_is_trained_tested_and_drawn_there_and_resumes_to_the_same_bits(slides: Path) -> None:
    train(configure(slides, steps=1, out="first"))  # the first run of a process that planned before rounds otherwise
    LEDGER.forget()
    whole = train(configure(slides, steps=4, out="whole"))
    assert LEDGER.ups > 4
    assert whole.pictures and whole.pictures[0].exists()
    train(configure(slides, steps=2, out="parts"))
    train(configure(slides, steps=4, out="parts"), resume=True)
    ours, theirs = (load_model(slides / out).state_dict() for out in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = load_model(slides / "whole")
    with wg.open_slide(slides / "slides/b.tif") as slide, wg.open_mask(slides / "masks/b.mask.tif", like=slide) as mask:
        counts = wg.measure(model, slide, mask, metrics=METRICS, device=pretend.device())["counts"]
        assert score("b", counts).dice == whole.scores[0].dice


def test_a_budget_that_the_device_holds_already_is_refused(slides: Path) -> None:
    held = torch.zeros(1 << 21, dtype=torch.uint8, device="pretend")
    with pytest.raises(PlanError, match="are held on pretend:0 already"):
        train(configure(slides, steps=1, budget=held.numel() // 2))


def test_commands_take_a_device(slides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(configure(slides, steps=1, out="run", device=None, budget="4GiB"))
    out, weights = slides / "logits.npy", str(slides / "run")
    argv = ["predict", str(slides / "slides/b.tif"), "--weights", weights, "--kind", "logits"]
    LEDGER.forget()
    assert main([*argv, "--out", str(out), "--device", "pretend", "--budget", "4GiB", "--host-budget", "32GiB"]) == 0
    assert LEDGER.ups > 4
    with wg.open_slide(slides / "slides/b.tif") as slide:
        wanted = wg.predict(load_model(weights), slide, kind="logits")
    np.testing.assert_allclose(np.load(out), wanted, rtol=0, atol=1e-5)
    capsys.readouterr()
    assert main(["plan", "--shape", "3x2000x3000", "--device", "pretend", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["device"] == "pretend:0" and said["host"]["projected"] >= said["host"]["reserved"]
    assert main(["plan", "--shape", "3x2000x3000", "--device", "pretend"]) == 0
    assert "projected peak of the process" in capsys.readouterr().out
    assert main(["plan", "--shape", "3x2000x3000", "--tf32"]) == 2
    assert "give --device cuda" in capsys.readouterr().err
    assert main(["plan", "--shape", "3x2000x3000", "--device", "nonsense"]) == 2
    assert "which PyTorch does not know" in capsys.readouterr().err


def test_options_reach_the_device() -> None:
    opened = wg.open_device("pretend", tf32=True, at_once=3)
    assert opened.options == Options(tf32=True, at_once=3)
    plan = wg.plan(unet4492(), None, np.zeros((3, 64, 64), np.uint8), device=opened)
    assert plan.workers == 3 and plan.made_on is opened
    with pytest.raises(PlanError, match="at_once: is 0"):
        wg.open_device("pretend", at_once=0)

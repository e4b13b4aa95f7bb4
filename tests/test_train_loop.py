"""Training on tiny whole slides: it learns, logs, resumes to the same bits, and refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from torch import nn

import wholegrad as wg
from wholegrad.cli import main
from wholegrad.errors import ConfigError, NumericsError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.balance import Balanced, find_balance
from wholegrad.slide.thumbnail import balanced, thumbnail
from wholegrad.train.cases import open_cases
from wholegrad.train.config import Config, TrainConfig, check_config
from wholegrad.train.draws import pick
from wholegrad.train.events import Step, Watch
from wholegrad.train.interrupt import Interrupt
from wholegrad.train.loop import train
from wholegrad.train.metrics import METRICS, score
from wholegrad.train.optim import learning_rate
from wholegrad.train.split import entries
from wholegrad.train.state import load_model, read_card


@pytest.fixture
def slides(tmp_path: Path, write_case: Callable[..., None]) -> Path:
    for number, name in enumerate(("a", "b", "c")):
        write_case(tmp_path, name, size=(96 + 16 * number, 112), seed=number)
    return tmp_path


def configure(folder: Path, out: str = "out", **settings: Any) -> Config:
    data = {"root": ".", "train": ["a", "b"], "test": ["c"], **settings.pop("data", {})}
    network = settings.pop("network", {"args": {"seed": 0}})
    given = {"steps": 4, "lr": 0.01, "panels": False, "out": out, **settings}
    return check_config({"data": data, "network": network, "train": given}, "test", folder)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_and_leaves_what_it_promises(slides: Path) -> None:
    outcome = train(configure(slides, steps=20, lr=0.03))
    log = lines(slides / "out/log.jsonl")
    assert [line["step"] for line in log] == list(range(20))
    assert set(log[0]) == {"kind", "norm", "step", "slide", "loss", "dice", "seconds", "rss", "peak", "projected", "lr"}
    assert log[-1]["loss"] < log[0]["loss"] / 2
    assert outcome.scores[0].dice > 0.8
    assert outcome.scores[0].pixels == 128 * 112
    card = read_card(outcome.weights)
    assert card.step == 20
    assert card.parameters == 4492
    assert card.dice == {"c": outcome.scores[0].dice, "mean": outcome.scores[0].dice}
    assert json.loads((slides / "out/test.json").read_text())[0]["name"] == "c"


def test_balance_is_seen_by_training_testing_and_predict(slides: Path) -> None:
    stored = tifffile.imread(slides / "slides/c.tif")
    tinted = np.clip(stored * np.array([0.8, 0.9, 0.6]), 0, 255).astype(np.uint8)
    tifffile.imwrite(slides / "slides/c.tif", tinted, tile=(64, 64), photometric="rgb")
    outcome = train(configure(slides, steps=2, data={"balance": True}))
    model = load_model(slides / "out")
    with wg.open_slide(slides / "slides/c.tif") as slide, wg.open_mask(slides / "masks/c.mask.tif", like=slide) as mask:
        even = balanced(slide)
        assert not np.array_equal(even.read(Box(0, 64, 0, 64)), slide.read(Box(0, 64, 0, 64)))
        counts = wg.measure(model, even, mask, metrics=METRICS)["counts"]
        assert outcome.scores[0].dice == score("c", counts).dice
        expected, plain = wg.predict(model, even, kind="logits"), wg.predict(model, slide, kind="logits")
    command = ["predict", str(slides / "slides/c.tif"), "--weights", str(slides / "out"), "--kind", "logits"]
    assert main([*command, "--out", str(slides / "logits.npy")]) == 0
    found = np.load(slides / "logits.npy")
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, plain)


def test_the_balance_of_a_region_is_that_of_its_slide(slides: Path) -> None:
    train(configure(slides, steps=1, data={"balance": True}))
    region = (16, 8, 48, 40)
    with wg.open_slide(slides / "slides/c.tif") as slide, wg.open_slide(slide.path, region=region) as part:
        assert balanced(part).balance == balanced(slide).balance != find_balance(thumbnail(part))
        expected = wg.predict(load_model(slides / "out"), Balanced(part, balanced(slide).balance), kind="logits")
    command = ["predict", str(slides / "slides/c.tif"), "--weights", str(slides / "out"), "--kind", "logits"]
    assert main([*command, "--region", "16,8,48,40", "--out", str(slides / "logits.npy")]) == 0
    assert np.array_equal(np.load(slides / "logits.npy"), expected)


@pytest.mark.parametrize("balance", [False, True])
def test_beyond_a_slide_is_its_own_glass(slides: Path, balance: bool) -> None:
    colour = np.array([231, 219, 226], np.uint8)
    stored = np.random.default_rng(0).integers(40, 120, (96, 112, 3), dtype=np.uint8)
    stored[:, :40] = colour
    tifffile.imwrite(slides / "slides/a.tif", stored, tile=(64, 64), photometric="rgb")
    config = configure(slides, data={"crop": [150, 160], "pad": True, "balance": balance})
    (case, *_) = open_cases(entries(config), config.data)
    with case.crop((150, 160), np.random.default_rng(0), pad=True).open() as (slide, mask):
        pixels, labels = slide.read(Box(0, 150, 0, 160)).copy(), mask.read(Box(0, 150, 0, 160))[0].copy()
    shown = [240, 240, 240] if balance else colour.tolist()
    assert [pixels[:, y, x].tolist() for y, x in ((0, 0), (149, 159), (0, 159))] == [shown] * 3
    assert (pixels == np.array(shown)[:, None, None]).all(axis=0).sum() >= 150 * 160 - 96 * 72
    assert not labels[[0, -1]].any()


def test_boundaries_are_stored_as_the_configuration_says(slides: Path) -> None:
    plans: list[wg.Plan] = []
    watch = Watch(on_plan=lambda slide, plan: plans.append(plan))
    train(configure(slides, out="narrow", steps=1, boundary_dtype="float16"), watch)
    train(configure(slides, out="plain", steps=1), watch)
    assert [plan.boundary_dtype for plan in plans] == [torch.float16, None]


def test_a_step_is_whole_image_training(slides: Path) -> None:
    """One step of the loop moves the weights as whole-image autograd with the same Adam does."""
    from wholegrad.losses import bce_dice_loss
    from wholegrad.nets import unet4492

    config = configure(slides, steps=1)
    outcome = train(config)
    name = ("a", "b")[pick(config.train.seed, 0, 2)]
    image = torch.from_numpy(tifffile.imread(slides / "slides" / f"{name}.tif")).permute(2, 0, 1)[None] / 255
    target = torch.from_numpy(tifffile.imread(slides / "masks" / f"{name}.mask.tif"))[None, None]
    model = unet4492(seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss = bce_dice_loss(model(image), target)
    loss.backward()
    optimizer.step()
    assert lines(slides / "out/log.jsonl")[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(load_model(outcome.weights).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


def test_a_run_continued_is_the_run_unbroken(slides: Path) -> None:
    train(configure(slides, out="whole", steps=6, data={"crop": [64, 80]}))

    def stop(step: Step) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    config = configure(slides, out="broken", steps=6, data={"crop": [64, 80]})
    outcome = train(config, Watch(on_step=stop))
    assert outcome.interrupted
    assert (outcome.steps, outcome.weights.name) == (3, "checkpoint.safetensors")
    assert not train(config, resume=True).interrupted
    whole, broken = (load_model(slides / out).state_dict() for out in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    steps = [[(x["step"], x["slide"], x["loss"]) for x in lines(slides / out / "log.jsonl")]
             for out in ("whole", "broken")]  # fmt: skip
    assert steps[0] == steps[1]


def test_another_run_is_not_written_over(slides: Path) -> None:
    train(configure(slides, steps=1))
    with pytest.raises(ConfigError, match="already holds a run; choose another --out, or continue it with --resume"):
        train(configure(slides, steps=1))


class Exploding(nn.Module):
    """Its output is not finite once its weight has been stepped twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) / (self.conv.weight.detach().abs().sum() < 3)


def exploding() -> nn.Module:
    torch.manual_seed(0)
    return Exploding()


def test_a_loss_that_is_not_finite_names_slide_and_step(slides: Path) -> None:
    network = {"name": f"{__name__}:exploding"}
    config = configure(slides, network=network, steps=50, lr=0.5, loss="bce", data={"test": []})
    with pytest.raises(NumericsError) as error:
        train(config)
    said = str(error.value)
    assert said.startswith(("a: ", "b: "))
    assert " at step " in said
    assert "lower train.lr" in said
    assert "\n" not in said
    taken = read_card(slides / "out/checkpoint.safetensors").step
    assert 0 < taken == len(lines(slides / "out/log.jsonl"))
    assert all(p.isfinite().all() for p in load_model(slides / "out", exploding()).parameters())


def test_every_file_is_tried_before_the_first_step(slides: Path) -> None:
    whole = (slides / "slides/c.tif").read_bytes()
    (slides / "slides/c.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SlideError, match=r"c\.tif"):
        train(configure(slides))
    assert not (slides / "out").exists()


def test_a_mask_with_other_labels_is_refused(slides: Path) -> None:
    tifffile.imwrite(slides / "masks/a.mask.tif", np.full((96, 112), 7, np.uint8), tile=(64, 64))
    with pytest.raises(ConfigError, match=r"a\.mask\.tif: holds label 7; use 0 for background"):
        train(configure(slides))


def test_a_slide_named_twice(slides: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train: names a twice; name each slide once"):
        train(configure(slides, data={"train": ["a", "a"]}))


def test_every_epoch_sees_every_slide_in_its_own_order() -> None:
    epochs = [[pick(3, 5 * epoch + place, 5) for place in range(5)] for epoch in range(20)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    assert pick(3, 7, 5) == pick(3, 7, 5)


def test_learning_rates() -> None:
    settings = TrainConfig(steps=10, lr=1.0, schedule="cosine", warmup=2)
    rates = [learning_rate(settings, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert sorted(rates[2:], reverse=True) == rates[2:]
    assert learning_rate(TrainConfig(steps=10, lr=0.3), 9, 10) == 0.3


def test_an_interrupt_waits_for_a_moment_that_harms_nothing() -> None:
    import os
    import signal

    with Interrupt() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

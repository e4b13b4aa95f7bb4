"""The command line as users meet it: help with examples, one-line errors, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

import wholegrad
from wholegrad.cli import main
from wholegrad.commands import demo
from wholegrad.slide.slide import open_slide
from wholegrad.slide.write import PyramidWriter
from wholegrad.train.made_up import blobs
from wholegrad.train.state import load_model, read_card

COMMANDS = ("demo", "train", "evaluate", "predict", "plan", "verify", "explore", "synth", "view")
SETTINGS = '[data]\nroot = "."\ntrain = ["a", "b"]\ntest = ["c"]\n[train]\nsteps = 3\nout = "out"\n'


@pytest.fixture
def config(tmp_path: Path, write_case: Callable[..., None]) -> Path:
    for seed, name in enumerate("abc"):
        write_case(tmp_path, name, size=(96, 112), seed=seed)
    (tmp_path / "run.toml").write_text(SETTINGS)
    return tmp_path / "run.toml"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a refused command says: one line on standard error, exit code 2."""
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert said.startswith("wholegrad")
    return said


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.search(rf"examples:\n  wholegrad {command}\b", said)
    assert "--debug" in said


def test_help_names_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n    {command} " in said for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"wholegrad {wholegrad.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["view", "a", "b"], "unrecognized arguments: b; see wholegrad view --help"),
        (
            ["synth", "--size", "12", "--out", "a", "--mask", "b"],
            "'12' is not HEIGHTxWIDTH such as 16000x64000",
        ),
        (["synth", "--size", "0x5", "--out", "a", "--mask", "b"], "'0x5' is not HEIGHTxWIDTH"),
        (["synth", "--size", "64x64", "--out", "a", "--mask", "a"], "a: is given for slide and mask alike"),
        (["plan", "--shape", "16"], "'16' is not CHANNELSxHEIGHTxWIDTH"),
        (["plan", "--network", "unet"], "network unet: is not built in; use unet4492, or module:factory"),
        (["plan", "--network", "nowhere:net"], "No module named 'nowhere'; check module and factory"),
        (["plan", "--network", "math:pi"], "network math:pi: is a float; name a class or function"),
        (["plan", "--budget", "2"], "needs a unit"),
        (["plan", "--slide", "no.svs"], "no.svs: "),
        (["plan", "--boundary-dtype", "int8"], "invalid choice: 'int8' (choose from"),
        (["plan", "--shape", "3x4000x4000", "--budget", "10MiB"], "the smallest that would do is"),
        (["plan", "--mpp", "1", "--level", "2"], "not allowed with argument"),
        (["plan", "--region", "0,0,10,10"], "--region: is of a slide, and none is given; add --slide"),
        (["plan", "--ranks", "2x"], "'2x' is neither a number of ranks nor ROWSxCOLUMNS of blocks"),
        (["plan", "--ranks", "2", "--budgets", "1GiB"], "--budgets: compares strategies of one process"),
        (["plan", "--slide-mpp", "1"], "--slide-mpp: is of a slide, and none is given; add --slide"),
        (["plan", "--slide", "a.svs", "--region", "0,0,10"], "'0,0,10' is not X,Y,WIDTH,HEIGHT in level-0 pixels"),
        (["train", "no.toml"], "no.toml: cannot be read (No such file or directory); check the path"),
        (
            ["predict", "x.svs", "--weights", "no.safetensors", "--out", "m.tif"],
            "no.safetensors: no such file",
        ),
        (
            ["predict", "x.svs", "--weights", "w", "--out", "m.npy", "--kind", "logits", "--overlay", "o.png"],
            "o.png: cannot show logits; use kind='mask'",
        ),
    ],
)
def test_each_refusal_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *argv)


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(wholegrad.WholegradError):
        main(["train", "no.toml", "--debug"])


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: here warnings are errors."""
    with PyramidWriter(tmp_path / "a.tif", (3, 200, 300), mpp=1.0) as slide:
        slide.write_rows(np.zeros((200, 300, 3), np.uint8))
    np.save(tmp_path / "a.npy", np.ones((200, 300), np.uint8))
    ring = [[10, 10], [110, 110], [110, 10], [10, 110], [10, 10]]
    feature = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (tmp_path / "a.geojson").write_text(json.dumps(feature))
    argv = ["evaluate", "--prediction", "a.npy", "--mask", "a.geojson", "--slides", "a.tif"]
    done = subprocess.run(
        [sys.executable, "-m", "wholegrad", *argv], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr.startswith("wholegrad: warning: a.geojson: an outline crosses itself")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["cache", "segment"])
def test_a_folder_that_cannot_be_is_refused(command: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide, out = str(config.parent / "slides/a.tif"), str(config / "below")  # below a file
    said = refused_at_the_end(capsys, command, slide, "--out", f"{out}/a.tif" if command == "cache" else out)
    assert f"{out}: cannot be a folder (Not a directory); choose another --out" in said


def refused_at_the_end(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The last line that a refused command says."""
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_plan_prints_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--shape", "3x2000x3000", "--budget", "4.5GiB"]) == 0
    said = capsys.readouterr().out
    assert "image 1 x 3 x 2000 x 3000" in said
    assert "of a budget of 4.50 GiB" in said


@pytest.mark.usefixtures("mine")
def test_plan_stores_boundaries_rounded_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--network", "my_nets:normed", "--loss", "bce", "--shape", "3x4000x3000", "--budget", "2GiB"]
    assert main([*argv, "--boundary-dtype", "float16"]) == 0
    assert "rounded to float16" in capsys.readouterr().out


def test_synth_writes_a_slide_and_its_mask(tmp_path: Path) -> None:
    slide, mask = tmp_path / "new/s.tif", tmp_path / "new/m.tif"
    assert main(["synth", "--size", "200x300", "--seed", "3", "--out", str(slide), "--mask", str(mask)]) == 0
    assert open_slide(slide).shape == (3, 200, 300)
    assert tifffile.imread(mask).shape == (200, 300)


def test_train_with_flags_on_top(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = config.parent / "elsewhere"
    argv = ["train", str(config), "--steps", "2", "--lr", "0.5", "--budget", "2GiB", "--seed", "7"]
    argv += ["--boundary-dtype", "float16"]
    assert main([*argv, "--out", str(out), "--set", "train.loss=focal", "--set", "train.panels=false"]) == 0
    said = capsys.readouterr().out
    assert "slides not trained on" in said
    assert str(out / "weights.safetensors") in said.replace("\n", "")
    settings = read_card(out).config["train"]
    keys = ("steps", "lr", "budget", "boundary_dtype", "seed", "loss")
    assert [settings[key] for key in keys] == [2, 0.5, "2GiB", "float16", 7, "focal"]
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    assert "already holds a run" in refused(capsys, *argv, "--out", str(out))


def test_train_with_slides_and_settings_given_by_flags(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = config.parent / "fold"
    argv = ["train", str(config), "--slides", str(config.parent / "slides"), "--folds", "3", "--fold", "1"]
    argv += ["--set", f"data.root={config.parent}", "--optimizer", "SGD", "--schedule", "cosine", "--ema", "0.5"]
    argv += ["--set", "train.optimizer.args.momentum=0.9", "--accumulate", "2", "--epochs", "2", "--out", str(out)]
    assert main([*argv, "--set", "train.panels=false", "--resume"]) == 0  # which starts what is not there yet
    said = capsys.readouterr()
    assert "1 to be judged on: " in said.err and str(out / "report.html") in said.out
    found = json.loads((out / "split.json").read_text())
    assert [len(found[part]) for part in ("train", "val", "test")] == [2, 0, 1]
    train = read_card(out).config["train"]
    assert train["optimizer"] == {"name": "SGD", "args": {"momentum": 0.9}}
    assert len((out / "log.jsonl").read_text().splitlines()) == 4


def test_a_profile_says_where_the_time_went(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", str(config), "--steps", "2", "--set", "train.panels=false"]
    assert main([*argv, "--profile"]) == 0
    said = capsys.readouterr().out
    assert "of roofline" in said and "weight gradient" in said and "profile.json" in said.replace("\n", "")
    found = json.loads((config.parent / "out/profile.json").read_text())
    assert (found["steps"], found["workers"]) == (2, 2)
    assert {"fuse1", "down1", "head"} <= {row["where"] for row in found["rows"] if row["macs"]}
    assert main([*argv, "--out", str(config.parent / "other")]) == 0
    assert not (config.parent / "other/profile.json").exists()


def test_a_trained_network_predicts_and_draws(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "--steps", "1"]) == 0
    folder = config.parent
    assert (folder / "out/predictions/c.png").stat().st_size > 1000
    argv = ["predict", str(folder / "slides/c.tif"), "--weights", str(folder / "out"), "--out"]
    assert main([*argv, str(folder / "m.tif"), "--overlay", str(folder / "m.png")]) == 0
    mask = tifffile.imread(folder / "m.tif")
    assert mask.shape == (96, 112)
    assert np.array_equal(mask, tifffile.imread(folder / "out/predictions/c.tif"))
    assert (folder / "m.png").stat().st_size > 1000
    assert main([*argv, str(folder / "p.npy"), "--kind", "probability"]) == 0
    assert np.array_equal(np.load(folder / "p.npy")[0] > 0.5, mask > 0)


def test_a_part_of_a_slide_is_predicted_where_it_lies(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "--steps", "1"]) == 0
    folder, weights = config.parent, str(config.parent / "out")
    slide = str(folder / "slides/c.tif")
    argv = ["predict", slide, "--weights", weights, "--threshold", "1e-6", "--region", "32,16,64,48"]
    assert main([*argv, "--out", str(folder / "p.npy"), "--out", str(folder / "p.geojson")]) == 0
    with open_slide(slide, region=(32, 16, 64, 48)) as part:
        expected = wholegrad.predict(load_model(weights), part, threshold=1e-6)
    assert np.array_equal(np.load(folder / "p.npy"), expected) and expected is not None and expected.all()
    (feature,) = json.loads((folder / "p.geojson").read_text())["features"]
    corners = np.array(feature["geometry"]["coordinates"][0])
    assert [*corners.min(axis=0), *corners.max(axis=0)] == [32, 16, 96, 64]
    capsys.readouterr()
    assert "reaches outside it" in refused(capsys, *argv[:-1], "90,16,64,48", "--out", str(folder / "q.npy"))
    assert not (folder / "q.npy").exists()
    capsys.readouterr()
    assert main(["plan", "--slide", slide, "--region", "32,16,64,48"]) == 0
    assert "image 1 x 3 x 48 x 64" in capsys.readouterr().out
    assert main(["plan", "--slide", slide, "--region", "bounds", "--slide-mpp", "1", "--mpp", "2"]) == 0
    assert "image 1 x 3 x 48 x 56" in capsys.readouterr().out


def test_masks_are_written_drawn_outlined_and_scored(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "--steps", "1"]) == 0
    folder = config.parent
    argv = [
        "predict",
        str(folder / "slides/c.tif"),
        "--weights",
        str(folder / "out"),
        "--overlay",
        str(folder / "c.png"),
    ]
    outs = [part for name in ("c.ome.tif", "c.zarr", "c.geojson") for part in ("--out", str(folder / name))]
    assert main([*argv, *outs, "--min-area", "50", "--min-hole", "20", "--simplify", "1", "--class", "Tumor"]) == 0
    assert json.loads((folder / "c.geojson").read_text())["type"] == "FeatureCollection"
    assert (folder / "c.png").stat().st_size > 1000
    scores, rows = folder / "s.json", folder / "s.csv"
    true = folder / "masks/c.mask.tif"
    for prediction in ("c.ome.tif", "c.zarr"):
        argv = ["evaluate", "--prediction", str(folder / prediction), "--mask", str(true), "--json", str(scores)]
        assert main(argv) == 0
        told = json.loads(scores.read_text())["slides"][0]
        predicted, truth = tifffile.imread(folder / "c.ome.tif"), tifffile.imread(true)
        counted = truth != 255
        assert told["classes"][0]["tp"] == ((predicted == 1) & (truth == 1) & counted).sum()
        assert told["boundary_f1"] is not None
    (folder / "pairs.csv").write_text("prediction,mask,name\nc.ome.tif,masks/c.mask.tif,C\nc.zarr,masks/c.mask.tif,Z\n")
    capsys.readouterr()
    assert main(["evaluate", "--pairs", str(folder / "pairs.csv"), "--csv", str(rows), "--no-boundary"]) == 0
    said = capsys.readouterr().out
    assert "standard deviation" in said and "95 % interval" in said and "Dice" in said
    assert rows.read_text().splitlines()[0] == "slide,dice,iou,precision,recall"
    assert [line.split(",")[0] for line in rows.read_text().splitlines()] == ["slide", "C", "Z"]
    assert main(["evaluate", str(config), "--weights", str(folder / "out"), "--json", str(scores)]) == 0
    network = json.loads(scores.read_text())["slides"][0]
    assert network["dice"] == pytest.approx(told["dice"]) and network["iou"] == pytest.approx(told["iou"])


def test_folders_are_paired_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, ending, value in (("p", ".ome.tif", 1), ("m", ".mask.tif", 0)):
        (tmp_path / folder).mkdir()
        for name in ("a", "b.2"):
            labels = np.zeros((40, 50), np.uint8)
            labels[10 : 20 + value, 10:30] = 1
            tifffile.imwrite(tmp_path / folder / f"{name}{ending}", labels, tile=(16, 16))
    pair = [
        "evaluate",
        "--prediction",
        str(tmp_path / "p"),
        "--mask",
        str(tmp_path / "m"),
        "--json",
        str(tmp_path / "s"),
    ]
    assert main([*pair, "--mpp", "2", "--tolerance", "2"]) == 0
    told = json.loads((tmp_path / "s").read_text())
    assert [slide["name"] for slide in told["slides"]] == ["a", "b.2"]
    assert told["summary"]["dice"]["mean"] == pytest.approx(2 * 200 / 420) and told["summary"]["dice"]["deviation"] == 0
    assert told["summary"]["hausdorff95_um"]["mean"] == 2 and told["summary"]["boundary_f1"]["mean"] == 1
    capsys.readouterr()
    (tmp_path / "m/a.mask.tif").unlink()
    assert "has no mask of its name" in refused(capsys, *pair)
    assert "does not know what to compare" in refused(capsys, "evaluate", "--mask", "x")
    assert "does not exist" in refused(capsys, "evaluate", "--mask", "x", "--prediction", "y")
    assert "goes with --weights alone" in refused(capsys, "evaluate", "run.toml")


def test_verify_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--size", "24x33", "--loss", "focal"]) == 0
    assert "down1.weight" in capsys.readouterr().out


def test_verify_says_by_its_exit_code_that_a_network_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wholegrad, "verify", lambda *_args, **_kw: SimpleNamespace(ok=False))
    assert main(["verify", "--size", "50x67"]) == 1


MINE = r"""
import torch
from torch import nn
import torch.nn.functional as F

def segmenter(): return nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.Dropout2d(), nn.Conv2d(5, 5, 1))
def classifier():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
def with_loss(): return alone(), lambda output, target: (output - target[0] + target[1]).square().mean()
def alone(): return nn.Conv2d(3, 1, 3, padding=1)
def square(output, target):
    assert target is None
    return output.square().mean()
def pair(height, width): return torch.full((1, height, width), 0.5), torch.ones(1)
def number(): return 3
def normed(): return nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1))
def breaks(): raise RuntimeError("no weights\nhere")
class Otherwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), Doubled())
    def forward(self, x): return self.block(x)
class Doubled(nn.Module):
    def forward(self, x): return x * 2 if x.is_meta else x * 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's in the current folder."""
    (tmp_path / "my_nets.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    "options",
    [
        ["segmenter", "--channels", "4", "--loss", "torch.nn:CrossEntropyLoss", "--target", "labels:5"],
        ["classifier", "--loss", "torch.nn.functional:cross_entropy", "--target", "class:2", "--eval"],
        ["with_loss", "--target", "my_nets:pair"],
        ["alone", "--loss", "my_nets:square", "--target", "none"],
        ["alone", "--loss", "torch.nn:BCEWithLogitsLoss", "--target", "mask"],
    ],
)
def test_verify_on_the_users_own_model_loss_and_target(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = options
    tiles = ["--tile", "9x12", "--tile", "16x16"]
    assert main(["verify", f"my_nets:{name}", "--size", "24x33", "--no-float32", *tiles, *rest]) == 0
    said = capsys.readouterr().out
    assert "tiles of 9 x 12" in said and "over 3 plans" in said and "responsible" not in said


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    "options",
    [
        ["segmenter", "--loss", "torch.nn:CrossEntropyLoss", "--target", "labels:5"],
        ["with_loss", "--target", "my_nets:pair"],
        ["alone", "--loss", "torch.nn:BCEWithLogitsLoss", "--target", "mask"],
    ],
)
def test_plan_takes_what_verify_takes(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    channels = 4 if options[0] == "segmenter" else 3
    assert main(["plan", "--network", f"my_nets:{options[0]}", "--shape", f"{channels}x40x60", *options[1:]]) == 0
    assert f"image 1 x {channels} x 40 x 60" in capsys.readouterr().out


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("command", [["verify", "my_nets:alone", "--size"], ["plan", "--network", "my_nets:alone"]])
def test_a_target_that_the_loss_does_not_take(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    size = ["24x33"] if command[0] == "verify" else ["--shape", "3x24x33"]
    assert main([*command, *size, "--loss", "torch.nn:BCEWithLogitsLoss", "--target", "labels:2"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "target labels:2: is not what the loss takes (ValueError: " in said
    assert said.endswith("choose another --target: labels, labels:K, mask, class:K, none or module:function")


@pytest.mark.usefixtures("mine")
def test_verify_says_what_it_does_and_leaves_out_what_it_did_not_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "my_nets:normed", "--size", "24x33", "--tile", "9x12", "--no-float32"]) == 0
    said = capsys.readouterr()
    assert "float32" not in said.out and "num_batches_tracked" not in said.out and "running_mean" in said.out
    assert re.search(r"\n  tiles of 9 x 12, every boundary, on disk\n", said.out)
    assert "float64: whole image" in said.err and "float64: plan 2 of 2" in said.err


@pytest.mark.usefixtures("mine")
def test_verify_names_what_is_responsible(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "my_nets:Otherwise", "--size", "24x33", "--no-float32", "--tile", "9x12"]) == 1
    said = capsys.readouterr().out
    assert "MISMATCH" in said and "\nresponsible: block.1 (capture): its output is not what" in said


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["my_nets:number"], "network my_nets:number: gave an int; return a torch.nn.Module, or one and its loss"),
        (["my_nets:breaks"], "network my_nets:breaks: raises RuntimeError: no weights here; run it in Python"),
        (["my_nets:with_loss", "--loss", "bce"], "brings a loss of its own; leave out --loss"),
        (
            ["my_nets:alone", "--loss", "hinge"],
            "loss hinge: is not built in; use bce, dice, bce+dice, focal, or module:",
        ),
        (["my_nets:alone", "--loss", "my_nets:no"], "loss my_nets:no: module 'my_nets' has no attribute 'no'; check"),
        (["my_nets:alone", "--target", "class:0"], "target class:0: is unknown; use labels, labels:K, mask, class:K"),
        (["my_nets:alone", "--channels", "0"], "'0' is not a number of at least 1"),
    ],
)
def test_verify_refuses_in_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, "verify", *argv)


def test_ctrl_c_leaves_a_checkpoint_that_loads_and_continues(config: Path) -> None:
    command = [sys.executable, "-m", "wholegrad", "train", str(config), "--set", "train.panels=false"]
    run = subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    log, give_up = config.parent / "out/log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < give_up:
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in said
    taken = read_card(config.parent / "out/checkpoint.safetensors").step
    assert f"stopped after {taken} steps; checkpoint: " in said.replace("\n", " ")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(taken))
    assert main([*command[3:], "--steps", str(taken + 1), "--resume"]) == 0
    assert read_card(config.parent / "out").step == taken + 1


def test_made_up_labels_have_all_kinds() -> None:
    labels = blobs(100, 130)
    assert labels.shape == (1, 100, 130)
    assert set(np.unique(labels)) == {0, 1, 255}


def test_demo_compares_only_what_is_alike() -> None:
    assert "of the same job" in demo._fair(demo.FULL.whole)
    assert "not to be compared" in demo._fair(demo.QUICK.whole)

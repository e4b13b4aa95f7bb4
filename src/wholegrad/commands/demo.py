"""``wholegrad demo``: the published experiment on this machine, from nothing, beside the paper's figures.

The gigapixel slide is painted by a process of its own, so that the peak in the table is the training's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import wholegrad as wg
from wholegrad.commands.common import CONSOLE, NOTES, Commands, add_command, blank, size
from wholegrad.errors import WholegradError
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan.plan import show_bytes
from wholegrad.run.process import machine
from wholegrad.train.config import Config, check_config
from wholegrad.train.loop import Outcome, Step, train
from wholegrad.train.progress import display
from wholegrad.train.state import count_parameters

TEXT = """\
Make a gigapixel slide, show the plan, train the 4492-parameter network on the whole of it for a step or two,
go on with smaller slides until the mask is good, and show it all beside the figures of the paper (Remedios et
al., MIDL 2023). Slides that are there already are used again; earlier results in the folder are replaced."""

EXAMPLES = """\
  wholegrad demo
  wholegrad demo --out out/demo --steps 2 --budget 1GiB
  wholegrad demo --quick            two minutes, on a smaller slide"""

GOOD = 0.975  # mean Dice over the last AVERAGED steps at which the mask is good enough to stop
AVERAGED = 6


@dataclass(frozen=True)
class Scale:
    """How large the demo is: slide sizes in pixels, most steps and seconds of the second training."""

    whole: tuple[int, int]
    small: tuple[int, int]
    steps: int
    seconds: float


FULL = Scale(whole=(16000, 64000), small=(1536, 3072), steps=90, seconds=200.0)
QUICK = Scale(whole=(2048, 4096), small=(768, 1536), steps=60, seconds=40.0)
SMALL_SLIDES = 4  # the last one is for testing
WHOLE_LOSS = "bce"  # the paper's job: its gradient is known before its sums, so one pass does
SMALL_LOSS = "bce+dice"


@dataclass(frozen=True)
class Training:
    """One of the demo's two trainings: its steps and how it ended."""

    steps: list[Step]
    outcome: Outcome


def add(commands: Commands) -> None:
    parser = add_command(commands, "demo", run, "the published experiment on this machine", TEXT, EXAMPLES)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (out/demo)")
    parser.add_argument("--size", type=size, metavar="HxW", help="of the large slide (16000x64000)")
    parser.add_argument("--steps", type=int, default=2, help="training steps on the whole large slide (2)")
    parser.add_argument("--seed", type=int, default=0, help="of slides and weights (0)")
    parser.add_argument("--budget", default="1.5GiB", metavar="SIZE", help="memory of the process (1.5GiB)")
    parser.add_argument("--quick", action="store_true", help="everything smaller: two minutes")


def run(args: argparse.Namespace) -> int:
    scale = QUICK if args.quick else FULL
    whole = args.size or scale.whole
    _say(f"1. A slide of {whole[0]} x {whole[1]} pixels, and smaller ones")
    large = _paint(args.out, whole, args.seed)
    small = [_paint(args.out, scale.small, args.seed + 1 + number) for number in range(SMALL_SLIDES)]
    _say("2. The plan of a training step on the whole of it")
    plan = _show_plan(whole, args)
    _say(f"3. {args.steps} training step(s) on all {whole[0] * whole[1] / 1e6:.0f} megapixels")
    first = _train(_config(args, "whole_slide", WHOLE_LOSS, args.steps, [large], []))
    _say("4. Training on, on smaller slides of the same kind")
    config = _config(args, "training", SMALL_LOSS, scale.steps, small[:-1], small[-1:], first.outcome.weights)
    second = _train(config, scale.seconds)
    _say("5. Beside the paper")
    CONSOLE.print(_table(whole, plan, first, second))
    CONSOLE.print(_fair(whole))
    for picture in second.outcome.pictures:
        CONSOLE.print(f"\npicture of that slide, its truth and the prediction: {picture}")
    return 0


def _fair(whole: tuple[int, int]) -> str:
    """What may be compared."""
    dice = "theirs is of real slides, ours of a synthetic slide that was not trained on."
    if whole == FULL.whole:
        return f"Memory and seconds are of the same job on the same number of parameters. Dice is not:\n{dice}"
    return f"Memory and seconds are not to be compared, as the image here has another size. Nor is Dice:\n{dice}"


def _say(text: str) -> None:
    CONSOLE.print(f"\n[bold]{text}[/bold]\n")


def _paint(root: Path, shape: tuple[int, int], seed: int) -> str:
    """Make a slide and its mask in a process of its own, unless they are there; returns their name."""
    name = f"synthetic-{shape[0]}x{shape[1]}-seed{seed}"
    slide, mask = root / "slides" / f"{name}.tif", root / "masks" / f"{name}.mask.tif"
    if slide.exists() and mask.exists():  # files appear only complete
        CONSOLE.print(f"{slide} is there")
        return name
    start = time.perf_counter()
    command = [sys.executable, "-m", "wholegrad", "synth", "--size", f"{shape[0]}x{shape[1]}"]
    command += ["--seed", str(seed), "--out", str(slide), "--mask", str(mask)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise WholegradError(str(slide), "could not be made", "see the message above")
    seconds = time.perf_counter() - start
    CONSOLE.print(f"{slide}: {show_bytes(slide.stat().st_size)} in {seconds:.0f} s")
    return name


def _show_plan(whole: tuple[int, int], args: argparse.Namespace) -> wg.Plan:
    model = unet4492(seed=args.seed)
    plan = wg.plan(model, LOSSES[WHOLE_LOSS], blank(3, *whole), blank(1, *whole), budget=args.budget)
    CONSOLE.print(str(plan))
    return plan


def _config(
    args: argparse.Namespace,
    name: str,
    loss: str,
    steps: int,
    learn: list[str],
    test: list[str],
    weights: Path | None = None,
) -> Config:
    """The configuration of one of the two trainings; what an earlier demo left in its folder goes."""
    out = (args.out / name).absolute()
    shutil.rmtree(out, ignore_errors=True)
    network: dict[str, Any] = {"name": "unet4492", "args": {"seed": args.seed}}
    if weights:
        network["weights"] = str(weights)
    settings = {"steps": steps, "lr": 0.02, "schedule": "cosine", "warmup": 1, "budget": args.budget}
    settings |= {"seed": args.seed, "out": str(out), "loss": loss}
    data = {"root": str(args.out.absolute()), "train": learn, "test": test}
    return check_config({"data": data, "network": network, "train": settings}, f"demo {name}")


def _train(config: Config, seconds: float | None = None) -> Training:
    """Train; with ``seconds``, until the mask is good or that time is over."""
    steps: list[Step] = []
    start = time.monotonic()

    def enough(step: Step) -> bool:
        steps.append(step)
        recent = [done.dice for done in steps[-AVERAGED:]]
        good = len(recent) == AVERAGED and sum(recent) / AVERAGED > GOOD
        return seconds is not None and (good or time.monotonic() - start > seconds)

    with display(NOTES) as shown:
        outcome = train(config, shown.watch(), enough=enough)
    if outcome.interrupted:
        raise KeyboardInterrupt
    for step in steps[:: max(1, len(steps) // 8)]:
        CONSOLE.print(f"step {step.step + 1:4}  loss {step.loss:.4f}  Dice {step.dice:.3f}  {step.seconds:.1f} s")
    return Training(steps, outcome)


def _table(whole: tuple[int, int], plan: wg.Plan, first: Training, second: Training) -> Table:
    pixels = f"{whole[0]} x {whole[1]} = {whole[0] * whole[1] / 1e9:.4g}e9"
    last, score = (first.steps or second.steps)[-1], second.outcome.scores[0]
    dice = f"{score.dice:.3f} (precision {score.precision:.3f}, recall {score.recall:.3f})"
    table = Table()
    for column in ("", "paper (MIDL 2023)", "here, now"):
        table.add_column(column)
    table.add_row("machine", "Apple M1 Ultra, 128 GB shared memory", machine())
    table.add_row("pixels of the training image", "16000 x 64000 = 1.024e9", pixels)
    table.add_row("parameters", "4492", str(count_parameters(unet4492())))
    table.add_row("peak memory, whole process", "over 100 GB", show_bytes(last.peak))
    table.add_row("  projected by the plan", "", show_bytes(last.projected))
    table.add_row("  whole-image PyTorch would need, for maps alone", "", show_bytes(plan.whole_image))
    table.add_row("seconds a training step", "81", f"{last.seconds:.1f}")
    steps = f"{len(first.steps)} on that, {len(second.steps)} on smaller slides"
    table.add_row("training steps", "4940", steps)
    table.add_row("Dice", "0.989 +- 0.005", dice)
    return table

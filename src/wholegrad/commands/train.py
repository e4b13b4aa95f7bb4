"""``wholegrad train``: a configuration file, flags on top, and a run that can be watched and stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from wholegrad.commands.common import CONSOLE, NOTES, Commands, add_command
from wholegrad.run.profile import Profile
from wholegrad.run.roofline import measure
from wholegrad.train.config import Config, load_config
from wholegrad.train.loop import Outcome, train
from wholegrad.train.progress import display, score_table

TEXT = """\
Train a network on whole slides, one slide a step, with the gradients of whole-image training.

The run's folder gets log.jsonl (a line a step), checkpoint.safetensors, weights.safetensors with a JSON card,
test.json (Dice of each test slide) and a picture of each test slide. Ctrl-C stops cleanly: it writes a
checkpoint and says where."""

EXAMPLES = """\
  wholegrad train examples/real_slides.toml
  wholegrad train run.toml --steps 500 --lr 0.003 --budget 2GiB --out out/second
  wholegrad train run.toml --set data.mpp=4 --set train.schedule=constant
  wholegrad train run.toml --steps 3 --profile --out out/profiled
  wholegrad train run.toml --resume"""

FLAGS = {"steps": int, "lr": float, "budget": str, "boundary_dtype": str, "seed": int}


def add(commands: Commands) -> None:
    parser = add_command(commands, "train", run, "train a network on whole slides", TEXT, EXAMPLES)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file; see examples/")
    for name, kind in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"in place of train.{name}")
    parser.add_argument("--out", type=Path, help="folder of the run, in place of train.out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key: data.mpp=2")
    parser.add_argument("--resume", action="store_true", help="continue from the folder's checkpoint")
    help_text = "print where the steps' time went, by op and stage, and write it to profile.json"
    parser.add_argument("--profile", action="store_true", help=help_text)


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, overrides(args))
    profile = Profile(measure(config.train.threads or torch.get_num_threads())) if args.profile else None
    with display(NOTES) as shown:
        outcome = train(config, shown.watch(), resume=args.resume, profile=profile)
    if profile is not None and profile.steps:
        CONSOLE.print(profile.table(), markup=False)  # not a rich table, which cuts cells off where it is narrow
        CONSOLE.print(f"profile: {config.out / 'profile.json'}")
    return tell(config, outcome)


def overrides(args: argparse.Namespace) -> list[str]:
    """The flags as ``key=value``, those of ``--set`` first."""
    given = list(args.set)
    for name, kind in FLAGS.items():
        value = getattr(args, name)
        if value is not None:
            given.append(f'train.{name}="{value}"' if kind is str else f"train.{name}={value}")
    if args.out is not None:
        given.append(f"train.out='{args.out.absolute()}'")
    return given


def tell(config: Config, outcome: Outcome) -> int:
    """Say how the run ended; returns the exit code."""
    if outcome.interrupted:
        NOTES.print(f"stopped after {outcome.steps} steps; checkpoint: {outcome.weights}; continue with --resume")
        return 130
    if outcome.scores:
        CONSOLE.print(score_table(list(outcome.scores), "slides not trained on"))
    CONSOLE.print(f"weights: {outcome.weights}")
    for picture in outcome.pictures:
        CONSOLE.print(f"picture: {picture}")
    return 0

"""``wholegrad train``: a configuration file, flags on top, and a run that can be watched and stopped."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from wholegrad.commands.common import CONSOLE, NOTES, Commands, add_command
from wholegrad.commands.live import LivePage
from wholegrad.errors import ConfigError
from wholegrad.run.profile import Profile
from wholegrad.run.roofline import measure
from wholegrad.train.config import Config, load_config
from wholegrad.train.events import Outcome, Watch
from wholegrad.train.loop import train
from wholegrad.train.plans import threads_of_rank
from wholegrad.train.progress import display, score_table
from wholegrad.train.team import Place, Team

TEXT = """\
Train a network on whole slides, one slide a step, with the gradients of whole-image training.

The run's folder gets split.json (which slides are for what), log.jsonl (a line a step), checkpoint.safetensors,
best.safetensors (if there are validation slides), weights.safetensors with a JSON card, test.json (Dice of each test
slide), a picture of each test slide, and report.html. Ctrl-C stops cleanly: it writes a checkpoint and says where.
A run that was killed, at whatever moment, goes on with --resume and ends with the bits of an unbroken one.
Under torchrun the slides of each update (train.accumulate) are shared by its ranks: docs/launching.md.
docs/training.md explains every key of the configuration."""

EXAMPLES = """\
  wholegrad train examples/real_slides.toml
  wholegrad train run.toml --steps 500 --lr 0.003 --budget 2GiB --out out/second
  wholegrad train run.toml --epochs 20 --optimizer AdamW --schedule cosine --accumulate 4 --ema 0.99
  wholegrad train run.toml --folds 5 --fold 0 --out out/fold0
  wholegrad train run.toml --set data.mpp=4 --set train.optimizer.args.weight_decay=0.01
  wholegrad train run.toml --live
  wholegrad train run.toml --steps 3 --profile --out out/profiled
  wholegrad train run.toml --resume
  torchrun --nproc-per-node 2 -m wholegrad train run.toml --accumulate 2 --resume"""

FLAGS: dict[str, tuple[str, Callable[[str], Any]]] = {  # flag: the key that it stands for, and its kind
    "steps": ("train.steps", int),
    "epochs": ("train.epochs", int),
    "lr": ("train.lr", float),
    "optimizer": ("train.optimizer", str),
    "schedule": ("train.schedule", str),
    "warmup": ("train.warmup", int),
    "loss": ("train.loss", str),
    "accumulate": ("train.accumulate", int),
    "clip": ("train.clip", float),
    "ema": ("train.ema", float),
    "patience": ("validation.patience", int),
    "budget": ("train.budget", str),
    "device": ("train.device", str),
    "host_budget": ("train.host_budget", str),
    "boundary_dtype": ("train.boundary_dtype", str),
    "strategy": ("train.strategy", str),
    "threads": ("train.threads", int),
    "seed": ("train.seed", int),
    "on_error": ("train.on_error", str),
    "mpp": ("data.mpp", float),
    "folds": ("data.split.folds", int),
    "fold": ("data.split.fold", int),
}


def add(commands: Commands) -> None:
    parser = add_command(commands, "train", run, "train a network on whole slides", TEXT, EXAMPLES)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file; see examples/ and docs/training.md")
    for name, (key, kind) in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"in place of {key}")
    parser.add_argument("--out", type=Path, help="folder of the run, in place of train.out")
    parser.add_argument("--slides", help="folder, glob or CSV of slides, in place of data.slides and of any lists")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key: data.crop=[512,512]")
    parser.add_argument("--resume", action="store_true", help="continue from the folder's checkpoint, if it has one")
    help_text = "print where the steps' time went, by op and stage, and write it to profile.json"
    parser.add_argument("--profile", action="store_true", help=help_text)
    live = parser.add_argument_group("a page of the run while it goes on (docs/viewer.md)")
    help_text = "serve curves, memory, speed and the latest prediction to a browser of this machine, until the run ends"
    live.add_argument("--live", action="store_true", help=help_text)
    live.add_argument("--port", type=int, help="that the page listens on (any that is free)")
    live.add_argument("--live-slide", metavar="NAME", help="validation slide that the page shows (the first)")
    live.add_argument("--live-keep", action="store_true", help="keep the page after the run, until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, overrides(args))
    team = Team(Place.found(), config.mesh.timeout, config.mesh.tiles)
    profile = Profile(measure(config.train.threads or threads_of_rank(team.place))) if args.profile else None
    given = {"--port": args.port is not None, "--live-slide": args.live_slide, "--live-keep": args.live_keep}
    if not args.live and (alone := next((flag for flag, value in given.items() if value), None)):
        raise ConfigError(alone, "is of a live page", "add --live")
    live = args.live and team.first
    opened = LivePage(config.out, args.port or 0, args.live_slide, NOTES.print) if live else nullcontext()
    with opened as page:
        outcome = _train(config, args.resume, profile, page, team)
        if page is not None and args.live_keep:
            NOTES.print(f"the page stays until Ctrl-C: {page.url}")
            page.wait()
    if not team.first:
        return 130 if outcome.interrupted else 0
    if profile is not None and profile.steps:
        CONSOLE.print(profile.table(), markup=False)  # not a rich table, which cuts cells off where it is narrow
        CONSOLE.print(f"profile: {config.out / 'profile.json'}")
    return tell(config, outcome)


def _train(config: Config, resume: bool, profile: Profile | None, page: LivePage | None, team: Team) -> Outcome:
    """The run, told to the terminal and to its page, if it has one; of several ranks, by the first."""
    try:
        team.join()
        resume = resume or team.claimed(str(config.out.absolute()))  # what torchrun starts again goes on
        if not team.first:
            return train(config, resume=resume, profile=profile, team=team)
        with display(NOTES) as shown:
            shown.ranks = team.size
            watch = shown.watch() if page is None else Watch.joined(shown.watch(), page.live.watch())
            outcome = train(config, watch, resume=resume, profile=profile, team=team)
    finally:
        team.close()
    if page is not None:
        page.live.end("interrupted" if outcome.interrupted else "finished")
    return outcome


def overrides(args: argparse.Namespace) -> list[str]:
    """The flags as ``key=value``, those of ``--set`` last: they may go into what another flag names."""
    given = []
    for name, (key, kind) in FLAGS.items():
        value = getattr(args, name)
        if value is not None:
            given.append(f'{key}="{value}"' if kind is str else f"{key}={value}")
    if args.out is not None:
        given.append(f"train.out='{args.out.absolute()}'")
    if args.slides is not None:
        given.append(f"data.slides='{Path(args.slides).absolute()}'")
    return [*given, *args.set]


def tell(config: Config, outcome: Outcome) -> int:
    """Say how the run ended; returns the exit code."""
    if outcome.interrupted:
        NOTES.print(f"stopped after {outcome.steps} steps; checkpoint: {outcome.weights}; continue with --resume")
        return 130
    if outcome.scores:
        CONSOLE.print(score_table(list(outcome.scores), "slides not trained on"))
    CONSOLE.print(f"weights: {outcome.weights}")
    if outcome.report:
        CONSOLE.print(f"report: {outcome.report}")
    for picture in outcome.pictures:
        CONSOLE.print(f"picture: {picture}")
    return 0

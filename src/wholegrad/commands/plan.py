"""``wholegrad plan``: what a training step would need, without running it."""

from __future__ import annotations

import argparse
from pathlib import Path

import wholegrad as wg
from wholegrad.commands.common import (
    CONSOLE,
    Commands,
    add_budget,
    add_command,
    add_level,
    add_loss,
    add_network,
    blank,
    shape,
)
from wholegrad.losses import LOSSES
from wholegrad.slide.slide import open_slide
from wholegrad.train.networks import build_network

TEXT = """\
Print the plan of one training step: segments, tiles, projected peak, what whole-image training would need.
Nothing is read or run."""

EXAMPLES = """\
  wholegrad plan --shape 3x16000x64000 --budget 1.5GiB
  wholegrad plan --slide case.svs --mpp 0.5 --budget 2GiB
  wholegrad plan --network mynets:make_unet --loss dice --shape 3x8000x8000"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "plan", run, "print what a training step would need", TEXT, EXAMPLES)
    image = parser.add_mutually_exclusive_group()
    image.add_argument("--shape", type=shape, default=(3, 16000, 64000), metavar="CxHxW", help="(3x16000x64000)")
    image.add_argument("--slide", type=Path, help="a slide whose size counts")
    add_network(parser)
    add_loss(parser)
    add_level(parser)
    add_budget(parser)


def run(args: argparse.Namespace) -> int:
    image = open_slide(args.slide, mpp=args.mpp, level=args.level) if args.slide else blank(*args.shape)
    target = blank(1, *image.shape[1:])
    model = build_network(args.network)
    CONSOLE.print(str(wg.plan(model, LOSSES[args.loss], image, target, budget=args.budget)))
    return 0

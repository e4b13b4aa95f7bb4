"""``wholegrad verify``: the proof of exactness, on the user's own network and machine."""

from __future__ import annotations

import argparse

import torch

import wholegrad as wg
from wholegrad.commands.common import CONSOLE, Commands, add_command, add_loss, add_network, blobs, size
from wholegrad.losses import LOSSES
from wholegrad.train.networks import build_network

TEXT = """\
Run one training step tile by tile and once more on the whole image, in float64, and compare loss, output and
each parameter's gradient. Exit code 0 if all agree, 1 if one does not."""

EXAMPLES = """\
  wholegrad verify
  wholegrad verify --size 300x517 --loss focal
  wholegrad verify mynets:make_unet --size 512x512"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "verify", run, "prove exactness on your network", TEXT, EXAMPLES)
    add_network(parser, positional=True)
    parser.add_argument("--size", type=size, default=(512, 512), metavar="HxW", help="of the image (512x512)")
    add_loss(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the network's random weights (0)")


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    model = build_network(args.network)
    report = wg.verify(model, LOSSES[args.loss], shape=(3, *args.size), target=blobs(*args.size))
    CONSOLE.print(str(report))
    return 0 if report.ok else 1

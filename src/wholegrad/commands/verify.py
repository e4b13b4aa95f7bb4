"""``wholegrad verify``: the proof of exactness, on the user's own network and machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import wholegrad as wg
from wholegrad.commands.common import (
    CONSOLE,
    NOTES,
    TARGETS,
    Commands,
    add_command,
    add_device,
    add_loss,
    add_network,
    blaming_target,
    blank,
    size,
    where_of,
)
from wholegrad.train.made_up import model_and_loss, target_of

TEXT = f"""\
Run training steps tile by tile and one on the whole image, in float64 and float32, and compare loss, output, buffers
and each parameter's gradient. Where one differs, name the first op responsible: module path and ATen op.

{TARGETS}

The whole-image run in float64 holds every feature map at once: 16 bytes for each element or more, some 3 GB for a
small U-Net at 1024x1024 and four times that at twice the size; one that does not fit is refused. A smaller size proves
the same.

Exit code 0 if all agree, 1 if one does not, 2 if the model is refused."""

EXAMPLES = """\
  wholegrad verify
  wholegrad verify --size 300x517 --loss focal
  wholegrad verify mynets:make_unet --size 1024x1024 --loss torch.nn:BCEWithLogitsLoss --target mask
  wholegrad verify mynets:make_segmenter --loss torch.nn:CrossEntropyLoss --target labels:5 --tile 128x96
  wholegrad verify mynets:make_classifier --loss torch.nn.functional:cross_entropy --target class:2 --eval"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "verify", run, "prove exactness on your network", TEXT, EXAMPLES)
    add_network(parser, positional=True)
    parser.add_argument("--size", type=size, default=(512, 512), metavar="HxW", help="of the random image (512x512)")
    parser.add_argument("--channels", type=_count, default=3, metavar="C", help="of the image (3)")
    add_loss(parser)
    parser.add_argument(
        "--tile",
        type=size,
        action="append",
        metavar="HxW",
        help="a tile size to try; may be repeated (default: three or four)",
    )
    parser.add_argument("--eval", action="store_true", help="evaluation mode (default: as the factory left the model)")
    parser.add_argument(
        "--float32", action=argparse.BooleanOptionalAction, default=True, help="compare in float32 too (yes)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights, image and target (0)")
    add_device(parser, budget=False)


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    model, loss_fn = model_and_loss(args.network, args.loss)
    if args.eval:
        model.eval()
    target = target_of(args.target, args.size, args.seed)
    try:
        report = wg.verify(
            model,
            loss_fn,
            shape=(args.channels, *args.size),
            target=target,
            tiles=args.tile,
            single=args.float32,
            seed=args.seed,
            progress=_line(),
            device=where_of(args)["device"],
        )
    except wg.WholegradError as error:
        raise blaming_target(error, model, blank(args.channels, *args.size), args.target) from error
    CONSOLE.print(str(report), markup=False)
    return 0 if report.ok else 1


def _line() -> Callable[[str], None]:
    """Prints each stage as it begins, with the time since the start."""
    start = time.monotonic()
    return lambda stage: NOTES.print(f"{time.monotonic() - start:5.0f} s  {stage}", markup=False)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)

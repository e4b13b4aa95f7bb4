"""``wholegrad plan``: what a training step would need, without running it."""

from __future__ import annotations

import argparse
from pathlib import Path

import wholegrad as wg
from wholegrad.commands.common import (
    CONSOLE,
    NOTES,
    TARGETS,
    Commands,
    add_budget,
    add_command,
    add_level,
    add_loss,
    add_network,
    blaming_target,
    blank,
    model_and_loss,
    shape,
    target_of,
)
from wholegrad.errors import PlanError
from wholegrad.plan.storage import NARROW
from wholegrad.run.calibrate import calibrate, rates_file
from wholegrad.slide.slide import open_slide

TEXT = f"""\
Print the plan of one training step: segments, tiles, projected peak, what whole-image training would need.
Nothing is read or run.

{TARGETS}"""

EXAMPLES = """\
  wholegrad plan --shape 3x16000x64000 --budget 1.5GiB
  wholegrad plan --shape 100000x150000 --budget 4GiB --json
  wholegrad plan --slide case.svs --mpp 0.5 --budget 2GiB
  wholegrad plan --network mynets:make_unet --loss torch.nn:BCEWithLogitsLoss --target mask"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "plan", run, "print what a training step would need", TEXT, EXAMPLES)
    image = parser.add_mutually_exclusive_group()
    image.add_argument("--shape", type=area, default=(3, 16000, 64000), metavar="[Cx]HxW", help="(3x16000x64000)")
    image.add_argument("--slide", type=Path, help="a slide whose size counts")
    add_network(parser)
    add_loss(parser)
    add_level(parser)
    add_budget(parser)
    help_text = "store boundaries rounded to this dtype, in half the bytes of float32 (default: as they are)"
    parser.add_argument("--boundary-dtype", choices=NARROW, help=help_text)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this machine first (seconds), for predicted times from now on"
    )


def run(args: argparse.Namespace) -> int:
    if args.calibrate:
        _calibrate()
    image = open_slide(args.slide, mpp=args.mpp, level=args.level) if args.slide else blank(*args.shape)
    model, loss_fn = model_and_loss(args.network, args.loss)
    height, width = image.shape[1:]
    target = target_of(args.target, (height, width), empty=True)
    try:
        dtype = NARROW.get(args.boundary_dtype)
        made = wg.plan(model, loss_fn, image, target, budget=args.budget, boundary_dtype=dtype)
    except wg.WholegradError as error:
        raise blaming_target(error, model, image, args.target) from error
    print(made.to_json()) if args.json else CONSOLE.print(str(made))
    return 0


def _calibrate() -> None:
    try:
        calibrate()
    except OSError as error:
        raise PlanError(str(rates_file()), f"cannot be written: {error.strerror}", "set WHOLEGRAD_CACHE") from error
    NOTES.print(f"measured and kept in {rates_file()}")


def area(text: str) -> tuple[int, int, int]:
    """Channels, height and width from ``CxHxW``, or from ``HxW`` for three channels; for argparse."""
    return shape(f"3x{text}" if text.count("x") == 1 else text)

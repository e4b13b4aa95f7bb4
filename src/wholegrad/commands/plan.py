"""``wholegrad plan``: what a training step would need, without running it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import wholegrad as wg
from wholegrad.commands.common import (
    CONSOLE,
    NOTES,
    TARGETS,
    Commands,
    add_budget,
    add_command,
    add_device,
    add_level,
    add_loss,
    add_network,
    add_region,
    blaming_target,
    blank,
    shape,
    where_of,
)
from wholegrad.errors import ConfigError, PlanError
from wholegrad.explore.tradeoff import Row, as_json, drawing, planner, read_budgets, table, trade_off
from wholegrad.plan.storage import NARROW
from wholegrad.plan.strategies import Strategy
from wholegrad.run import calibrate, calibrate_device
from wholegrad.run.device import Device
from wholegrad.slide.slide import open_slide
from wholegrad.train.made_up import model_and_loss, target_of
from wholegrad.train.state import write_whole

TEXT = f"""\
Print the plan of one training step: segments, tiles, projected peak, and what the maps of whole-image training alone
would need. Nothing is read or run.

{TARGETS}"""

EXAMPLES = """\
  wholegrad plan --shape 3x16000x64000 --budget 1.5GiB
  wholegrad plan --shape 100000x150000 --budget 4GiB --json
  wholegrad plan --slide case.svs --mpp 0.5 --budget 2GiB
  wholegrad plan --slide case.svs --mpp 0.5 --region 20000,8000,30000,30000
  wholegrad plan --budgets 0.6GiB..64GiB --plot budgets.svg
  wholegrad plan --shape 100000x150000 --budget 8GiB --ranks 16
  wholegrad plan --calibrate --device cuda --triton
  wholegrad plan --network mynets:make_unet --loss torch.nn:BCEWithLogitsLoss --target mask"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "plan", run, "print what a training step would need", TEXT, EXAMPLES)
    image = parser.add_mutually_exclusive_group()
    image.add_argument("--shape", type=area, default=(3, 16000, 64000), metavar="[Cx]HxW", help="(3x16000x64000)")
    image.add_argument("--slide", type=Path, help="a slide whose size counts")
    add_network(parser)
    add_loss(parser)
    add_level(parser)
    add_region(parser)
    parser.add_argument("--slide-mpp", type=float, help="um a pixel of level 0, where the slide does not say")
    add_budget(parser)
    add_device(parser)
    help_text = "store boundaries rounded to this dtype, in half the bytes of float32 (default: as they are)"
    parser.add_argument("--boundary-dtype", choices=NARROW, help=help_text)
    parser.add_argument("--strategy", default="auto", choices=list(Strategy), help="how activations are held (auto)")
    help_text = "time against memory of every strategy, e.g. 0.6GiB..64GiB or 1GiB,2GiB, instead of one plan"
    parser.add_argument("--budgets", metavar="RANGE", help=help_text)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw that, with --budgets")
    help_text = "for so many processes that share the image, or RxC blocks of it; budget and times are then of each"
    parser.add_argument("--ranks", type=ranks, metavar="N|RxC", help=help_text)
    parser.add_argument("--json", action="store_true", help="print the plan, or that, as JSON")
    help_text = "measure this machine or the --device first (seconds), for predicted times from now on"
    parser.add_argument("--calibrate", action="store_true", help=help_text)


def run(args: argparse.Namespace) -> int:
    if args.plot and not args.budgets:
        raise ConfigError("--plot", "is for several budgets", "give --budgets too")
    if args.device and args.budgets:
        raise ConfigError("--budgets", "compares strategies on the CPU", "leave out --device")
    if args.ranks and args.budgets:
        raise ConfigError("--budgets", "compares strategies of one process", "leave out --ranks")
    where = where_of(args)
    if args.calibrate:
        _calibrate(where["device"])
    how = {"mpp": args.mpp, "level": args.level, "region": args.region, "slide_mpp": args.slide_mpp}
    given = next((name for name, value in how.items() if value is not None), None)
    if given and not args.slide:
        raise ConfigError(f"--{given.replace('_', '-')}", "is of a slide, and none is given", "add --slide")
    image = open_slide(args.slide, **how) if args.slide else blank(*args.shape)
    model, loss_fn = model_and_loss(args.network, args.loss)
    height, width = image.shape[1:]
    target = target_of(args.target, (height, width), empty=True)
    try:
        dtype = NARROW.get(args.boundary_dtype)
        if args.budgets:
            return _trade_off(args, trade_off(planner(model, loss_fn, image, target), read_budgets(args.budgets)))
        options = {
            "budget": args.budget,
            "boundary_dtype": dtype,
            "strategy": args.strategy,
            "ranks": args.ranks,
            **where,
        }
        made = wg.plan(model, loss_fn, image, target, **options)
    except wg.WholegradError as error:
        raise blaming_target(error, model, image, args.target) from error
    print(made.to_json()) if args.json else CONSOLE.print(str(made))
    return 0


def _trade_off(args: argparse.Namespace, rows: list[Row]) -> int:
    """Show what came of several budgets."""
    if args.plot:
        write_whole(args.plot, drawing(rows).encode())
    if args.json:
        print(json.dumps(as_json(rows), indent=1))
    else:
        CONSOLE.print(table(rows))
    return 0 if any(row.fits for row in rows) else 2


def _calibrate(device: Device | None) -> None:
    """Measure where tiles run: a device with memory of its own, or this machine."""
    there = device is not None and device.apart
    path = calibrate_device.rates_file(device) if device is not None and there else calibrate.rates_file()
    try:
        if device is not None and there:
            calibrate_device.calibrate(device)
        else:
            calibrate.calibrate()
    except OSError as error:
        raise PlanError(str(path), f"cannot be written: {error.strerror}", "set WHOLEGRAD_CACHE") from error
    NOTES.print(f"measured and kept in {path}")


def area(text: str) -> tuple[int, int, int]:
    """Channels, height and width from ``CxHxW``, or from ``HxW`` for three channels; for argparse."""
    return shape(f"3x{text}" if text.count("x") == 1 else text)


def ranks(text: str) -> int | tuple[int, int]:
    """A number of ranks, or ``RxC`` blocks; for argparse."""
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of ranks nor ROWSxCOLUMNS of blocks")
    return int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))

"""``wholegrad explore``: the paper's experiment on this machine, by strategy and size."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from wholegrad.commands.common import CONSOLE, NOTES, Commands, add_command, add_loss, add_network
from wholegrad.errors import ConfigError
from wholegrad.explore.cells import DONE, QUICK, Cell, Result, Settings, Store, all_areas, area, grid, read_areas
from wholegrad.explore.conclude import conclusions, label, size
from wholegrad.explore.report import machine, write
from wholegrad.explore.run import devices, explore, kinds
from wholegrad.plan.plan import parse_bytes, show_bytes
from wholegrad.plan.strategies import WHOLE, Strategy, check_strategy
from wholegrad.run import process
from wholegrad.train.made_up import model_and_loss

TEXT = """\
Measure one training step by every strategy (in-core, recompute, offload, stream, and managed on NVIDIA's GPUs) and on
every device that there is, on images from a quarter of a megapixel to 16000 x 64000 pixels, each in a process of its
own that is ended where it passes the limit of memory: running out of memory is a result. Writes a page with a picture
(README.md, explore.svg), a table (explore.csv) and every figure (explore.json). A run that was stopped goes on where it
was."""

EXAMPLES = """\
  wholegrad explore --quick
  wholegrad explore --out out/explore --report docs/explore.md
  wholegrad explore --network mynets:make_unet --sizes 1,4,16 --strategies in-core,stream --budget 8GiB"""

COMPARED = (*WHOLE, Strategy.STREAM)
SHARE = 0.9  # of what is free, where nobody names a limit
SECONDS, QUICK_SECONDS = 300.0, 20.0
QUICK_ALL = 280.0  # seconds after which --quick measures nothing more: with the report it ends within five minutes


def add(commands: Commands) -> None:
    parser = add_command(
        commands, "explore", run, "which strategy trains which size here, and how fast", TEXT, EXAMPLES
    )
    parser.add_argument("--out", type=Path, default=Path("out/explore"), help="folder to write to (out/explore)")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="also write page and picture here")
    parser.add_argument("--quick", action="store_true", help="up to 64 megapixels, in less than five minutes")
    parser.add_argument("--sizes", metavar="LIST", help="megapixels at 1:4, or HxW (0.25 to 1024, each twice the last)")
    names = ",".join(COMPARED)
    parser.add_argument("--strategies", default=names, metavar="LIST", help=f"of {names} and auto ({names})")
    parser.add_argument("--devices", metavar="LIST", help="of cpu, cuda and mps (those that there are)")
    parser.add_argument("--budget", metavar="SIZE", help="memory that a process may hold (nine tenths of what is free)")
    help_text = f"of a step, predicted, beyond which it is not run ({SECONDS:.0f}; --quick: {QUICK_SECONDS:.0f})"
    parser.add_argument("--seconds", type=float, help=help_text)
    add_network(parser)
    add_loss(parser)
    parser.set_defaults(loss=None)


def run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    names = [str(check_strategy(name.strip())) for name in args.strategies.split(",")]
    areas = read_areas(args.sizes) if args.sizes else [area(each) for each in QUICK] if args.quick else all_areas()
    cells = grid(areas, kinds(names, _devices(args)))
    if not cells:
        given = f"strategies {args.strategies} run on none of devices {', '.join(_devices(args))}"
        raise ConfigError("explore", f"has nothing to measure: {given}", "choose other --strategies or --devices")
    where = f"{len(cells)} cells, each within {show_bytes(settings.limit)}; results in {args.out}"
    NOTES.print(where)
    done = [0]

    def told(cell: Cell, result: Result | None) -> None:
        if result is None:
            if NOTES.is_terminal:
                NOTES.print(f"  {cell.name} ...", end="\r")
            return
        done[0] += 1
        NOTES.print(f"[{done[0]}/{len(cells)}] {label(result):10} {size(result):15} {_short(result)}")

    allowed = QUICK_ALL if args.quick else float("inf")
    results = explore(cells, settings, Store(args.out, settings), told, allowed)
    files = write(results, settings, args.out, args.report, _command())
    CONSOLE.print(conclusions(results, settings.limit, machine()))
    CONSOLE.print(f"\n{', '.join(map(str, files))}")
    return 0 if any(each.outcome == DONE for each in results) else 1


def _settings(args: argparse.Namespace) -> Settings:
    """What is measured under; a loss that the factory does not bring is the paper's, cross-entropy."""
    model_and_loss(args.network, None)  # which refuses
    loss = args.loss or ("bce" if args.network == "unet4492" else None)
    model_and_loss(args.network, loss)
    try:
        limit = parse_bytes(args.budget) if args.budget else _limit(args.out)
    except ValueError as error:
        raise ConfigError("budget", str(error), 'write for example "8GiB"') from error
    seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    return Settings(args.network, loss, args.target, limit, seconds)


def _limit(out: Path) -> int:
    """What an earlier run in this folder took as its limit, or a share of what is free, in whole GiB where it is."""
    for path in sorted((out / "cells").glob("*.json")):
        try:
            return int(json.loads(path.read_text())["settings"]["limit"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    free = int(SHARE * process.available())
    return free >> 30 << 30 if free >= 2 << 30 else free


def _devices(args: argparse.Namespace) -> list[str]:
    there = devices()
    wanted = [name.strip() for name in args.devices.split(",")] if args.devices else there
    for name in wanted:
        if name not in there:
            raise ConfigError(f"device {name}", "is not there", f"choose from {', '.join(there)}")
    return wanted


def _short(result: Result) -> str:
    if result.outcome != DONE:
        return f"{result.outcome}: {result.said}"
    assert result.seconds is not None and result.peak is not None
    return f"{result.seconds:8.3g} s  {show_bytes(result.peak):>10}"


def _command() -> str:
    return shlex.join(["wholegrad", *sys.argv[1:]])

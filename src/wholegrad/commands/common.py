"""What several commands share: flags, sizes, and the network and image that they name."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.console import Console
from torch import nn

import wholegrad as wg
from wholegrad.errors import CaptureError, ConfigError, WholegradError
from wholegrad.losses import LOSSES
from wholegrad.run.device import open_device
from wholegrad.slide.slide import Region
from wholegrad.train.made_up import KINDS
from wholegrad.train.networks import NETWORKS

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
CONSOLE = Console(soft_wrap=True, highlight=False)  # standard output: results
NOTES = Console(stderr=True, soft_wrap=True, highlight=False)  # standard error: progress

TARGETS = """\
module:factory is called without arguments and returns the model, or the model and its loss. What the loss gets as its
target is made up:
  labels             0, 1 and 255 ("ignore"), uint8 (1, 1, H, W)
  labels:K           K classes, int64 (1, H, W), as cross-entropy takes it
  mask               0 and 1, floats (1, 1, H, W), as BCEWithLogitsLoss takes it
  class:K            one of K classes for the whole image, int64 (1,)
  none               None
  module:function    what function(H, W) returns"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other of wholegrad's."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def rank_name() -> str:
    """Which rank speaks, where torchrun started several."""
    return f" [rank {os.environ.get('RANK')}]" if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    text: str,
    examples: str,
) -> Parser:
    """A subcommand with its help: one summary line, a paragraph, examples."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, refuse=parser.error)
    return parser


def add_budget(parser: Parser) -> None:
    help_text = "most memory for the whole process, e.g. 1.5GiB, or auto: a safe share of what is free (auto)"
    parser.add_argument("--budget", metavar="SIZE", help=help_text)


def add_device(parser: Parser, budget: bool = True) -> None:
    """Where tiles run; :func:`where_of` reads it."""
    parser.add_argument("--device", metavar="NAME", help="run tiles on cpu, cuda, cuda:1, mps or auto (cpu)")
    if budget:
        help_text = "most memory of the host for the whole process, where --budget is that of a GPU (auto)"
        parser.add_argument("--host-budget", metavar="SIZE", help=help_text)
    parser.add_argument("--tf32", action="store_true", help="let a GPU round factors of float32 products to 10 bits")
    help_text = "refuse ops of a GPU that sum in no fixed order, so that two runs give the same bits"
    parser.add_argument("--deterministic", action="store_true", help=help_text)
    help_text = "convolutions of few channels on a GPU by the project's Triton kernels"
    parser.add_argument("--triton", action="store_true", help=help_text)


def where_of(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_device` added, as calls of the library take it."""
    how = {name: getattr(args, name) for name in ("tf32", "deterministic", "triton")}
    device = open_device(args.device, **how) if args.device else None
    for name, wanted in how.items():
        if wanted and (device is None or not device.apart):
            raise ConfigError(f"--{name}", "is of a GPU", "give --device cuda")
    return {"device": device, "host_budget": getattr(args, "host_budget", None)}


def add_level(parser: Parser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--mpp", type=float, help="read at this many micrometres a pixel, resampled if no level has them"
    )
    group.add_argument("--level", type=int, help="use this level, 0 the largest")


def add_region(parser: Parser) -> None:
    help_text = "part of the slide, in level-0 pixels, or 'bounds' for what the scanner says it scanned"
    parser.add_argument("--region", type=region, metavar="X,Y,W,H", help=help_text)


def region(text: str) -> Region:
    """Four whole numbers, or "bounds", for argparse."""
    if text.strip() == "bounds":
        return "bounds"
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y,WIDTH,HEIGHT in level-0 pixels, nor 'bounds'")
    x, y, width, height = (int(part) for part in parts)
    return x, y, width, height


def add_network(parser: Parser, positional: bool = False) -> None:
    help_text = f"a network that ships ({', '.join(NETWORKS)}) or module:factory for your own (default: unet4492)"
    if positional:
        parser.add_argument("network", nargs="?", default="unet4492", metavar="NETWORK", help=help_text)
    else:
        parser.add_argument("--network", default="unet4492", metavar="NETWORK", help=help_text)


def add_loss(parser: Parser) -> None:
    known = f"{', '.join(LOSSES)}, or module:function or module:class (default: what the factory returned, or bce+dice)"
    parser.add_argument("--loss", metavar="LOSS", help=known)
    parser.add_argument("--target", default="labels", metavar="TARGET", help="what the loss gets (labels); see above")


def size(text: str) -> tuple[int, int]:
    """Height and width from ``HEIGHTxWIDTH``, for argparse."""
    height, width = _numbers(text, 2, "HEIGHTxWIDTH such as 16000x64000")
    return height, width


def shape(text: str) -> tuple[int, int, int]:
    """Channels, height and width from ``CxHxW``, for argparse."""
    channels, height, width = _numbers(text, 3, "CHANNELSxHEIGHTxWIDTH such as 3x16000x64000")
    return channels, height, width


def blank(channels: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """An image of zeros ``(C, H, W)`` that takes one byte, for plans."""
    return np.broadcast_to(np.uint8(0), (channels, height, width))


def check_out_is_new(path: str, remedy: str) -> None:
    """Refuse to write over a file."""
    if Path(path).exists():
        raise ConfigError(path, "exists already", remedy)


def make_folder(path: Path) -> None:
    """A folder for results, if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be a folder ({error.strerror})", "choose another --out") from None


def _numbers(text: str, count: int, wanted: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+" + r"x\d+" * (count - 1), text) or "0" in text.split("x"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return tuple(int(part) for part in text.split("x"))


def blaming_target(error: WholegradError, model: nn.Module, image: Any, name: str) -> WholegradError:
    """The same error, or one about the target if the model can be captured without the loss."""
    if not isinstance(error, CaptureError) or error.__cause__ is None:
        return error
    try:
        wg.plan(model, None, image)
    except WholegradError:
        return error
    cause = error.__cause__
    said = " ".join(f"is not what the loss takes ({type(cause).__name__}: {cause}".split())[:300]
    return ConfigError(f"target {name}", f"{said})", f"choose another --target: {KINDS}")

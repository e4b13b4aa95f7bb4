"""What several commands share: flags, sizes, and the network and image that they name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.console import Console

from wholegrad.errors import ConfigError
from wholegrad.losses import LOSSES
from wholegrad.train.networks import NETWORKS

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
CONSOLE = Console(soft_wrap=True, highlight=False)  # standard output: results
NOTES = Console(stderr=True, soft_wrap=True, highlight=False)  # standard error: progress


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other of wholegrad's."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


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
    parser.set_defaults(run=run)
    return parser


def add_budget(parser: Parser) -> None:
    help_text = "most memory for the whole process, e.g. 1.5GiB (default: a safe share of what is free)"
    parser.add_argument("--budget", metavar="SIZE", help=help_text)


def add_level(parser: Parser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--mpp", type=float, help="use the level nearest to this many micrometres a pixel")
    group.add_argument("--level", type=int, help="use this level, 0 the largest")


def add_network(parser: Parser, positional: bool = False) -> None:
    help_text = f"a network that ships ({', '.join(NETWORKS)}) or module:factory for your own (default: unet4492)"
    if positional:
        parser.add_argument("network", nargs="?", default="unet4492", metavar="NETWORK", help=help_text)
    else:
        parser.add_argument("--network", default="unet4492", metavar="NETWORK", help=help_text)


def add_loss(parser: Parser) -> None:
    parser.add_argument("--loss", choices=LOSSES, default="bce+dice", help="the loss (default: bce+dice)")


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


def blobs(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Made-up labels ``(1, H, W)`` with tissue, background and pixels to ignore, for proofs."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array([0, 1, 255], np.uint8), p=(0.5, 0.4, 0.1), size=(height // 8 + 1, width // 8 + 1))
    labels: npt.NDArray[np.uint8] = coarse.repeat(8, axis=0).repeat(8, axis=1)[None, :height, :width]
    return labels


def check_out_is_new(path: str, remedy: str) -> None:
    """Refuse to write over a file."""
    from pathlib import Path

    if Path(path).exists():
        raise ConfigError(path, "exists already", remedy)


def _numbers(text: str, count: int, wanted: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+" + r"x\d+" * (count - 1), text) or "0" in text.split("x"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return tuple(int(part) for part in text.split("x"))

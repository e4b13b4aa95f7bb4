"""The command line: finds the command, runs it, and turns every refusal into one plain line and an exit code.

Exit codes: 0 done, 1 a proof or some of several slides failed, or something is broken (doctor), 2 refused (wrong
input, impossible budget), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import wholegrad as wg
from wholegrad.commands.common import NOTES, Parser, rank_name

COMMANDS = (
    "demo", "segment", "train", "launch", "evaluate", "predict", "view", "plan", "verify", "explore", "synth", "cache",
    "export", "doctor", "completion",
)  # fmt: skip
ABOUT = "Train convolutional networks end to end on gigapixel images, exactly, in the memory that there is."


def build_parser(command: str | None = None) -> Parser:
    """The whole command line; given the name of a command, with that one alone, since others' libraries take memory."""
    parser = Parser(prog="wholegrad", description=ABOUT, epilog="wholegrad COMMAND --help shows examples.")
    parser.add_argument("--version", action="version", version=f"wholegrad {wg.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser.set_defaults(whole=build_parser)  # for a command that tells of all
    for name in (command,) if command in COMMANDS else COMMANDS:
        import_module(f"wholegrad.commands.{name}").add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors go to standard error, a line each."""
    words = sys.argv[1:] if argv is None else argv
    args, unknown = build_parser(words[0] if words else None).parse_known_args(words)
    if unknown:
        args.refuse(f"unrecognized arguments: {' '.join(unknown)}")  # by the command's own parser, which knows its help
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is said once, by us
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.showwarning = _warn
            return int(args.run(args))
    except KeyboardInterrupt:
        NOTES.print(f"wholegrad{rank_name()}: stopped", markup=False)
        return 130
    except BrokenPipeError:
        return 1
    except wg.WholegradError as error:
        return _refuse(args, str(error), error)
    except (MemoryError, OSError) as error:
        return _refuse(args, f"{type(error).__name__}: {error}", error)


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning in one line, without the place in the code."""
    NOTES.print(f"wholegrad: warning: {' '.join(str(message).split())}", markup=False)


def _refuse(args: argparse.Namespace, message: str, error: BaseException) -> int:
    if args.debug:
        raise error
    if not getattr(error, "quiet", False):
        print(f"wholegrad{rank_name()}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2

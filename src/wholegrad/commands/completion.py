"""``wholegrad completion``: what makes a shell complete commands, options and files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wholegrad.commands.common import Commands, add_command

SHELLS = ("bash", "zsh", "fish")
PATHS = ("weights", "out", "mask", "slides", "prediction", "json", "csv")  # arguments that are paths and read as text

TEXT = """\
Print the completion script of a shell, made from the commands of this version. Install it once:

  bash   wholegrad completion bash > ~/.local/share/bash-completion/completions/wholegrad
  zsh    wholegrad completion zsh > ~/.zfunc/_wholegrad     (with fpath=(~/.zfunc $fpath) before compinit in ~/.zshrc)
  fish   wholegrad completion fish > ~/.config/fish/completions/wholegrad.fish"""

EXAMPLES = """\
  wholegrad completion bash > ~/.local/share/bash-completion/completions/wholegrad
  source <(wholegrad completion bash)"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "completion", run, "print a shell's completion script", TEXT, EXAMPLES)
    parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    print(script(args.whole(), args.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of all commands, for one shell."""
    import shtab

    for each in _parsers(parser):
        _mark_files(each)
    text: str = shtab.complete(parser, shell=shell)
    return text


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser and those of all its commands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.extend(each for child in action.choices.values() for each in _parsers(child))
    return found


def _mark_files(parser: argparse.ArgumentParser) -> None:
    """Arguments that are paths are completed as such."""
    import shtab

    for action in parser._actions:
        if action.nargs != 0 and action.choices is None and (action.type is Path or action.dest in PATHS):
            marked: Any = action
            marked.complete = shtab.FILE

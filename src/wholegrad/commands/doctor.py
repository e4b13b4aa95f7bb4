"""``wholegrad doctor``: what this machine is, what works on it, and what to mend."""

from __future__ import annotations

import argparse

from rich.markup import escape

from wholegrad.commands.common import CONSOLE, NOTES, Commands, add_command
from wholegrad.doctor import Section, State, as_json, broken, examine, mendings

TEXT = """\
Look at everything that a run depends on: machine, versions, accelerators, memory and its limits, threads, how fast
slides are decoded and boundaries written here, compiled kernels, extras, and a small training step against whole-image
autograd. Then say what to mend.

Exits with 1 if something is broken; what is absent or could be better is no reason to."""

EXAMPLES = """\
  wholegrad doctor
  wholegrad doctor --quick
  wholegrad doctor --json > doctor.json"""

MARKS = {
    State.OK: " ",
    State.ABSENT: "[dim]-[/dim]",
    State.ADVICE: "[yellow]![/yellow]",
    State.BROKEN: "[bold red]X[/bold red]",
}


def add(commands: Commands) -> None:
    parser = add_command(commands, "doctor", run, "look at this machine and say what to mend", TEXT, EXAMPLES)
    parser.add_argument("--quick", action="store_true", help="measure the least, and compile and import nothing")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    sections = []
    for section in examine(args.quick, None if args.json else _next):
        sections.append(section)
        if not args.json:
            _show(section)
    if args.json:
        print(as_json(sections))
    else:
        _advise(sections)
    return int(broken(sections))


def _next(name: str) -> None:
    """What is looked at now, for those who watch; a line that the next one writes over."""
    if NOTES.is_terminal:
        NOTES.print(f"[dim]{name} ...[/dim]", end="\r")


def _show(section: Section) -> None:
    over = " " * 12 if NOTES.is_terminal else ""
    CONSOLE.print(f"[bold]{section.name}[/bold]{over}")
    width = max((len(each.name) for each in section.findings), default=0)
    for each in section.findings:
        how = f" [dim]({escape(each.mend or '')})[/dim]" if each.state is State.ABSENT and each.mend else ""
        CONSOLE.print(f" {MARKS[each.state]} {escape(each.name):{width}}  {escape(each.text)}{how}")


def _advise(sections: list[Section]) -> None:
    found = mendings(sections)
    CONSOLE.print("[bold]what to mend[/bold]")
    for state, what in found:
        CONSOLE.print(f" {MARKS[state]} {escape(what)}")
    if not found:
        CONSOLE.print("   nothing")
    elif not broken(sections):
        CONSOLE.print("nothing is broken")

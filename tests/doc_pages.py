"""Reads the pages of docs/ as programs: which blocks run, in which order, and what they are to print.

Of a page's fenced blocks

- ``python`` and ``sh`` run, in order, in one process and one scratch folder; a ``text`` block right after one is what
  it prints;
- one with ``title="NAME"`` is a file of that name;
- ``toml`` is a run's configuration;
- one after a line ``*Not run by the tests: REASON.*`` is only checked against the command line's parser.

Anything else that looks like a program is a mistake (``escaped``).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
SHOWN = [*PAGES, ROOT / "README.md"]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"\*Not run by the tests[^:*]*: (?P<reason>[^*]{8,})\.\*\s*$")
TITLE = re.compile(r'title="(?P<name>[^"]+)"')
INLINE = re.compile(r"(?<!`)`(?P<code>[^`\n]+)`(?!`)")
COMMAND = re.compile(r"^\s*(?:\$ )?(?:wholegrad|python3?|pip|make|git|torchrun|sbatch|docker|import|from \w+ import)\b")
STATUS = re.compile(r"# exits with (?P<status>\d+)")
KINDS = ("python", "sh", "toml", "text", "")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file that it is, if any, its text, its line, and why it is not run."""

    kind: str
    title: str | None
    body: str
    line: int
    reason: str | None

    @property
    def runs(self) -> bool:
        return self.kind in ("python", "sh") and self.reason is None and self.title is None


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page."""
    found = []
    for match in FENCE.finditer(text):
        kind, _, rest = match["info"].strip().partition(" ")
        title, reason = TITLE.search(rest), NOT_RUN.search(text[: match.start()].rstrip().rpartition("\n\n")[2])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(kind, title and title["name"], match["body"], line, reason and _one_line(reason["reason"])))
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def escaped(page: Path) -> list[str]:
    """What looks like a program on a page and is neither run nor said not to be."""
    text, problems = page.read_text(), []
    previous: Block | None = None
    for block in blocks(text):
        where = f"{page.name}:{block.line}"
        if block.kind not in KINDS:
            problems.append(f"{where}: a block of {block.kind!r}: use one of {', '.join(filter(None, KINDS))}")
        elif block.kind in ("text", "") and not _follows(previous, block):
            looks = [line for line in block.body.splitlines() if COMMAND.match(line)]
            problems += [f"{where}: looks like a program: {line}" for line in looks if not _make(line)]
        previous = block
    outside = FENCE.sub("", text)
    indented = [line for line in re.findall(r"^(?: {4}|\t)(.*)$", outside, re.MULTILINE) if COMMAND.match(line)]
    problems += [f"{page.name}: indented, so nobody runs it: {line}" for line in indented]
    return problems


def _follows(previous: Block | None, block: Block) -> bool:
    return block.kind == "text" and previous is not None and previous.kind in ("python", "sh")


def _make(line: str) -> bool:
    """Whether a line calls targets of the Makefile that are there."""
    words = line.split("#")[0].split()
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return words[:1] == ["make"] and set(words[1:]) <= known


def commands(block: Block) -> list[tuple[list[str], int]]:
    """The commands of a shell block, as words, each with the exit status that it is to have."""
    found = []
    for line in block.body.replace("\\\n", " ").splitlines():
        status = STATUS.search(line)
        words = shlex.split(line, comments=True)
        if words:
            found.append((words, int(status["status"]) if status else 0))
    return found


def every_command(page: Path) -> list[str]:
    """Each ``wholegrad ...`` that a page shows, in blocks and in its text."""
    text = page.read_text()
    shown = [shlex.join(words) for block in blocks(text) if block.kind == "sh" for words, _ in commands(block)]
    shown += [match["code"] for match in INLINE.finditer(FENCE.sub("", text))]
    return [each for each in shown if re.match(r"wholegrad [a-z]", each)]


def unknown_words(shown: str, commands_of: dict[str, argparse.ArgumentParser]) -> list[str]:
    """The command or the flags of a shown command line that the program does not have."""
    _, name, *rest = shlex.split(shown, comments=True)
    if name not in commands_of:
        return [name]
    known, unknown = commands_of[name]._option_string_actions, []
    words = iter(rest)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.startswith("--") and flag not in known:
            unknown.append(word)
        elif flag in known and not equals and known[flag].nargs is None:
            next(words, None)  # its value, whatever it looks like
    return unknown


PROGRAM = """\
import sys
from pathlib import Path

def command(words, status):
    from wholegrad import cli
    try:
        code = cli.main(words)
    except SystemExit as exit:
        code = exit.code
    sys.stderr.flush()
    assert code == status, f"wholegrad {' '.join(words)}: exit status {code}, not {status}"

"""


def program(page: Path, mark: str) -> tuple[str, list[tuple[Block, str | None]]]:
    """A script that runs a page's blocks in order, a mark printed before each; and the blocks with what they show."""
    script = [PROGRAM]
    run: list[tuple[Block, str | None]] = []
    previous: Block | None = None
    for block in blocks(page.read_text()):
        if block.kind == "text" and previous is not None and previous.runs:
            run[-1] = (run[-1][0], block.body)
        elif block.title is not None:
            script.append(f"Path({block.title!r}).write_text({block.body!r})\n")
        elif block.runs:
            script.append(f"print({mark.format(len(run))!r}, flush=True)\n{_code(page, block)}\n")
            run.append((block, None))
        previous = block
    return "".join(script), run


def _code(page: Path, block: Block) -> str:
    if block.kind == "python":
        return block.body
    calls = []
    for words, status in commands(block):
        assert words[0] == "wholegrad", f"{page.name}:{block.line}: {words[0]}: not run; say so, with a reason"
        calls.append(f"command({words[1:]!r}, {status})")
    return "\n".join(calls)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one test process makes and the others wait for."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder.with_suffix(".done")
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + 500
        while not done.exists() and time.monotonic() < end:
            time.sleep(0.2)
        assert done.exists() and done.read_text() == "", f"{name} could not be made by another test process"
        return folder
    try:
        make(folder)
    except BaseException:
        done.write_text("failed")
        raise
    done.write_text("")
    return folder

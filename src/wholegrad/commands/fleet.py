"""What ``segment`` and ``predict`` share where they go over many slides: flags, progress, the table at the end."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wholegrad.commands.common import CONSOLE, NOTES, Parser, make_folder
from wholegrad.errors import ConfigError
from wholegrad.fleet.dispatch import Fleet, Told, local_workers, remote_workers, share_of_machine
from wholegrad.fleet.jobs import Job, Outcome
from wholegrad.fleet.manifest import CLAIMED, DONE, FAILED, NAME, WAITING, Manifest, Row, Slide
from wholegrad.fleet.sources import find_slides
from wholegrad.run.budget import budget_bytes, is_automatic
from wholegrad.slide.bigtiff import PartialFile
from wholegrad.train.plans import share_of_budget

SHOWN = 20  # rows of the table at the end; the CSV has all


def add_fleet(parser: Parser) -> None:
    """Flags that make a command go over many slides by a manifest."""
    group = parser.add_argument_group("many slides (docs/launching.md)")
    group.add_argument(
        "--workers", type=int, metavar="N", help="worker processes on this machine, a slide each at once"
    )
    group.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler's workers, such as tcp://host:8786")
    group.add_argument("--retries", type=int, default=2, help="of a slide whose worker died or met the unforeseen (2)")
    group.add_argument("--retry-failed", action="store_true", help="try slides again that failed in an earlier run")


def is_fleet(args: argparse.Namespace) -> bool:
    """Whether the flags ask for workers.

    Raises:
        ConfigError: they make no sense.
    """
    if args.workers is not None and args.scheduler is not None:
        raise ConfigError("--workers and --scheduler", "both given", "give one of them")
    if args.workers is not None and args.workers < 1:
        raise ConfigError("--workers", f"is {args.workers}", "give 1 or more")
    if args.scheduler is not None and is_automatic(args.budget):
        remedy = "give that of each worker, since those of one machine do not know of each other"
        raise ConfigError("--scheduler", "without --budget", remedy)
    if args.retries < 0:
        raise ConfigError("--retries", f"is {args.retries}", "give 0 or more")
    return args.workers is not None or args.scheduler is not None


def budget_of_worker(args: argparse.Namespace) -> str | int | None:
    """What each worker may take: what was asked for, else an equal share of what is safe on this machine."""
    budget_bytes(args.budget)
    return share_of_budget(args.budget, args.workers or 1)


def run_fleet(args: argparse.Namespace, slides: list[Path], out: Path, job: Job) -> int:
    """Do ``job`` to all slides; returns the exit code: 1 if one failed, 130 after Ctrl-C."""
    found = find_slides(slides, leave=out)
    make_folder(out)
    manifest = Manifest(out, job.about())
    workers: AbstractContextManager[Any]
    threads = None
    if args.scheduler is None:
        workers, threads = local_workers(args.workers), share_of_machine(args.workers)
    else:
        workers = remote_workers(args.scheduler)
    interrupted = False
    try:
        missing = [name for name in found if not all(path.exists() for path in job.files(name))]
        manifest.add(found, missing, again=args.retry_failed)
        counts = manifest.counts(list(found))
        if counts[WAITING] or counts[CLAIMED]:
            with workers as client, _bar() as bar:
                Fleet(client, manifest, job, threads, args.retries, args.workers or 0, _told(bar)).run(list(found))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        manifest.give_back()
        counts = manifest.counts(list(found))
        rows = [row for row in manifest.rows() if row.name in found]
        manifest.close()
    summary = out / "fleet.csv"
    _write(summary, rows)
    CONSOLE.print(_table(rows), markup=False)
    left = counts[WAITING] + counts[CLAIMED]
    CONSOLE.print(f"{counts[DONE]} done, {counts[FAILED]} failed, {left} left of {len(found)}: {summary}, {out / NAME}")
    if interrupted:
        NOTES.print("stopped; the same command goes on")
        return 130
    return 1 if counts[FAILED] or left else 0


def _bar() -> Progress:
    columns = (TextColumn("slides"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=NOTES, transient=True, disable=not NOTES.is_terminal)


def _told(bar: Progress) -> Told:
    task = bar.add_task("slides", total=None)
    say: Callable[[str], None] = lambda text: bar.console.print(text, markup=False)  # noqa: E731

    def start(left: int, total: int) -> None:
        bar.update(task, total=total, completed=total - left)
        say(f"{total} slides, {total - left} of them done or failed before")

    def done(slide: Slide, outcome: Outcome) -> None:
        bar.advance(task)
        say(f"done: {slide.name} in {outcome.seconds:.1f} s")

    def failed(slide: Slide, cause: str, again: bool) -> None:
        bar.advance(task, 0 if again else 1)
        say(f"{'again' if again else 'failed'}: {cause}")

    return Told(start, done, failed, say)


def _table(rows: list[Row]) -> str:
    """Plain text, for a rich table cuts cells off where the terminal is narrow; those that are not done come first."""
    shown = sorted(rows, key=lambda row: row.state == DONE)[:SHOWN]
    lines = [("slide", "state", "tries", "seconds", "what")]
    for row in shown:
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append((row.name, row.state, str(row.attempts), seconds, row.cause or _figures(row.result)))
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:4]]
    made = ["  ".join([a.ljust(w), b.ljust(x), c.rjust(y), d.rjust(z), e]) for a, b, c, d, e in lines
            for w, x, y, z in [widths]]  # fmt: skip
    if len(rows) > SHOWN:
        made.append(f"and {len(rows) - SHOWN} more")
    return "\n".join(made)


def _figures(result: dict[str, Any] | None) -> str:
    if not result:
        return ""
    size = " x ".join(map(str, result["shape"]))
    return size if "tissue" not in result else f"{size}, tissue {result['tissue']:.1%}, {result['area']:.1f} mm2"


def _write(path: Path, rows: list[Row]) -> None:
    """All slides as a table that other programs read, whole or not at all."""
    text = io.StringIO()
    keys = sorted({key for row in rows for key in row.result or {}})
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide", "path", "state", "tries", "seconds", "cause", *keys])
    for row in rows:
        figures = [(row.result or {}).get(key, "") for key in keys]
        writer.writerow([row.name, row.path, row.state, row.attempts, row.seconds, row.cause or "", *figures])
    file = PartialFile(path)
    try:
        file.append(text.getvalue().encode())
        file.commit()
    except BaseException:
        file.discard()
        raise

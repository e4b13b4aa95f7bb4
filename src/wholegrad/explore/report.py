"""The report of an exploration: a page in Markdown with its picture, a table as CSV, and everything as JSON."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import wholegrad as wg
from wholegrad.explore.cells import DONE, Result, Settings
from wholegrad.explore.conclude import (
    PAPER,
    PAPER_AREA,
    PAPER_BYTES,
    PAPER_SECONDS,
    Machine,
    by_label,
    conclusions,
    label,
    size,
)
from wholegrad.explore.plot import COLOURS, Panel, Series, figure
from wholegrad.plan.plan import show_bytes
from wholegrad.run import process
from wholegrad.train.state import write_whole

GIB = float(2**30)
PAGE = """\
# Which memory architecture does a training step need?

One training step of {network} on made-up images, by strategy and size, each in a process of its own that may hold
{limit}: the experiment of {paper}, on this machine.

    {command}

{conclusions}

![peak memory and seconds a step against area]({picture})

Dots are measured. Circles are what a plan says that it would need; such steps were not run, or ran out of memory. The
star is the paper's.

{table}

*Other work*: cores that the machine spent on other processes meanwhile, on average.

## Strategies

- **in-core**: whole-image autograd of the model as it is, channels last where the model allows it, PyTorch's default
  allocator.
- **recompute**: whole maps; what passes between chunks of the graph is kept, the rest is computed twice.
- **offload**: whole-image autograd; what the backward pass needs waits in a file (of a GPU: in the host's pinned
  memory).
- **managed** (of NVIDIA's GPUs): whole-image autograd with tensors in memory that the driver pages between the GPU and
  the host; its peak is of tensors, wherever they lay.
- **stream**: tiles, as wholegrad trains.

Each process makes a plan, warms up on a small image, and times a step with Adam; where it takes less than 5 s, three
steps, of which the first is not counted. Peaks are of the whole process, Python and PyTorch included. Pixels and labels
are a pattern repeated as it is read, so that no disk is timed but that of offload.

{left}Measured {dates}: {machine}.
"""
ORDER = ("in-core", "recompute", "offload", "managed", "stream", "auto")  # of rows
COLOURED = ("in-core", "recompute", "offload", "stream", "auto")  # on the CPU; the rest take the colours that are left


def machine() -> Machine:
    """This one."""
    return Machine(f"{process.machine()}, {platform.system()}", process.total_memory())


def coloured(labels: Sequence[str]) -> dict[str, int]:
    """Indices among ``COLOURS``: those of the CPU's strategies stay the same, whatever else is drawn."""
    left = cycle(k for k in range(len(COLOURS)) if k >= len(COLOURED) or COLOURED[k] not in labels)
    return {label: COLOURED.index(label) if label in COLOURED else next(left) for label in labels}


def drawing(results: Sequence[Result], limit: int, memory: int) -> str:
    """Peak memory and seconds a step against area, as SVG."""
    peaks, times = [], []
    labels = by_label(results)
    colours = coloured(list(labels))
    for name, found in labels.items():
        colour = colours[name]
        done = [each for each in found if each.outcome == DONE]
        top = max((each.cell.pixels for each in done), default=0)
        beyond = [
            (each.megapixels, each.projected / GIB) for each in found if each.cell.pixels > top and each.projected
        ]
        peaks.append(Series(name, [(each.megapixels, (each.peak or 0) / GIB) for each in done], beyond, colour))
        times.append(Series(name, [(each.megapixels, each.seconds or 0.0) for each in done], (), colour))
    across = "megapixels of the image"
    levels = [(memory / GIB, f"this machine's memory, {memory / GIB:.0f} GiB")]
    if limit < 0.8 * memory:
        levels.append((limit / GIB, f"limit, {limit / GIB:.2g} GiB"))
    paper = PAPER_AREA / 1e6
    return figure(
        [
            Panel("peak memory of the process, GiB", across, peaks, levels,
                  [(paper, PAPER_BYTES / GIB, "paper: over 100 GB")]),
            Panel("seconds a training step", across, times, (), [(paper, PAPER_SECONDS, "paper: 81 s, M1 Ultra")]),
        ]
    )  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """A row a cell, in Markdown."""
    head = "| area | MP | strategy | outcome | s a step | ns a pixel | peak | projected | predicted s | other work |"
    rows = [head, "|" + " --- |" * 10]
    for each in sorted(results, key=lambda each: (each.cell.pixels, ORDER.index(each.cell.strategy), each.cell.device)):
        seconds = "" if each.seconds is None else f"{each.seconds:.3g}"
        pace = "" if each.seconds is None else f"{1e9 * each.seconds / each.cell.pixels:.3g}"
        cells = [
            size(each), f"{each.megapixels:.4g}", label(each), each.outcome, seconds, pace, _bytes(each.peak),
            _bytes(each.projected), "" if each.predicted is None else f"{each.predicted:.3g}",
            "" if each.others is None else f"{each.others:.2f}",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _bytes(count: int | None) -> str:
    return "" if count is None else show_bytes(count)


def table_csv(results: Sequence[Result]) -> str:
    """The same with every figure, as CSV."""
    out = io.StringIO()
    rows = [each.flat() for each in results]
    writer = csv.DictWriter(out, list(rows[0]) if rows else ["strategy"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def page(results: Sequence[Result], settings: Settings, here: Machine, command: str, picture: str) -> str:
    """The report in Markdown."""
    dates = sorted(each.date for each in results if each.date) or ["?"]
    reasons = [f"- {label(each)}, {size(each)}: {each.said}" for each in results if each.outcome != DONE and each.said]
    left = "## What was not run to its end\n\n" + "\n".join(reasons) + "\n\n" if reasons else ""
    return PAGE.format(
        network=settings.network,
        limit=show_bytes(settings.limit),
        paper=PAPER,
        command=command,
        conclusions=conclusions(results, settings.limit, here),
        picture=picture,
        table=table(results),
        left=left,
        dates=f"from {dates[0]} to {dates[-1]}",
        machine=f"{here.words}, Python {platform.python_version()}, torch {_torch()}, wholegrad {wg.__version__}",
    )


def _torch() -> str:
    import torch

    return str(torch.__version__)


def write(results: Sequence[Result], settings: Settings, out: Path, report: Path | None, command: str) -> list[Path]:
    """Write the report into ``out``, and its page and picture once more at ``report``; returns what was written."""
    here = machine()
    picture = drawing(results, settings.limit, here.memory)
    whole = {
        "command": command, "settings": asdict(settings), "machine": asdict(here), "versions": {"torch": _torch()},
        "conclusions": conclusions(results, settings.limit, here), "results": [asdict(each) for each in results],
    }  # fmt: skip
    files = {
        out / "explore.csv": table_csv(results),
        out / "explore.json": json.dumps(whole, indent=1) + "\n",
        out / "explore.svg": picture,
        out / "README.md": page(results, settings, here, command, "explore.svg"),
    }
    if report is not None:
        drawn = report.with_suffix(".svg")
        files |= {drawn: picture, report: page(results, settings, here, command, drawn.name)}
    for path, text in files.items():
        write_whole(path, text.encode())
    return list(files)

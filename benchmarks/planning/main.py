"""Seconds that planning takes once a network is captured, for the networks of docs/support.md and at full width.

    python -W ignore benchmarks/planning/main.py

Writes ``README.md`` beside this file. Nothing is run and no pixel exists. Every row is one network, captured once and
planned several times, each time from nothing but the graph: processor seconds of the first time and the median of all.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wholegrad.errors import CaptureError, UnsupportedOpError
from wholegrad.given import given
from wholegrad.graph.capture import capture
from wholegrad.plan.plan import parse_bytes
from wholegrad.plan.planner import Request, make_plan
from wholegrad.run.process import machine
from wholegrad.run.sources import raw_images

HERE = Path(__file__).parent
RESERVED = 600 << 20  # bytes of interpreter and libraries, the same for every network
Case = tuple[str, Callable[[], torch.nn.Module], Any, Any, Any]  # name, network, loss, image and target


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="16000x64000", help="height x width (default %(default)s)")
    parser.add_argument("--budget", default="8GiB", help="of each plan (default %(default)s)")
    parser.add_argument("--times", type=int, default=5, help="plans of each network (default %(default)s)")
    parser.add_argument("--only", default="", help="networks whose name contains this; writes nothing")
    return parser.parse_args()


def narrow(size: tuple[int, int]) -> Iterator[Case]:
    """The networks of docs/support.md."""
    from test_gigapixel_plans import blanks
    from zoo_networks import NETWORKS

    for entry in NETWORKS:
        image, target = (blanks(make(*entry.size), size) for make in (entry.image, entry.target))
        yield entry.name, lambda entry=entry: entry.build().float(), entry.loss, image, target


def wide(size: tuple[int, int]) -> Iterator[Case]:
    """Networks as their libraries have them."""
    capturing = runpy.run_path(str(HERE.parent / "capture" / "main.py"))
    blank = capturing["blank"]
    for name, make, loss, labels in capturing["NETWORKS"]:
        shape = size if labels is None or not labels[1] else (1, *size)
        target = capturing["SLIDE_LABEL"] if labels is None else blank(labels[0], shape)
        yield name, make, loss, blank(np.uint8, (3, *size)), target


def row(case: Case, args: argparse.Namespace) -> str | None:
    """One line of the table; None for what cannot run in tiles at this size."""
    name, make, loss, image, target = case
    model = make()
    inputs = given(image, target, torch.float32)
    try:
        graph = capture(model, loss, inputs.inputs)
    except (CaptureError, UnsupportedOpError):
        return None
    request = Request(parse_bytes(args.budget), RESERVED, True, 2, raw=raw_images(graph, inputs.sources))
    seconds = []
    for _ in range(args.times):
        started = time.process_time()
        plan = make_plan(graph, request)
        seconds.append(time.process_time() - started)
    figures = f"{seconds[0]:.2f} | {statistics.median(seconds):.2f}"
    return f"| {name} | {len(graph.nodes)} | {len(plan.segments)} | {figures} |"


def table(cases: Iterator[Case], args: argparse.Namespace) -> list[str]:
    lines = ["| network | nodes | segments | first (s) | median (s) |", "|---|---|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    for case in cases:
        if args.only in case[0] and (line := row(case, args)) is not None:
            lines.append(line)
            print(line, flush=True)
    return lines


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    high, across = (int(edge) for edge in args.size.split("x"))
    lines = ["# How long planning takes", "", *(__doc__ or "").strip().splitlines(), ""]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    lines += [
        f"Images of {high} x {across} pixels, a budget of {args.budget}, two workers, {args.times} plans of each.",
        "Networks without locality (attention at an eighth, flatten and linear) cannot be planned at this size.",
        "",
        f"Measured on {datetime.date.today()}: {machine()}; {versions}; one thread.",
        "",
    ]
    for title, cases in (("Narrow, as in docs/support.md", narrow), ("As their libraries have them", wide)):
        lines += [f"## {title}", "", *table(cases((high, across)), args), ""]
    if not args.only:
        (HERE / "README.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()

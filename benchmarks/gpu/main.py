"""Everything that a GPU has to show, in one call of at most ten minutes.

    PYTHONPATH=src python benchmarks/gpu/main.py --out out/gpu [--minutes 9.5] [--only step,whole]

Each stage is a process of its own with a share of the time, so that one that fails, hangs or runs out of memory takes
nothing from the others. Results are lines of JSON in ``results.jsonl`` under ``--out``, beside ``log.txt``; the table
is printed at the end and lies in ``table.md`` there. ``--table results.jsonl`` makes it again from kept results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STAGES = (  # name, command, seconds at most: the claims first
    ("machine", ["stages.py", "machine"], 60),
    ("step", ["stages.py", "step"], 120),
    ("whole", ["stages.py", "whole"], 90),
    ("errors", ["stages.py", "errors", "--size", "2048x3072"], 40),
    ("kernels", ["stages.py", "kernels"], 60),
    ("wide", ["stages.py", "wide", "--size", "16384x16384"], 90),
    ("wide65536", ["stages.py", "wide", "--size", "65536x65536"], 180),
    ("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"], 150),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu", help="folder of results and logs")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default %(default)s)")
    order = ", ".join(stage[0] for stage in STAGES)
    parser.add_argument("--only", help=f"stages, by commas; default all, in this order: {order}")
    parser.add_argument("--size", default="16000x64000", help="of the published network's step (default %(default)s)")
    parser.add_argument("--table", type=Path, help="make the table of these results and measure nothing")
    return parser.parse_args()


def command(words: list[str], size: str) -> list[str]:
    """A stage's command line."""
    if words[0] != "stages.py":
        return [sys.executable, *words]
    given = words[1:] if "--size" in words else [*words[1:], "--size", size]
    return [sys.executable, str(HERE / "stages.py"), *given]


def run(name: str, words: list[str], limit: float, args: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    """One stage: its results, and one that says how it ended."""
    started = time.monotonic()
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("a") as errors, tempfile.TemporaryFile("w+") as output:
        errors.write(f"==== {name}\n")
        errors.flush()
        child = subprocess.Popen(command(words, args.size), cwd=ROOT, env=environment, stdout=output, stderr=errors)
        try:
            ended = str(child.wait(limit))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            ended = f"stopped after {limit:.0f} s"
        output.seek(0)
        lines = output.read().splitlines()
        if name == "tests":
            errors.write("\n".join(lines) + "\n")
    found = [json.loads(line) for line in lines if line.startswith("{")]
    last = next((line for line in reversed(lines) if line.strip()), "") if name == "tests" else ""
    found.append({"stage": name, "name": "end", "exit": ended, "took": time.monotonic() - started, "last": last})
    return found


def about() -> dict[str, Any]:
    """The machine, the code and the time, for the table's foot."""

    def said(*words: str) -> str:
        try:
            return subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    gpu = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader")
    return {
        "stage": "about", "name": "about", "gpu": gpu, "commit": said("git", "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count(),
        "python": platform.python_version(), "command": " ".join(sys.argv),
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """All results as Markdown."""
    lines = ["| stage | what | median | spread | device peak | projected | more |", "|---|---|---|---|---|---|---|"]
    for each in found:
        rest = {k: v for k, v in each.items() if k not in ("stage", "name", "seconds", "peak_bytes", "projected_bytes",
                                                           "process_peak_bytes", "each")}  # fmt: skip
        times = each.get("seconds", [])
        median = f"{statistics.median(times):.4g} s" if times else ""
        spread = f"{min(times):.4g} to {max(times):.4g}" if len(times) > 1 else ""
        more = ", ".join(f"{key} {_number(value)}" for key, value in rest.items())
        sizes = [_bytes(each.get(key)) for key in ("peak_bytes", "projected_bytes")]
        lines.append(f"| {each['stage']} | {each['name']} | {median} | {spread} | {sizes[0]} | {sizes[1]} | {more} |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f} GiB"


def main() -> None:
    args = arguments()
    if args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = args.only.split(",") if args.only else [stage[0] for stage in STAGES]
    unknown = set(wanted) - {stage[0] for stage in STAGES}
    if unknown:
        sys.exit(f"no such stage: {', '.join(sorted(unknown))}")
    end = time.monotonic() + 60 * args.minutes
    results = args.out / "results.jsonl"
    (args.out / "log.txt").write_text("")
    found = [about()]
    results.write_text(json.dumps(found[0]) + "\n")
    for name, words, limit in STAGES:
        left = end - time.monotonic()
        if name not in wanted or left < 5:
            continue
        new = run(name, words, min(limit, left), args, args.out / "log.txt")
        found += new
        with results.open("a") as file:
            file.writelines(json.dumps(each) + "\n" for each in new)
        print(f"{name}: {new[-1]['exit']} after {new[-1]['took']:.0f} s {new[-1]['last']}", flush=True)
    text = table(found)
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""A gigapixel training step of the 4492-parameter U-Net: seconds, memory, whole-image peers, and two tilings compared.

    python benchmarks/gigapixel_step/main.py [--only step,peers,...] [--size 16000x64000] [--steps 3] [--write]

Every measurement is a fresh process. Its result is kept as JSON under ``out/gigapixel_step/results``; tables are made
from all results kept for the size. ``--write`` puts them and the plot into this folder. The exit status is not 0 if a
measurement failed or the two tilings disagree.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import tables
from common import area
from runs import HERE, ROOT, STAGES, Settings, carry_out, environment, prepare


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STAGES), help="stages, with commas (default %(default)s)")
    parser.add_argument("--size", default="16000x64000", help="height x width in pixels (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one to warm up (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "gigapixel_step", help="of slides and results")
    parser.add_argument("--write", action="store_true", help="write tables and plot into this folder")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Settings and stages; what cannot be is refused."""
    stages = [stage for stage in args.only.split(",") if stage]
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        sys.exit(f"no stage is called {unknown[0]}: choose from {', '.join(STAGES)}")
    if args.steps < 1:
        sys.exit("--steps must be at least 1")
    try:
        area(args.size)
    except ValueError:
        sys.exit(f"--size {args.size} is not a height and a width, such as 16000x64000")
    data = os.environ.get("WHOLEGRAD_DATA")
    if data is None and "tilings" in stages:
        sys.exit("tilings needs real slides: set WHOLEGRAD_DATA to their folder, or leave tilings out of --only")
    return Settings(args.size, args.steps, args.folder.resolve(), Path(data or "")), stages


def plot(settings: Settings, out: Path) -> None:
    """Draw seconds and memory against area, in an environment of its own."""
    python = environment(settings.folder, "plot")
    subprocess.run([python, str(HERE / "plot.py"), str(settings.results), str(out)], check=True)


def main() -> int:
    args = arguments()
    settings, stages = settings_of(args)
    if set(stages) - {"tilings"}:
        prepare(settings)
    done = [carry_out(settings, run) for stage in stages for run in STAGES[stage](settings)]
    results = tables.load(settings.results)
    text = tables.render(results)
    print(text)
    if any(name.startswith("area-") for name in results):
        plot(settings, (HERE if args.write else settings.results) / "area.svg")
    if args.write:
        tables.write(HERE / "README.md", text)
    wrong = tables.disagreements(results) if "tilings" in stages else []
    for line in wrong:
        print(line, file=sys.stderr)
    return 0 if all(done) and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())

"""``wholegrad segment``: the tissue of slides, out of the box, as mask, outlines and picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from wholegrad.commands.common import CONSOLE, NOTES, Commands, add_budget, add_command, make_folder
from wholegrad.commands.fleet import add_fleet, budget_of_worker, is_fleet, run_fleet
from wholegrad.errors import ConfigError, WholegradError
from wholegrad.fleet.jobs import ENDINGS, Segmenting
from wholegrad.nets.tissue import MPP
from wholegrad.run.budget import budget_bytes
from wholegrad.segment import MIN_AREA, MIN_HOLE, Segmented, segment
from wholegrad.slide.grid import OutlineOptions
from wholegrad.train.progress import display
from wholegrad.train.tables import stem

TEXT = """\
Find the tissue of slides with the network that ships, and write for each NAME.mask.ome.tif (opens in QuPath),
NAME.mask.geojson (outlines, QuPath) and NAME.mask.png (a picture). A slide that fails is reported and skipped; the exit
code is then 1.

With --workers or --scheduler SLIDE may also be a folder, a text file of paths or a CSV with a column "slide". The
folder of the results then keeps a manifest: the same command goes on where it was stopped, does no slide twice, and may
run several times at once on one folder."""

EXAMPLES = """\
  wholegrad segment case.svs
  wholegrad segment slides/*.svs --out masks
  wholegrad segment archive/ --out masks --workers 8 --budget 2GiB
  wholegrad segment slides.csv --out masks --budget 2GiB --scheduler tcp://head:8786
  wholegrad segment case.tif --slide-mpp 0.25 --min-area 20000 --only mask geojson"""

MPPS = 0.2, 32.0  # um a pixel, the least and most to work at


def add(commands: Commands) -> None:
    parser = add_command(commands, "segment", run, "find the tissue of slides", TEXT, EXAMPLES)
    parser.add_argument("slides", type=Path, nargs="+", metavar="SLIDE", help="any format that wg.open_slide reads")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where results go (here)")
    parser.add_argument("--only", nargs="+", choices=tuple(ENDINGS), default=list(ENDINGS), help="what to write (all)")
    parser.add_argument("--mpp", type=float, default=MPP, help=f"um a pixel to work at ({MPP:g}, as it was trained)")
    parser.add_argument("--slide-mpp", type=float, help="um a pixel of level 0, where a slide does not say")
    area, hole = "leave out pieces that are smaller", "fill holes that are smaller"
    parser.add_argument("--min-area", type=float, default=MIN_AREA, metavar="UM2", help=f"{area} ({MIN_AREA:g})")
    parser.add_argument("--min-hole", type=float, default=MIN_HOLE, metavar="UM2", help=f"{hole} ({MIN_HOLE:g})")
    parser.add_argument("--simplify", type=float, metavar="UM", help="most that outlines may move (one pixel)")
    add_budget(parser)
    add_fleet(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    if is_fleet(args):
        kinds = tuple(dict.fromkeys(args.only))
        shaping = (args.mpp, args.slide_mpp, args.min_area, args.min_hole, args.simplify)
        job = Segmenting(str(args.out.absolute()), kinds, *shaping, budget_of_worker(args))
        return run_fleet(args, args.slides, args.out, job)
    names = [stem(path.name) for path in args.slides]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(twice, "is the name of two slides", "segment them into different folders")
    make_folder(args.out)
    found: list[tuple[str, Segmented]] = []
    for number, (path, name) in enumerate(zip(args.slides, names, strict=True), 1):
        try:
            found.append((name, _segment(args, path, name, f"{number} of {len(names)}")))
        except Exception as error:  # whatever a library raises on one slide, the others can still be done
            if args.debug:
                raise
            said = str(error) if isinstance(error, WholegradError) else f"{path}: {type(error).__name__}: {error}"
            NOTES.print(f"wholegrad: error: {' '.join(said.split())}")
    if found:
        CONSOLE.print(_table(found))
    failed = len(names) - len(found)
    if failed:
        NOTES.print(f"{failed} of {len(names)} slides failed")
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    """What is wrong with the options is said once, before any slide."""
    if not MPPS[0] <= args.mpp <= MPPS[1]:
        raise ConfigError(
            "--mpp", f"is {args.mpp:g}", f"give {MPPS[0]:g} to {MPPS[1]:g}; the network learned at {MPP:g}"
        )
    OutlineOptions(args.min_area, args.min_hole, args.simplify).in_pixels(args.mpp)
    budget_bytes(args.budget)


def _segment(args: argparse.Namespace, path: Path, name: str, where: str) -> Segmented:
    with display(NOTES, f"{name} ({where})") as shown:
        return segment(
            path,
            [args.out / f"{name}{ENDINGS[kind]}" for kind in dict.fromkeys(args.only)],
            mpp=args.mpp,
            slide_mpp=args.slide_mpp,
            min_area=args.min_area,
            min_hole=args.min_hole,
            simplify=args.simplify,
            budget=args.budget,
            progress=shown.tile,
        )


def _table(found: list[tuple[str, Segmented]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("slide")
    for heading in ("pixels", "um/px", "tissue", "mm2", "seconds"):
        table.add_column(heading, justify="right")
    for name, result in found:
        size = f"{result.shape[0]} x {result.shape[1]}"
        row = (size, f"{result.mpp:.3g}", f"{result.tissue:.1%}", f"{result.area:.1f}", f"{result.seconds:.1f}")
        table.add_row(name, *row)
    return table

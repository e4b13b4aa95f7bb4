"""``wholegrad evaluate``: how good masks, or a network, are on whole slides, slide by slide and over all."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import wholegrad as wg
from wholegrad.commands.common import CONSOLE, NOTES, Commands, add_budget, add_command, add_device, where_of
from wholegrad.errors import ConfigError
from wholegrad.metrics.compare import METRICS, TOLERANCE, SlideScore, compare
from wholegrad.metrics.files import find_pairs, opened, read_pairs
from wholegrad.metrics.summary import Summary, summarise
from wholegrad.slide.bigtiff import PartialFile
from wholegrad.train.cases import open_cases
from wholegrad.train.config import load_config
from wholegrad.train.judge import judged
from wholegrad.train.metrics import evaluate
from wholegrad.train.plans import device_name, share_of_budget, threads_of_rank
from wholegrad.train.progress import display
from wholegrad.train.split import entries, of_part
from wholegrad.train.state import load_model
from wholegrad.train.team import Place, Team

TEXT = """\
Score predicted masks against true ones, or a network on the slides of a run: Dice, IoU, precision and recall of
exactly counted pixels, and, for masks that tell their um a pixel, boundary F1, Hausdorff-95 and mean surface distance.

Prints a row for each slide, then mean, standard deviation and the 95 % bootstrap interval over slides. Several
classes: their mean, without background (--json has each). Pixels whose true label is 255 are not counted. Masks are
label files (.tif, .zarr, .npy, .png) or outlines (GeoJSON, ASAP or Aperio XML), which need their slide."""

EXAMPLES = """\
  wholegrad evaluate --prediction mask.ome.tif --mask case.mask.tif
  wholegrad evaluate --prediction predictions/ --mask masks/ --tolerance 20 --json scores.json --csv scores.csv
  wholegrad evaluate --prediction mask.ome.tif --mask case.geojson --slides case.svs
  wholegrad evaluate --pairs pairs.csv
  wholegrad evaluate run.toml --weights out/train --budget 1.5GiB"""

Row = tuple[str, Mapping[str, float | None]]
SHORT = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "boundary_f1": "boundary F1",
    "hausdorff95_um": "HD95 um",
    "surface_distance_um": "surface um",
}


def add(commands: Commands) -> None:
    parser = add_command(commands, "evaluate", run, "score masks or a network on whole slides", TEXT, EXAMPLES)
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="a run's TOML file, with --weights")
    parser.add_argument("--prediction", type=Path, metavar="PATH", help="predicted mask, or folder of them")
    parser.add_argument("--mask", type=Path, metavar="PATH", help="true mask, or folder of masks named alike")
    help_text = "slide, or folder of slides named alike, that outlines lie on"
    parser.add_argument("--slides", type=Path, metavar="PATH", help=help_text)
    parser.add_argument("--pairs", type=Path, metavar="CSV", help="columns prediction and mask, perhaps name, slide")
    parser.add_argument(
        "--weights", metavar="PATH", help="weights file or folder of a run, to score on CONFIG's slides"
    )
    parser.add_argument("--part", choices=("test", "train"), default="test", help="which of CONFIG's slides (test)")
    help_text = f"um within which a boundary is right, for boundary F1 ({TOLERANCE:g})"
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="UM", help=help_text)
    help_text = "class of outlines that is label 1, then 2, ... (one class needs no name)"
    parser.add_argument("--class", dest="classes", action="append", metavar="NAME", help=help_text)
    help_text = "class of outlines whose pixels are not to be counted ('Ignore', and names that end in a star)"
    parser.add_argument("--ignore", action="append", metavar="NAME", help=help_text)
    parser.add_argument("--mpp", type=float, help="um a pixel of predictions that do not tell")
    parser.add_argument("--no-boundary", action="store_true", help="count pixels only")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores, of each class too, and summaries")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each slide")
    add_budget(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    details: list[dict[str, Any]] = []
    rows = _of_network(args) if args.config else _of_masks(args, details)
    if args.config and not rows:  # another rank tells them
        return 0
    metrics = [name for name in METRICS if any(values.get(name) is not None for _, values in rows)]
    summaries = {name: summarise([values.get(name) for _, values in rows], args.seed) for name in metrics}
    CONSOLE.print(_table(rows, summaries), markup=False)
    for name, summary in summaries.items():
        if summary.missing:
            NOTES.print(f"{SHORT[name]}: {summary.missing} of {len(rows)} slides without (nothing to measure to)")
    if args.json:
        told = {name: asdict(summary) for name, summary in summaries.items()}
        slides = details or [{"name": name, **values} for name, values in rows]
        _write(args.json, json.dumps({"slides": slides, "summary": told}, indent=1, allow_nan=False))
    if args.csv:
        _write(args.csv, _as_csv(rows, metrics))
    return 0


def _of_masks(args: argparse.Namespace, details: list[dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    classes = None if args.classes is None else {name: label for label, name in enumerate(args.classes, 1)}
    for pair in _pairs(args):
        with opened(pair, args.mpp, classes, args.ignore) as (predicted, true, mpp):
            score = compare(
                predicted,
                true,
                mpp=mpp,
                tolerance=args.tolerance,
                boundaries=not args.no_boundary,
                name=pair.name,
            )
        if mpp is None and not args.no_boundary:
            NOTES.print(f"{pair.name}: um a pixel unknown, so no distances; give --mpp")
        rows.append((pair.name, {metric: score.value(metric) for metric in METRICS}))
        details.append(_detail(score))
    return rows


def _pairs(args: argparse.Namespace) -> list[Any]:
    if args.pairs and not (args.prediction or args.mask or args.slides):
        return read_pairs(args.pairs)
    if args.pairs or not (args.prediction and args.mask):
        raise ConfigError(
            "evaluate", "does not know what to compare", "give --prediction and --mask, --pairs or CONFIG"
        )
    return find_pairs(args.prediction, args.mask, args.slides)


def _of_network(args: argparse.Namespace) -> list[Row]:
    """The network on each whole slide of a run; pixels are counted where they are computed, and no mask is written."""
    if not args.weights or args.prediction or args.mask or args.pairs or args.slides:
        raise ConfigError("evaluate", "CONFIG goes with --weights alone", "leave out masks and --slides")
    config = load_config(args.config)
    cases = open_cases(of_part(entries(config), args.part), config.data)
    if not cases:
        raise ConfigError(str(args.config), f"names no slides in data.{args.part}", "add some, or choose --part")
    team, model = Team(Place.found(), config.mesh.timeout), load_model(args.weights)
    args.device = device_name(args.device, team.place)
    where = where_of(args)
    torch.set_num_threads(threads_of_rank(team.place))
    budget = share_of_budget(args.budget, team.local_size)
    with display(NOTES, "slide") as shown:

        def tile(event: wg.Progress) -> None:
            team.beat()
            if team.first:
                shown.tile(event)

        try:
            team.join()
            scores = judged(team, cases, lambda some, _: evaluate(model, some, budget, progress=tile, **where))
        finally:
            team.close()
    if not team.first:
        return []
    return [(s.name, {"dice": s.dice, "iou": s.iou, "precision": s.precision, "recall": s.recall}) for s in scores]


def _detail(score: SlideScore) -> dict[str, Any]:
    classes = [
        {"label": one.label, **asdict(one.counts), **{name: value(one) for name, value in METRICS.items()}}
        for one in score.classes
    ]
    return {"name": score.name, **{metric: score.value(metric) for metric in METRICS}, "classes": classes}


def _table(rows: Sequence[Row], summaries: Mapping[str, Summary]) -> str:
    """Plain text, for a rich table cuts cells off where the terminal is narrow."""
    lines = [["slide", *(SHORT[name] for name in summaries)]]
    lines += [[name, *(_said(metric, values.get(metric)) for metric in summaries)] for name, values in rows]
    if len(rows) > 1:
        parts = {"mean": "mean", "standard deviation": "deviation", "95 % interval from": "low", "to": "high"}
        for label, part in parts.items():
            lines.append([label, *(_said(name, getattr(one, part)) for name, one in summaries.items())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    said = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
    made = list(said)
    if len(rows) > 1:
        made.insert(1 + len(rows), "")
    return "\n".join(made)


def _said(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if metric.endswith("_um") else f"{value:.4f}"


def _as_csv(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide", *metrics])
    for name, values in rows:
        writer.writerow([name, *("" if values.get(m) is None else repr(values[m]) for m in metrics)])
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    file = PartialFile(path)
    try:
        file.append(text.encode())
        file.commit()
    except BaseException:
        file.discard()
        raise
    CONSOLE.print(f"written: {path}")

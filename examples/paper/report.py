"""The tables and learning curves of this folder's README, from the scores that runs left."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from arms import ARMS, FEW, FOLDS
from score import dice
from thresholds import TCGA, clam, otsu

import wholegrad as wg
from wholegrad.graph.geometry import Box
from wholegrad.train.svg import HEIGHT, WIDTH, Line, chart

HERE = Path(__file__).parent
MARKS = ("<!-- results: written by main.py --write -->", "<!-- end of results -->")
COLOURS = {"c1": "#2563b8", "c2": "#c2571a", "c3": "#16805c", "c4": "#7a3cbe"}
LOOKS = """
svg { background: #ffffff; font: 12px system-ui, sans-serif; } text { fill: #66707b; }
.grid { stroke: #e2e4e7; } .line { fill: none; stroke-width: 2; }
""" + "".join(f".line.{c} {{ stroke: {v}; }} .dot.{c} {{ fill: {v}; }} " for c, v in COLOURS.items())
CURVES = {"whole": "c1", "thumbnail-16": "c2", "thumbnail-4": "c3", "patches": "c4"}


def write(out: Path, pairs: list[tuple[Path, Path]]) -> None:
    """Put tables between the README's marks, and the curves beside it."""
    names = [slide.stem for slide, _ in pairs]
    arms = {name: found for name in ARMS if (found := read(out, name)) and len(found["scores"]) == len(names)}
    text = "\n\n".join(
        [
            table(names, arms, thresholds(pairs)),
            summary(arms),
            "![learning curves](curves.svg)",
            *synthetic(out),
            machine(list(arms)),
        ]
    )
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    readme.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    (HERE / "curves.svg").write_text(curves(out, [name for name in CURVES if name in arms]))


def read(out: Path, name: str) -> dict[str, Any] | None:
    """Scores by slide over all folds of a way to train, its seconds and its largest peak."""
    files = [out / name / f"fold-{fold}" / "scores.json" for fold in range(FOLDS)]
    told = [json.loads(file.read_text()) for file in files if file.exists()]
    if not told:
        return None
    scores = {slide: values for each in told for slide, values in each["scores"].items()}
    return {"scores": scores, "seconds": sum(t["seconds"] for t in told), "peak": max(t["peak"] for t in told)}


def thresholds(pairs: list[tuple[Path, Path]]) -> dict[str, tuple[float, float]]:
    """Dice of saturation-Otsu and of CLAM's recipe, on pictures of 4 um a pixel, on the grid of the masks."""
    found = {}
    for slide, mask in pairs:
        with wg.open_slide(slide, mpp=4.0) as image:
            picture = np.moveaxis(image.read(Box(0, image.shape[1], 0, image.shape[2])), 0, 2).copy()
        truth = np.asarray(tifffile.imread(mask), np.uint8)
        rows, cols = (
            ((np.arange(n) + 0.5) * h / n).astype(int) for n, h in zip(truth.shape, picture.shape, strict=False)
        )
        masks = (made[rows][:, cols].astype(np.uint8) for made in (otsu(picture), clam(picture, 4.0, TCGA)))
        otsus, clams = (dice(each, truth) for each in masks)
        found[slide.stem] = (otsus, clams)
    return found


def table(names: list[str], arms: dict[str, Any], simple: dict[str, tuple[float, float]]) -> str:
    """Dice of each slide by the network that never saw it: its mask as it is, for whole slides also tidied."""
    head = ["slide", "whole, tidied", *arms, "Otsu", "CLAM"]
    lines = [head, ["---"] * len(head)]
    for name in names:
        shown = [arm["scores"][name]["network"] for arm in arms.values()]
        first = [arms["whole"]["scores"][name]["tidied"]] if "whole" in arms else [float("nan")]
        lines.append([name.split("_mpp")[0], *(f"{v:.3f}" for v in (*first, *shown, *simple[name]))])
    columns = np.array([[float(cell) for cell in line[1:]] for line in lines[2:]])
    for label, values in (("**mean**", columns.mean(0)), ("standard deviation", columns.std(0, ddof=1))):
        lines.append([label, *(f"{v:.3f}" for v in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(arms: dict[str, Any]) -> str:
    """What each way to train is, and what it took."""
    lines = [
        "| way to train | what a step sees | updates | mean Dice | tidied | least | minutes | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        raw, neat = (np.array([s[key] for s in arm["scores"].values()]) for key in ("network", "tidied"))
        cells = [f"{raw.mean():.3f} | {neat.mean():.3f} | {raw.min():.3f}", f"{arm['seconds'] / 60:.0f}"]
        row = [name, ARMS[name].title, str(ARMS[name].updates), *cells, f"{arm['peak'] / 2**30:.2f} GiB"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def curves(out: Path, arms: list[str]) -> str:
    """Mean Dice of held-back slides during training, over folds, as an SVG that stands alone."""
    lines = []
    for name in arms:
        folds = [_held(out / name / f"fold-{fold}" / "log.jsonl") for fold in range(FOLDS)]
        share = [step / ARMS[name].updates for step, _ in folds[0]]
        mean = np.mean([[value for _, value in fold] for fold in folds], axis=0)
        lines.append(Line("", CURVES[name], share, [float(v) for v in mean], dots=True))
    drawn = chart("Dice of held-back slides", lines, across="share of updates")
    body = drawn[drawn.index("<svg") : drawn.index("</svg>")]
    body = body.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT + 24}" ', 1)
    body = body.replace(f'viewBox="0 0 {WIDTH} {HEIGHT}"', f'viewBox="0 0 {WIDTH} {HEIGHT + 24}"')
    keys = "".join(
        f'<g><circle class="dot {CURVES[name]}" cx="{70 + 130 * i}" cy="{HEIGHT + 12}" r="4"/>'
        f'<text x="{80 + 130 * i}" y="{HEIGHT + 16}">{name}</text></g>'
        for i, name in enumerate(arms)
    )
    return f"{body}<style>{LOOKS}</style>{keys}</svg>\n"


def _held(log: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(line["step"], line["dice"]) for line in lines if line["kind"] == "validation"]


def synthetic(out: Path) -> list[str]:
    """A sentence on synthetic slides, if they were tried."""
    file = out / "synthetic" / "fold-0" / "scores.json"
    if not file.exists():
        return []
    found = [one["network"] for one in json.loads(file.read_text())["scores"].values()]
    shown = ", ".join(f"{value:.3f}" for value in found)
    return [
        f"On synthetic slides alone (six of 4000 x 8000 pixels to learn from, {FEW} updates): {shown} on four others."
    ]


def machine(arms: list[str]) -> str:
    """Where and when."""
    threads, today = torch.get_num_threads(), datetime.datetime.now(datetime.UTC).date()
    where = f"{platform.processor() or platform.machine()}, {threads} threads, {platform.system()}"
    return (
        f"Written {today}: {where}, Python {platform.python_version()}, torch {torch.__version__}. Minutes are "
        "training alone, all five folds together. Command: "
        f"`python examples/paper/main.py --arms {','.join(arms)} --write`."
    )

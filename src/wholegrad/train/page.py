"""The report of a run: one HTML file that needs nothing else, neither a network nor a script, light or dark.

Everything in it comes from what the run left on disk and from its plans: curves from the log, scores, pictures, the
division of slides, settings and versions.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

import wholegrad as wg
from wholegrad.plan.plan import show_bytes
from wholegrad.train.log import read_log
from wholegrad.train.metrics import Score, mean_dice
from wholegrad.train.page_style import STYLE
from wholegrad.train.split import from_json
from wholegrad.train.state import Card, write_whole
from wholegrad.train.svg import Line, chart, smoothed
from wholegrad.train.tables import PARTS, Config

PICTURE = 1500  # pixels: the longer side of a picture in the page
QUALITY = 82  # of its JPEG
SMOOTH = 25  # a curve's average is over one part in so many of its steps
WORDS = {"train": "to learn from", "val": "to choose by", "test": "to be judged on"}
Plans = Sequence[tuple[tuple[int, ...], wg.Plan]]
Lines = list[dict[str, Any]]


def write_report(config: Config, card: Card, scores: Sequence[Score], pictures: Sequence[Path], plans: Plans) -> Path:
    """Write ``report.html`` into the run's folder; returns its path.

    Raises:
        WholegradError: it cannot be written.
    """
    log = read_log(config.out / "log.jsonl")
    body = [
        _head(config, card, scores, log),
        _curves(log),
        _slides(scores),
        _pictures(scores, pictures),
        _plans(plans, log),
        _split(config),
        _settings(card),
    ]
    title = escape(f"{config.out.name}: {card.network}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )
    path = config.out / "report.html"
    write_whole(path, page.encode())
    return path


def _head(config: Config, card: Card, scores: Sequence[Score], log: Lines) -> str:
    steps = _kind(log, "step")
    validations = _kind(log, "validation")
    tiles: list[tuple[str, str, str]] = []
    if scores:
        tiles.append((f"{mean_dice(scores):.3f}", "mean Dice", f"on {_count(len(scores), 'test slide')}"))
    if validations:
        best = max(validations, key=lambda line: line["dice"])
        tiles.append((f"{best['dice']:.3f}", "best validation Dice", f"after {best['step']} steps"))
    if steps:
        seconds = sorted(line["seconds"] for line in steps)[len(steps) // 2]
        peak, projected = max(line["peak"] for line in steps), max(line["projected"] for line in steps)
        tiles.append((str(len(steps)), "steps", f"{seconds:.3g} s each (median), {_hours(steps)} in all"))
        tiles.append((show_bytes(peak), "peak memory", f"{show_bytes(projected)} projected"))
    skipped = len(_kind(log, "skip"))
    if skipped:
        tiles.append((str(skipped), "steps skipped", "slides that could not be read; see the log"))
    cells = "".join(
        f'<div class="tile"><strong>{escape(value)}</strong><span>{escape(name)}</span>'
        f"<small>{escape(note)}</small></div>"
        for value, name, note in tiles
    )
    what = f"{card.network}, {card.parameters:,} parameters, whole slides one at a time, exact gradients"
    return f"<header><h1>{escape(config.out.name)}</h1><p>{escape(what)}</p></header><div class='tiles'>{cells}</div>"


def _curves(log: Lines) -> str:
    steps, validations = _kind(log, "step"), _kind(log, "validation")
    x = [line["step"] + 1 for line in steps]
    over = max(1, len(steps) // SMOOTH)

    def both(key: str, style: str, label: str) -> list[Line]:
        values = [float(line[key]) for line in steps]
        faint = [Line("each step", f"{style} faint", x, values)] if over > 1 else []
        return [*faint, Line(f"{label}, mean of {over}" if over > 1 else label, style, x, smoothed(values, over))]

    judged = [line["step"] for line in validations], [line["dice"] for line in validations]
    dice = [*both("dice", "c1", "training"), Line("validation", "c2", *judged, dots=True)]
    projected = list(accumulate((line["projected"] for line in steps), max))  # a peak is of all steps so far, too
    gib = [
        Line("projected", "c3", x, [most / 2**30 for most in projected]),
        Line("peak", "c1", x, [line["peak"] / 2**30 for line in steps]),
        Line("now", "c2 faint", x, [line["rss"] / 2**30 for line in steps]),
    ]
    norms = [(line["step"] + 1, line["norm"]) for line in steps if line["norm"]]
    charts = [
        chart("Loss", both("loss", "c1", "training"), log=True),
        chart("Dice", dice),
        chart("Learning rate", [Line("", "c4", x, [line["lr"] for line in steps])]),
        chart("Norm of the gradient", [Line("", "c3", [a for a, _ in norms], [b for _, b in norms])], log=True),
        chart("Memory of the process", gib, "GiB"),
        chart("Seconds a step", [Line("", "c4", x, [line["seconds"] for line in steps])]),
    ]
    return f"<h2>Curves</h2><div class='charts'>{''.join(charts)}</div>" if steps else ""


def _slides(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = "".join(
        f"<tr><td>{escape(score.name)}</td><td>{score.pixels / 1e6:,.1f}</td>{_bar(score.dice)}"
        f"<td>{score.precision:.3f}</td><td>{score.recall:.3f}</td></tr>"
        for score in sorted(scores, key=lambda score: score.dice)
    )
    return (
        "<h2>Test slides</h2><p>None of them was trained on. The worst come first.</p><div class='wide'><table>"
        "<thead><tr><th>slide</th><th>megapixels</th><th>Dice</th><th>precision</th><th>recall</th></tr></thead>"
        f"<tbody>{rows}</tbody><tfoot><tr><td>mean</td><td></td>{_bar(mean_dice(scores))}<td></td><td></td></tr>"
        "</tfoot></table></div>"
    )


def _bar(dice: float) -> str:
    return f'<td class="bar"><span style="width:{100 * dice:.1f}%"></span><b>{dice:.3f}</b></td>'


def _pictures(scores: Sequence[Score], pictures: Sequence[Path]) -> str:
    """The best and the worst slide, if they were drawn."""
    drawn = {path.stem: path for path in pictures}
    ranked = [score for score in sorted(scores, key=lambda score: -score.dice) if score.name in drawn]
    if not ranked:
        return ""
    chosen = [("Best", ranked[0])] + ([("Worst", ranked[-1])] if len(ranked) > 1 else [])
    figures = "".join(
        f'<figure class="picture"><img alt="{escape(score.name)}: slide, truth and prediction"'
        f' src="{_inline(drawn[score.name])}"><figcaption>{word}: {escape(score.name)}, Dice {score.dice:.3f}'
        "</figcaption></figure>"
        for word, score in chosen
    )
    return f"<h2>Best and worst</h2>{figures}"


def _inline(path: Path) -> str:
    """A picture as a data URL, small enough for a page."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    small.save(buffer, "jpeg", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plans(plans: Plans, log: Lines) -> str:
    if not plans:
        return ""
    rows = "".join(
        f"<tr><td>{' x '.join(map(str, size))}</td><td>{len(plan.segments)}</td><td>{plan.tiles}</td>"
        f"<td>{show_bytes(plan.projected)}</td><td>{show_bytes(plan.whole_image)}</td></tr>"
        for size, plan in plans
    )
    largest = max(plans, key=lambda each: each[0][1] * each[0][2])[1]
    peak = max((line["peak"] for line in _kind(log, "step")), default=0)
    said = f"<p>The process held {show_bytes(peak)} at most.</p>" if peak else ""
    return (
        f"<h2>Plan and memory</h2>{said}<div class='wide'><table>"
        "<thead><tr><th>image</th><th>segments</th><th>tiles</th>"
        "<th>projected peak of the process</th><th>whole-image autograd: maps alone</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        f"<details><summary>The largest plan, segment by segment</summary><pre>{escape(str(largest))}</pre></details>"
    )


def _split(config: Config) -> str:
    path = config.out / "split.json"
    if not path.exists():
        return ""
    found = from_json(path)
    parts = []
    for part in PARTS:
        names = [entry.name for entry in found if entry.part == part]
        if names:
            listed = ", ".join(escape(name) for name in names)
            parts.append(f"<dt>{_count(len(names), 'slide')} {WORDS[part]}</dt><dd>{listed}</dd>")
    return f"<h2>Slides</h2><dl>{''.join(parts)}</dl>"


def _settings(card: Card) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in card.versions.items())
    settings = escape(json.dumps(card.config, indent=2))
    return (
        f"<h2>Settings</h2><p>{escape(versions)}</p><details><summary>Every setting of the run</summary>"
        f"<pre>{settings}</pre></details>"
    )


def _kind(log: Iterable[dict[str, Any]], kind: str) -> Lines:
    return [line for line in log if line["kind"] == kind]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _hours(steps: Lines) -> str:
    seconds = sum(line["seconds"] for line in steps)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

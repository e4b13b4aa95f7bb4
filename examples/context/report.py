"""The tables, curves and picture of this folder's README, from what the trainings left."""

from __future__ import annotations

import datetime
import itertools
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from main import (
    BUDGET,
    FINALISTS,
    LRS,
    PATCHES,
    PIXELS,
    SEEDS,
    SHORT,
    TEST,
    UPDATES,
    WAYS,
    Run,
    accuracy,
    result_of,
    todo,
)
from PIL import Image
from task import FOUND, PLAIN, STRIPED, TASKS, Task, draw, labels

from wholegrad.run.process import machine as processor
from wholegrad.train.svg import HEIGHT, WIDTH, Line, chart

HERE = Path(__file__).parent
MARKS = ("<!-- results: written by main.py --write -->", "<!-- end of results -->")
COLOURS = {"c1": "#2b6fd6", "c2": "#e07b00", "c3": "#8a6bbf", "c4": "#9aa1a9"}
KEYS = {"c1": "whole slides", "c2": "patches, judged by patches", "c3": "patches, judged on whole slides", "c4": "0.75"}
LOOKS = """
svg { background: #ffffff; font: 12px system-ui, sans-serif; } text { fill: #66707b; }
.grid { stroke: #e2e4e7; } .line { fill: none; stroke-width: 1.6; } .line.c4 { stroke-dasharray: 5 4; }
""" + "".join(f".line.{c} {{ stroke: {v}; }} .dot.{c} {{ fill: {v}; }} " for c, v in COLOURS.items())
TINTS = {FOUND: (90, 255, 130), STRIPED: (255, 170, 70), PLAIN: (150, 190, 255)}
Results = dict[tuple[Task, str], list[list[dict[str, Any]]]]  # by setting, the best first: its seeds' runs


def write(out: Path) -> None:
    """Put tables between the README's marks, curves and a picture of the slides beside it."""
    results: Results = {}
    tuning: list[dict[str, Any]] = []
    for task, way in itertools.product(TASKS, WAYS):
        settings = results[task, way] = []
        for run in done(out, task, way):
            if run.seed == 0:
                tuning.append(result_of(out, run))
            else:
                if run.seed == SEEDS[0]:
                    settings.append([])
                settings[-1].append(result_of(out, run))
        settings.sort(key=lambda runs: -validated(runs))
    shown = (
        "![two slides, and pieces of 128 pixels: control, a striped region, a plain one](slides.png)\n\n"
        "Two slides, each a row: made small, with next to nothing to be seen; the same by how much grey varies, with\n"
        "what is to be found on `context` in green, what is striped and not to be found in orange, plain discs in\n"
        "blue; 128 pixels of the control, of a striped disc and of a plain one."
    )
    parts = [shown, table(results), "![accuracy while training](curves.svg)", tuned(tuning), machine(results, tuning)]
    ran = len(tuning) + sum(len(runs) for settings in results.values() for runs in settings)
    if ran < trainings():
        parts.insert(
            1, f"**{ran} of {trainings()} trainings have run so far. What is missing is left out; no verdict yet.**"
        )
    readme = HERE / "README.md"
    head, _, rest = readme.read_text().partition(MARKS[0])
    _, _, tail = rest.partition(MARKS[1])
    text = "\n\n".join(parts)
    readme.write_text(f"{head}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{tail}")
    (HERE / "curves.svg").write_text(curves(results))
    picture(HERE / "slides.png")


def done(out: Path, task: Task, way: str) -> Iterator[Run]:
    """The trainings of a way on a task that have run, up to the first that has not."""
    with suppress(FileNotFoundError):  # of results that choose what comes next
        yield from itertools.takewhile(lambda run: (out / f"{run.name}.json").exists(), todo(out, task, way))


def trainings() -> int:
    """How many there are in all."""
    tried = len(TASKS) * (2 * len(LRS) + len(PATCHES) - 1)
    return tried + len(WAYS) * len(SEEDS) * sum(FINALISTS.values())


def validated(runs: Sequence[dict[str, Any]]) -> float:
    """The mean over seeds of what was right on validation slides at the end, as they are judged better."""
    return float(np.mean([max(run["curve"][-1][2:]) for run in runs]))


def table(results: Results) -> str:
    """Accuracy on the test slides: the mean over seeds, and each seed's."""
    lines = [
        "| task | trained on | learning rate | judged | right, of regions | seeds | of striped ones | of plain ones "
        "| on validation slides | updates | minutes of processor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, _), settings in results.items():
        complete = sum(len(runs) for runs in settings) == FINALISTS[task] * len(SEEDS)
        for place, runs in enumerate(settings):
            first, mark = runs[0], "**" if complete and not place else ""
            what = f"patches of {first['patch']} x {first['patch']}" if first["patch"] else "whole slides"
            for judged, said in (("whole", "on whole slides"), ("patches", "by such patches")):
                if judged in first["test"]:
                    each = [accuracy(run["test"][judged]) for run in runs]
                    striped, plain = np.mean([run["test"][judged] for run in runs], axis=(0, 1))
                    seen = np.mean([run["curve"][-1][2 if judged == "whole" else 3] for run in runs])
                    spent = np.mean([run["processor"] for run in runs]) / 60
                    cells = [task, what, f"{first['lr']:g}", said, f"{mark}{np.mean(each):.3f}{mark}"]
                    cells += [", ".join(f"{value:.3f}" for value in each), f"{striped:.3f}", f"{plain:.3f}"]
                    cells += [f"{seen:.3f}", str(first["updates"]), f"{spent:.1f}"]
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tuned(tuning: Sequence[dict[str, Any]]) -> str:
    """What was tried to choose settings by."""
    lines = [
        f"Settings, chosen with seed 0 on trainings of {UPDATES // SHORT} updates' pixels; right on validation slides, "
        "at the end:",
        "",
        "| trained on | learning rate | context, whole slides | by patches | local, whole slides | by patches |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[int, float], dict[Task, dict[str, Any]]] = {}
    for run in tuning:
        rows.setdefault((run["patch"] or 0, run["lr"]), {})[run["task"]] = run
    for (patch, lr), tasks in sorted(rows.items()):
        what = f"patches of {patch}, {PATCHES[patch]} an update" if patch else "whole slides"
        cells = [what, f"{lr:g}"]
        for task in TASKS:
            last = tasks[task]["curve"][-1][2:] if task in tasks else []
            cells += [f"{last[i]:.3f}" if i < len(last) else "" for i in range(2)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(results: Results) -> str:
    """Accuracy on validation slides against pixels seen, a line a seed and a panel a task, as an SVG alone."""
    panels = []
    for number, task in enumerate(TASKS):
        lines = [
            Line("", style, [row[0] / 1e9 for row in run["curve"]], [row[column] for row in run["curve"]], dots=True)
            for way, style, column in (("patches", "c3", 2), ("whole", "c1", 2), ("patches", "c2", 3))
            for run in next(iter(results[task, way]), [])
        ]
        lines.append(Line("", "c4", [0, UPDATES * PIXELS / 1e9], [0.75, 0.75]))
        drawn = chart(task, lines, across="gigapixels seen")
        body = drawn[drawn.index("<svg") : drawn.index("</svg>")]
        inner = body[body.index(">") + 1 :]
        panels.append(f'<g transform="translate({number * WIDTH} 24)">{inner}<text x="58" y="-8">{task}</text></g>')
    keys = "".join(
        f'<circle class="dot {style}" cx="{70 + 230 * i}" cy="{HEIGHT + 36}" r="4"/>'
        f'<text x="{80 + 230 * i}" y="{HEIGHT + 40}">{said}</text>'
        for i, (style, said) in enumerate(KEYS.items())
    )
    size = f'width="{2 * WIDTH}" height="{HEIGHT + 48}" viewBox="0 0 {2 * WIDTH} {HEIGHT + 48}"'
    what = 'role="img" aria-label="Right on validation slides, against gigapixels seen"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {what}><style>{LOOKS}</style>{"".join(panels)}{keys}</svg>\n'
    )


def picture(path: Path) -> None:
    """Two slides made small, what is where on them, and pieces of their controls and regions at full size."""
    rows = []
    for number in TEST[:2]:
        image, kinds = draw(number)
        blocks = image[0].reshape(image.shape[1] // 12, 12, -1, 12).astype(np.float32)
        small, spread = blocks.mean(axis=(1, 3)), 255 - 3 * blocks.std(axis=(1, 3))  # dark where there are stripes
        told = np.repeat(spread[..., None], 3, axis=2)
        for kind, tint in TINTS.items():
            told[labels(kinds, number, "context")[0, ::12, ::12] == kind] *= np.divide(tint, 255)
        pieces = [_piece(image[0], kinds[0], what) for what in (None, 2, 3)]
        greys = [np.repeat(np.asarray(each, np.float32)[..., None], 3, axis=2) for each in (small, *pieces)]
        parts = [np.pad(each, ((2, 2), (2, 2), (0, 0)), constant_values=255) for each in (greys[0], told, *greys[1:])]
        rows.append(np.concatenate(parts, axis=1))
    Image.fromarray(np.clip(np.concatenate(rows), 0, 255).astype(np.uint8)).save(path, optimize=True)


def _piece(image: Any, kinds: Any, what: int | None) -> Any:
    """128 x 128 pixels of the control, or within a region of a kind."""
    if what is None:
        ys, xs = np.nonzero(image[:, 256:768] < 100)
        y, x = int(np.median(ys)), 512
    else:
        ys, xs = np.nonzero(kinds == what)
        y, x = int(ys[0]) + 100, int(np.median(xs[: len(xs) // 100 + 1]))
    y, x = max(64, min(y, image.shape[0] - 64)), max(64, min(x, image.shape[1] - 64))
    return image[y - 64 : y + 64, x - 64 : x + 64]


def machine(results: Results, tuning: Sequence[dict[str, Any]]) -> str:
    """Where, when, with what."""
    every = [*tuning, *(run for settings in results.values() for runs in settings for run in runs)]
    whole = [run for run in every if run["patch"] is None]
    total = sum(run["processor"] for run in every) / 60
    threads = " or ".join(str(count) for count in sorted({run["threads"] for run in every}))
    today = datetime.datetime.now(datetime.UTC).date()
    need = f"{max(run['projected'] for run in whole) / 2**30:.2f} GiB projected for the process"
    return (
        f"Bold: the setting that counts. Whole slides: planned within {BUDGET} ({need}), where whole-image autograd "
        f"would need {whole[0]['whole_image'] / 2**30:.2f} GiB for its maps alone. All {len(every)} trainings together "
        f"took {total:.0f} minutes of processor time, judging not counted. Written {today}: {processor()}, {threads} "
        f"threads a training, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}. "
        "Command: `python examples/context/main.py --write`."
    )

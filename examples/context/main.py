"""Patches against whole slides where a region's label depends on something thousands of pixels away.

    python examples/context/main.py            # an hour or more on two cores; goes on where it was stopped
    python examples/context/main.py --write    # also the tables and curves of this folder's README

``task.py`` says what the slides are, ``network.py`` what learns. Both ways train the same network from the same initial
weights, on the same slides, with Adam, for the same number of pixels. Learning rates, and the size of patches, are
chosen for each task on its validation slides, by trainings of one length.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from network import ContextUNet
from task import FIELD, FOUND, HEIGHT, PLAIN, TASKS, WIDTH, Pixels, Task, labels, layout, stored

import wholegrad as wg

BUDGET = "0.75GiB"
TRAIN, VAL, TEST = range(24), range(100, 106), range(200, 212)
UPDATES = 100  # of whole slides, each by one slide whose control is striped and one whose control is plain
PIXELS = 2 * HEIGHT * WIDTH  # to an update of whole slides
SHORT = 2  # settings are chosen on trainings so many times shorter, of either way
LOOKS = 5  # times that a run is judged on the validation slides
PATCHES = {256: 16, 512: 4, 1024: 1, 1536: 1}  # edge: how many to an update, one to two megapixels
FIRST = 512  # edge with which the learning rate of patches is chosen
LRS = (0.003, 0.01, 0.03)
WAYS = ("whole", "patches")
SEEDS = (1, 2, 3)  # of what is reported; settings are tried with seed 0
FINALISTS = {"context": 2, "local": 1}  # settings of a way that go on to these; the best on validation slides counts


@dataclass(frozen=True)
class Run:
    """One training: ``patch`` is the edge of patches in pixels, None for whole slides."""

    task: Task
    patch: int | None
    lr: float
    seed: int

    @property
    def name(self) -> str:
        how = "whole" if self.patch is None else f"patch{self.patch}"
        return f"{self.task}-{how}-lr{self.lr:g}-seed{self.seed}"


def loss_fn(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, the mean over pixels of regions; all else has no label."""
    counted = (target > 0).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, (target == FOUND).to(logits.dtype), reduction="none")
    return (each * counted).sum() / counted.sum().clamp_min(1)


def right(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Pixels of striped regions that are said rightly, and all of them; the same of plain regions."""
    good, plain = (logits > 0) == (target == FOUND), target == PLAIN
    striped = (target > 0) & ~plain
    return torch.stack([(good & striped).sum(), striped.sum(), (good & plain).sum(), plain.sum()])


def shares(counts: Sequence[float]) -> tuple[float, float]:
    """The share of striped regions' pixels that is said rightly, and of plain ones'."""
    return counts[0] / max(counts[1], 1), counts[2] / max(counts[3], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/context"), help="folder of slides and results")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after about so long; the next call goes on"
    )
    parser.add_argument("--write", action="store_true", help="write README.md and curves.svg of this folder")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=WAYS, help="whole or patches alone")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=TASKS, help="context or local alone")
    parser.add_argument("--one", type=lambda text: Run(**json.loads(text)), help=argparse.SUPPRESS)
    args = parser.parse_args()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        sys.exit(one(args.one, args.out, began + args.seconds))
    done = all(run_all(args.out, task, way, began + args.seconds) for task, way in product(args.tasks, args.ways))
    if args.write:  # what there is, if all is not done
        from report import write

        write(args.out)
    if not done:
        sys.exit("not all is done; call it again")


def run_all(out: Path, task: Task, way: str, until: float) -> bool:
    """Do the trainings of a way on a task that have not been done; False if time is over before."""
    for run in todo(out, task, way):
        if not (out / f"{run.name}.json").exists():
            left = until - time.monotonic()
            words = ["--one", json.dumps(asdict(run)), "--out", str(out), "--seconds", str(left)]
            if left <= 0 or subprocess.run([sys.executable, __file__, *words]).returncode:
                return False
    return True


def one(run: Run, out: Path, until: float) -> int:
    """One training, in a process of its own, so that what it holds is its own; 1 if it has to go on later."""
    result = train(run, out, until)
    if result is None:
        return 1
    path = out / f"{run.name}.json"
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").replace(path)
    return 0


def todo(out: Path, task: Task, way: str) -> Iterator[Run]:
    """The trainings of a way on a task in order; later ones depend on what earlier ones left in ``out``."""
    tried = [Run(task, None if way == "whole" else FIRST, lr, 0) for lr in LRS]
    yield from tried
    if way == "patches":
        rate = ranked(out, tried)[0].lr
        others = [Run(task, edge, rate, 0) for edge in PATCHES if edge != FIRST]
        yield from others
        tried += others
    for setting in ranked(out, tried)[: FINALISTS[task]]:
        yield from (replace(setting, seed=seed) for seed in SEEDS)


def ranked(out: Path, runs: Sequence[Run]) -> list[Run]:
    """The one first that was right on most of the validation slides at its end, by the least loss among equal ones.

    What was trained on patches is judged both ways, and the better one counts.
    """

    def how_good(run: Run) -> tuple[float, float]:
        _, loss, *found = result_of(out, run)["curve"][-1]
        return -round(max(found), 3), loss

    return sorted(runs, key=how_good)


def result_of(out: Path, run: Run) -> dict[str, Any]:
    """What ``train`` found."""
    found: dict[str, Any] = json.loads((out / f"{run.name}.json").read_text())
    return found


def train(run: Run, out: Path, until: float) -> dict[str, Any] | None:
    """Train and judge, on from where it was stopped; None if it is stopped again, at ``until`` by the clock.

    The curve has a row for each look, after which the state is kept: pixels, training loss, accuracy on validation
    slides seen whole and, where it is trained on patches, by patches.
    """
    kept, folder = out / f"{run.name}.pt", out / "slides"
    model = ContextUNet(run.seed)
    optimizer = torch.optim.Adam(model.parameters(), run.lr)
    share = 1 if run.patch is None else PIXELS // (PATCHES[run.patch] * run.patch**2)  # updates to one of whole slides
    total = (UPDATES if run.seed else UPDATES // SHORT) * share
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    state: dict[str, Any] = {"update": 0, "curve": [], "processor": 0.0, "peak": 0}
    if kept.exists():
        state, *parts = torch.load(kept)
        for part, values in zip((model, optimizer, schedule), parts, strict=True):
            part.load_state_dict(values)
    losses: list[float] = []
    plan: wg.Plan | None = None
    used = _processor()
    for update in range(state["update"], total):
        optimizer.zero_grad()
        for image, target in batches(run, update, folder):
            if plan is None:
                plan = wg.plan(model, loss_fn, image, target, budget=BUDGET)
                state["plan"] = {"projected": plan.projected, "whole_image": plan.whole_image}
            losses.append(float(wg.backward(model, loss_fn, image, target, plan=plan)))
        optimizer.step()
        schedule.step()
        if (update + 1) % (total // LOOKS) == 0:
            state["processor"] += _processor() - used
            state["peak"] = state["peak"] or _peak()  # of training alone, before anything was judged
            found = [accuracy(each) for each in judged(model, VAL, run, folder).values()]
            state["curve"].append(((update + 1) * PIXELS / share, float(np.mean(losses)), *found))
            print(run.name, *(round(each, 4) for each in state["curve"][-1]), flush=True)
            losses.clear()
            state["update"] = update + 1
            whole = [state, *(part.state_dict() for part in (model, optimizer, schedule))]
            torch.save(whole, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
            if time.monotonic() > until and update + 1 < total:
                return None
            used = _processor()
    return {
        **asdict(run), **state["plan"], "updates": total, "curve": state["curve"],
        "test": judged(model, TEST, run, folder),
        "peak": state["peak"], "processor": state["processor"],
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def _peak() -> int:
    """Bytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor() -> float:
    """Seconds of processor time that this process has taken."""
    times = os.times()
    return times.user + times.system


def batches(run: Run, update: int, folder: Path) -> Any:
    """What one update sees: two whole slides, one after the other, or some patches at once, each around a region.

    Controls are striped on every other slide, and every other slide or patch is of such a one.
    """
    rng = np.random.default_rng((run.seed, update))
    if run.patch is None:
        for odd in (0, 1):
            number = 2 * int(rng.integers(len(TRAIN) // 2)) + odd
            image, kinds = stored(folder, number)
            yield image, labels(np.asarray(kinds), number, run.task)
        return
    count = PATCHES[run.patch]
    numbers = [2 * int(rng.integers(len(TRAIN) // 2)) + (update * count + i) % 2 for i in range(count)]
    parts = [cut(run, number, rng, folder) for number in numbers]
    images, targets = (np.stack(each) for each in zip(*parts, strict=True))
    yield torch.from_numpy(images), torch.from_numpy(targets)


def cut(run: Run, number: int, rng: np.random.Generator, folder: Path) -> tuple[Pixels, Pixels]:
    """A patch ``(1, p, p)`` around a random pixel of a random region of a slide, with its labels."""
    image, kinds = stored(folder, number)
    disc = layout(number).discs[int(rng.integers(len(layout(number).discs)))]
    turn, away = rng.uniform(0, 2 * np.pi), disc.radius * np.sqrt(rng.uniform())
    edge = run.patch or 0
    y = int(np.clip(disc.y + away * np.sin(turn) - edge // 2, 0, HEIGHT - edge))
    x = int(np.clip(disc.x + away * np.cos(turn) - edge // 2, 0, WIDTH - edge))
    box = np.s_[:, y : y + edge, x : x + edge]
    return np.array(image[box]), labels(np.array(kinds[box]), number, run.task)


def judged(model: torch.nn.Module, numbers: Sequence[int], run: Run, folder: Path) -> dict[str, list[list[float]]]:
    """The shares of striped and of plain regions' pixels that are said rightly on each slide.

    Each slide is seen whole and, if patches are what the network was trained on, also by patches of their size.
    """
    found: dict[str, list[list[float]]] = {"whole": []}
    if run.patch is not None:
        found["patches"] = []
    for number in numbers:
        image, kinds = stored(folder, number)
        target = labels(np.asarray(kinds), number, run.task)
        found["whole"].append(_shares(model, image, target))
        if run.patch is not None:
            pieces, targets = (np.stack(each) for each in zip(*windows(image, target, run.patch), strict=True))
            found["patches"].append(_shares(model, torch.from_numpy(pieces), torch.from_numpy(targets)))
    return found


def _shares(model: torch.nn.Module, image: Any, target: Any) -> list[float]:
    counts = wg.measure(model, image, target, metrics={"right": right}, budget="2GiB")["right"]
    return list(shares(counts.tolist()))


def windows(image: Pixels, target: Pixels, edge: int) -> Iterator[tuple[Pixels, Pixels]]:
    """Patches that overlap by half, and their labels: each pixel of the field counts in the patch in which it lies
    furthest inside, once."""
    for y, rows in spans(0, HEIGHT, HEIGHT, edge):
        for x, columns in spans(FIELD, WIDTH, WIDTH, edge):
            owned = np.zeros((1, edge, edge), np.uint8)
            owned[:, rows, columns] = target[:, y : y + edge, x : x + edge][:, rows, columns]
            if owned.any():
                yield np.array(image[:, y : y + edge, x : x + edge]), owned


def spans(low: int, high: int, length: int, edge: int) -> list[tuple[int, slice]]:
    """Along an axis: starts of windows half an edge apart, and the part of each that counts of ``low`` to ``high``."""
    starts = sorted({min(at, length - edge) for at in range(max(0, low - edge // 4), high - edge // 2, edge // 2)})
    cuts = [low, *((a + b + edge) // 2 for a, b in pairwise(starts)), high]
    return [(at, slice(cuts[i] - at, cuts[i + 1] - at)) for i, at in enumerate(starts)]


def accuracy(each: Sequence[Sequence[float]]) -> float:
    """The mean over slides of the two shares' mean: 0.75 for whoever is right but for chance on striped regions."""
    return float(np.mean(each))


if __name__ == "__main__":
    main()

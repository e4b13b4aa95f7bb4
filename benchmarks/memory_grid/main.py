"""Measured, projected and allowed peak memory of training steps over a grid of networks, sizes and budgets.

    python -W ignore benchmarks/memory_grid/main.py [--only TEXT] [--again] [--kept] [--write]

Every cell is a process of its own: it plans, takes four steps with Adam on noise, and reports its peak (``VmHWM``,
Linux) beside the plan's. Results are kept as JSON under ``out/memory_grid``, so that a broken run goes on; ``--again``
measures anew, ``--kept`` nothing. ``--write`` puts the table into this folder's README. The exit code is 1 if any cell
breaks measured <= projected <= budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

MIB, GIB = 1 << 20, 1 << 30
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MARKS = ("<!-- results: written by main.py --write -->", "<!-- end of results -->")
TOLERANCE = 1.2  # projected over measured, at most
SMALL, MIDDLE, LARGE = (1600, 3200), (3000, 8000), (8000, 16000)


class Cell(NamedTuple):
    """A network by name, height and width in pixels, budget, and what is fixed of the plan."""

    network: str
    size: tuple[int, int]
    budget: str
    fixed: str = ""

    @property
    def name(self) -> str:
        fixed = f" {self.fixed}" if self.fixed else ""
        return f"{self.network} {self.size[0]}x{self.size[1]} {self.budget}{fixed}"


def grid() -> list[Cell]:
    """All cells, small ones first."""
    published = [
        Cell("published U-Net", size, budget)
        for size, budget in itertools.product((SMALL, MIDDLE, LARGE), ("0.5GiB", "0.6GiB", "0.8GiB", "1.2GiB", "3GiB"))
    ]
    disk = [Cell("published U-Net", SMALL, "0.6GiB", f) for f in ("disk", "host", "bfloat16", "float16 disk")]
    dice = [Cell("published U-Net, Dice", size, b) for size in (SMALL, MIDDLE) for b in ("0.6GiB", "1.2GiB")]
    others = [
        Cell(name, SMALL, budget)
        for name in (
            "batch norm",
            "group norm, reflect",
            "instance norm",
            "classifier",
            "MONAI UNet",
            "MONAI BasicUNet",
        )
        for budget in ("0.8GiB", "1.2GiB", "2GiB")
    ]
    attention = [Cell("attention", SMALL, budget) for budget in ("2.5GiB", "4GiB")]
    wide = [Cell(name, MIDDLE, b) for name in ("MONAI UNet", "batch norm") for b in ("1.5GiB", "4GiB")]
    return sorted([*published, *disk, *dice, *others, *attention, *wide], key=lambda cell: cell.size)


def network(name: str) -> tuple[Any, Any, Any]:
    """Model, loss and target (None: the mask) of a cell."""
    from wholegrad.losses import LOSSES
    from wholegrad.nets import unet4492

    if name.startswith("published"):
        return unet4492(seed=0), LOSSES["bce+dice" if "Dice" in name else "bce"], None
    if name.startswith("MONAI"):
        from monai.networks.nets import BasicUNet, UNet

        if "Basic" in name:
            return BasicUNet(2, 3, 1, features=(16, 16, 32, 32, 64, 16), norm="batch"), LOSSES["bce"], None
        return UNet(2, 3, 1, channels=(16, 32, 64), strides=(2, 2), num_res_units=1), LOSSES["bce"], None
    sys.path.insert(0, str(ROOT / "tests"))
    from memory_networks import NETWORKS

    build, loss, target = NETWORKS[name]
    return build(), loss, target


def fixed_of(words: str) -> dict[str, Any]:
    """Arguments of ``plan`` from the words of a cell."""
    import torch

    given: dict[str, Any] = {}
    for word in words.split():
        if word in ("disk", "host"):
            given |= {"placement": word}
        else:
            given |= {"boundary_dtype": getattr(torch, word), "placement": given.get("placement", "host")}
    return given | ({"boundaries": ["down1", "fuse1"]} if given else {})


def pixels(size: tuple[int, int], folder: Path) -> tuple[Path, Path]:
    """Noise and a mask of it, uncompressed, made once."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{size[0]}x{size[1]}.image.npy", folder / f"{size[0]}x{size[1]}.mask.npy"
    rng = np.random.default_rng(0)
    for path, channels, top in zip(paths, (3, 1), (256, 2), strict=True):
        if not path.exists():
            aside = path.with_suffix(".part.npy")
            np.save(aside, rng.integers(0, top, (channels, *size), dtype=np.uint8))
            aside.rename(path)
    return paths


def child(cell: Cell, folder: Path) -> None:
    """Plan, four steps; the last line of output is the result."""
    import torch

    import wholegrad as wg
    from wholegrad.errors import BudgetError
    from wholegrad.run import process
    from wholegrad.slide.arrays import open_npy

    model, loss, target = network(cell.network)
    image, mask = map(open_npy, pixels(cell.size, folder))
    optimizer = torch.optim.Adam(model.parameters())
    wanted = mask if target is None else target
    started = time.perf_counter()
    try:
        plan = wg.plan(model, loss, image, wanted, budget=cell.budget, **fixed_of(cell.fixed))
    except BudgetError as error:
        print(json.dumps({"smallest": error.smallest}))
        return
    found: dict[str, Any] = {"planning": time.perf_counter() - started, "held": process.resident(), "seconds": []}
    for _ in range(4):
        started = time.perf_counter()
        optimizer.zero_grad()
        wg.backward(model, loss, image, wanted, plan=plan)
        optimizer.step()
        found["seconds"].append(time.perf_counter() - started)
    parts = dict(plan.memory.rows())
    tiles = [
        [*part.tile, part.tiles, part.fused, part.working.forward, part.working.backward, part.working.slack]
        for part in plan.segments
    ]
    print(
        json.dumps(
            {**found, "measured": process.peak_resident(), "after": process.resident(), "projected": plan.projected,
             "budget": plan.budget, "parts": parts, "workers": plan.workers, "segments": tiles}
        )
    )  # fmt: skip


def kept_path(cell: Cell, out: Path) -> Path:
    """Where a cell's result is kept."""
    return out / f"{cell.name.replace(' ', '_')}.json"


def measured(cell: Cell, out: Path, again: bool) -> dict[str, Any]:
    """A cell's result, from its file if it is there."""
    path = kept_path(cell, out)
    if path.exists() and not again:
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    pixels(cell.size, out)
    command = [sys.executable, __file__, "--child", json.dumps(cell), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{cell.name}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    path.write_text(json.dumps(result))
    return result


def row(cell: Cell, found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    first = [cell.network, f"{cell.size[0]} x {cell.size[1]}", f"{cell.budget}{', ' * bool(cell.fixed)}{cell.fixed}"]
    if "measured" not in found:
        return [*first, f"refused: at least {found['smallest'] / GIB:.2f} GiB", "", "", ""]
    over = found["projected"] / found["measured"]
    shares = [f"{found['projected'] / MIB:.0f}", f"{found['measured'] / MIB:.0f}", f"{over:.2f}"]
    return [*first, *shares, f"{min(found['seconds']):.1f}"]


def table(results: list[tuple[Cell, dict[str, Any]]]) -> str:
    """The results as Markdown, and what they come to."""
    head = ["network", "pixels", "budget", "projected MiB", "measured MiB", "ratio", "s a step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row(cell, found)) + " |" for cell, found in results]
    ran = [(cell, found) for cell, found in results if "measured" in found]
    ratios = sorted(found["projected"] / found["measured"] for _, found in ran)
    over = [f"{cell.name} ({found['projected'] / found['measured']:.2f})" for cell, found in ran
            if found["projected"] > TOLERANCE * found["measured"]]  # fmt: skip
    lines += [
        "",
        f"{len(ran)} cells ran. Projected over measured: {ratios[0]:.2f} to {ratios[-1]:.2f}, median "
        f"{ratios[len(ratios) // 2]:.2f}. More than {TOLERANCE} times: {'; '.join(over) or 'none'}.",
    ]
    return "\n".join(lines)


def broken(found: dict[str, Any]) -> bool:
    """Whether a cell breaks measured <= projected <= budget."""
    return "measured" in found and not found["measured"] <= found["projected"] <= found["budget"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--kept", action="store_true", help="leave out what is not measured yet")
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "memory_grid")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, size, budget, fixed = json.loads(args.child)
        child(Cell(name, tuple(size), budget, fixed), args.out)
        return 0
    results = []
    for cell in grid():
        if args.only in cell.name and (not args.kept or kept_path(cell, args.out).exists()):
            results.append((cell, measured(cell, args.out, args.again)))
            mark = "BROKEN" if broken(results[-1][1]) else ""
            print(" | ".join(row(*results[-1])), mark, flush=True)
    text = table(results)
    print(text.rpartition("\n")[2])
    if args.write:
        readme = HERE / "README.md"
        pattern = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
        readme.write_text(pattern.sub(lambda _: f"{MARKS[0]}\n{text}\n{MARKS[1]}", readme.read_text()))
    return int(any(broken(found) for _, found in results))


if __name__ == "__main__":
    sys.exit(main())

"""Repeats the published experiment on real slides: whole ones, at the resolution at which they are stored.

    WHOLEGRAD_DATA=... python examples/paper/main.py            # hours; goes on where it was stopped
    WHOLEGRAD_DATA=... python examples/paper/main.py --write    # also the tables and curves of this folder's README

WHOLEGRAD_DATA is a folder with ``slides/NAME.tif`` or ``.svs`` and ``masks/NAME.mask.tif``. Each way to train
(``arms.py``) is cross-validated by slide in five folds, so that every slide is tested by a network that never saw it.
Slides are first copied as uncompressed TIFF (``wg.copy_slide``: the same pixels), 4 bytes a pixel. Everything goes into
``--out``; one way alone: ``--arms whole``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from arms import ARMS, FOLDS, Arm, fold_of, table
from score import score

import wholegrad as wg
from wholegrad.slide.synth import synthesize
from wholegrad.train.config import check_config
from wholegrad.train.loop import train
from wholegrad.train.state import load_model

SYNTHETIC, SYNTHETIC_HELD = 10, 4  # slides of 4000 x 8000 pixels, of which so many are tested
SYNTHETIC_SIZE, SYNTHETIC_MPP = (4000, 8000), 1.0


def main() -> None:
    args = arguments()
    pairs = copied(slides(Path(os.environ["WHOLEGRAD_DATA"])), args.out / "copies")
    for name in args.arms:
        for fold in range(FOLDS):
            step(args, ["--run", name, str(fold)], args.out / name / f"fold-{fold}" / "scores.json", pairs)
    step(args, ["--run", "synthetic", "0"], args.out / "synthetic" / "fold-0" / "scores.json", pairs)
    if args.write:
        from report import write

        write(args.out, pairs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/paper"), help="folder of copies, runs and scores")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS), help=",".join(ARMS))
    parser.add_argument("--write", action="store_true", help="write README.md and curves.svg of this folder")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "FOLD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        pairs = copied(slides(Path(os.environ["WHOLEGRAD_DATA"])), args.out / "copies")
        run(args.out, args.run[0], int(args.run[1]), pairs)
        sys.exit()
    return args


def step(args: argparse.Namespace, command: list[str], result: Path, pairs: list[tuple[Path, Path]]) -> None:
    """One run in a process of its own, unless its scores are there."""
    if not result.exists():
        subprocess.run([sys.executable, __file__, "--out", str(args.out), *command], check=True)
    print(f"{' '.join(command[1:])}: {json.loads(result.read_text())['scores']}", flush=True)


def slides(root: Path) -> list[tuple[Path, Path]]:
    """Each slide and its mask; of two files of one slide, the smaller."""
    found = [(path, root / "masks" / f"{path.stem}.mask.tif") for path in sorted((root / "slides").iterdir())]
    return [pair for pair in found if pair[1].exists() and "Gpx" not in pair[0].name]


def copied(pairs: list[tuple[Path, Path]], folder: Path) -> list[tuple[Path, Path]]:
    """The same slides, uncompressed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for slide, mask in pairs:
        copy = folder / f"{slide.stem}.tif"
        if not copy.exists():
            with wg.open_slide(slide) as image:
                wg.copy_slide(image, copy)
        made.append((copy.absolute(), mask))
    return made


def painted(folder: Path) -> list[tuple[Path, Path]]:
    """Synthetic slides with their exact masks."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for seed in range(SYNTHETIC):
        slide, mask = folder / f"synthetic-{seed}.tif", folder / f"synthetic-{seed}.mask.tif"
        if not mask.exists():
            synthesize(*SYNTHETIC_SIZE, seed, slide, mask, mpp=SYNTHETIC_MPP)
        made.append((slide.absolute(), mask.absolute()))
    return made


def run(out: Path, name: str, fold: int, pairs: list[tuple[Path, Path]]) -> None:
    """Train one network on the slides that a fold leaves, going on where it was stopped, and score the others."""
    if name == "synthetic":
        pairs, arm = painted(out / "copies"), ARMS["whole"]
        held = list(range(SYNTHETIC - SYNTHETIC_HELD, SYNTHETIC))
    else:
        arm, held = ARMS[name], fold_of(len(pairs), fold)
    folder = (out / name / f"fold-{fold}").absolute()
    trained(arm, pairs, held, folder)
    model = load_model(folder / "checkpoint.safetensors")  # the last weights: nothing was chosen by held-back slides
    scores = {pairs[i][0].stem: score(model, *pairs[i], arm.data.get("mpp")) for i in held}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if line["kind"] == "step"]
    told = {
        "scores": scores,
        "seconds": sum(line["seconds"] for line in steps),
        "peak": max(line["peak"] for line in steps),
    }
    (folder / "scores.json").write_text(json.dumps(told, indent=2) + "\n")


def trained(arm: Arm, pairs: list[tuple[Path, Path]], held: list[int], folder: Path) -> None:
    config = check_config(table(arm, pairs, held, folder), str(folder))
    if not (folder / "weights.safetensors").exists():
        train(config, resume=(folder / "checkpoint.safetensors").exists())


if __name__ == "__main__":
    main()

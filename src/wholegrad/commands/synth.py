"""``wholegrad synth``: a slide and its exact mask for machines without data."""

from __future__ import annotations

import argparse
from pathlib import Path

import wholegrad as wg
from wholegrad.commands.common import CONSOLE, NOTES, Commands, add_command, size
from wholegrad.errors import ConfigError
from wholegrad.slide.synth import synthesize
from wholegrad.train.progress import display

TEXT = """\
Write a synthetic stained section on glass, as a tiled pyramidal JPEG TIFF, and its exact tissue mask. The
same size and seed give the same slide. Memory stays small, whatever the size."""

EXAMPLES = """\
  wholegrad synth --size 16000x64000 --seed 1 --out s.tif --mask m.tif
  wholegrad synth --size 2048x4096 --seed 2 --out small.tif --mask small.mask.tif --mpp 1"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "synth", run, "write a synthetic slide and its mask", TEXT, EXAMPLES)
    parser.add_argument("--size", type=size, required=True, metavar="HxW", help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of everything in it (0)")
    parser.add_argument("--mpp", type=float, default=0.5, help="micrometres a pixel (0.5)")
    parser.add_argument("--out", type=Path, required=True, help="slide to write, .tif")
    parser.add_argument("--mask", type=Path, required=True, help="mask to write, .tif")


def run(args: argparse.Namespace) -> int:
    if args.out.absolute() == args.mask.absolute():
        raise ConfigError(str(args.out), "is given for slide and mask alike", "give two names")
    for path in (args.out, args.mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    height, width = args.size
    with display(NOTES, "slide") as shown:
        synthesize(
            height,
            width,
            args.seed,
            args.out,
            args.mask,
            mpp=args.mpp,
            progress=lambda done, total: shown.tile(wg.Progress("painting", done, total)),
        )
    for path in (args.out, args.mask):
        CONSOLE.print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0

"""``wholegrad predict``: a trained network's mask of a whole slide, streamed to disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from torch import nn

import wholegrad as wg
from wholegrad.commands.common import (
    CONSOLE,
    NOTES,
    Commands,
    add_budget,
    add_command,
    add_device,
    add_level,
    add_region,
    where_of,
)
from wholegrad.errors import ConfigError
from wholegrad.outputs import Depth, checked_paths
from wholegrad.slide.slide import Slide, open_slide
from wholegrad.slide.thumbnail import balanced
from wholegrad.train.networks import build_network
from wholegrad.train.progress import display
from wholegrad.train.state import Card, load_model, read_card

TEXT = """\
Predict a whole slide in bounded memory, without seams, and write it to one file or several, by their endings:
.ome.tif (QuPath) or .tif (OpenSlide), tiled pyramids; .zarr, OME-Zarr; .npy (C, H, W); .geojson, outlines that QuPath
opens; .png, a picture. All appear together, complete, or none does.

The slide is read at the resolution that the weights were trained at, unless --mpp or --level says otherwise. With
--region a part of it is predicted: outlines still lie on the whole slide."""

EXAMPLES = """\
  wholegrad predict case.svs --weights out/train --out mask.tif
  wholegrad predict case.svs --weights weights.safetensors --out p.ome.tif --kind probability
  wholegrad predict case.svs --weights out/train --out mask.npy
  wholegrad predict case.svs --weights out/train --out mask.ome.tif --out mask.geojson --min-area 500 --min-hole 1000
  wholegrad predict case.svs --weights out/train --out mask.tif --overlay mask.png --budget 1GiB
  wholegrad predict case.svs --weights out/train --out part.geojson --region 20000,8000,30000,30000"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "predict", run, "predict a slide's mask", TEXT, EXAMPLES)
    parser.add_argument("slide", type=Path, metavar="SLIDE", help="SVS or TIFF")
    parser.add_argument("--weights", required=True, help="weights file, or folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        action="append",
        help="file to write: .ome.tif, .tif, .zarr, .npy, .geojson or .png; give it several times for several",
    )
    parser.add_argument("--kind", choices=("mask", "probability", "logits"), default="mask")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability from which it is tissue (0.5)")
    parser.add_argument("--overlay", type=Path, metavar="PNG", help="also draw the mask on the slide")
    parser.add_argument("--class", dest="classes", action="append", metavar="NAME", help="name of label 1, then 2, ...")
    parser.add_argument("--depth", choices=get_args(Depth), default="uint8", help="of probabilities in .tif and .zarr")
    parser.add_argument("--min-area", type=float, default=0.0, metavar="UM2", help="outline no smaller pieces (0)")
    parser.add_argument("--min-hole", type=float, default=0.0, metavar="UM2", help="fill smaller holes of outlines (0)")
    help_text = "most that outlines may move (one pixel; 0: exact pixel edges)"
    parser.add_argument("--simplify", type=float, metavar="UM", help=help_text)
    parser.add_argument("--network", help="module:factory of your own network, if the weights are of one")
    parser.add_argument("--slide-mpp", type=float, help="um a pixel of level 0, where the slide does not say")
    add_level(parser)
    add_region(parser)
    add_budget(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    if args.overlay and args.overlay.suffix.lower() != ".png":
        raise ConfigError(str(args.overlay), "is no name of a picture", "name it .png")
    where = where_of(args)
    files = [*args.out, *([args.overlay] if args.overlay else [])]
    checked_paths(files, args.kind)  # before weights and slide are read
    card = read_card(args.weights)
    model = load_model(args.weights, _own_network(args, card))
    slide = _open(args, card)
    NOTES.print(f"{slide!r}, {card.network} after {card.step} steps")
    seen = balanced(slide) if card.config.get("data", {}).get("balance") else slide
    with display(NOTES, "slide") as shown:
        wg.predict(
            model,
            seen,
            out=files,
            kind=args.kind,
            threshold=args.threshold,
            classes=args.classes,
            depth=args.depth,
            min_area=args.min_area,
            min_hole=args.min_hole,
            simplify=args.simplify,
            budget=args.budget,
            progress=shown.tile,
            **where,
        )
    for file in files:
        CONSOLE.print(f"written: {file}")
    return 0


def _own_network(args: argparse.Namespace, card: Card) -> nn.Module | None:
    return build_network(args.network, card.args) if args.network else None


def _open(args: argparse.Namespace, card: Card) -> Slide:
    """The slide at the resolution asked for, else at that of the training."""
    if args.mpp is None and args.level is None:
        trained = card.config.get("data", {})
        mpp, level = trained.get("mpp"), trained.get("level")
    else:
        mpp, level = args.mpp, args.level
    return open_slide(args.slide, mpp=mpp, level=level, region=args.region, slide_mpp=args.slide_mpp)

"""``wholegrad predict``: a trained network's mask of a whole slide, streamed to disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

import wholegrad as wg
from wholegrad.commands.common import CONSOLE, NOTES, Commands, add_budget, add_command, add_level
from wholegrad.errors import ConfigError
from wholegrad.slide.slide import Slide, open_slide
from wholegrad.train.networks import build_network
from wholegrad.train.progress import display
from wholegrad.train.report import picture
from wholegrad.train.state import Card, load_model, read_card

TEXT = """\
Predict a whole slide in bounded memory, without seams, and write it as a tiled pyramidal TIFF (or .npy).

The slide is read at the resolution that the weights were trained at, unless --mpp or --level says
otherwise."""

EXAMPLES = """\
  wholegrad predict case.svs --weights out/train --out mask.tif
  wholegrad predict case.svs --weights weights.safetensors --out p.ome.tif --kind probability
  wholegrad predict case.svs --weights out/train --out mask.npy
  wholegrad predict case.svs --weights out/train --out mask.tif --overlay mask.png --budget 1GiB"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "predict", run, "predict a slide's mask", TEXT, EXAMPLES)
    parser.add_argument("slide", type=Path, metavar="SLIDE", help="SVS or TIFF")
    parser.add_argument("--weights", required=True, help="weights file, or folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="file to write: .tif or .ome.tif (8 bits, pyramid), or .npy (C, H, W)",
    )
    parser.add_argument("--kind", choices=("mask", "probability", "logits"), default="mask")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability from which it is tissue (0.5)")
    parser.add_argument("--overlay", type=Path, metavar="PNG", help="also draw the mask on the slide")
    parser.add_argument("--network", help="module:factory of your own network, if the weights are of one")
    add_level(parser)
    add_budget(parser)


def run(args: argparse.Namespace) -> int:
    if args.overlay and (args.kind != "mask" or args.out.suffix == ".npy"):
        raise ConfigError("--overlay", "needs a mask as TIFF", "use --kind mask and --out mask.tif")
    card = read_card(args.weights)
    model = load_model(args.weights, _own_network(args, card))
    slide = _open(args, card)
    NOTES.print(f"{slide!r}, {card.network} after {card.step} steps")
    with display(NOTES, "slide") as shown:
        wg.predict(
            model,
            slide,
            out=args.out,
            kind=args.kind,
            threshold=args.threshold,
            budget=args.budget,
            progress=shown.tile,
        )
    CONSOLE.print(f"{args.kind}: {args.out}")
    if args.overlay:
        picture(args.overlay, slide, None, args.out, args.slide.name, f"{card.network} after {card.step} steps")
        CONSOLE.print(f"picture: {args.overlay}")
    return 0


def _own_network(args: argparse.Namespace, card: Card) -> nn.Module | None:
    return build_network(args.network, card.args) if args.network else None


def _open(args: argparse.Namespace, card: Card) -> Slide:
    """The slide at the resolution asked for, else at that of the training."""
    if args.mpp is None and args.level is None:
        trained = card.config.get("data", {})
        return open_slide(args.slide, mpp=trained.get("mpp"), level=trained.get("level"))
    return open_slide(args.slide, mpp=args.mpp, level=args.level)

"""``wholegrad predict``: a trained network's mask of a whole slide, streamed to disk."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import get_args

import torch
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
    make_folder,
    where_of,
)
from wholegrad.commands.fleet import add_fleet, budget_of_worker, is_fleet, run_fleet
from wholegrad.errors import ConfigError
from wholegrad.fleet.jobs import Predicting
from wholegrad.outputs import Depth, checked_paths
from wholegrad.slide.slide import Slide, open_slide
from wholegrad.slide.thumbnail import balanced
from wholegrad.train.networks import build_network
from wholegrad.train.plans import device_name, share_of_budget, threads_of_rank
from wholegrad.train.progress import display
from wholegrad.train.state import Card, find_weights, load_model, read_card
from wholegrad.train.team import Place, Team

TEXT = """\
Predict a whole slide in bounded memory, without seams, and write it to one file or several, by their endings:
.ome.tif (QuPath) or .tif (OpenSlide), tiled pyramids; .zarr, OME-Zarr; .npy (C, H, W); .geojson, outlines that QuPath
opens; .png, a picture. All appear together, complete, or none does.

The slide is read at the resolution that the weights were trained at, unless --mpp or --level says otherwise. With
--region a part of it is predicted: outlines still lie on the whole slide. Started by torchrun, all processes share the
slide, each a band of its columns, and the first one writes."""

EXAMPLES = """\
  wholegrad predict case.svs --weights out/train --out mask.tif
  wholegrad predict case.svs --weights weights.safetensors --out p.ome.tif --kind probability
  wholegrad predict case.svs --weights out/train --out mask.npy
  wholegrad predict case.svs --weights out/train --out mask.ome.tif --out mask.geojson --min-area 500 --min-hole 1000
  wholegrad predict case.svs --weights out/train --out mask.tif --overlay mask.png --budget 1GiB
  torchrun --standalone --nproc-per-node 2 -m wholegrad predict case.svs --weights out/train --out mask.ome.tif
  wholegrad predict archive/ --weights out/train --out masks --format .ome.tif .geojson --workers 4
  wholegrad predict case.svs --weights out/train --out part.geojson --region 20000,8000,30000,30000"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "predict", run, "predict a slide's mask", TEXT, EXAMPLES)
    parser.add_argument("slides", type=Path, nargs="+", metavar="SLIDE", help="any format that wg.open_slide reads")
    parser.add_argument("--weights", required=True, help="weights file, or folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        action="append",
        help="file to write: .ome.tif, .tif, .zarr, .npy, .geojson or .png, or several; with --workers a folder",
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
    add_fleet(parser)
    help_text = "with workers: what to write for each slide, such as .ome.tif .geojson (.ome.tif)"
    parser.add_argument("--format", nargs="+", dest="endings", metavar="ENDING", help=help_text)


def run(args: argparse.Namespace) -> int:
    if is_fleet(args):
        return _fleet(args)
    if len(args.slides) > 1 or args.endings:
        raise ConfigError("predict", "does one slide to the files that --out names", "give --workers for more")
    if args.overlay and args.overlay.suffix.lower() != ".png":
        raise ConfigError(str(args.overlay), "is no name of a picture", "name it .png")
    team = Team(Place.found())
    try:
        team.join()
        with team.said_once():
            return _of_slide(args, team)
    finally:
        team.close()


def _of_slide(args: argparse.Namespace, team: Team) -> int:
    """One slide, by all ranks together if there are several."""
    args.device = device_name(args.device, team.place)
    where, files = where_of(args), [*args.out, *([args.overlay] if args.overlay else [])]
    with team.together("the slide"):
        if team.first:
            checked_paths(files, args.kind)  # before weights and slide are read
        card = read_card(args.weights)
        model = load_model(args.weights, _own_network(args, card))
        slide = _open(args, card)
    if team.first:
        NOTES.print(f"{slide!r}, {card.network} after {card.step} steps")
    if not team.alone:
        torch.set_num_threads(threads_of_rank(team.place))
        where["group"] = torch.distributed.group.WORLD
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
            budget=share_of_budget(args.budget, team.local_size),
            progress=shown.tile if team.first else None,
            **where,
        )
    for file in files if team.first else ():
        CONSOLE.print(f"written: {file}")
    return 0


def _fleet(args: argparse.Namespace) -> int:
    """All slides by workers, into one folder."""
    for flag, value in (("--overlay", args.overlay), ("--region", args.region), ("--device", args.device)):
        if value is not None:
            raise ConfigError(flag, "is of one slide", "leave it out, or leave out --workers and --scheduler")
    if len(args.out) != 1:
        raise ConfigError("--out", "names several", "give one folder, and --format for what to write")
    weights = find_weights(Path(args.weights)).absolute()
    card = read_card(weights)
    load_model(weights, _own_network(args, card))  # whether the weights fit is said before any slide
    job = Predicting(
        str(args.out[0].absolute()),
        tuple(dict.fromkeys(args.endings or [".ome.tif"])),
        str(weights),
        hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
        args.network,
        args.kind,
        args.threshold,
        None if args.classes is None else tuple(args.classes),
        args.depth,
        args.min_area,
        args.min_hole,
        args.simplify,
        args.mpp,
        args.level,
        args.slide_mpp,
        budget_of_worker(args),
    )
    make_folder(args.out[0])
    checked_paths(job.files("name"), args.kind, args.depth)
    return run_fleet(args, args.slides, args.out[0], job)


def _own_network(args: argparse.Namespace, card: Card) -> nn.Module | None:
    return build_network(args.network, card.args) if args.network else None


def _open(args: argparse.Namespace, card: Card) -> Slide:
    """The slide at the resolution asked for, else at that of the training."""
    if args.mpp is None and args.level is None:
        trained = card.config.get("data", {})
        mpp, level = trained.get("mpp"), trained.get("level")
    else:
        mpp, level = args.mpp, args.level
    return open_slide(args.slides[0], mpp=mpp, level=level, region=args.region, slide_mpp=args.slide_mpp)

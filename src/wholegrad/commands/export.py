"""``wholegrad export``: a trained network as one file for other programs, and the card that says how to run it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from torch import nn

import wholegrad as wg
from wholegrad.commands.common import CONSOLE, Commands, add_command
from wholegrad.errors import ConfigError
from wholegrad.export import ExportCard
from wholegrad.export.formats import format_of
from wholegrad.export.network import Kind
from wholegrad.nets.tissue import MPP, tissue4492
from wholegrad.train.networks import build_network
from wholegrad.train.state import load_model, read_card

SHIPPED = "tissue4492"

TEXT = f"""\
Write a trained network for other programs: .onnx (ONNX Runtime and others), .pt2 (torch.export) or .pt (TorchScript,
which PyTorch has deprecated). The file takes images of any height and width, as floats in [0, 1].

Beside it appears a card, with .json for the ending: um a pixel, normalisation, classes, and the stride and halo with
which tiles agree with the whole slide. The file is run and compared with the network before it is written.

WEIGHTS is a weights file, the folder of a run, or {SHIPPED}, the network that ships."""

EXAMPLES = f"""\
  wholegrad export out/train --out tissue.onnx
  wholegrad export {SHIPPED} --out tissue.onnx --kind probability
  wholegrad export weights.safetensors --out net.pt2 --network mynets:make_unet --class Tumor --class Stroma"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "export", run, "write a trained network for other programs", TEXT, EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help=f"weights file, folder of a run, or {SHIPPED}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write: .onnx, .pt2 or .pt")
    parser.add_argument("--kind", choices=get_args(Kind), default="logits", help="what the file gives (logits)")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability from which it is tissue (0.5)")
    parser.add_argument("--class", dest="classes", action="append", metavar="NAME", help="name of label 1, then 2, ...")
    parser.add_argument("--mpp", type=float, help="um a pixel, where the weights do not say")
    parser.add_argument("--licence", metavar="TEXT", help="of the weights, for the card")
    parser.add_argument("--network", help="module:factory of your own network, if the weights are of one")
    parser.add_argument("--opset", type=int, help="of ONNX (the exporter's own choice)")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not run and compare the file")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def run(args: argparse.Namespace) -> int:
    format_of(args.out)
    for path in (args.out, args.out.with_suffix(".json")):
        if path.exists() and not args.force:
            raise ConfigError(str(path), "exists already", "choose another --out, or give --force")
    model, told = _trained(args)
    card = wg.export(
        model,
        args.out,
        kind=args.kind,
        threshold=args.threshold,
        opset=args.opset,
        check=args.check,
        **told,
    )
    for line in summary(card):
        CONSOLE.print(line, markup=False)
    CONSOLE.print(f"written: {args.out}")
    CONSOLE.print(f"written: {args.out.with_suffix('.json')}")
    return 0


def _trained(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what is known of it for the card."""
    if args.weights == SHIPPED and not Path(SHIPPED).exists():
        for flag in ("network", "mpp", "licence"):
            if getattr(args, flag) is not None:
                raise ConfigError(f"--{flag}", f"is known of {SHIPPED}", "leave it out")
        told = {"mpp": MPP, "classes": args.classes or ["Tissue"], "balance": True, "licence": "Apache-2.0"}
        return tissue4492(), {**told, "name": SHIPPED}
    card = read_card(args.weights)
    model = load_model(args.weights, build_network(args.network, card.args) if args.network else None)
    data = card.config.get("data", {})
    return model, {
        "name": card.network,
        "mpp": data.get("mpp") if args.mpp is None else args.mpp,
        "classes": args.classes or _classes(data.get("classes")),
        "balance": bool(data.get("balance")),
        "licence": args.licence,
    }


def _classes(table: Any) -> Sequence[str] | None:
    """Names of labels 1, 2, ... of a run's table of classes, if each has one of its own."""
    if not isinstance(table, dict):
        return None
    names = {label: name for name, label in table.items() if isinstance(label, int) and label > 0}
    return [names[label] for label in sorted(names)] if sorted(names) == list(range(1, len(names) + 1)) else None


def summary(card: ExportCard) -> list[str]:
    """What to know before running the file."""
    axes = " x ".join(str(each) for each in card.input["axes"])
    mpp = f" at {card.input['mpp']:g} um a pixel" if card.input["mpp"] else ""
    lines = [f"{card.network}, {card.parameters} parameters, as {card.format}: {card.output['kind']} of {axes}{mpp}"]
    if card.input["multiple"] not in ([1, 1], None):
        lines.append(f"height and width: multiples of {' and '.join(map(str, sorted(set(card.input['multiple']))))}")
    if card.tiling is None:
        lines.append(f"tiles: none ({card.why_not})")
    else:
        stride, halo = (" x ".join(map(str, card.tiling[each])) for each in ("stride", "halo"))
        lines.append(f"tiles: start at multiples of {stride} pixels, with a halo of {halo} around")
    if card.input["balance"]:
        lines.append("pixels: glass and ink evened out before (wholegrad.slide.balance)")
    if card.checked is None:
        lines.append("not checked")
    else:
        tiles = "" if card.checked["tiles"] is None else f", by tiles {card.checked['tiles']:.1e}"
        lines.append(
            f"checked with {card.checked['with']}: off by {card.checked['whole']:.1e}{tiles} "
            f"(PyTorch itself {card.checked['torch']:.1e}) from float64"
        )
    return lines

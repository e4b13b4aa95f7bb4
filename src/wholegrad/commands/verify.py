"""``wholegrad verify``: the proof of exactness, on the user's own network and machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import wholegrad as wg
from wholegrad.api import LossFn
from wholegrad.commands.common import CONSOLE, Commands, add_command, add_network, blobs, size
from wholegrad.errors import ConfigError
from wholegrad.losses import LOSSES
from wholegrad.train.networks import imported, network_factory

TEXT = """\
Run training steps tile by tile and one on the whole image, in float64 and float32, and compare loss, output, buffers
and each parameter's gradient. Where one differs, name the first op responsible: module path and ATen op.

module:factory is called without arguments and returns the model, or the model and its loss. What the loss gets as its
target is made up:
  labels             0, 1 and 255 ("ignore"), uint8 (1, 1, H, W)
  labels:K           K classes, int64 (1, H, W), as cross-entropy takes it
  class:K            one of K classes for the whole image, int64 (1,)
  none               None
  module:function    what function(H, W) returns

Exit code 0 if all agree, 1 if one does not, 2 if the model is refused."""

EXAMPLES = """\
  wholegrad verify
  wholegrad verify --size 300x517 --loss focal
  wholegrad verify mynets:make_unet --size 2048x2048
  wholegrad verify mynets:make_segmenter --loss torch.nn:CrossEntropyLoss --target labels:5 --tile 128x96
  wholegrad verify mynets:make_classifier --loss torch.nn.functional:cross_entropy --target class:2 --eval"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "verify", run, "prove exactness on your network", TEXT, EXAMPLES)
    add_network(parser, positional=True)
    parser.add_argument("--size", type=size, default=(512, 512), metavar="HxW", help="of the random image (512x512)")
    parser.add_argument("--channels", type=_count, default=3, metavar="C", help="of the image (3)")
    known = f"{', '.join(LOSSES)}, or module:function or module:class (default: what the factory returned, or bce+dice)"
    parser.add_argument("--loss", metavar="LOSS", help=known)
    parser.add_argument("--target", default="labels", metavar="TARGET", help="what the loss gets (labels); see above")
    parser.add_argument(
        "--tile", type=size, action="append", metavar="HxW", help="a tile size to try; may be repeated (default: four)"
    )
    parser.add_argument("--eval", action="store_true", help="evaluation mode (default: as the factory left the model)")
    parser.add_argument(
        "--float32", action=argparse.BooleanOptionalAction, default=True, help="compare in float32 too (yes)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights, image and target (0)")


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    model, loss_fn = _model_and_loss(args.network, args.loss)
    if args.eval:
        model.eval()
    report = wg.verify(
        model,
        loss_fn,
        shape=(args.channels, *args.size),
        target=_target(args.target, args.size, args.seed),
        tiles=args.tile,
        single=args.float32,
        seed=args.seed,
    )
    CONSOLE.print(str(report), markup=False)
    return 0 if report.ok else 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _model_and_loss(network: str, loss: str | None) -> tuple[nn.Module, LossFn]:
    """What the factory returns, with the loss that was asked for or that it brings."""
    made = _called(f"network {network}", network_factory(network))
    model, own = made if isinstance(made, tuple | list) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"network {network}", f"gave a {type(made).__name__}", "return a torch.nn.Module, or one and its loss"
        )
    if own is None:
        return model, _loss(loss or "bce+dice")
    if loss is not None:
        raise ConfigError(f"network {network}", "brings a loss of its own", "leave out --loss")
    if not callable(own):
        raise ConfigError(f"network {network}", f"gave a {type(own).__name__} as loss", "return a function or module")
    return model, own


def _loss(name: str) -> LossFn:
    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        raise ConfigError(f"loss {name}", "is not built in", f"use {', '.join(LOSSES)}, or module:function")
    found = imported(name, "loss", "function")
    loss: LossFn = _called(f"loss {name}", found) if isinstance(found, type) else found
    return loss


def _called(where: str, make: Callable[..., Any], *args: int) -> Any:
    try:
        return make(*args)
    except Exception as error:
        cause = " ".join(f"raises {type(error).__name__}: {error}".split())
        raise ConfigError(where, cause, "run it in Python, or with --debug, to see where") from error


def _target(name: str, edges: tuple[int, int], seed: int) -> Any:
    """A made-up target, as --help describes it."""
    kind, colon, rest = name.partition(":")
    generator = torch.Generator().manual_seed(seed)
    if name == "labels":
        return blobs(*edges, seed)
    if name == "none":
        return None
    if kind in ("labels", "class") and rest.isdecimal() and int(rest) > 0:
        shape = edges if kind == "labels" else (1,)
        return torch.randint(int(rest), shape, generator=generator)
    if not colon or kind in ("labels", "class"):
        raise ConfigError(f"target {name}", "is unknown", "use labels, labels:K, class:K, none or module:function")
    return _called(f"target {name}", imported(name, "target", "function"), *edges)

"""The facade: a network in, a file and its card out.

The file holds the network in evaluation mode, at any height and width, from pixels in [0, 1] to logits (or
probabilities). The card holds what no format says: um a pixel, classes, and the stride and halo that make tiles agree
with the whole image, worked out from the network's geometry. Before anything is written the file is run, whole and by
tiles, and compared with the network.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from wholegrad.errors import ConfigError, ShapeError, UnsupportedOpError
from wholegrad.export.card import ExportCard, class_names, scale_of, tiling_of, versions, weights_digest
from wholegrad.export.check import Truth
from wholegrad.export.formats import INPUT, ONNX, OUTPUT, Format, format_of, quiet
from wholegrad.export.made import make
from wholegrad.given import given
from wholegrad.graph.capture import capture
from wholegrad.graph.graph import Graph
from wholegrad.graph.reach import Reach, Unbounded, reach
from wholegrad.run.device import CPU
from wholegrad.run.sources import model_dtype
from wholegrad.slide.balance import INK, WHITE
from wholegrad.slide.bigtiff import PartialFile
from wholegrad.train.networks import Normalized, without_normalization

Kind = Literal["logits", "probability"]
EXTRA = "pip install 'wholegrad[export]'"
LEAST = 128  # pixels of an image to export with
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MULTIPLES = (*POWERS, 3, 6, 12, 24, 48, 96, 5, 10, 20, 40, 7, 14, 28, 56)  # of the stride, that code may ask of sizes
VALUES = "fractions: 8-bit values divided by 255"
COLOURS = {3: ["red", "green", "blue"], 1: ["grey"]}


class Exported(nn.Module):
    """What goes into the file: the network's first output, as logits or probabilities."""

    def __init__(self, model: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = self.model(image)
        logits: torch.Tensor = found if isinstance(found, torch.Tensor) else tree_leaves(found)[0]
        if self.kind == "logits":
            return logits
        return torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, 1)


def export(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    kind: Kind = "logits",
    channels: int | None = None,
    mpp: float | None = None,
    classes: Sequence[str] | None = None,
    threshold: float = 0.5,
    balance: bool = False,
    name: str | None = None,
    licence: str | None = None,
    opset: int | None = None,
    check: bool = True,
) -> ExportCard:
    """Write a network to ``out``, and its card beside it with ``.json`` for the ending.

    Args:
        model: in evaluation mode; its first output counts, as for :func:`wholegrad.predict`.
        out: ``.onnx`` (ONNX), ``.pt2`` (``torch.export``) or ``.pt`` (TorchScript, which PyTorch has deprecated).
        kind: what the file gives: ``"logits"``, or ``"probability"``: their sigmoid (one channel) or softmax.
        channels: of the image; None for those that the first convolution takes.
        mpp: um a pixel that the network learned at.
        classes: names of labels 1, 2, ...; label 0 is background.
        threshold: probability from which a pixel of a one-channel output is labelled 1.
        balance: whether the network learned on slides evened out by :mod:`wholegrad.slide.balance`.
        name, licence: of the network, for the card.
        opset: of ONNX; None for the exporter's own choice.
        check: run the file, whole and by tiles, and compare with the network before it is written.

    Raises:
        ConfigError: the ending is unknown, a package is missing, an option cannot be, the network is in training mode.
        ShapeError: the network gives no tensor, or takes no size that was tried.
        MismatchError: the file does not compute what the network does; nothing is written.
        WholegradError: the network cannot be captured or exported, or the file cannot be written.
    """
    path = Path(out)
    form = format_of(path)
    _refuse(model, kind, threshold, form, check)
    _refuse_numbers(channels, mpp, None if form is ONNX else opset)
    if not path.parent.is_dir():
        raise ConfigError(str(path), "has no folder to go to", f"make {path.parent} first")
    dtype = model_dtype(model)
    network = Exported(_copy(model), kind).requires_grad_(False)
    truth = Truth(network, dtype, _channels(model) if channels is None else channels)
    found = _reach(network.model, truth.channels, dtype)
    with quiet():
        size, units, given_back = _tried(truth, found)
        card = _card(model, found, truth, given_back, form, kind, {
            "mpp": mpp, "classes": classes, "threshold": threshold, "balance": balance, "name": name,
            "licence": licence,
        })  # fmt: skip
        made = make(form, network, truth, card, size, units, opset, check)
    card = made.card.of_file(path.name, made.data)
    _write(path, made.data)
    _write(path.with_suffix(".json"), card.to_json().encode())
    return card


def _refuse(model: nn.Module, kind: Kind, threshold: float, form: Format, check: bool) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError("model", f"is a {type(model).__name__}", "give an nn.Module")
    if model.training:
        raise ConfigError(
            "model", "is in training mode, in which it computes something else", "call model.eval() first"
        )
    if kind not in get_args(Kind):
        raise ConfigError("kind", f"is {kind!r}", f"choose from {', '.join(get_args(Kind))}")
    if not isinstance(threshold, int | float) or not 0 < threshold < 1:
        raise ConfigError("threshold", f"is {threshold!r}", "choose a probability between 0 and 1")
    if model_dtype(model) not in (torch.float32, torch.float64):
        raise ConfigError("model", f"computes in {model_dtype(model)}", "call model.float() first")
    for package in form.needs:
        if importlib.util.find_spec(package) is None and (check or package != "onnxruntime"):
            remedy = f"{EXTRA}, or leave out the check" if package == "onnxruntime" else EXTRA
            raise ConfigError(form.name, f"needs {package}, which is not installed", remedy)


def _refuse_numbers(channels: int | None, mpp: float | None, opset: int | None) -> None:
    if channels is not None and (not isinstance(channels, int) or channels < 1):
        raise ConfigError("channels", f"is {channels!r}", "give a whole number of 1 or more")
    if mpp is not None and (not isinstance(mpp, int | float) or not 0 < mpp < inf):
        raise ConfigError("mpp", f"is {mpp!r}", "give um a pixel, more than 0")
    if opset is not None:
        raise ConfigError("opset", "is of ONNX", "name a file .onnx, or leave it out")


def _copy(model: nn.Module) -> nn.Module:
    """The network on the CPU, in evaluation mode, with weights of its own."""
    try:
        return copy.deepcopy(model).to(CPU).eval()
    except Exception as error:  # whatever a module of the user's raises
        said = " ".join(str(error).split())[:200]
        remedy = "take off torch.nn.utils.weight_norm (remove_weight_norm), or let copy.deepcopy copy its modules"
        raise ConfigError("model", f"cannot be copied ({type(error).__name__}: {said})", remedy) from error


def _channels(model: nn.Module) -> int:
    """What the first convolution takes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ConfigError("channels", "cannot be told from the network", "say how many an image has")


def _reach(network: nn.Module, channels: int, dtype: torch.dtype) -> Reach | Unbounded:
    def captured(size: int) -> Graph:
        return capture(network, None, given(np.broadcast_to(np.uint8(0), (channels, size, size)), None, dtype).inputs)

    try:
        return reach(captured)
    except UnsupportedOpError as error:
        return Unbounded(error.where, error.cause)


def _tried(truth: Truth, found: Reach | Unbounded) -> tuple[tuple[int, int], list[tuple[int, int]], Any]:
    """Size of an image to export with, what sizes may have to be multiples of, and what the network gives for it.

    Raises:
        ShapeError: it runs on no size that was tried.
    """
    stride = (1, 1) if isinstance(found, Unbounded) else (found.rows.stride, found.cols.stride)
    first: Exception | None = None
    for multiple in MULTIPLES:
        unit = (stride[0] * multiple, stride[1] * multiple)
        size = _size(found, unit)
        try:
            with torch.no_grad():
                out = truth.model(truth.image(1, *size))
        except Exception as error:  # the network's own code
            first = first or error
            continue
        larger = [(unit[0] * by, unit[1] * by) for by in POWERS]
        fit = [each for each in larger if size[0] % each[0] == size[1] % each[1] == 0]
        return size, list(dict.fromkeys([(1, 1), stride, *fit])), out
    said = " ".join(f"{type(first).__name__}: {first}".split())[:200]
    sizes = " x ".join(map(str, _size(found, stride)))
    raise ShapeError("model", f"runs on no image of about {sizes} pixels ({said})", "export a network of any size")


def _size(found: Reach | Unbounded, unit: tuple[int, int]) -> tuple[int, int]:
    """The least multiple of a unit such that no map is one pixel wide, which would mean broadcasting."""
    whole = (2 * LEAST, 3 * LEAST)
    if not isinstance(found, Unbounded):
        reaches = (found.rows.before + found.rows.after, found.cols.before + found.cols.after)
        whole = (max(reaches[0], LEAST) + 2 * unit[0], max(reaches[1], LEAST) + 3 * unit[1])
    return -(-whole[0] // unit[0]) * unit[0], -(-whole[1] // unit[1]) * unit[1]


def _card(
    model: nn.Module,
    found: Reach | Unbounded,
    truth: Truth,
    out: Any,
    form: Format,
    kind: Kind,
    told: dict[str, Any],
) -> ExportCard:
    """What can be said before the file is there, but after the network gave ``out`` for an image."""
    if not isinstance(out, torch.Tensor) or out.dim() < 2:
        raise ShapeError("model", "returns no tensor (N, C, ...)", "export a network of maps or of scores")
    tiling, why_not = tiling_of(found)
    channels, word = truth.channels, str(truth.dtype).removeprefix("torch.")
    mean, std = model.given if isinstance(model, Normalized) else (None, None)
    is_map, one = out.dim() == 4, out.shape[1] == 1
    balance = {"white": WHITE, "ink": INK, "by": "wholegrad.slide.balance"} if told["balance"] else None
    names = class_names(told["classes"], out.shape[1]) if is_map else told["classes"] and list(told["classes"])
    return ExportCard(
        format=form.name,
        network=told["name"] or type(without_normalization(model)).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        input={
            "name": INPUT, "axes": ["batch", channels, "height", "width"], "dtype": word,
            "channels": COLOURS.get(channels, [f"channel {k}" for k in range(channels)]), "mpp": told["mpp"],
            "values": VALUES, "mean": mean, "std": std, "balance": balance, "multiple": None,
        },
        output={
            "name": OUTPUT, "axes": ["batch", out.shape[1], *(("height", "width") if is_map else out.shape[2:])],
            "dtype": word, "kind": kind, "probability": "sigmoid" if one else "softmax over channels",
            "threshold": told["threshold"] if one else None, "classes": names, "scale": scale_of(found),
        },
        tiling=tiling,
        why_not=why_not,
        checked=None,
        licence=told["licence"],
        weights=weights_digest(model),
        versions=versions(form.needs),
    )  # fmt: skip


def _write(path: Path, data: bytes) -> None:
    file = PartialFile(path)
    try:
        file.append(data)
        file.commit()
    except BaseException:
        file.discard()
        raise

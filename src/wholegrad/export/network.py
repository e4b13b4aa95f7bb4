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
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from wholegrad.errors import ConfigError, ShapeError, UnsupportedOpError
from wholegrad.export.card import ExportCard, class_names, scale_of, tiling_of, versions, weights_digest
from wholegrad.export.check import Truth
from wholegrad.export.formats import FORMATS, INPUT, OUTPUT, Format, quiet
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
        ConfigError: the ending is unknown, a package is missing, or the network is in training mode.
        MismatchError: the file does not compute what the network does; nothing is written.
        WholegradError: the network cannot be captured or exported, or the file cannot be written.
    """
    path = Path(out)
    form = _format(path)
    _refuse(model, kind, threshold, form, check)
    if not path.parent.is_dir():
        raise ConfigError(str(path), "has no folder to go to", f"make {path.parent} first")
    dtype = model_dtype(model)
    network = Exported(copy.deepcopy(model).to(CPU).eval(), kind).requires_grad_(False)
    truth = Truth(network, dtype, channels or _channels(model))
    found = _reach(network.model, truth.channels, dtype)
    size = _size(found)
    with quiet():
        card = _card(model, found, truth, size, form, kind, {
            "mpp": mpp, "classes": classes, "threshold": threshold, "balance": balance, "name": name,
            "licence": licence,
        })  # fmt: skip
        stride = None if isinstance(found, Unbounded) else (found.rows.stride, found.cols.stride)
        made = make(form, network, truth, card, size, stride, opset, check)
    card = made.card.of_file(path.name, made.data)
    _write(path, made.data)
    _write(path.with_suffix(".json"), card.to_json().encode())
    return card


def _format(path: Path) -> Format:
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        known = ", ".join(f"{ending} ({each.name})" for ending, each in FORMATS.items())
        raise ConfigError(str(path), "has no ending of a format that networks are exported to", f"choose from {known}")
    return form


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


def _size(found: Reach | Unbounded) -> tuple[int, int]:
    """Of an image to export with: no map of it is one pixel wide, which would mean broadcasting."""
    if isinstance(found, Unbounded):
        return 2 * LEAST, 3 * LEAST
    rows, cols = (
        axis.stride * -(-max(axis.before + axis.after, LEAST) // axis.stride) for axis in (found.rows, found.cols)
    )
    return rows + 2 * found.rows.stride, cols + 3 * found.cols.stride


def _card(
    model: nn.Module,
    found: Reach | Unbounded,
    truth: Truth,
    size: tuple[int, int],
    form: Format,
    kind: Kind,
    told: dict[str, Any],
) -> ExportCard:
    """What can be said before the file is there."""
    with torch.no_grad():
        out = truth.model(truth.image(1, *size))
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

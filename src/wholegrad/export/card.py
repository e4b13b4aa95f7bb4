"""What stands beside an exported network: all that running it needs and no file format says."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from wholegrad.errors import ConfigError
from wholegrad.graph.reach import AxisReach, Reach, Unbounded

VERSION = 1


@dataclass(frozen=True)
class ExportCard:
    """The card of an exported network, as its JSON file has it.

    Attributes:
        card: version of this layout.
        format: of the network's file, in words.
        network: its name; ``parameters``: how many numbers it learned.
        input: name, axes, dtype, channels, um a pixel, and what pixels are: ``values`` in words; ``mean`` and
            ``std`` that the file itself normalises by, or None; ``balance`` that has to be done before, or None;
            ``multiple``: of pixels that height and width must be, None where it was not looked for.
        output: name, axes, dtype, ``kind`` (logits or probability), how probabilities follow, classes in order of the
            channels (of one channel: what 0 and 1 stand for), ``scale``: input pixels under one of its own,
            rows and columns.
        tiling: ``stride``, ``halo``, ``before`` and ``after``, rows and columns, in input pixels; or None for a
            network that cannot run by tiles, and ``why_not``.
        checked: with what the file was run, and how far it was from the network; None if it was not.
        licence: of the weights, as they were declared.
        weights: SHA-256 of names, shapes and values of parameters and buffers.
        versions: of what made the file.
        file: its name, bytes and SHA-256; not in the copy that is inside of the file.
    """

    format: str
    network: str
    parameters: int
    input: dict[str, Any]
    output: dict[str, Any]
    tiling: dict[str, Any] | None
    why_not: str | None
    checked: dict[str, Any] | None
    licence: str | None
    weights: str
    versions: dict[str, str]
    file: dict[str, Any] | None = None
    card: int = VERSION

    def to_json(self) -> str:
        told = asdict(self)
        return json.dumps({"card": told.pop("card"), **told}, indent=2, allow_nan=False) + "\n"

    def of_file(self, name: str, data: bytes) -> ExportCard:
        """The same card for a file of this name and content."""
        return replace(self, file={"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})


def tiling_of(found: Reach | Unbounded) -> tuple[dict[str, Any] | None, str | None]:
    """What a card says of tiles, and why it says nothing."""
    if isinstance(found, Unbounded):
        return None, f"{found.place} {found.cause}: run whole images"
    return {
        "stride": [found.rows.stride, found.cols.stride],
        "halo": [found.rows.halo, found.cols.halo],
        "before": [found.rows.before, found.cols.before],
        "after": [found.rows.after, found.cols.after],
    }, None


def scale_of(found: Reach | Unbounded) -> list[float] | None:
    """Input pixels under one output pixel: rows, columns."""

    def number(axis: AxisReach) -> float:
        return int(axis.scale) if axis.scale.denominator == 1 else float(axis.scale)

    return None if isinstance(found, Unbounded) else [number(found.rows), number(found.cols)]


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer that is saved: name, dtype, shape, bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # what a module keeps beside them, of any type
            continue
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return found.hexdigest()


def class_names(names: Sequence[str] | None, channels: int) -> list[str]:
    """Of labels 0, 1, ...: background, then what the caller names.

    Raises:
        ConfigError: there are more names than labels, a name twice, or no list of them.
    """
    count = max(1, channels - 1)
    given = list(names or [])
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in given):
        raise ConfigError("classes", f"is {names!r}", "give a list of names")
    if len(set(given)) < len(given):
        raise ConfigError("classes", f"has a name twice: {', '.join(given)}", "give different names")
    if len(given) > count:
        raise ConfigError("classes", f"are {len(given)} names for {count} labels", "name labels 1, 2, ... alone")
    return ["background", *given, *(f"class {label}" for label in range(len(given) + 1, count + 1))]


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of wholegrad, torch, Python and these packages, those that are installed."""
    found: dict[str, str] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("wholegrad", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return dict(sorted(found.items()))

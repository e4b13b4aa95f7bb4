"""What a run leaves on disk: weights and checkpoints as safetensors, with a card that says what they are.

A file appears complete or not at all (rule 11): written aside, flushed to the disk, renamed. The card travels
inside the safetensors file, so that the two cannot part; the JSON file beside a weights file is a copy to
read. Nothing in these files is code: loading one imports nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from wholegrad.aside import aside
from wholegrad.errors import ConfigError, WholegradError
from wholegrad.train.networks import NETWORKS, build_network, normalized, without_normalization
from wholegrad.train.optim import AVERAGE, Mover
from wholegrad.train.team import Team

MODEL = "model/"  # prefix of weights' names in a checkpoint; a weights file has none


@dataclass(frozen=True)
class Card:
    """What a weights file is.

    Attributes:
        network: built-in name or ``module:factory``.
        args: the factory's arguments.
        parameters: how many numbers were learned.
        step: training steps taken.
        dice: of each test slide, and ``"mean"``; empty before any test.
        config: the run's configuration.
        versions: of wholegrad, torch and Python.
        mean, std: by which images are normalised in front of the network, a number a channel; None for not at all.
    """

    network: str
    args: dict[str, Any]
    parameters: int
    step: int
    dice: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]
    mean: list[float] | None = None
    std: list[float] | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def versions() -> dict[str, str]:
    """Of what shapes a result: wholegrad, torch, Python."""
    try:
        ours = version("wholegrad")
    except PackageNotFoundError:
        ours = "unknown"
    return {"wholegrad": ours, "torch": torch.__version__, "python": platform.python_version()}


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save_weights(path: Path, model: nn.Module, card: Card) -> None:
    """Write ``path`` (safetensors) and, beside it, the card as ``.json``."""
    write_whole(path, _pack(_tensors(model), card))
    write_whole(path.with_suffix(".json"), card.to_json().encode())


def save_checkpoint(path: Path, model: nn.Module, mover: Mover, card: Card, state: Mapping[str, Any]) -> None:
    """Write all that continuing the run takes, in one file: weights, buffers, how they move, card.

    Args:
        state: plain values of the run itself.

    Raises:
        WholegradError: the file cannot be written; the one before it stays.
    """
    tensors = {MODEL + name: tensor for name, tensor in _tensors(model).items()}
    for name, tensor in mover.tensors().items():
        tensors[name] = tensor.detach().clone().contiguous()
    write_whole(path, _pack(tensors, card, {"mover": mover.values(), **state}))


def load_checkpoint(path: Path, model: nn.Module, mover: Mover) -> tuple[Card, dict[str, Any]]:
    """Put a checkpoint back into a model and mover of the same making; returns its card and the run's state.

    Raises:
        ConfigError: it is not a checkpoint, or one of another network or optimiser.
    """
    tensors, card, state = _read(path)
    if "mover" not in state:
        raise ConfigError(str(path), "is not a checkpoint of this version", "start the run anew")
    _fill(model, {k.removeprefix(MODEL): v for k, v in tensors.items() if k.startswith(MODEL)}, path)
    try:
        mover.restore(tensors, state["mover"])
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(str(path), f"is of another optimiser or schedule ({said})", "resume with those") from error
    return card, state


def share_state(team: Team, model: nn.Module, mover: Mover | None = None) -> None:
    """Give every rank the weights and buffers of rank 0, and with ``mover`` how they move."""
    if team.alone:
        return
    moving = None if mover is None else (mover.tensors(), mover.values())
    tensors, moving = team.share((_tensors(model), moving), "rank 0's state")
    if not team.first:
        without_normalization(model).load_state_dict(tensors)
        if mover is not None and moving is not None:
            mover.restore(*moving)


def load_model(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The trained network of a weights file, a checkpoint, or a run's folder, in evaluation mode.

    Args:
        path: the file, or a folder that holds ``weights.safetensors`` (else ``checkpoint.safetensors``).
        model: a network to put the weights into; needed for one that is not built in, since a file never
        decides what
            code is imported.

    Raises:
        ConfigError: no such file, not one of ours, or its weights do not fit.
    """
    file = find_weights(Path(path))
    tensors, card, _ = _read(file)
    if model is None:
        if card.network not in NETWORKS:
            raise ConfigError(str(file), f"holds weights of {card.network}", "name that network yourself")
        model = build_network(card.network, card.args)
    for prefix in (AVERAGE, MODEL):  # of a checkpoint: averaged weights if there are any
        if any(name.startswith(prefix) for name in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    _fill(model, tensors, file)
    return normalized(model, card.mean, card.std).eval()


def read_card(path: str | Path) -> Card:
    """The card inside a weights file, a checkpoint, or those of a run's folder.

    Raises:
        ConfigError: no such file, or not one of ours.
    """
    return _read(find_weights(Path(path)))[1]


def find_weights(path: Path) -> Path:
    """``path`` itself, or the weights or checkpoint that a run left in that folder."""
    if not path.is_dir():
        return path
    for name in ("weights.safetensors", "checkpoint.safetensors"):
        if (path / name).exists():
            return path / name
    raise ConfigError(str(path), "holds neither weights nor a checkpoint", "name a run's folder or a .safetensors file")


def write_whole(path: Path, data: bytes) -> None:
    """Write ``path`` so that it is either the old file or the complete new one, whatever happens (rule 11).

    Raises:
        WholegradError: the file cannot be written.
    """
    partial = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # its folder may be a file
            partial.unlink()
        raise WholegradError(str(path), f"cannot be written ({error.strerror})", "check space and rights") from None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last; only POSIX systems can open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    own = without_normalization(model).state_dict()
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in own.items()}


def _pack(tensors: Mapping[str, torch.Tensor], card: Card, state: Mapping[str, Any] | None = None) -> bytes:
    metadata = {"wholegrad": card.to_json(), **({} if state is None else {"state": json.dumps(state)})}
    data: bytes = to_safetensors(dict(tensors), metadata=metadata)
    return data


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Card, dict[str, Any]]:
    if not path.is_file():
        raise ConfigError(str(path), "no such file", "check the path")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            card, state = Card(**json.loads(metadata["wholegrad"])), json.loads(metadata.get("state", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, card, state  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        cause = f"is not a weights file of wholegrad ({type(error).__name__})"
        raise ConfigError(str(path), cause, "use one that wholegrad train wrote") from error


def _fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    model = without_normalization(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            cause = f"{name} is {given.get(name, 'absent')} and the network has {wanted.get(name, 'none')}"
            raise ConfigError(str(path), cause, "load it into the network that it came from")
    model.load_state_dict(dict(tensors))

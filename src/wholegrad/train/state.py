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
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from wholegrad.errors import ConfigError, WholegradError
from wholegrad.train.networks import NETWORKS, build_network

MODEL, OPTIMIZER = "model/", "optimizer/"  # prefixes of tensor names in a checkpoint; a weights file has none


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
    """

    network: str
    args: dict[str, Any]
    parameters: int
    step: int
    dice: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]

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


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, card: Card) -> None:
    """Write all that continuing the run takes, in one file: weights, buffers, optimiser state, card."""
    tensors = {MODEL + name: tensor for name, tensor in _tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"{OPTIMIZER}{index}/{key}"] = torch.as_tensor(value).clone().contiguous()
    write_whole(path, _pack(tensors, card))


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Card:
    """Put a checkpoint back into a model and optimiser of the same making; returns its card.

    Raises:
        ConfigError: it is not a checkpoint, or one of another network.
    """
    tensors, card = _read(path)
    _fill(model, {k.removeprefix(MODEL): v for k, v in tensors.items() if k.startswith(MODEL)}, path)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER):
            index, key = name.removeprefix(OPTIMIZER).split("/")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return card


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
    tensors, card = _read(file)
    if model is None:
        if card.network not in NETWORKS:
            raise ConfigError(str(file), f"holds weights of {card.network}", "name that network yourself")
        model = build_network(card.network, card.args)
    if any(name.startswith(MODEL) for name in tensors):
        tensors = {k.removeprefix(MODEL): v for k, v in tensors.items() if k.startswith(MODEL)}
    _fill(model, tensors, file)
    return model.eval()


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
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
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
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def _pack(tensors: Mapping[str, torch.Tensor], card: Card) -> bytes:
    data: bytes = to_safetensors(dict(tensors), metadata={"wholegrad": card.to_json()})
    return data


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Card]:
    if not path.is_file():
        raise ConfigError(str(path), "no such file", "check the path")
    try:
        with safe_open(str(path), framework="pt") as file:
            card = Card(**json.loads((file.metadata() or {})["wholegrad"]))
            return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        cause = f"is not a weights file of wholegrad ({type(error).__name__})"
        raise ConfigError(str(path), cause, "use one that wholegrad train wrote") from error


def _fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            cause = f"{name} is {given.get(name, 'absent')} and the network has {wanted.get(name, 'none')}"
            raise ConfigError(str(path), cause, "load it into the network that it came from")
    model.load_state_dict(dict(tensors))

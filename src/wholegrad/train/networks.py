"""From a network's name to the network: the built-in ones, and ``module:factory`` for the user's own."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wholegrad.errors import ConfigError
from wholegrad.nets import unet4492

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet4492": unet4492}


class Normalized(nn.Module):
    """A network behind ``(image - mean) / std``, so that normalising is part of the graph.

    Args:
        network: takes images ``(N, C, H, W)``.
        mean, std: a number a channel, in fractions of 255. They are no parameters: a weights file's card holds them.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network, self.given = network, (list(mean), list(std))
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("scale", 1 / torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network((image - self.mean) * self.scale)
        return logits


def normalized(model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """``model`` behind its normalisation, if there is one."""
    return Normalized(model, mean, std) if mean and std else model


def without_normalization(model: nn.Module) -> nn.Module:
    """The network itself."""
    return model.network if isinstance(model, Normalized) else model


def build_network(name: str, args: dict[str, Any] | None = None) -> nn.Module:
    """The network that ``name`` stands for, built with ``args``.

    ``module:factory`` imports ``module`` (the current folder counts) and calls ``factory``: only for names
    that the user gave, never for one read from a weights file.

    Raises:
        ConfigError: no such network, or its factory refuses the arguments or does not return an
        ``nn.Module``.
    """
    factory = network_factory(name)
    try:
        model = factory(**(args or {}))
    except TypeError as error:
        raise ConfigError(f"network {name}", str(error), "check network.args") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"network {name}", f"gave a {type(model).__name__}", "return a torch.nn.Module")
    return model


def network_factory(name: str) -> Callable[..., Any]:
    """What makes the network of this name.

    Raises:
        ConfigError: no such network.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"network {name}", "is not built in", f"use {near}, or module:factory for your own")
    return imported(name, "network", "factory")


def imported(name: str, what: str, part: str) -> Callable[..., Any]:
    """The function or class that ``module:attribute`` names; the current folder counts.

    Args:
        what, part: what is looked for and what its attribute is called, for errors.

    Raises:
        ConfigError: it cannot be imported or called.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever the user's module raises
        said = " ".join(str(error).split())
        raise ConfigError(f"{what} {name}", said, f"check module and {part}") from error
    if not callable(found):
        raise ConfigError(f"{what} {name}", f"is a {type(found).__name__}", "name a class or function")
    result: Callable[..., Any] = found
    return result

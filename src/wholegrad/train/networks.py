"""From a network's name to the network: the built-in ones, and ``module:factory`` for the user's own."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from wholegrad.errors import ConfigError
from wholegrad.nets import unet4492

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet4492": unet4492}


def build_network(name: str, args: dict[str, Any] | None = None) -> nn.Module:
    """The network that ``name`` stands for, built with ``args``.

    ``module:factory`` imports ``module`` (the current folder counts) and calls ``factory``: only for names
    that the user gave, never for one read from a weights file.

    Raises:
        ConfigError: no such network, or its factory refuses the arguments or does not return an
        ``nn.Module``.
    """
    factory = NETWORKS[name] if name in NETWORKS else _import(name)
    try:
        model = factory(**(args or {}))
    except TypeError as error:
        raise ConfigError(f"network {name}", str(error), "check network.args") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"network {name}", f"gave a {type(model).__name__}", "return a torch.nn.Module")
    return model


def _import(name: str) -> Callable[..., nn.Module]:
    module_name, colon, attribute = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"network {name}", "is not built in", f"use {near}, or module:factory for your own")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"network {name}", str(error), "check module and factory") from error
    if not callable(found):
        raise ConfigError(f"network {name}", f"is a {type(found).__name__}", "name a class or function")
    factory: Callable[..., nn.Module] = found
    return factory

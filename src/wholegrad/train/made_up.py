"""Model and loss from the names that a user gives, with a made-up target: for plans, proofs and measurements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wholegrad.api import LossFn
from wholegrad.errors import ConfigError
from wholegrad.losses import LOSSES
from wholegrad.train.networks import imported, network_factory

KINDS = "labels, labels:K, mask, class:K, none or module:function"


def blobs(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Made-up labels ``(1, H, W)`` with tissue, background and pixels to ignore, for proofs."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array([0, 1, 255], np.uint8), p=(0.5, 0.4, 0.1), size=(height // 8 + 1, width // 8 + 1))
    labels: npt.NDArray[np.uint8] = coarse.repeat(8, axis=0).repeat(8, axis=1)[None, :height, :width]
    return labels


def a(word: str) -> str:
    """The word with its article."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def model_and_loss(network: str, loss: str | None) -> tuple[nn.Module, LossFn]:
    """What the factory returns, with the loss that was asked for or that it brings."""
    made = _called(f"network {network}", network_factory(network))
    model, own = made if isinstance(made, tuple | list) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"network {network}", f"gave {a(type(made).__name__)}", "return a torch.nn.Module, or one and its loss"
        )
    if own is None:
        return model, loss_of(loss or "bce+dice")
    if loss is not None:
        raise ConfigError(f"network {network}", "brings a loss of its own", "leave out --loss")
    if not callable(own):
        raise ConfigError(f"network {network}", f"gave {a(type(own).__name__)} as loss", "return a function or module")
    return model, own


def loss_of(name: str) -> LossFn:
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


def target_of(name: str, edges: tuple[int, int], seed: int = 0, empty: bool = False) -> Any:
    """A made-up target, as --help describes it; with ``empty``, one of zeros that takes no memory."""
    kind, colon, rest = name.partition(":")
    if name == "none":
        return None
    if name in ("labels", "mask"):
        if empty:
            return np.broadcast_to(np.uint8(0) if name == "labels" else np.float32(0), (1, *edges))
        return blobs(*edges, seed) if name == "labels" else torch.from_numpy((blobs(*edges, seed) == 1).astype("f4"))
    if kind in ("labels", "class") and rest.isdecimal() and int(rest) > 0:
        if kind == "labels" and empty:
            return np.broadcast_to(np.int64(0), edges)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(int(rest), edges if kind == "labels" else (1,), generator=generator)
    if not colon or kind in ("labels", "class"):
        raise ConfigError(f"target {name}", "is unknown", f"use {KINDS}")
    return _called(f"target {name}", imported(name, "target", "function"), *edges)

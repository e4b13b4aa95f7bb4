"""What is compared: the same network, loss and optimiser, on whole slides, on thumbnails of them, and on patches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FOLDS = 5
FEW, MANY = 96, 960  # updates: twelve times eight slides, and ten times as many
SHARED = {
    "data": {"balance": True},
    "augment": {"flip": True, "turn": True},
    "network": {"name": "unet4492", "args": {"seed": 0}},
    "train": {
        "loss": "bce",  # known before its sum is: forward and backward are one pass
        "schedule": "cosine",
        "clip": 1.0,
        "budget": "1.5GiB",
        "seed": 0,
        "panels": False,
        "checkpoint_minutes": 1.0,
    },
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: what a reader calls it.
        updates: steps of batch 1.
        data: where its slides are read otherwise than whole at the resolution at which they are stored.
        lr, warmup: of the optimiser, Adam.
    """

    title: str
    updates: int
    data: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.02
    warmup: int = 5


def _more(title: str, data: dict[str, Any]) -> Arm:
    return Arm(title, MANY, data, lr=0.01, warmup=50)


ARMS = {
    "whole": Arm("whole slides as stored", FEW),
    "thumbnail-16": Arm("whole slides at 16 um", FEW, {"mpp": 16.0}),
    "thumbnail-4": Arm("whole slides at 4 um", FEW, {"mpp": 4.0}),
    "patches": Arm("patches of 1024 x 1024 as stored", FEW, {"crop": [1024, 1024]}),
    "thumbnail-16-more": _more("whole slides at 16 um", {"mpp": 16.0}),
    "thumbnail-4-more": _more("whole slides at 4 um", {"mpp": 4.0}),
    "patches-more": _more("patches of 1024 x 1024 as stored", {"crop": [1024, 1024]}),
}


def fold_of(count: int, fold: int) -> list[int]:
    """Which of so many slides a fold holds back: shuffled once, dealt out."""
    order = np.random.default_rng(0).permutation(count)
    return [int(i) for i in order[fold::FOLDS]]


def table(arm: Arm, pairs: list[tuple[Path, Path]], held: list[int], out: Path) -> dict[str, dict[str, Any]]:
    """A run's configuration: the slides not in ``held`` are learned from, the others make the held-back curve.

    The last weights are the ones that are tested: those slides choose nothing.
    """
    of = [{"slide": str(slide), "mask": str(mask)} for slide, mask in pairs]
    made = {name: dict(values) for name, values in SHARED.items()}
    made["data"] |= {
        "train": [pair for i, pair in enumerate(of) if i not in held],
        "val": [of[i] for i in held],
        **arm.data,
    }
    made["train"] |= {"steps": arm.updates, "lr": arm.lr, "warmup": arm.warmup, "out": str(out)}
    made["validation"] = {"steps": arm.updates // 8}
    return made

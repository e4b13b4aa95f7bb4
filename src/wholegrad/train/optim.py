"""How weights move: an optimiser and a schedule by name, gradients clipped and averaged, and averaged weights.

All of its state goes into a checkpoint as tensors and plain values, and comes back to the same bits.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from wholegrad.errors import ConfigError
from wholegrad.train.networks import without_normalization
from wholegrad.train.tables import TrainConfig

Tensors = dict[str, torch.Tensor]
GRAD, STATE, AVERAGE = "grad/", "optimizer/", "ema/"  # prefixes of tensors' names in a checkpoint


def learning_rate(train: TrainConfig, update: int, total: int) -> float:
    """The rate at an update: a linear warm-up, then constant or half a cosine down to nothing."""
    if update < train.warmup:
        return train.lr * (update + 1) / train.warmup
    if train.schedule.name == "constant":
        return train.lr
    done = (update - train.warmup) / max(1, total - train.warmup)
    return train.lr * (1 + math.cos(math.pi * done)) / 2


class Mover:
    """Optimiser, schedule and averaged weights of one run.

    Args:
        model: whose parameters move.
        train: the settings.
        total: updates that the run has.

    Raises:
        ConfigError: optimiser or schedule refuse their arguments.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, total: int) -> None:
        self.model, self.train, self.total = model, train, total
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.trained, train)
        self.schedule = _schedule(self.optimizer, train, total)
        self.updates = 0
        self.slides = 0  # whose gradients wait for the next update
        self.waiting: list[torch.Tensor | None] | None = None  # their sum in float64, beside what parameters hold
        self.average: Tensors | None = None
        if train.ema is not None:
            self.average = {name: value.detach().clone() for name, value in self.weights().items()}

    def weights(self) -> Tensors:
        """The network's weights and buffers themselves, by name."""
        return without_normalization(self.model).state_dict()

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        if self.schedule is None:
            return learning_rate(self.train, self.updates, self.total)
        warm = min(1.0, (self.updates + 1) / self.train.warmup) if self.train.warmup else 1.0
        return float(self.optimizer.param_groups[0]["lr"]) * warm

    def add(self, more: bool = False) -> None:
        """Note that one more slide's gradient has been added to the parameters'.

        Args:
            more: whether others follow before the update; then it is taken into a sum in float64.
        """
        self.slides += 1
        if more or self.waiting is not None:
            sums = self.waiting or [None] * len(self.trained)
            self.waiting = [_sum(kept, p.grad) for kept, p in zip(sums, self.trained, strict=True)]
            self.optimizer.zero_grad(set_to_none=True)

    def take(self, sums: list[torch.Tensor | None], slides: int) -> None:
        """Put the sum of the gradients of so many slides, in float64, in place of what waits."""
        self.slides, self.waiting = slides, sums if slides else None
        self.optimizer.zero_grad(set_to_none=True)

    def move(self) -> float | None:
        """One update by the mean gradient of the slides since the last; nothing if there were none.

        Returns:
            The gradient's norm before clipping; where that is not finite, nothing moved.
        """
        if not self.slides:
            return None
        grads = self._mean()
        norm = _norm(grads)
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            self.slides = 0
            return norm
        if self.train.clip is not None and norm > self.train.clip:
            for grad in grads:
                grad.mul_(self.train.clip / norm)
        self._step()
        self.optimizer.zero_grad(set_to_none=True)
        self.slides, self.updates = 0, self.updates + 1
        self._average()
        return norm

    def _mean(self) -> list[torch.Tensor]:
        """The parameters' gradients, now the mean over slides."""
        if self.waiting is not None:
            for parameter, total in zip(self.trained, self.waiting, strict=True):
                parameter.grad = None if total is None else (total / self.slides).to(parameter.dtype)
            self.waiting = None
            return [p.grad for p in self.trained if p.grad is not None]
        grads = [p.grad for p in self.trained if p.grad is not None]
        if self.slides > 1:
            for grad in grads:
                grad.div_(self.slides)
        return grads

    def _step(self) -> None:
        rate, groups = self.rate, self.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = rate
        self.optimizer.step()
        for group, own in zip(groups, scheduled, strict=True):
            group["lr"] = own  # schedules go on from their own last value
        if self.schedule is not None and not isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step()

    @torch.no_grad()
    def _average(self) -> None:
        """Weights move a little towards the new ones; what is no float (a counter) is taken over."""
        if self.average is None or self.train.ema is None:
            return
        for name, value in self.weights().items():
            kept = self.average[name]
            if value.is_floating_point():
                kept.lerp_(value, 1 - self.train.ema)
            else:
                kept.copy_(value)

    def scored(self, dice: float) -> None:
        """Tell a schedule that waits for a plateau how good the network is."""
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(dice)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the averaged ones, if there are any; twice is as before."""
        for name, value in self.weights().items() if self.average is not None else ():
            assert self.average is not None
            kept = self.average[name].clone()
            self.average[name].copy_(value)
            value.copy_(kept)

    def tensors(self) -> Tensors:
        """What a checkpoint needs as tensors: optimiser's state, averaged weights, gradients that wait."""
        found: Tensors = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    found[f"{STATE}{index}/{key}"] = value
        for name, value in (self.average or {}).items():
            found[AVERAGE + name] = value
        for i, parameter in enumerate(self.trained):
            grad = parameter.grad if self.waiting is None else self.waiting[i]
            if self.slides and grad is not None:
                found[f"{GRAD}{i}"] = grad
        return found

    def values(self) -> dict[str, Any]:
        """What a checkpoint needs as plain values."""
        state = self.optimizer.state_dict()
        return {
            "names": [self.train.optimizer.name, self.train.schedule.name],
            "updates": self.updates,
            "slides": self.slides,
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
            "state": {
                str(index): {k: v for k, v in each.items() if not isinstance(v, torch.Tensor)}
                for index, each in state["state"].items()
            },
            "schedule": None if self.schedule is None else _plain(self.schedule.state_dict()),
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Put back what ``tensors`` and ``values`` gave.

        Raises:
            ValueError: they are of another optimiser or schedule.
        """
        names = [self.train.optimizer.name, self.train.schedule.name]
        if values["names"] != names:
            raise ValueError(f"{' and '.join(values['names'])}, not {' and '.join(names)}")
        waiting: dict[int, torch.Tensor] = {}
        state: dict[int, dict[str, Any]] = {int(i): dict(each) for i, each in values["state"].items()}
        for name, tensor in tensors.items():
            if name.startswith(STATE):
                index, key = name.removeprefix(STATE).split("/", 1)
                state.setdefault(int(index), {})[key] = tensor
            elif name.startswith(AVERAGE) and self.average is not None:
                self.average[name.removeprefix(AVERAGE)].copy_(tensor)
            elif name.startswith(GRAD):
                waiting[int(name.removeprefix(GRAD))] = tensor.to(torch.float64)
        own = self.optimizer.state_dict()["param_groups"]
        groups = [
            {**mine, **{k: _as_before(mine.get(k), v) for k, v in saved.items()}}
            for mine, saved in zip(own, values["groups"], strict=True)
        ]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.schedule is not None and values["schedule"] is not None:
            self.schedule.load_state_dict(values["schedule"])
        self.updates, self.slides = int(values["updates"]), int(values["slides"])
        self.waiting = [waiting.get(i) for i in range(len(self.trained))] if waiting else None


def _sum(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    """A sum in float64 and one more term, either of which may be missing."""
    if grad is None:
        return total
    return grad.detach().to(torch.float64) if total is None else total.add_(grad.detach())


def _norm(grads: list[torch.Tensor]) -> float:
    """The norm of all gradients together, summed in float64."""
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))


def _as_before(mine: Any, saved: Any) -> Any:
    """A value from JSON in the type that it had: pairs of betas are tuples."""
    return tuple(saved) if isinstance(mine, tuple) else saved


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a schedule's state that are values; functions and tables are made anew by its constructor."""
    return {key: v for key, v in state.items() if isinstance(v, int | float | str | list | None)}


def _optimizer(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    kind = getattr(torch.optim, train.optimizer.name)
    return _made(kind, "train.optimizer", train.optimizer.args, parameters, lr=train.lr)  # type: ignore[no-any-return]


def _schedule(
    optimizer: torch.optim.Optimizer, train: TrainConfig, total: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if train.schedule.name in ("constant", "cosine"):
        return None
    kind = getattr(torch.optim.lr_scheduler, train.schedule.name)
    given = {key: total if value == "total" else value for key, value in train.schedule.args.items()}
    if kind is torch.optim.lr_scheduler.ReduceLROnPlateau:
        given = {"mode": "max", **given}  # of Dice
    return _made(kind, "train.schedule", given, optimizer)  # type: ignore[no-any-return]


def _made(kind: Any, where: str, given: Mapping[str, Any], *args: Any, **fixed: Any) -> Any:
    known = list(inspect.signature(kind).parameters)[len(args) :]
    for name in given:
        if name not in known:
            cause = f"{kind.__name__} takes no {name!r}"
            raise ConfigError(f"{where}.args", cause, f"choose from {', '.join(k for k in known if k not in fixed)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(*args, **fixed, **given)
    except (TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{where}.args", f"{kind.__name__} says: {said}", "mend the arguments") from error

"""One model, loss and image run whole and under plans, and how far the tensors of two such runs are apart."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from wholegrad.api import DeviceLike, LossFn, backward, plan, run_outputs
from wholegrad.given import given, in_dtype
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.rules.reduction import gather
from wholegrad.plan.boundaries import candidates, storable
from wholegrad.plan.plan import Plan
from wholegrad.run.reference import Reference, buffers, gradients, named, parts, whole_image
from wholegrad.run.sink import Sink

ZERO = 1e-10  # float64: a gradient of this share of its module's largest is rounding
LARGE = 768 * 768  # pixels above which no tile is the whole image


class Case:
    """Model, loss and data in one dtype; plans run on ``device`` (None for the CPU)."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        image: Any,
        target: Any,
        dtype: torch.dtype,
        seed: int,
        device: DeviceLike = None,
    ) -> None:
        self.model, self.loss_fn = copy.deepcopy((model, loss_fn))
        for _, part in parts(self.model, self.loss_fn):
            part.to(dtype)
        self.start = copy.deepcopy([part.state_dict() for _, part in parts(self.model, self.loss_fn)])
        self.dtype, self.seed, self.device = dtype, seed, device
        self.image, self.target = in_dtype(image, dtype), in_dtype(target, dtype)

    def reference(self) -> Reference:
        args, kwargs, target = given(self.image, self.target, self.dtype).whole()
        return whole_image(self.model, self.loss_fn, args, kwargs, target, self.dtype, self.seed)

    def nudged(self, generator: torch.Generator) -> Case:
        """The same with every parameter changed by up to one rounding."""
        other = copy.copy(self)
        other.model, other.loss_fn = copy.deepcopy((self.model, self.loss_fn))
        with torch.no_grad():
            for _, part in parts(other.model, other.loss_fn):
                for parameter in part.parameters():
                    share = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) * 2 - 1
                    parameter.mul_(1 + torch.finfo(parameter.dtype).eps * share)
        return other

    def plan(self, **fixed: Any) -> Plan:
        return plan(self.model, self.loss_fn, self.image, self.target, device=self.device, **fixed)

    def run(self, made: Plan, tile: tuple[int, int] | None) -> dict[str, torch.Tensor]:
        """Loss, outputs, gradients and buffers under one plan; the model is left as it was."""
        for _, part in parts(self.model, self.loss_fn):
            part.zero_grad(set_to_none=True)
        loss = backward(self.model, self.loss_fn, self.image, self.target, plan=made, seed=self.seed)
        written = buffers(self.model, self.loss_fn)
        grads = gradients(self.model, self.loss_fn)
        self.reset()
        outputs = whole_outputs(self.model, self.image, tile, self.seed, self.device)
        self.reset()
        return named(loss, outputs, grads, written)

    def tiled(self, tile: tuple[int, int], place: str) -> dict[str, torch.Tensor]:
        """:meth:`run` under the plan that :meth:`made` makes."""
        return self.run(self.made(tile, place), tile)

    def reset(self) -> None:
        """Parameters and buffers as they were at first."""
        for (_, part), state in zip(parts(self.model, self.loss_fn), self.start, strict=True):
            part.load_state_dict(state)

    def made(self, tile: tuple[int, int], place: str) -> Plan:
        """The plan with these tiles; on disk, with every boundary that there could be; else in the nearest memory."""
        made = self.plan(tile=tile, placement=place if place == "disk" or self.device is None else None)
        if place == "disk":  # every map that could be kept, so that stores and cuts are tried too
            names = [made.graph.nodes[ref.node].name for ref in candidates(made.graph)]
            made = self.plan(tile=tile, placement=place, boundaries=names)
        return made


def whole_outputs(
    model: nn.Module, image: Any, tile: tuple[int, int] | None = None, seed: int = 0, device: DeviceLike = None
) -> tuple[torch.Tensor, ...]:
    """The model's outputs, computed tile by tile and put together in memory."""
    kept: dict[Ref, torch.Tensor] = {}
    order: list[Ref] = []

    def sinks(graph: Graph) -> dict[Ref, Sink]:
        maps = [i for i, ref in enumerate(graph.outputs) if graph.spec(ref).is_map]
        loose = {i for i in maps if not storable(graph.spec(graph.outputs[i]))}
        if loose:
            raise _LooseError(loose)
        order.extend(graph.outputs)
        for ref in dict.fromkeys(order[i] for i in maps):
            kept[ref] = torch.full(graph.spec(ref).shape, torch.nan).to(graph.spec(ref).dtype)
        return {ref: _into(whole) for ref, whole in kept.items()}

    try:
        small = run_outputs(model, image, sinks, None, tile, seed=seed, device=device)
    except _LooseError as loose:
        return whole_outputs(_Gathered(model, loose.which), image, tile, seed, device)
    return tuple({**kept, **small}[ref] for ref in order)


class _LooseError(Exception):
    """Some outputs run along the image in other dimensions than the last two: no sink takes them box by box."""

    def __init__(self, which: set[int]) -> None:
        self.which = which


class _Gathered(nn.Module):
    """The same model, some of whose outputs are gathered: held whole, they are no maps."""

    def __init__(self, model: nn.Module, which: set[int]) -> None:
        super().__init__()
        self.model, self.which = model, which
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        found = [leaf for leaf in tree_leaves(self.model(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        return [gather(t) if i in self.which else t for i, t in enumerate(found)]


def _into(whole: torch.Tensor) -> Sink:
    def take(box: Box, value: torch.Tensor) -> None:
        rows, cols = box.slices()
        whole[..., rows, cols] = value

    return Sink(take)


def scales(wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """What each tensor's error is relative to: its largest absolute element.

    A gradient that is zero but for rounding (a bias before a norm: below 1e-10 of the largest element among its
    module's gradients) is measured against that largest element; where the module has no other, against the model's.
    """
    largest = {name: t.double().abs().max().item() if t.numel() else 0.0 for name, t in wanted.items()}
    result = dict(largest)
    for name, size in largest.items():
        module = name.rpartition(".")[0]
        others = [value for other, value in largest.items() if other.rpartition(".")[0] == module]
        for reference in (max(others), max(largest.values())):
            if result[name] == size and size <= ZERO * reference:
                result[name] = reference
    return result


def relative_error(found: torch.Tensor, wanted: torch.Tensor, scale: float) -> float:
    """Largest absolute difference over ``scale``; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = (found.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


def errors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of every tensor; infinite for one that only one side has."""
    scale = scales(wanted)
    both = found.keys() & wanted.keys()
    return {
        name: relative_error(found[name], wanted[name], scale[name]) if name in both else float("inf")
        for name in dict.fromkeys([*wanted, *found])
    }


def own_errors(case: Case, wanted: Reference, draws: int) -> dict[str, float]:
    """Each tensor's worst error over whole-image runs: one as it is, the others with parameters rounded anew."""
    worst = errors(case.reference().tensors, wanted.tensors)
    generator = torch.Generator().manual_seed(case.seed)
    for _ in range(draws - 1):
        for name, error in errors(case.nudged(generator).reference().tensors, wanted.tensors).items():
            worst[name] = max(worst[name], error)
    return worst


def random_labels(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Labels 0 and 1 in blocks, with some 255 ("ignore"), ``(1, H, W)`` uint8."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 8, (shape[0] // 7 + 1, shape[1] // 7 + 1), generator=generator)
    labels = torch.where(blocks == 7, 255, blocks % 2).to(torch.uint8)
    full = labels.repeat_interleave(7, 0).repeat_interleave(7, 1)
    return full[: shape[0], : shape[1]].unsqueeze(0).contiguous()


def default_tiles(height: int, width: int) -> list[tuple[int, int]]:
    """Tiles that divide the image and that do not, down to slim ones; of small images also the whole."""
    if height * width > LARGE:
        sizes = [(512, 512), (451, 293), (128, 2048)]
        return list(dict.fromkeys((min(height, rows), min(width, cols)) for rows, cols in sizes))
    thirds = (-(-height // 3), -(-width // 3))
    return list(
        dict.fromkeys([(height, width), thirds, (height // 2 + 3, width // 4 + 5), (max(height // 5, 1), width)])
    )

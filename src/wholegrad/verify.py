"""Prove rule 5 on the user's own model and loss: whole-image autograd against several plans, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wholegrad.api import LossFn, backward, image_source, plan, run_outputs, target_source
from wholegrad.errors import ShapeError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Ref
from wholegrad.plan.planner import candidates
from wholegrad.run.executor import Sink
from wholegrad.run.reference import Reference, whole_image

EXACT = 1e-12  # float64: relative to the tensor's largest element
FLOOR = 16 * 2.0**-23  # float32: errors of up to sixteen roundings are chance, and not compared


@dataclass(frozen=True)
class Row:
    """One tensor's errors, relative to the largest element of the float64 reference.

    Attributes:
        double: worst over the plans, both in float64.
        single: worst over the plans in float32, against the float64 reference; NaN if float32 was not asked for.
        whole_single: whole-image float32's own error against the float64 reference.
    """

    name: str
    double: float
    single: float
    whole_single: float

    @property
    def ok(self) -> bool:
        exact = self.double <= EXACT
        return exact and (self.single != self.single or self.single <= max(2 * self.whole_single, FLOOR))


@dataclass(frozen=True)
class Report:
    """The outcome: one row a tensor, and the plans that were compared."""

    rows: tuple[Row, ...]
    plans: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        head = f"{'tensor'.ljust(width)}  float64    float32    whole-image float32"
        lines = [head, "-" * len(head)]
        for row in self.rows:
            mark = "" if row.ok else "   MISMATCH"
            lines.append(f"{row.name.ljust(width)}  {row.double:.2e}   {row.single:.2e}   {row.whole_single:.2e}{mark}")
        verdict = "exact" if self.ok else "NOT exact"
        lines.append("")
        lines.append(f"{verdict}: worst relative errors over {len(self.plans)} plans ({'; '.join(self.plans)})")
        return "\n".join(lines)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute element of ``wanted``; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = (found.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
    scale = wanted.double().abs().max().item() if wanted.numel() else 0.0
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


def random_labels(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Labels 0 and 1 in blocks, with some 255 ("ignore"), ``(1, H, W)`` uint8."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 8, (shape[0] // 7 + 1, shape[1] // 7 + 1), generator=generator)
    labels = torch.where(blocks == 7, 255, blocks % 2).to(torch.uint8)
    full = labels.repeat_interleave(7, 0).repeat_interleave(7, 1)
    return full[: shape[0], : shape[1]].unsqueeze(0).contiguous()


def default_tiles(height: int, width: int) -> list[tuple[int, int]]:
    """Tiles that divide the image and that do not, down to slim ones."""
    thirds = (-(-height // 3), -(-width // 3))
    return list(
        dict.fromkeys([(height, width), thirds, (height // 2 + 3, width // 4 + 5), (max(height // 5, 1), width)])
    )


def verify(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    shape: tuple[int, int, int] = (3, 512, 512),
    image: torch.Tensor | None = None,
    target: Any = None,
    tiles: Sequence[tuple[int, int]] | None = None,
    single: bool = True,
    seed: int = 0,
) -> Report:
    """Compare wholegrad with whole-image autograd on the same model, loss, image and target.

    Args:
        model, loss_fn: copied; the originals are not touched.
        shape: ``(C, H, W)`` of a random image, if none is given.
        image: ``(C, H, W)`` or ``(N, C, H, W)`` floats.
        target: as :func:`wholegrad.backward` takes it; random labels 0, 1 and 255, ``(1, H, W)``, if not given.
        tiles: tile sizes of the plans to compare; by default four, and one with every boundary on disk.
        single: compare in float32 too.

    Returns:
        A report; ``report.ok`` says whether every tensor agrees.
    """
    if image is None:
        image = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if image.dim() not in (3, 4):
        raise ShapeError("image", f"has shape {tuple(image.shape)}", "give (C, H, W) or (N, C, H, W)")
    height, width = image.shape[-2:]
    labels = random_labels((height, width), seed) if target is None else target
    chosen = list(tiles) if tiles is not None else default_tiles(height, width)
    runs = [(tile, "host") for tile in chosen] + [(chosen[-1], "disk")]
    double = _Case(model, loss_fn, image, labels, torch.float64)
    plan(double.model, double.loss_fn, double.image, double.target)  # refusals come before the reference runs
    wanted = double.reference()
    doubles = _worst(double, wanted, runs)
    singles: dict[str, float] = {}
    wholes: dict[str, float] = {}
    if single:
        case = _Case(model, loss_fn, image, labels, torch.float32)
        singles = _worst(case, wanted, runs)
        wholes = _errors(_tensors(case.reference()), _tensors(wanted))
    nan = float("nan")
    rows = tuple(Row(name, doubles[name], singles.get(name, nan), wholes.get(name, nan)) for name in doubles)
    words = {"host": "planner's boundaries", "disk": "every boundary, on disk"}
    return Report(rows, tuple(f"tiles of {h} x {w}, {words[place]}" for (h, w), place in runs))


class _Case:
    """Model, loss and data in one dtype."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, image: torch.Tensor, target: Any, dtype: torch.dtype) -> None:
        self.model, self.loss_fn = copy.deepcopy((model, loss_fn))
        self.model.to(dtype)
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.to(dtype)
        self.dtype = dtype
        self.image = image.to(dtype)
        floats = isinstance(target, torch.Tensor) and target.is_floating_point()
        self.target = target.to(dtype) if floats else target

    def reference(self) -> Reference:
        image = image_source(self.image, self.dtype).whole()
        target = target_source(self.target)
        return whole_image(self.model, self.loss_fn, image, None if target is None else target.whole(), self.dtype)

    def tiled(self, tile: tuple[int, int], place: str) -> dict[str, torch.Tensor]:
        """Loss, output and gradients under one plan."""
        self.model.zero_grad(set_to_none=True)
        made = plan(self.model, self.loss_fn, self.image, self.target, tile=tile, placement=place)
        if place == "disk":  # every map that could be kept, so that stores and cuts are tried too
            names = [made.graph.nodes[ref.node].name for ref in candidates(made.graph)]
            made = plan(self.model, self.loss_fn, self.image, self.target, tile=tile, placement=place, boundaries=names)
        loss = backward(self.model, self.loss_fn, self.image, self.target, plan=made)
        output = whole_output(self.model, self.image, tile)
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": loss, "output": output, **grads}


def whole_output(model: nn.Module, image: Any, tile: tuple[int, int] | None = None) -> torch.Tensor:
    """The model's output map, computed tile by tile and put together in memory."""
    kept: list[torch.Tensor] = []

    def sinks(graph: Graph) -> dict[Ref, Sink]:
        spec = graph.spec(graph.outputs[0])
        kept.append(torch.full(spec.shape, float("nan"), dtype=spec.dtype))

        def take(box: Box, value: torch.Tensor) -> None:
            rows, cols = box.slices()
            kept[0][..., rows, cols] = value

        return {graph.outputs[0]: take}

    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    run_outputs(model, image_source(image, dtype), sinks, None, tile)
    return kept[0]


def _tensors(reference: Reference) -> dict[str, torch.Tensor]:
    return {"loss": reference.loss, "output": reference.output, **reference.grads}


def _errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    names = dict.fromkeys([*wanted, *found])
    return {
        name: relative_error(found[name], wanted[name]) if name in found and name in wanted else float("inf")
        for name in names
    }


def _worst(case: _Case, wanted: Reference, runs: Sequence[tuple[tuple[int, int], str]]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for tile, place in runs:
        for name, error in _errors(case.tiled(tile, place), _tensors(wanted)).items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst

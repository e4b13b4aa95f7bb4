"""Prove rule 5 on the user's own model and loss: whole-image autograd against several plans, tensor by tensor.

In float64 every tensor must agree to 1e-12; where rounding alone moves it farther (many norms over a small map), to
eight times what whole-image autograd moves it by when each parameter changes by one rounding, and never beyond 1e-9.

In float32 a tensor's error must be at most twice whole-image float32's own. There chance plays a part: where a ReLU's
input is zero but for rounding, one run takes the one slope and the next run the other, and a gradient that few pixels
make changes by percents. A tensor beyond twice its own is therefore put down to chance if the errors as a whole are no
worse: the largest at most twice the largest of whole-image float32, the second largest at most twice the second
largest, and so on, over as many float32 runs on either side. A sum that loses digits fails that, since it loses them in
every tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from wholegrad.api import LossFn, backward, plan, run_outputs
from wholegrad.diagnose import diagnose
from wholegrad.errors import NumericsError, WholegradError
from wholegrad.given import given, in_dtype
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Ref
from wholegrad.plan.plan import Plan
from wholegrad.plan.planner import candidates, storable
from wholegrad.run.executor import Sink
from wholegrad.run.reference import Reference, buffers, gradients, named, parts, whole_image

EXACT = 1e-12  # float64: relative to the tensor's largest element
ROUNDING = 1e-9  # float64: no error above this is rounding
ZERO = 1e-10  # float64: a gradient of this share of its module's largest is rounding
FLOOR = 16 * 2.0**-23  # float32: errors of up to sixteen roundings are chance, and not compared


@dataclass(frozen=True)
class Row:
    """One tensor's errors, relative to the largest element of the float64 reference.

    Attributes:
        double: worst over the plans, both in float64.
        single: worst over the plans in float32, against the float64 reference; NaN if float32 was not asked for.
        whole_single: whole-image float32's own error against the float64 reference.
        whole_double: how far whole-image float64 moves when parameters are rounded anew; 0 if it was not asked for.
    """

    name: str
    double: float
    single: float
    whole_single: float
    whole_double: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether it agrees in float64."""
        return self.double <= max(EXACT, min(8 * self.whole_double, ROUNDING))

    @property
    def ok(self) -> bool:
        """Whether it agrees in float64 and, by itself, in float32."""
        return self.exact and (self.single != self.single or self.single <= max(2 * self.whole_single, FLOOR))


def by_chance(rows: Sequence[Row]) -> bool:
    """Whether float32's errors, put in order, are at most twice whole-image float32's, put in order."""
    ours, whole = (
        sorted(errors, reverse=True) for errors in zip(*((r.single, r.whole_single) for r in rows), strict=True)
    )
    return all(mine <= max(2 * theirs, FLOOR) for mine, theirs in zip(ours, whole, strict=True))


@dataclass(frozen=True)
class Report:
    """The outcome: one row a tensor, the plans that were compared, and where one does not agree, why.

    Attributes:
        responsible: what a mismatch comes from: the first op that is wrong by itself (module path and ATen op), or the
            model, the capture, or the plan in words; None if every tensor agrees.
    """

    rows: tuple[Row, ...]
    plans: tuple[str, ...]
    responsible: str | None = None

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows) or (all(row.exact for row in self.rows) and by_chance(self.rows))

    def _mark(self, row: Row) -> str:
        if row.ok:
            return ""
        return "   by chance" if self.ok else "   MISMATCH"

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        head = f"{'tensor'.ljust(width)}  float64    float32    whole-image float32"
        lines = [head, "-" * len(head)]
        for row in self.rows:
            numbers = f"{row.double:.2e}   {row.single:.2e}   {row.whole_single:.2e}"
            lines.append(f"{row.name.ljust(width)}  {numbers}{self._mark(row)}")
        verdict = "exact" if self.ok else "NOT exact"
        lines.append("")
        lines.append(f"{verdict}: worst relative errors over {len(self.plans)} plans ({'; '.join(self.plans)})")
        if self.ok and (far := [row.whole_double for row in self.rows if row.double > EXACT]):
            lines.append(
                f"above {EXACT}: parameters rounded anew move whole-image float64 by up to {max(far):.0e} there"
            )
        if self.ok and not all(row.ok for row in self.rows):
            lines.append(
                "by chance: beyond twice its own float32 error, but no worse than other tensors' (a ReLU at zero)"
            )
        if self.responsible is not None:
            lines.append(f"responsible: {self.responsible}")
        return "\n".join(lines)


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
    image: Any = None,
    target: Any = ...,
    tiles: Sequence[tuple[int, int]] | None = None,
    single: bool = True,
    seed: int = 0,
) -> Report:
    """Compare wholegrad with whole-image autograd on the same model, loss, image and target.

    Args:
        model, loss_fn: copied; the originals are not touched.
        shape: ``(C, H, W)`` of a random image, if none is given.
        image: ``(C, H, W)`` or ``(N, C, H, W)`` floats.
        target: as :func:`wholegrad.backward` takes it; random labels 0, 1 and 255, ``(1, H, W)``, if left out.
        tiles: tile sizes of the plans to compare; by default four, and one with every boundary on disk.
        single: compare in float32 too.

    Returns:
        A report; ``report.ok`` says whether every tensor agrees, ``report.responsible`` what is to blame if not.

    Raises:
        WholegradError: the model is refused, as by :func:`wholegrad.plan`.
    """
    if image is None:
        image = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = given(image, None, torch.float64).inputs.tensors[0]
    height, width = first.shape[-2:]
    labels = random_labels((height, width), seed) if target is ... else target
    chosen = list(tiles) if tiles is not None else default_tiles(height, width)
    runs = [(tile, "host") for tile in chosen] + [(chosen[-1], "disk")]
    double = Case(model, loss_fn, image, labels, torch.float64, seed)
    double.plan()  # refusals come before the reference runs
    wanted = double.reference()
    doubles = _compared(double, wanted, runs)
    singles: dict[str, float] = {}
    wholes: dict[str, float] = {}
    rounded: dict[str, float] = {}
    if doubles.raised is None and max(doubles.worst.values()) > EXACT:
        rounded = own_errors(double, wanted, len(runs))
    if single and doubles.raised is None:
        case = Case(model, loss_fn, image, labels, torch.float32, seed)
        singles = _compared(case, wanted, runs).worst
        wholes = errors(case.reference().tensors, wanted.tensors)
        if not all(Row(name, 0.0, singles[name], wholes[name]).ok for name in singles):
            wholes = own_errors(case, wanted, len(runs))
    nan = float("nan")
    rows = tuple(
        Row(name, error, singles.get(name, nan), wholes.get(name, nan), rounded.get(name, 0.0))
        for name, error in doubles.worst.items()
    )
    report = Report(rows, tuple(_described(*run) for run in runs))
    return report if report.ok else replace(report, responsible=_responsible(double, doubles, report))


def _described(tile: tuple[int, int], place: str) -> str:
    words = {"host": "planner's boundaries", "disk": "every boundary, on disk"}
    return f"tiles of {tile[0]} x {tile[1]}, {words[place]}"


class Case:
    """Model, loss and data in one dtype."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, image: Any, target: Any, dtype: torch.dtype, seed: int
    ) -> None:
        self.model, self.loss_fn = copy.deepcopy((model, loss_fn))
        for _, part in parts(self.model, self.loss_fn):
            part.to(dtype)
        self.start = copy.deepcopy([part.state_dict() for _, part in parts(self.model, self.loss_fn)])
        self.dtype, self.seed = dtype, seed
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
        return plan(self.model, self.loss_fn, self.image, self.target, **fixed)

    def run(self, made: Plan, tile: tuple[int, int] | None) -> dict[str, torch.Tensor]:
        """Loss, outputs, gradients and buffers under one plan; the model is left as it was."""
        for _, part in parts(self.model, self.loss_fn):
            part.zero_grad(set_to_none=True)
        loss = backward(self.model, self.loss_fn, self.image, self.target, plan=made, seed=self.seed)
        written = buffers(self.model, self.loss_fn)
        grads = gradients(self.model, self.loss_fn)
        self.reset()
        outputs = whole_outputs(self.model, self.image, tile, self.seed)
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
        """The plan with these tiles; on disk, with every boundary that there could be."""
        made = self.plan(tile=tile, placement=place)
        if place == "disk":  # every map that could be kept, so that stores and cuts are tried too
            names = [made.graph.nodes[ref.node].name for ref in candidates(made.graph)]
            made = self.plan(tile=tile, placement=place, boundaries=names)
        return made


def whole_outputs(
    model: nn.Module, image: Any, tile: tuple[int, int] | None = None, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """The model's outputs, computed tile by tile and put together in memory."""
    kept: dict[Ref, torch.Tensor] = {}
    order: list[Ref] = []

    def sinks(graph: Graph) -> dict[Ref, Sink]:
        order.extend(graph.outputs)
        maps = [ref for ref in dict.fromkeys(order) if graph.spec(ref).is_map and storable(graph.spec(ref))]
        for ref in maps:
            kept[ref] = torch.full(graph.spec(ref).shape, torch.nan).to(graph.spec(ref).dtype)
        return {ref: _into(kept[ref]) for ref in maps}

    small = run_outputs(model, image, sinks, None, tile, seed=seed)
    return tuple({**kept, **small}[ref] for ref in order)


def _into(whole: torch.Tensor) -> Sink:
    def take(box: Box, value: torch.Tensor) -> None:
        rows, cols = box.slices()
        whole[..., rows, cols] = value

    return take


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


@dataclass(frozen=True)
class _Compared:
    """Each tensor's worst error over some plans, and the first plan that is not exact.

    Attributes:
        raised: what stopped that plan, if it was an error; later plans were not run.
    """

    worst: dict[str, float]
    failed: Plan | None
    name: str
    raised: Exception | None


def _compared(case: Case, wanted: Reference, runs: Sequence[tuple[tuple[int, int], str]]) -> _Compared:
    worst: dict[str, float] = {}
    failed: tuple[Plan | None, str] = (None, "")
    for tile, place in runs:
        made = case.made(tile, place)
        try:
            found = errors(case.run(made, tile), wanted.tensors)
        except Exception as error:
            if isinstance(error, WholegradError) and not isinstance(error, NumericsError):
                raise
            case.reset()
            return _Compared(dict.fromkeys(wanted.tensors, float("inf")), made, _described(tile, place), error)
        if failed[0] is None and max(found.values()) > EXACT:
            failed = (made, _described(tile, place))
        for name, error_of in found.items():
            worst[name] = max(worst.get(name, 0.0), error_of)
    return _Compared(worst, *failed, None)


def _responsible(case: Case, compared: _Compared, report: Report) -> str:
    """What a mismatch comes from."""
    if compared.failed is None or all(row.exact for row in report.rows):
        return "rounding: in float64 every tensor agrees, but float32's errors exceed twice whole-image float32's own"
    inputs = given(case.image, case.target, case.dtype)
    found = diagnose(case.model, case.loss_fn, inputs, compared.failed, case.seed)
    if found is None and compared.raised is not None:
        raise compared.raised
    return found or f"the plan ({compared.name}): every op agrees by itself, so cutting, storing or merging is wrong"

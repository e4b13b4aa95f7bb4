"""Prove rule 5 on the user's own model and loss: whole-image autograd against several plans, tensor by tensor.

In float64 every tensor must agree to 1e-12; where rounding alone moves it farther (many norms over a small map), to
eight times what whole-image autograd moves it by when each parameter changes by one rounding, and never beyond 1e-9.

In float32 a tensor's error must be at most twice whole-image float32's own. There chance plays a part: where a ReLU's
input is zero but for rounding, one run takes the one slope and the next run the other, and a gradient that few pixels
make changes by percents. A tensor beyond twice its own is therefore put down to chance if the errors as a whole are no
worse: the largest at most twice the largest of whole-image float32, the second largest at most twice the second
largest, and so on, over as many float32 runs on either side. A sum that loses digits fails that, since it loses them in
every tensor.

A model or loss may compute in float32 inside whatever its dtype. Where every op agrees by itself, float64's errors are
then held against 64 roundings of that inner dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from wholegrad.api import DeviceLike, LossFn
from wholegrad.diagnose import coarse, diagnose
from wholegrad.errors import BudgetError, CaptureError, NumericsError, PlanError, WholegradError
from wholegrad.given import given
from wholegrad.graph.graph import Graph
from wholegrad.plan.plan import Plan, show_bytes
from wholegrad.proof import LARGE, Case, default_tiles, errors, own_errors, random_labels
from wholegrad.run import process
from wholegrad.run.reference import Reference, parts

__all__ = ["EXACT", "FLOOR", "Case", "Report", "Row", "by_chance", "errors", "random_labels", "verify"]

EXACT = 1e-12  # float64: relative to the tensor's largest element
ROUNDING = 1e-9  # float64: no error above this is rounding
INNER = 64  # roundings of a coarser dtype inside the model that errors may make
WHOLE = 1.3  # of a plan's estimate: convolutions in float64 unfold their input (1.34 measured on a U-Net)
SMALLEST = 1024  # pixels of a tile below which none is tried by itself
COARSEST = 0.03  # no error above this is rounding, whatever the dtype
FLOOR = 16 * 2.0**-23  # float32: errors of up to sixteen roundings are chance, and not compared


@dataclass(frozen=True)
class Row:
    """One tensor's errors, relative to the largest element of the float64 reference.

    Attributes:
        double: worst over the plans, both in float64.
        single: worst over the plans in float32, against the float64 reference; NaN if float32 was not asked for.
        whole_single: whole-image float32's own error against the float64 reference.
        whole_double: how far whole-image float64 moves when parameters are rounded anew; 0 if it was not asked for.
        inner: what the rounding of a coarser dtype inside the model accounts for; 0 if it has none.
        counts: whether it holds integers.
    """

    name: str
    double: float
    single: float
    whole_single: float
    whole_double: float = 0.0
    inner: float = 0.0
    counts: bool = False

    @property
    def exact(self) -> bool:
        """Whether it agrees in float64."""
        return self.double <= max(EXACT, min(8 * self.whole_double, ROUNDING), self.inner)

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
        inner: the dtype and the op in which a float64 model computes more coarsely, if that is what differs.
    """

    rows: tuple[Row, ...]
    plans: tuple[str, ...]
    responsible: str | None = None
    inner: str | None = None

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows) or (all(row.exact for row in self.rows) and by_chance(self.rows))

    def _mark(self, row: Row) -> str:
        if row.ok:
            return ""
        return "   by chance" if self.ok else "   MISMATCH"

    def __str__(self) -> str:
        shown = [row for row in self.rows if not (row.counts and row.ok and row.double == 0)]
        width = max(len(row.name) for row in shown)
        single = any(row.single == row.single for row in shown)
        head = f"{'tensor'.ljust(width)}  float64 " + ("   float32    whole-image float32" if single else "")
        lines = [head.rstrip(), "-" * len(head.rstrip())]
        for row in shown:
            numbers = f"{row.double:.2e}" + (f"   {row.single:.2e}   {row.whole_single:.2e}" if single else "")
            lines.append(f"{row.name.ljust(width)}  {numbers}{self._mark(row)}")
        lines += ["", "plans:", *(f"  {plan}" for plan in self.plans), ""]
        verdict = "exact" if self.ok else "NOT exact"
        lines.append(f"{verdict}: worst errors over {len(self.plans)} plans, relative to each tensor's largest element")
        if self.ok and self.inner is not None:
            lines.append(f"exact up to the model's own {self.inner}")
        if self.ok and (far := [row.whole_double for row in self.rows if row.double > max(EXACT, row.inner)]):
            lines.append(
                f"above {EXACT}: parameters rounded anew move whole-image float64 by up to {max(far):.0e} there"
            )
        if self.ok and not all(row.ok for row in self.rows):
            lines.append(
                "by chance: beyond twice its own float32 error, but no worse than other tensors' (a ReLU at zero)"
            )
        if self.responsible is not None:
            lines.append(f"responsible: {self.responsible}")
            if "wrong by" in self.responsible:
                lines.append("(wrong by: relative to the largest element of what the op gives)")
        return "\n".join(lines)


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
    progress: Callable[[str], None] | None = None,
    device: DeviceLike = None,
) -> Report:
    """Compare wholegrad with whole-image autograd on the same model, loss, image and target.

    Args:
        model, loss_fn: copied; the originals are not touched.
        shape: ``(C, H, W)`` of a random image, if none is given.
        image: ``(C, H, W)`` or ``(N, C, H, W)`` floats.
        target: as :func:`wholegrad.backward` takes it; random labels 0, 1 and 255, ``(1, H, W)``, if left out.
        tiles: tile sizes of the plans to compare, the last one also with every boundary on disk; by default four, on
            large images three.
        single: compare in float32 too.
        progress: called with a line of text as each stage begins.
        device: where tiles run, as for :func:`wholegrad.plan`; the whole-image run is on the CPU.

    Returns:
        A report; ``report.ok`` says whether every tensor agrees, ``report.responsible`` what is to blame if not.

    Raises:
        WholegradError: the model is refused, as by :func:`wholegrad.plan`, or the whole image does not fit in memory.
        NumericsError: the whole-image run gives numbers that are not finite.
    """
    say = progress or (lambda text: None)
    if image is None:
        image = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = given(image, None, torch.float64).inputs.tensors[0]
    height, width = first.shape[-2:]
    labels = random_labels((height, width), seed) if target is ... else target
    _check_weights(model, loss_fn)
    say("plans")
    double = Case(model, loss_fn, image, labels, torch.float64, seed, device)
    runs = _runs(double, tiles, height, width)
    case = Case(model, loss_fn, image, labels, torch.float32, seed, device) if single else None
    singly = [_Run(run.tile, run.place, _made(case, run.tile, run.place)) for run in runs] if case else []
    graph = runs[0].plan.graph
    _check_memory(runs[0].plan, height, width)
    say("float64: whole image")
    wanted = _reference(double)
    doubles = _compared(double, wanted, runs, say)
    singles: dict[str, float] = {}
    wholes: dict[str, float] = {}
    rounded: dict[str, float] = {}
    if doubles.raised is None and max(doubles.worst.values()) > EXACT and coarse(graph) is None:
        say("float64: whole image, parameters rounded anew")
        rounded = own_errors(double, wanted, len(runs))
    if case is not None and doubles.raised is None:
        say("float32: whole image")
        wholes = errors(case.reference().tensors, wanted.tensors)
        singles = _compared(case, wanted, singly, say).worst
        if not all(Row(name, 0.0, singles[name], wholes[name]).ok for name in singles):
            say("float32: whole image, parameters rounded anew")
            wholes = own_errors(case, wanted, len(runs))
    nan = float("nan")
    rows = tuple(
        Row(
            name,
            error,
            singles.get(name, nan),
            wholes.get(name, nan),
            rounded.get(name, 0.0),
            counts=name in wanted.tensors and not wanted.tensors[name].is_floating_point(),
        )
        for name, error in doubles.worst.items()
    )
    report = Report(rows, tuple(str(run) for run in runs))
    if report.ok:
        return report
    say("looking for what is responsible")
    return _explained(double, doubles, report, graph)


def _explained(case: Case, compared: _Compared, report: Report, graph: Graph) -> Report:
    """The report with what is responsible, or with the coarser dtype inside the model that accounts for the errors."""
    said = _responsible(case, compared, report)
    inner = coarse(graph)
    if said is not None or inner is None:
        return replace(report, responsible=said or _the_plan(compared))
    dtype, place = inner
    limit = min(INNER * torch.finfo(dtype).eps, COARSEST)
    name = str(dtype).removeprefix("torch.")
    judged = replace(report, rows=tuple(replace(row, inner=limit) for row in report.rows), inner=f"{name}: {place}")
    if judged.ok:
        return judged
    if all(row.exact for row in judged.rows):
        return replace(judged, responsible=ROUNDS)
    return replace(
        judged,
        responsible=f"{_the_plan(compared)}; {place} computes in {name}, whose rounding is at most {limit:.0e}",
    )


@dataclass(frozen=True)
class _Run:
    """One plan that is compared."""

    tile: tuple[int, int]
    place: str
    plan: Plan

    def __str__(self) -> str:
        words = {"host": "planner's boundaries", "disk": "every boundary, on disk"}
        return f"tiles of {self.tile[0]} x {self.tile[1]}, {words[self.place]}"


def _runs(case: Case, tiles: Sequence[tuple[int, int]] | None, height: int, width: int) -> list[_Run]:
    """Every plan; of tiles that nobody asked for, halves of them where no plan fits."""
    chosen = list(tiles) if tiles is not None else default_tiles(height, width)
    places = [*((tile, "host") for tile in chosen), (chosen[-1], "disk")]
    if tiles is None and len(chosen) > 1 and height * width > LARGE:
        del places[-2]
    found = []
    for tile, place in places:
        while True:
            try:
                found.append(_Run(tile, place, _made(case, tile, place)))
                break
            except BudgetError:
                smaller = (max(tile[0] // 2, 1), max(tile[1] // 2, 1))
                if tiles is not None or smaller[0] * smaller[1] < SMALLEST:
                    raise
                tile = smaller
    return found


def _made(case: Case, tile: tuple[int, int], place: str) -> Plan:
    try:
        return case.made(tile, place)
    except BudgetError as error:
        where = f"tiles of {tile[0]} x {tile[1]}: {error.where}"
        raise BudgetError(where, error.cause, error.remedy, error.smallest) from error


def _check_weights(model: nn.Module, loss_fn: LossFn) -> None:
    for prefix, part in parts(model, loss_fn):
        for name, parameter in part.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NumericsError(prefix + name, "has elements that are not finite", "check how it is initialised")


def _check_memory(made: Plan, height: int, width: int) -> None:
    """Refuse an image that the whole-image run has no memory for."""
    need, free = int(WHOLE * made.whole_image), process.available()
    if need > free:
        raise BudgetError(
            "whole-image autograd",
            f"needs about {show_bytes(need)} in float64 at {height} x {width}, and {show_bytes(free)} are free",
            "choose a smaller --size (or shape): it proves the same",
        )


def _reference(case: Case) -> Reference:
    try:
        found = case.reference()
    except WholegradError:
        raise
    except Exception as error:
        said = " ".join(f"raises {type(error).__name__} on the whole image: {error}".split())[:300]
        raise CaptureError("model or loss", said, "check that both accept these shapes and dtypes") from error
    process.release_memory()
    for name, tensor in chain({"loss": found.loss}.items(), found.grads.items()):
        if not torch.isfinite(tensor).all():
            raise NumericsError(name, "is not finite on the whole image either", "check weights, pixels and target")
    return found


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


def _compared(case: Case, wanted: Reference, runs: Sequence[_Run], say: Callable[[str], None]) -> _Compared:
    worst: dict[str, float] = {}
    failed: tuple[Plan | None, str] = (None, "")
    dtype = str(case.dtype).removeprefix("torch.")
    for i, run in enumerate(runs, 1):
        say(f"{dtype}: plan {i} of {len(runs)}, {run}")
        try:
            found = errors(case.run(run.plan, run.tile), wanted.tensors)
        except Exception as error:
            if isinstance(error, WholegradError) and not isinstance(error, NumericsError | PlanError):
                raise
            case.reset()
            return _Compared(dict.fromkeys(wanted.tensors, float("inf")), run.plan, str(run), error)
        if failed[0] is None and max(found.values()) > EXACT:
            failed = (run.plan, str(run))
        for name, error_of in found.items():
            worst[name] = max(worst.get(name, 0.0), error_of)
    return _Compared(worst, *failed, None)


ROUNDS = "rounding: in float64 every tensor agrees, but float32's errors exceed twice whole-image float32's own"


def _the_plan(compared: _Compared) -> str:
    return f"the plan ({compared.name}): every op agrees by itself, so cutting, storing or merging is wrong"


def _responsible(case: Case, compared: _Compared, report: Report) -> str | None:
    """What a mismatch comes from, if it is no plan and no rounding of a coarser dtype."""
    if compared.failed is None or all(row.exact for row in report.rows):
        return ROUNDS
    inputs = given(case.image, case.target, case.dtype)
    found = diagnose(case.model, case.loss_fn, inputs, compared.failed, case.seed)
    if found is None and compared.raised is not None:
        raise compared.raised
    return found

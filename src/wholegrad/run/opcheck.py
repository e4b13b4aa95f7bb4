"""One op by itself: its rule on boxes against PyTorch on whole tensors, forward and backward.

With a random cotangent v on the whole output, the boxes' vector-Jacobian products must add up to that of the whole op
for v times the number of boxes that hold each element, since they are linear in v. So boxes may overlap, as halos do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Kind, Node, Ref, Spec
from wholegrad.graph.layout import crop, full_box, on_box, unflattened
from wholegrad.graph.rules import MapRule, ReductionRule, State, rule_for
from wholegrad.graph.rules import Tile as Place
from wholegrad.run.tile import operand_boxes
from wholegrad.run.whole import meaning

aten = torch.ops.aten
T = TypeVar("T")
TOLERANCES = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}
COARSEST = 5e-2  # of 16-bit floats
UNDEFINED = {aten.empty_like.default}  # whose values nobody may look at


@dataclass(frozen=True)
class Fault:
    """An op that does not do by boxes what it does whole: which, in which sweep, and how wrong."""

    node: Node
    sweep: str
    cause: str

    def __str__(self) -> str:
        return f"{self.node.place}: {self.sweep} {self.cause}"


class _WrongError(Exception):
    """Ends a check; the message is the cause."""

    def __init__(self, sweep: str, cause: str) -> None:
        self.sweep, self.cause = sweep, cause


def is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def difference(found: torch.Tensor, wanted: torch.Tensor, least: float = 0.0) -> float:
    """Largest difference over the largest finite element of ``wanted``; infinite where shapes or NaNs differ.

    Args:
        least: what the difference is relative to at least.
    """
    if found.shape != wanted.shape:
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    wide = torch.complex128 if wanted.is_complex() or found.is_complex() else torch.float64
    found, wanted = found.detach().to(wide), wanted.detach().to(wide)
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    apart = torch.where(same, 0, found - wanted).abs().nan_to_num(nan=float("inf")).max().item()
    scale = max(torch.where(wanted.isfinite(), wanted, 0).abs().max().item(), least)
    return apart / scale if scale else apart


def tolerance(specs: Sequence[Spec]) -> float:
    """How far values may be apart that these Specs' dtypes round."""
    real = [spec.dtype for spec in specs if spec.dtype.is_floating_point or spec.dtype.is_complex]
    return max((TOLERANCES.get(dtype, COARSEST) for dtype in real), default=0.0)


def uneven(spec: Spec) -> list[Box]:
    """Nine boxes of different sizes that share out a map, fewer if it is tiny."""

    def cuts(size: int) -> list[int]:
        return sorted({0, min(size // 3 + 1, size), min(size * 3 // 4, size), size})

    rows, cols = cuts(spec.rows), cuts(spec.cols)
    return [Box(y0, y1, x0, x1) for y0, y1 in pairwise(rows) for x0, x1 in pairwise(cols)]


class OpCheck:
    """The check of one node.

    Args:
        values: whole operands.
        boxes: of a map, any boxes of it; of a reduction, boxes that share out its operand.
        seed: of the step, for random ops.

    Attributes:
        outputs: what the op gives on whole operands; empty if it cannot run there.
        fault: what is wrong, if anything.
    """

    def __init__(
        self, graph: Graph, node: Node, values: Mapping[Ref, torch.Tensor], boxes: Sequence[Box], seed: int
    ) -> None:
        self.graph, self.node, self.seed = graph, node, seed
        self.specs = tuple(graph.spec(ref) for ref in node.operands)
        self.tolerance = tolerance([*self.specs, *node.outputs])
        self.values = {ref: self._leaf(ref, values[ref]) for ref in node.operands}
        self.whole: tuple[torch.Tensor, ...] = ()
        self.fault: Fault | None = None
        try:
            self._run_whole()
            if node.kind is Kind.MAP and node.op not in UNDEFINED:
                self._check_map(boxes)
            elif node.kind is Kind.REDUCTION:
                self._check_reduction(boxes)
        except _WrongError as wrong:
            self.fault = Fault(node, wrong.sweep, wrong.cause)

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        return tuple(out.detach() for out in self.whole)

    def _leaf(self, ref: Ref, value: torch.Tensor) -> torch.Tensor:
        leaf = value.detach()
        trained = self.node.needs_grad and self.graph.nodes[ref.node].needs_grad and is_real(leaf)
        return leaf.requires_grad_() if trained else leaf

    @property
    def _wanted(self) -> list[Ref]:
        """Operands that have a gradient."""
        return [ref for ref, value in self.values.items() if value.requires_grad]

    def _run_whole(self) -> None:
        with torch.set_grad_enabled(self.node.needs_grad):
            self.whole = _tried("forward", lambda: meaning(self.node, self.values, self.seed), " on the whole map")

    def _compare(self, sweep: str, found: torch.Tensor, wanted: torch.Tensor, where: str, least: float = 0.0) -> None:
        error = difference(found, wanted, least)
        if error > self.tolerance:
            made = "" if found.shape == wanted.shape else f": shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
            raise _WrongError(sweep, f"is wrong by {error:.2g} {where}{made}")

    # Maps.

    def _check_map(self, boxes: Sequence[Box]) -> None:
        weights = self._weights(boxes)
        grads = {ref: torch.zeros_like(self.values[ref], memory_format=torch.contiguous_format) for ref in self._wanted}
        for box in boxes:
            self._check_box(box, grads)
        self._compare_grads(grads, weights)

    def _cotangent(self, i: int) -> torch.Tensor | None:
        """A random cotangent of output ``i``; None if it has no gradient."""
        out = self.whole[i]
        if not out.requires_grad:
            return None
        generator = torch.Generator().manual_seed(self.node.index + 1000003 * i)
        return torch.randn(out.shape, generator=generator, dtype=out.dtype)

    def _weights(self, boxes: Sequence[Box]) -> list[torch.Tensor | None]:
        """The cotangents, each element times the number of boxes that hold it."""
        self.cotangents = [self._cotangent(i) for i in range(len(self.whole))]
        result: list[torch.Tensor | None] = []
        for cotangent, spec in zip(self.cotangents, self.node.outputs, strict=True):
            if cotangent is None:
                result.append(None)
                continue
            weight = torch.zeros_like(cotangent)
            for box in boxes:
                on_box(weight, spec.layout, box).add_(on_box(cotangent, spec.layout, box))
            result.append(weight)
        return result

    def _check_box(self, box: Box, grads: dict[Ref, torch.Tensor]) -> None:
        where = f"on rows {box.y0} to {box.y1}, columns {box.x0} to {box.x1}"
        rule, wanted = rule_for(self.node.op), operand_boxes(self.graph, self.node, box)
        assert isinstance(rule, MapRule)
        tensors = [
            self._cropped(ref, spec, want)
            for ref, spec, want in zip(self.node.operands, self.specs, wanted, strict=True)
        ]
        place = Place(box, wanted, self.specs, self.node.outputs, self.seed)
        with torch.set_grad_enabled(self.node.needs_grad):
            outputs = _tried("forward", lambda: rule.run(self.node, tensors, place), f" {where}")
        for out, whole, spec in zip(outputs, self.whole, self.node.outputs, strict=True):
            mine = crop(whole.detach(), spec.layout, full_box(spec.layout), box)
            self._compare("forward", out.detach(), mine, where, self._size(whole))
        self._pull(box, outputs, dict(zip(self.node.operands, zip(tensors, wanted, strict=True), strict=True)), grads)

    def _size(self, whole: torch.Tensor) -> float:
        finite = torch.where(whole.isfinite(), whole, 0) if is_real(whole) else whole[:0]
        return finite.detach().abs().max().item() if finite.numel() else 0.0

    def _cropped(self, ref: Ref, spec: Spec, want: Box | None) -> torch.Tensor:
        value = self.values[ref]
        if want is not None:
            with torch.no_grad():
                value = crop(value, spec.layout, full_box(spec.layout), want)
        return value.detach().requires_grad_() if self.values[ref].requires_grad else value

    def _pull(
        self,
        box: Box,
        outputs: Sequence[torch.Tensor],
        operands: Mapping[Ref, tuple[torch.Tensor, Box | None]],
        grads: dict[Ref, torch.Tensor],
    ) -> None:
        """Add what pulling a box's cotangent back gives."""
        roots, given = [], []
        for out, cotangent, spec in zip(outputs, self.cotangents, self.node.outputs, strict=True):
            if cotangent is not None and out.requires_grad:
                roots.append(out)
                given.append(crop(cotangent, spec.layout, full_box(spec.layout), box))
        if not roots or not grads:
            return
        leaves = [operands[ref][0] for ref in grads]
        found = _tried("backward", lambda: torch.autograd.grad(roots, leaves, given, allow_unused=True), "")
        for (ref, total), grad in zip(grads.items(), found, strict=True):
            want, layout = operands[ref][1], self.graph.spec(ref).layout
            if grad is not None and want is None:
                total.add_(grad)
            elif grad is not None and want is not None:
                on_box(total, layout, want).add_(unflattened(grad, layout, want))

    def _compare_grads(self, grads: Mapping[Ref, torch.Tensor], weights: Sequence[torch.Tensor | None]) -> None:
        pairs = [(out, weight) for out, weight in zip(self.whole, weights, strict=True) if weight is not None]
        if not pairs or not grads:
            return
        roots, given = [out for out, _ in pairs], [weight for _, weight in pairs]
        wanted = torch.autograd.grad(roots, [self.values[ref] for ref in grads], given, allow_unused=True)
        least = 1e-3 * max((self._size(grad) for grad in wanted if grad is not None), default=0.0)
        for (ref, found), grad in zip(grads.items(), wanted, strict=True):
            where = f"for {self.graph.nodes[ref.node].name}"
            self._compare("backward", found, torch.zeros_like(found) if grad is None else grad, where, least)

    # Reductions.

    def _check_reduction(self, boxes: Sequence[Box]) -> None:
        node, rule, spec = self.node, rule_for(self.node.op), self.specs[0]
        assert isinstance(rule, ReductionRule)
        whole = self.values[node.operands[0]].detach()

        def mine(box: Box) -> torch.Tensor:
            return crop(whole, spec.layout, full_box(spec.layout), box)

        def merged() -> State:
            total: State | None = None
            for box in boxes:
                total = rule.merge(node, spec, total, rule.partial(node, mine(box)), box)
            assert total is not None
            return total

        where = f"over {len(boxes)} boxes"
        with torch.no_grad():
            total = _tried("forward", merged, f" {where}")
            outputs = _tried("forward", lambda: rule.finish(node, spec, total), f" {where}")
        for out, wanted in zip(outputs, self.whole, strict=True):
            self._compare("forward", out, wanted, where)
        if not self._wanted:
            return
        self.cotangents = [self._cotangent(i) for i in range(len(self.whole))]
        found = torch.zeros_like(whole, memory_format=torch.contiguous_format)
        known = () if rule.linear else total
        with torch.no_grad():
            for box in boxes:
                part = _tried("backward", lambda: rule.pull(node, spec, mine(box), box, known, self.cotangents), "")  # noqa: B023
                on_box(found, spec.layout, box).add_(unflattened(part, spec.layout, box))
        self._compare_grads({node.operands[0]: found}, self.cotangents)


def _tried(sweep: str, run: Callable[[], T], where: str) -> T:
    """What ``run`` gives; an error is a fault."""
    try:
        return run()
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise _WrongError(sweep, f"raises {type(error).__name__}{where}: {said}") from error

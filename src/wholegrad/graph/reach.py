"""How far an output pixel reaches into the image: by what tiles must overlap, and where they start, to leave no seam.

Every map has a *step*: so many image pixels lie under one of its pixels. A tile's own run of the network agrees with
the whole image's where the tile starts at a multiple of each step, that is of their least common multiple, the
*stride*. Reach then follows from the intervals by which segments are cut (:func:`wholegrad.graph.segment.spans`), asked
of every output pixel of one stride: exact, not a bound from kernel sizes.

A map that depends on all of the image (a norm's statistics, a pooled feature, attention) has no reach; nor has an op
that knows where on the image it works (interpolation with aligned corners, a flip, coordinates).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, lcm

from wholegrad.errors import CaptureError
from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Graph, Kind, Node, Spec
from wholegrad.graph.layout import Role
from wholegrad.graph.rules import rule_for
from wholegrad.graph.rules.adaptive import Adaptive
from wholegrad.graph.rules.interpolate import Upsample
from wholegrad.graph.rules.shape import extent_of
from wholegrad.graph.segment import cut, spans

SIZES = (20160, 20160 << 3)  # of an image, one after the other: divisible by 64, or 512, and by all up to 10
LONGEST = 64  # pixels after which an op's geometry must repeat
ROLES = (Role.ROW, Role.COL)


@dataclass(frozen=True)
class AxisReach:
    """Along one axis.

    Attributes:
        scale: image pixels under one output pixel.
        stride: image pixels; a tile starts at a multiple of it, and ends there or where the image does.
        before, after: image pixels that an output pixel depends on beyond those under itself, at most.
        halo: image pixels to read around a tile on either side, a multiple of the stride. It may be less than what
            ``before`` comes to: the first pixel of a tile's first stride need not be the one that reaches most.
    """

    scale: Fraction
    stride: int
    before: int
    after: int
    halo: int


@dataclass(frozen=True)
class Reach:
    """Of the first output of a network."""

    rows: AxisReach
    cols: AxisReach


@dataclass(frozen=True)
class Unbounded:
    """Why an output pixel depends on more than its surroundings.

    Attributes:
        place: module and op.
        cause: in words.
    """

    place: str
    cause: str


class _EndlessError(Exception):
    def __init__(self, node: Node, cause: str) -> None:
        super().__init__(cause)
        self.found = Unbounded(node.place, cause)


class _TooSmallError(Exception):
    """An image of this size shows its ends in every pixel's surroundings."""


def reach(captured: Callable[[int], Graph]) -> Reach | Unbounded:
    """Of the network that ``captured`` captures at a height and width.

    Raises:
        WholegradError: as the capture does.
    """
    refused: CaptureError | None = None
    for size in SIZES:
        try:
            graph = captured(size)
        except CaptureError as error:
            refused = refused or error
            continue
        try:
            rows, cols = (_axis(graph, role) for role in ROLES)
            return Reach(rows, cols)
        except _EndlessError as endless:
            return endless.found
        except _TooSmallError:
            continue
    if refused is not None:
        raise refused
    output = graph.nodes[graph.outputs[0].node]
    return Unbounded(output.place, f"reaches further than {SIZES[-1] // 2} pixels")


def _axis(graph: Graph, role: Role) -> AxisReach:
    out = graph.outputs[0]
    if not graph.spec(out).is_map:
        raise _EndlessError(graph.nodes[out.node], "is not a map, but made from all of it")
    steps = _steps(graph, role)
    scale, stride = steps[out.node], lcm(*(step.numerator for step in steps.values()))
    period = int(stride / scale)
    segments = cut(graph, frozenset({out}))
    size, first = extent_of(graph.spec(out), role), extent_of(graph.spec(out), role) // 2 // period * period
    if not segments or first + period > size:
        raise _EndlessError(graph.nodes[out.node], "is too small a map")
    whole = extent_of(graph.image.outputs[0], role)
    before, after, around = [], [], 0
    for o in range(first, first + period):
        need = spans(graph, segments[0], role, {out: Interval(o, o + 1)})[graph.image.index]
        if need.lo <= 0 or need.hi >= whole:
            raise _TooSmallError
        before.append(floor(o * scale) - need.lo)
        after.append(need.hi - ceil((o + 1) * scale))
        around = max(around, int(first * scale) - need.lo, need.hi - int((first + period) * scale))
    return AxisReach(scale, stride, max(before), max(after), -(-around // stride) * stride)


def _steps(graph: Graph, role: Role) -> dict[int, Fraction]:
    """Image pixels under one pixel of every map that the first output is made from."""
    steps: dict[int, Fraction] = {}
    whole = extent_of(graph.image.outputs[0], role)
    for index in sorted(graph.ancestors([graph.outputs[0].node])):
        node = graph.nodes[index]
        if node.kind is Kind.IMAGE:
            if steps:
                raise _EndlessError(node, "is a second image")
            steps[index] = Fraction(1)
        elif node.kind in (Kind.REDUCTION, Kind.SPREAD):
            raise _EndlessError(node, "depends on the whole image")
        elif node.kind is Kind.MAP:
            if node.draw >= 0:
                raise _EndlessError(node, "draws random numbers")
            found = {
                steps[ref.node] * _ratio(graph, node, position, role)
                for position, ref in enumerate(node.operands)
                if ref.node in steps and graph.spec(ref).is_map
            }
            if len(found) > 1:
                raise _EndlessError(node, "joins maps that lie differently on the image")
            if found:
                steps[index] = found.pop()
                if abs(extent_of(node.outputs[0], role) * steps[index] - whole) > whole / 4:
                    raise _EndlessError(node, "is of a size of its own, whatever the image's")
    return steps


def _ratio(graph: Graph, node: Node, position: int, role: Role) -> Fraction:
    """Pixels of an operand under one of the node's, where that is the same all over the map."""
    specs, rule = [graph.spec(ref) for ref in node.operands], rule_for(node.op)
    assert rule is not None
    size = extent_of(node.outputs[0], role)
    longest = min(LONGEST, size // 8)
    first = size // 2 - 2 * longest
    found = [rule.needs(node, specs, position, role, Interval(o, o + 1)) for o in range(first, first + 4 * longest)]
    for shift in range(1, longest + 1):
        by = found[shift].lo - found[0].lo
        if by > 0 and all(Interval(a.lo + by, a.hi + by) == b for a, b in zip(found, found[shift:], strict=False)):
            ratio = Fraction(by, shift)
            if not _same_everywhere(node, specs[position], role, ratio):
                break
            return ratio
    if size < 16:
        raise _TooSmallError
    raise _EndlessError(node, "treats pixels by where on the image they lie")


def _same_everywhere(node: Node, source: Spec, role: Role, ratio: Fraction) -> bool:
    """Whether the op's weights, and not only what it reads, repeat with its geometry."""
    rule = rule_for(node.op)
    inputs, outputs = extent_of(source, role), extent_of(node.outputs[0], role)
    if isinstance(rule, Upsample):
        axis = rule.axis(node, source, role)
        step = Fraction(1 / axis.scale).limit_denominator(1 << 12) if axis.scale else Fraction(inputs, outputs)
        return outputs == inputs or (not axis.corners and step == ratio)
    return not isinstance(rule, Adaptive) or inputs == outputs

"""What must hold of every plan, whoever made it: rules 1, 2, 7 and 8, checked on the plan itself."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from wholegrad.errors import PlanError
from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Kind, Ref
from wholegrad.graph.layout import Role
from wholegrad.plan.pieces import too_large
from wholegrad.plan.plan import Plan, show_bytes
from wholegrad.plan.tiles import AxisTiles


def check_plan(plan: Plan) -> None:
    """Check rules 1, 2, 7 and 8 of a plan, one axis of tiles at a time: a gigapixel plan takes moments.

    Raises:
        PlanError: one is broken; says which, where and with which figures.
    """
    _check_outputs(plan)
    for number, part in enumerate(plan.segments):
        grid = plan.grid(number)
        if len(grid) != part.tiles:
            raise _broken(plan, number, 1, f"has {len(grid)} tiles where {part.tiles} are planned")
        for role, axis in ((Role.ROW, grid.rows), (Role.COL, grid.cols)):
            _check_axis(plan, number, role, axis)
    check_elements(plan)
    if plan.budget is not None and plan.projected > plan.budget:
        figures = f"{show_bytes(plan.projected)} ({plan.projected}) of {show_bytes(plan.budget)} ({plan.budget})"
        raise PlanError("plan", f"breaks rule 7: projects {figures}", "plan again with a larger budget")


def _broken(plan: Plan, number: int, rule: int, cause: str) -> PlanError:
    paths = [plan.graph.nodes[i].path for i in plan.segments[number].segment.nodes]
    where = next((path for path in reversed(paths) if path), "labels")
    return PlanError(f"segment {number} ({where})", f"breaks rule {rule}: {cause}", "report this plan as a defect")


def _check_outputs(plan: Plan) -> None:
    """Each boundary and each sum is an output of exactly one segment, and a segment reads what earlier ones left."""
    graph = plan.graph
    made: set[Ref] = set()
    summed: set[int] = set()
    for number, part in enumerate(plan.segments):
        segment = part.segment
        for ref in segment.maps:
            kind = graph.nodes[ref.node].kind
            if kind not in (Kind.IMAGE, Kind.TARGET, Kind.SPREAD) and ref not in made:
                raise _broken(plan, number, 1, f"reads {graph.nodes[ref.node].place}, which no earlier segment made")
        twice = [ref for ref in segment.outputs if ref in made] + [i for i in segment.reductions if i in summed]
        if twice:
            raise _broken(plan, number, 1, f"makes {twice[0]} again")
        made.update(segment.outputs)
        summed.update(segment.reductions)
    wanted = {node.index for node in graph.of_kind(Kind.REDUCTION)}
    missing = [graph.nodes[i].place for i in sorted(wanted - summed)]
    missing += [graph.nodes[ref.node].place for ref in sorted(plan.boundaries - made)]
    if missing:
        raise PlanError("plan", f"breaks rule 1: no segment makes {missing[0]}", "report this plan as a defect")


def _check_axis(plan: Plan, number: int, role: Role, axis: AxisTiles) -> None:
    """Rules 1 and 2 along one axis: since tiles are a grid, boxes are right if intervals are."""
    graph, segment = plan.graph, plan.segments[number].segment

    def size(ref: Ref) -> int:
        return graph.spec(ref).rows if role is Role.ROW else graph.spec(ref).cols

    for ref in segment.owned(graph):
        if not _partition([mine[ref] for mine in axis.owned if ref in mine], size(ref)):
            cause = f"tiles do not own every element of {graph.nodes[ref.node].place} once along {role.value}"
            raise _broken(plan, number, 1, cause)
    for mine, spans in zip(axis.owned, axis.spans, strict=True):
        for ref, interval in mine.items():
            if not spans[ref.node].holds(interval):
                raise _broken(plan, number, 1, f"a tile does not compute what it owns of {graph.nodes[ref.node].place}")
        for index, interval in spans.items():
            if not 0 <= interval.lo < interval.hi <= size(Ref(index)):
                cause = f"{graph.nodes[index].place} on {tuple(interval)} of {size(Ref(index))} along {role.value}"
                raise _broken(plan, number, 2, f"a tile reaches past a map's end: {cause}")


def _partition(intervals: Iterable[Interval], size: int) -> bool:
    """Whether they cover ``[0, size)`` without overlap."""
    found = sorted(interval for interval in intervals)
    whole = bool(found) and found[0].lo == 0 and found[-1].hi == size
    return whole and all(a.hi == b.lo for a, b in pairwise(found)) and all(each.size > 0 for each in found)


def check_elements(plan: Plan) -> None:
    """Rule 8: every map's largest box, every output of it.

    Raises:
        PlanError: a tile's tensor would reach 2**31 elements, or the device's own limit; names the node.
    """
    graph = plan.graph
    most = None if plan.apart is None else plan.apart.most_bytes
    for number, part in enumerate(plan.segments):
        grid = plan.grid(number)
        for index in (*part.segment.nodes, *(ref.node for ref in part.segment.maps)):
            area = grid.rows.largest.get(index, 0) * grid.cols.largest.get(index, 0)
            for spec in graph.nodes[index].outputs:
                if too_large(area, spec, most):
                    limit = "2**31 elements" if most is None else f"2**31 elements or {most} bytes"
                    cause = f"a tile of {part.tile} needs {limit} or more"
                    raise PlanError(graph.nodes[index].place, cause, "choose a smaller tile")

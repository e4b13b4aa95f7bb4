"""How one training step goes over the slide: the plan's passes, and of each pass the tiles, with what they read.

Tiles are rows times columns, so a pass is two short lists of intervals: what a tile owns, and what it reads beyond that
(its halo), in level-0 pixels. The page draws them in the order in which the step runs them.
"""

from __future__ import annotations

from typing import Any

from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Kind, Ref
from wholegrad.plan.describe import name
from wholegrad.plan.plan import Plan, SegmentPlan, show_bytes
from wholegrad.plan.tiles import AxisTiles
from wholegrad.slide.placement import Axis, Placement


def as_passes(plan: Plan, placed: Placement) -> dict[str, Any]:
    """The plan as plain values.

    Args:
        plan: of one step on a map of the slide.
        placed: where that map's pixels lie on the slide.
    """
    order = [(number, "forward") for number, part in enumerate(plan.segments) if not part.fused]
    if plan.backward:
        back = [number for number in reversed(range(len(plan.segments))) if _pulled_back(plan, number)]
        order += [(number, "one pass" if plan.segments[number].fused else "backward") for number in back]
    return {
        "strategy": plan.strategy,
        "image": list(plan.image_shape),
        "seconds": plan.seconds,
        "projected": show_bytes(plan.projected),
        "budget": show_bytes(plan.budget) if plan.budget else None,
        "whole_image": show_bytes(plan.whole_image),
        "recompute": plan.recompute,
        "workers": plan.workers,
        "segments": [_segment(plan, number, placed) for number in range(len(plan.segments))],
        "passes": [_pass(plan.segments[number], number, sweep) for number, sweep in order],
    }


def _pulled_back(plan: Plan, number: int) -> bool:
    """Whether a segment runs again in the backward sweep: one that only counts labels does not."""
    segment = plan.segments[number].segment
    outputs = [ref.node for ref in segment.outputs]
    return any(plan.graph.nodes[index].needs_grad for index in (*outputs, *segment.reductions))


def _pass(part: SegmentPlan, number: int, sweep: str) -> dict[str, Any]:
    seconds = {"forward": part.seconds, "backward": part.backward_seconds}.get(sweep, part.backward_seconds)
    return {"segment": number, "sweep": sweep, "tiles": part.tiles, "seconds": seconds}


def _segment(plan: Plan, number: int, placed: Placement) -> dict[str, Any]:
    graph, part = plan.graph, plan.segments[number]
    grid, read = plan.grid(number), _read(plan, number)
    base = graph.spec(part.segment.base)
    there = graph.spec(read)
    modules, yields, *_ = plan.describe_segment(number)
    image = plan.image_shape[-2:]
    return {
        "modules": modules,
        "yields": yields,
        "reads": "image" if graph.nodes[read.node].kind is Kind.IMAGE else name(plan, read),
        "tile": list(part.tile),
        "base": [base.rows, base.cols],
        "memory": show_bytes(part.working.backward if plan.backward else part.working.forward),
        "rows": _intervals(grid.rows, part.segment.base, read, (base.rows, there.rows, image[0]), placed.rows),
        "cols": _intervals(grid.cols, part.segment.base, read, (base.cols, there.cols, image[1]), placed.cols),
    }


def _read(plan: Plan, number: int) -> Ref:
    """The map whose boxes show a tile's halo: the image where it is read, else the largest."""
    maps, graph = plan.segments[number].segment.maps, plan.graph
    images = [ref for ref in maps if graph.nodes[ref.node].kind is Kind.IMAGE]
    return images[0] if images else max(maps, key=lambda ref: graph.spec(ref).rows * graph.spec(ref).cols)


def _intervals(
    tiles: AxisTiles, base: Ref, read: Ref, sizes: tuple[int, int, int], axis: Axis
) -> list[tuple[float, float, float, float]]:
    """Of each tile along one axis: where what it owns starts and ends, and where what it reads does."""
    own, there, image = sizes

    def shown(interval: Interval, size: int) -> tuple[float, float]:
        ends = (float(axis.start) + float(axis.step) * at * image / size for at in interval)
        low, high = (round(end, 2) for end in ends)
        return low, high

    found = []
    for owned, spans in zip(tiles.owned, tiles.spans, strict=True):
        mine = shown(owned[base], own) if base in owned else (0.0, 0.0)
        reads = shown(spans[read.node], there) if read.node in spans else mine
        found.append((*mine, *reads))
    return found

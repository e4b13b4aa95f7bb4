"""A plan as plain values, for JSON and for whoever compares plans: every decision that the planner made."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from wholegrad.graph.graph import Ref
from wholegrad.graph.recall import recallable
from wholegrad.plan.memory import held_whole
from wholegrad.plan.plan import Plan
from wholegrad.plan.storage import dtype_name
from wholegrad.plan.traffic import traffic


def as_dict(plan: Plan) -> dict[str, Any]:
    """Segments, boundaries, bytes and seconds; maps by module path, sizes in pixels and bytes."""
    return {
        "image": list(plan.image_shape),
        "budget": plan.budget,
        "projected": plan.projected,
        "reserved": int(plan.reserved),
        "held_whole": held_whole(plan.graph),
        "whole_image": plan.whole_image,
        "recompute": plan.recompute,
        "seconds": plan.seconds,
        "backward": plan.backward,
        "workers": plan.workers,
        "device": plan.device,
        "triton": None if plan.apart is None else plan.apart.triton,
        "host": None if plan.host is None else asdict(plan.host),
        "ranks": None if plan.bands is None else _ranks(plan),
        "segments": [_segment(plan, number) for number in range(len(plan.segments))],
        "boundaries": [_boundary(plan, ref) for ref in sorted(plan.placements)],
    }


def _ranks(plan: Plan) -> dict[str, Any]:
    """How the image is shared, and the bytes that the rank with most of each sends in a step."""
    assert plan.bands is not None
    sent = [traffic(plan, rank) for rank in plan.bands.busiest]
    most = {key: max(getattr(each, key) for each in sent) for key in (*(f.name for f in fields(sent[0])), "total")}
    return {"shape": list(plan.bands.shape), "rows": plan.bands.rows, "cols": plan.bands.cols, "sent": most}


def _segment(plan: Plan, number: int) -> dict[str, Any]:
    graph, part = plan.graph, plan.segments[number]
    segment = part.segment
    recalled = recallable(graph, segment, plan.placements.keys()) if plan.backward else ()
    return {
        "modules": list(dict.fromkeys(graph.nodes[i].path for i in segment.nodes if graph.nodes[i].path)),
        "reads": [name(plan, ref) for ref in segment.maps],
        "makes": [name(plan, ref) for ref in segment.outputs],
        "sums": len(segment.reductions),
        "base": list(graph.spec(segment.base).shape),
        "tile": list(part.tile),
        "tiles": part.tiles,
        "fused": part.fused,
        "recalled": [name(plan, ref) for ref in recalled],
        "bytes": part.working.backward if plan.backward else part.working.forward,
        "macs": {"forward": part.forward_macs, "again": part.again_macs},
        "seconds": {"forward": part.seconds, "backward": part.backward_seconds},
    }


def _boundary(plan: Plan, ref: Ref) -> dict[str, Any]:
    spec = plan.graph.spec(ref)
    return {
        "map": name(plan, ref),
        "op": plan.graph.nodes[ref.node].name,
        "shape": list(spec.shape),
        "placement": str(plan.placements[ref]),
        "dtype": dtype_name(plan.stored_dtype(ref)),
        "bytes": plan.stored_bytes(ref),
        "gradient_bytes": spec.nbytes if plan.backward and plan.graph.nodes[ref.node].needs_grad else 0,
    }


def name(plan: Plan, ref: Ref) -> str:
    """A map by the module that makes it, or by its node."""
    node = plan.graph.nodes[ref.node]
    return node.path or node.name

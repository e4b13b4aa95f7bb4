"""Sums over ranks, in float64 and in the order of ranks, so that every rank holds the same bits (rules 3 and 6).

Small ones are brought to everyone, who adds them up. Of large ones (parameters' gradients) each rank adds up a part and
brings that to everyone: twice the bytes travel, whatever the number of ranks, and no sum is made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.rules import State
from wholegrad.graph.rules.base import CPU
from wholegrad.graph.segment import reduction_rule
from wholegrad.plan.traffic import BUCKET, buckets
from wholegrad.run.distributed.packed import packed, unpacked
from wholegrad.run.distributed.wire import Wire


def joined(
    wire: Wire,
    graph: Graph,
    reductions: Sequence[int],
    totals: Mapping[int, State],
    box: Callable[[int, Ref], Box | None],
    device: torch.device,
) -> dict[int, State]:
    """The merged state of each reduction, from what every rank has of it.

    Args:
        totals: this rank's own; one that is missing has no tile here.
        box: what a rank's tiles own of a map, all together; None for nothing.
        device: where states lie.
    """
    mine: dict[str, torch.Tensor] = {}
    for index in reductions:
        if index in totals:
            node = graph.nodes[index]
            own = box(wire.rank, node.operands[0])
            assert own is not None
            part = reduction_rule(graph, index).share(node, graph.spec(node.operands[0]), totals[index], own)
            mine |= {f"{index}.{k}": value for k, value in enumerate(part)}
    result: dict[int, State] = {}
    for rank, found in enumerate(wire.meet(packed(mine))):
        parts: dict[int, list[torch.Tensor]] = {}
        for name, value in (mine if rank == wire.rank else unpacked(found.cpu())).items():
            parts.setdefault(int(name.partition(".")[0]), []).append(value.to(device))
        for index, state in parts.items():
            node = graph.nodes[index]
            place = box(rank, node.operands[0])
            assert place is not None
            before, spec = result.get(index), graph.spec(node.operands[0])
            result[index] = reduction_rule(graph, index).join(node, spec, before, tuple(state), place)
    return result


def added(wire: Wire, mine: Mapping[str, torch.Tensor], device: torch.device = CPU) -> dict[str, torch.Tensor]:
    """The sum over ranks of each named tensor, on ``device``; one that a rank lacks counts as zero there."""
    result: dict[str, torch.Tensor] = {}
    for rank, found in enumerate(wire.meet(packed(mine))):
        for name, value in (mine if rank == wire.rank else unpacked(found.cpu())).items():
            result[name] = result[name] + value.to(device) if name in result else value.to(device)
    return result


def of_first(wire: Wire, mine: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What rank 0 has of these named tensors; nothing on rank 0 itself."""
    told = wire.meet(packed(mine) if wire.rank == 0 else None)[0]
    return {} if wire.rank == 0 else unpacked(told.cpu())


def summed(wire: Wire, sizes: Sequence[int], give: Callable[[int], torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """The sum over ranks of each of some tensors, flat and in float64, several at a time.

    Args:
        sizes: elements of each, the same on every rank.
        give: this rank's own, by its number.
    """
    for bucket in buckets(sizes):
        flat = torch.cat([give(k).reshape(-1) for k in bucket])
        added_up(wire, flat)
        yield from zip(bucket, torch.split(flat, [sizes[k] for k in bucket]), strict=True)


def added_up(wire: Wire, flat: torch.Tensor) -> None:
    """Put the sum over ranks in place of a long float64 tensor; every rank brings one of the same length."""
    for start in range(0, flat.numel(), BUCKET):
        _bucket(wire, flat[start : start + BUCKET])


def _bucket(wire: Wire, flat: torch.Tensor) -> None:
    """Each rank adds up one part of it, in order of ranks, and brings the others the sum."""
    edges = [flat.numel() * rank // wire.size for rank in range(wire.size + 1)]
    parts = [flat[lo:hi] for lo, hi in pairwise(edges)]
    here = [part.to(wire.device).contiguous() for part in parts]
    mine, others = parts[wire.rank], [rank for rank in range(wire.size) if rank != wire.rank]
    found = {rank: torch.empty_like(here[wire.rank]) for rank in others} | {wire.rank: here[wire.rank]}
    wire.swap([(rank, here[rank]) for rank in others], [(rank, found[rank]) for rank in others])
    total = found[0].clone()
    for rank in range(1, wire.size):
        total.add_(found[rank])
    mine.copy_(total)
    whole = [total if rank == wire.rank else torch.empty_like(here[rank]) for rank in range(wire.size)]
    wire.swap([(rank, total) for rank in others], [(rank, whole[rank]) for rank in others])
    for rank in others:
        parts[rank].copy_(whole[rank])

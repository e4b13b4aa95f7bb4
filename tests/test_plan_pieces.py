"""What planning works out for many segments and tiles at once is what one segment and one tile give by themselves."""

from __future__ import annotations

import gc
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wholegrad as wg
from test_random_nets import RandomNet, flat_ratio, mean_square, nets
from wholegrad.errors import BudgetError
from wholegrad.graph.graph import READERS, Graph, Ref
from wholegrad.graph.inline import Inlined, Inliner, inline
from wholegrad.graph.layout import Role
from wholegrad.graph.segment import Segment, cut
from wholegrad.plan.boundaries import candidates
from wholegrad.plan.extents import Extents, alike, extent
from wholegrad.plan.memory import DOUBLE, NEW_SLACK, PAGED, SLACK
from wholegrad.plan.tiles import axis_tiles
from wholegrad.plan.walk import Upkeep, Walk

Drawn = tuple[RandomNet, torch.Tensor, int]


def graph_of(drawn: Drawn, times: int) -> Graph:
    net, image, seed = drawn
    large = image.new_zeros(()).expand(*image.shape[:2], *(times * n for n in image.shape[-2:]))
    return wg.plan(net, (mean_square, flat_ratio)[seed % 2], large, None).graph


def segments_of(graph: Graph) -> list[Segment]:
    """Of several sets of boundaries."""
    pool = candidates(graph)
    sets = [(), *((ref,) for ref in pool), *list(combinations(pool, 2))[:6], tuple(pool)]
    return [segment for boundaries in sets for segment in cut(graph, frozenset(boundaries))]


def nodes_of(segment: Segment) -> list[int]:
    return sorted({*segment.nodes, *(ref.node for ref in segment.maps)})


@settings(max_examples=25)
@given(nets(), st.integers(1, 40), st.lists(st.integers(3, 300), min_size=1, max_size=4, unique=True))
def test_extents_of_many_sizes_are_those_of_each(drawn: Drawn, times: int, edges: list[int]) -> None:
    graph = graph_of(drawn, times)
    extents = Extents(graph)
    for segment in segments_of(graph):
        nodes = nodes_of(segment)
        for role in (Role.ROW, Role.COL):
            found = extents.of(segment, nodes, role, edges)
            for k, edge in enumerate(edges):
                each = extent(axis_tiles(graph, segment, role, edge), nodes)
                assert [found.counts[k]] == each.counts
                assert (found.largest[:, k] <= each.largest[:, 0]).all()
                if found.counts[k] <= 3:  # all of them were looked at
                    assert (found.largest[:, k] == each.largest[:, 0]).all()
                    assert (found.total[:, k] == each.total[:, 0]).all()


def test_nodes_are_alike_only_if_op_arguments_and_shapes_are() -> None:
    net = torch.nn.Sequential(*(torch.nn.Conv2d(2, 2, 3, padding=pad) for pad in (1, 1, 2, 1)))
    graph = wg.plan(net, lambda y, t: y.mean(), torch.zeros(2, 20, 20), None).graph
    kinds = alike(graph)
    first, second, wider, after = (kinds[n.index] for n in graph.nodes if n.op is torch.ops.aten.convolution.default)
    assert first == second and wider != first and after not in (first, wider)


def test_one_look_at_a_graph_serves_all_its_segments() -> None:
    """Programs that were found for one segment are those that each other finds by itself."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)
            self.c, self.norm = torch.nn.Conv2d(8, 20, 3, padding=1), torch.nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.norm(self.a(1 - x)))
            z = torch.nn.functional.leaky_relu(self.b(y * 2)) + y
            result: torch.Tensor = self.c(torch.cat([z.sigmoid(), y * z], 1)).relu() * 0.5
            return result

    graph = wg.plan(Net(), lambda y, t: (y.abs() * t).mean(), torch.zeros(3, 30, 40), torch.zeros(1, 30, 40)).graph
    refs = [Ref(node.index) for node in graph.nodes if node.op is not None and node.outputs[0].is_map]
    raw = frozenset({Ref(graph.image.index)})
    shared, found = Inliner(graph, raw), set()
    for boundaries in ((), *combinations(refs, 1), *combinations(refs, 2)):
        for segment in cut(graph, frozenset(boundaries)):
            how = shared.inline(segment)
            assert how == inline(graph, segment, raw)
            found.update(str(reading) for each in (how.chains, how.convolutions, how.sums) for reading in each.values())
    assert len(found) > 20, "programs differ from segment to segment"


def plain_walk(graph: Graph, segment: Segment, how: Inlined, sizes: dict[int, int]) -> tuple[int, int]:
    """Peaks forward and backward of one tile, a step at a time; ``sizes`` are bytes of what exists, by node index."""
    upkeep = Upkeep(graph)
    inputs = sum(sizes[ref.node] for ref in segment.maps)
    raw = sum(sizes[ref.node] for ref in segment.maps if graph.nodes[ref.node].kind in READERS)
    readers = {i: [ref.node for ref in how.reads(graph, i) if ref.node in sizes] for i in how.nodes}

    def copies(index: int) -> int:
        if index in how.convolutions:
            return 0
        operands = graph.nodes[index].operands
        first = sizes[operands[0].node] * upkeep.inputs[index] if upkeep.inputs[index] else 0
        return first + upkeep.outputs[index] * sizes[index]

    def rearranged(index: int) -> int:
        operands = graph.nodes[index].operands
        anew = upkeep.library[index] and index not in how.convolutions and operands[0].node in sizes
        return sizes[index] + sizes[operands[0].node] if anew else 0

    def drawing(index: int) -> int:
        return upkeep.drawing[index] * (sizes[index] // upkeep.item[index])

    def root(index: int) -> int:
        operands = graph.nodes[index].operands
        return root(operands[0].node) if upkeep.view[index] and operands[0].node in sizes and index in ran else index

    ran = set(how.nodes)
    values = {i: sizes[i] if root(i) == i else 0 for i in sizes}
    summed = [graph.nodes[i].operands[0] for i in segment.reductions if i not in how.sums]
    widest = DOUBLE * max((sizes[ref.node] // graph.spec(ref).dtype.itemsize for ref in summed), default=0)
    last = {root(ref): index for index in how.nodes for ref in readers[index]}
    leaves = [ref for reading in how.sums.values() for ref in reading.leaves]
    kept = {root(ref.node) for ref in (*leaves, *summed, *segment.outputs) if ref.node in sizes}
    live = peak = inputs
    for index in how.nodes:
        live += values[index]
        peak = max(peak, live + copies(index) + drawing(index))
        read = {root(ref) for ref in readers[index]} - kept
        live -= sum(sizes[ref] for ref in read if last[ref] == index)
    forward = raw + peak + widest + sum(sizes.get(ref.node, 0) for ref in segment.outputs)

    needs = {i: graph.nodes[i].needs_grad for i in sizes}
    live = inputs + sum(values[i] + (copies(i) if needs[i] else 0) for i in how.nodes)
    peak = live + max(widest, max((drawing(i) for i in how.nodes), default=0))
    grads = {ref.node: sizes[ref.node] for ref in segment.owned(graph) if ref.node in sizes}
    for reading in how.sums.values():
        grads |= {ref.node: sizes[ref.node] for ref in reading.leaves if ref.node in sizes and needs[ref.node]}
    for index in reversed([i for i in how.nodes if needs[i]]):
        grads.setdefault(index, sizes[index])
        fresh = 0
        for ref in readers[index]:
            if needs[ref]:
                fresh += sizes[ref] if ref in grads else 0
                grads[ref] = sizes[ref]
        peak = max(peak, live + sum(grads.values()) + fresh + copies(index) + rearranged(index))
        live -= values[index] + copies(index)
        del grads[index]
    backward = raw + peak + sum(sizes[ref.node] for ref in segment.maps if needs[ref.node])
    return forward, backward


@settings(max_examples=25)
@given(nets())
def test_the_bytes_of_many_tiles_are_those_of_each(drawn: Drawn) -> None:
    graph = graph_of(drawn, 4)
    rng = np.random.default_rng(drawn[2])
    upkeep = Upkeep(graph)
    for segment in segments_of(graph):
        how = inline(graph, segment)
        tiles = Walk(upkeep, segment, how, new=bool(drawn[2] % 2))
        areas = rng.integers(0, 5000, (len(tiles.nodes), 4))
        areas[:, 3] *= 1000
        wear = rng.random(4)
        found, seen = np.array(tiles.bytes(areas, wear)), np.array(tiles.bytes(areas))
        for k in range(4):
            sizes = {i: int(areas[row, k]) * upkeep.pixel[i] for row, i in enumerate(tiles.nodes)}
            assert seen[:, k].tolist() == list(plain_walk(graph, segment, how, sizes))
            worn = {
                i: NEW_SLACK + (SLACK - NEW_SLACK) * (0.0 if size >= PAGED else wear[k]) for i, size in sizes.items()
            }
            slack = {i: worn[i] if tiles.new else tiles.slack for i in sizes}
            more = {i: math.ceil(size * slack[i]) for i, size in sizes.items()}
            assert found[:, k].tolist() == list(plain_walk(graph, segment, how, more))


def test_pythons_collector_is_left_as_it_was_found() -> None:
    assert gc.isenabled()
    model, image = torch.nn.Conv2d(1, 1, 3), torch.zeros(1, 64, 64)
    wg.plan(model, lambda y, t: y.mean(), image, None)
    assert gc.isenabled()
    with pytest.raises(BudgetError):
        wg.plan(model, lambda y, t: y.mean(), image, None, budget="1MiB")
    assert gc.isenabled()
    gc.disable()
    try:
        wg.plan(model, lambda y, t: y.mean(), image, None)
        assert not gc.isenabled()
    finally:
        gc.enable()

"""Tiles that run side by side: how equal they are, which may meet, and what their plan projects for them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import wholegrad as wg
from oracle import assert_exact
from test_random_nets import mean_square
from wholegrad.commands.common import blank
from wholegrad.graph.graph import Graph
from wholegrad.graph.inline import inline
from wholegrad.graph.rules import rule_for
from wholegrad.graph.segment import cut
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan import memory
from wholegrad.plan.check import check_plan
from wholegrad.plan.cost import Bill, Prices
from wholegrad.plan.extents import extent
from wholegrad.plan.pieces import Ground, Piece, Terms, side_by_side
from wholegrad.plan.plan import Plan
from wholegrad.plan.planner import Planner, Request
from wholegrad.plan.rates import BUILT_IN
from wholegrad.plan.tiles import ALIGNED, cuts, even, grid
from wholegrad.plan.walk import Upkeep, Walk
from wholegrad.run.workers import in_order


@given(st.integers(1, 100_000), st.integers(1, 600).map(lambda n: ALIGNED * n))
def test_even_tiles_are_as_many_and_no_larger(size: int, tile: int) -> None:
    found = even(size, tile)
    before, after = np.diff(cuts(size, tile)), np.diff(cuts(size, found))
    assert len(after) == len(before) and after.max() <= before.max() and after.sum() == size
    if len(after) > 1:
        assert found % ALIGNED == 0
        assert after.max() - size / len(after) < ALIGNED, "no tile is much larger than its share"


@settings(max_examples=60)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=9), st.integers(1, 4), st.data())
def test_no_run_of_tiles_meets_in_more_bytes_than_counted(sizes: list[int], workers: int, data: st.DataObject) -> None:
    """The executor's order, with tiles that last as long as they like."""
    lasting = data.draw(st.lists(st.integers(1, 50), min_size=len(sizes), max_size=len(sizes)))
    assert most_at_once(sizes, lasting, workers) <= side_by_side(sizes, workers) <= workers * max(sizes)


def most_at_once(sizes: list[int], lasting: list[int], workers: int) -> int:
    """What :func:`~wholegrad.run.workers.in_order` would have running at most, in a time of its own."""
    now, most, ends, popped, begun = 0, 0, {}, 0, 0
    while popped < len(sizes):
        while (
            begun < len(sizes) and begun < popped + workers + 1 and len([e for e in ends.values() if e > now]) < workers
        ):
            ends[begun] = now + lasting[begun]
            begun += 1
        most = max(most, sum(sizes[i] for i, end in ends.items() if end > now))
        while popped in ends and ends[popped] <= now:
            popped += 1
        later = [end for end in ends.values() if end > now]
        if popped < len(sizes) and not (begun < len(sizes) and begun < popped + workers + 1 and len(later) < workers):
            now = min(later, default=now)
            while popped in ends and ends[popped] <= now:
                popped += 1
    return most


def test_what_is_counted_can_happen() -> None:
    sizes = [9, 1, 8, 2]  # the second is done before the first, so that the third meets the first
    assert side_by_side(sizes, 2) == 17 == most_at_once(sizes, [50, 1, 50, 1], 2)
    assert side_by_side([5, 4], 2) == 9 and side_by_side([5], 2) == 5 and side_by_side([], 3) == 0
    assert side_by_side([1, 2, 3, 4, 5, 6], 1) == 6


@pytest.mark.parametrize("workers", [2, 3])
def test_the_executors_own_order_is_what_was_counted(workers: int) -> None:
    rng = np.random.default_rng(workers)
    sizes, waits = rng.integers(1, 100, 9).tolist(), (rng.random((12, 9)) * 0.004).tolist()
    lock, running, most = threading.Lock(), list[int](), [0]

    def work(each: tuple[int, float]) -> None:
        with lock:
            running.append(each[0])
            most[0] = max(most[0], sum(running))
        time.sleep(each[1])
        with lock:
            running.remove(each[0])

    for wait in waits:
        tiles = list(zip(sizes, wait, strict=True))
        assert [tile for tile, _ in in_order(tiles, 9, work, workers)] == tiles
    assert max(sizes) < most[0] <= side_by_side(sizes, workers)


def plan_of(size: tuple[int, int], **fixed: Any) -> Plan:
    return wg.plan(unet4492(seed=0), LOSSES["bce"], blank(3, *size), blank(1, *size), budget="6GiB", **fixed)


def piece_of(graph: Graph, workers: int, tile: tuple[int, int] | None = None) -> Piece:
    """The last segment of a graph without boundaries."""
    return Piece(Ground(graph, Terms(True, workers, BUILT_IN, tile)), cut(graph, frozenset())[-1], True)


def test_two_unequal_tiles_count_as_they_are() -> None:
    graph = plan_of((1000, 2828)).graph
    found = {}
    for width in (2048, 1440):
        piece = piece_of(graph, 2, (1000, width))
        piece.settle((1000, width))
        found[width] = piece.needs((1000, width))[1]
    alone = piece_of(graph, 1, (1000, 2048))
    alone.settle((1000, 2048))
    large = alone.needs((1000, 2048))[1]
    assert found[2048] < 1.6 * large, "2048 and 780 columns are less than twice 2048"
    assert found[1440] == pytest.approx(found[2048], rel=0.05), "all columns together, however they are cut"


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [(1024, 1056), (1003, 1047)])
def test_estimates_are_never_more_than_what_all_tiles_need(workers: int, size: tuple[int, int]) -> None:
    graph = plan_of(size).graph
    piece, looked = piece_of(graph, workers), 0
    for option in piece.fine[::2]:
        estimate = piece.needs(option.tile)
        piece.settle(option.tile)
        exact = piece.needs(option.tile)
        assert all(a <= b for a, b in zip(estimate, exact, strict=True)), option.tile
        if max(-(-size[0] // option.tile[0]), -(-size[1] // option.tile[1])) <= 3:
            looked += 1
            assert estimate == exact, f"all tiles of {option.tile} were looked at"
    assert looked >= 2


@pytest.mark.parametrize("tile", [(96, 96), (352, 320), (512, 1047), (1003, 64), (32, 1047)])
@pytest.mark.parametrize("padded", [True, False])
def test_no_tile_needs_more_than_the_largest(tile: tuple[int, int], padded: bool) -> None:
    """Where a network pads at the image's ends, those tiles hold a copy more, and the others none."""
    graph = plan_of((1003, 1047) if padded else (1008, 1056)).graph
    piece = piece_of(graph, 1)
    found = grid(graph, piece.segment, tile)
    rows, cols = (extent(each, piece._bill.nodes, piece._pads) for each in (found.rows, found.cols))
    largest = [int(each[0]) for each in piece._largest(rows, cols, None)]
    pads = [i for i in piece._how.nodes if graph.nodes[i].op is torch.ops.aten.constant_pad_nd.default]
    assert (len(pads) == len(piece._pads) == 1) is padded
    met, most = 0, [0, 0]
    for each in found:
        makes = [each.boxes[i].area != each.boxes[graph.nodes[i].operands[0].node].area for i in pads]
        met += any(makes)
        for sweep, walks in enumerate((piece._walks[0], piece._walks[-1])):
            walk = walks[not any(makes)]
            areas = np.array([[each.boxes[i].area if i in each.boxes else 0] for i in walk.nodes], np.int64)
            most[sweep] = max(most[sweep], int(walk.bytes(areas)[sweep][0]))
    assert bool(met) is padded
    assert all(a <= b <= 1.25 * a for a, b in zip(most, largest, strict=True)), (most, largest)


def test_each_worker_gets_its_share_of_a_small_image() -> None:
    for workers in (2, 3, 4, 6):
        plan = Planner(plan_of((900, 3600)).graph, Request(None, 1 << 20, True, workers)).plan(None)
        check_plan(plan)
        for part in plan.segments:
            rounds = -(-part.tiles // workers)
            areas = [box.area for tile in plan.grid(0) for ref, box in tile.owned.items() if ref == part.segment.base]
            if areas and part is plan.segments[0]:
                assert rounds * max(areas) < 1.35 * sum(areas) / workers, f"{workers} workers, {part.tile}"


class Views(nn.Module):
    """Crops, a channel by itself and a turned map between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(2, 20, 3, padding=1), nn.Conv2d(1, 20, 3, padding=1), nn.Conv2d(20, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(F.pad(x, (0, 3, 0, 5))))[..., 2:-3, 1:]
        z = self.b(y[:, 4:5]) + y.permute(0, 1, 2, 3)
        found: torch.Tensor = self.c(F.pad(z, (2, 2, 2, 2)).select(0, 0).unsqueeze(0))[..., :-1, :]
        return found


def test_views_take_no_memory_of_their_own_and_keep_whose_they_are() -> None:
    graph = wg.plan(Views(), mean_square, torch.zeros(2, 64, 96), None).graph
    segment = cut(graph, frozenset())[0]
    how = inline(graph, segment)
    walk = Walk(Upkeep(graph), segment, how)
    views = [k for k, i in enumerate(how.nodes) if rule_for(graph.nodes[i].op).view]  # type: ignore[union-attr]
    assert len(views) >= 5
    areas = np.full((len(walk.nodes), 1), 1000, np.int64)
    before = np.array(walk.bytes(areas))
    sizes = walk._sized(areas)
    assert all(int(sizes.values[k, 0]) == 0 for k in views)
    ends = {walk.roots[k] for k in views}
    assert all(walk.makes[k, 0] == 1 for k in ends if k < len(how.nodes)), "a view lies in what something made"
    walk.roots = list(range(len(walk.nodes)))  # as if each were a map of its own
    walk.makes = np.ones_like(walk.makes)
    after = np.array(walk.bytes(areas))
    assert after[0] >= before[0] and after[1] > 1.3 * before[1]


@pytest.mark.parametrize("tile", [(17, 23), (30, 200)])
def test_views_and_padding_between_tiles_are_exact(tile: tuple[int, int]) -> None:
    assert_exact(Views().double(), mean_square, torch.rand(2, 61, 83, dtype=torch.float64), None, tile=tile)


def test_padding_costs_at_the_images_ends_alone() -> None:
    """An image whose sides are no multiples of the network's stride is predicted to take little longer."""
    even_sides, odd_sides = plan_of((4000, 16000)), plan_of((4003, 16011))
    assert odd_sides.seconds < 1.8 * even_sides.seconds
    small, odd = plan_of((400, 1600)), plan_of((403, 1611))
    assert odd.seconds - small.seconds > 0.02 * small.seconds, "where most tiles meet an end it does cost"


def test_a_steps_own_time_and_its_first_touch_of_memory_are_predicted() -> None:
    small = plan_of((250, 1000))
    assert small.seconds == pytest.approx(sum(p.seconds + p.backward_seconds for p in small.segments) + BUILT_IN.step)
    graph, fresh = plan_of((1000, 2828)).graph, {}
    for rate in (0.0, 1e-9):
        terms = Terms(True, 2, replace(BUILT_IN, fresh=rate), (512, 1440))
        (option,) = Piece(Ground(graph, terms), cut(graph, frozenset())[-1], True).fine
        fresh[rate] = option.backward
    bytes_of_a_tile = piece_of(graph, 1, (512, 1440)).needs((512, 1440))[1] - memory.HEAP
    assert 0.3e-9 < (fresh[1e-9] - fresh[0.0]) / bytes_of_a_tile < 1e-9, "once for a worker, however many tiles it has"


def test_a_bill_without_ends_is_one_of_all_tiles() -> None:
    graph = wg.plan(Views(), mean_square, torch.zeros(2, 640, 960), None).graph
    segment = cut(graph, frozenset())[0]
    bill = Bill(Prices(graph, BUILT_IN), segment, inline(graph, segment))
    pads = [graph.nodes[i] for i in segment.nodes if graph.nodes[i].op is torch.ops.aten.constant_pad_nd.default]
    ends = [rule_for(node.op).borders(node) for node in pads]  # type: ignore[union-attr]
    assert ends == [(1, 1), (2, 2)]
    assert [borders[2:] for borders in bill._borders] == ends


@pytest.mark.parametrize(
    ("tiles", "workers", "steps", "worn"),
    [
        (1, 2, False, 0), (2, 2, False, 0), (4, 2, False, 1 / 8), (32, 2, False, 4 / 8), (512, 2, False, 1),
        (900, 2, False, 1), (8, 1, False, 3 / 8), (1, 2, True, 4 / 8), (8, 2, True, 6 / 8), (32, 2, True, 1),
        (900, 2, True, 1),
    ],
)  # fmt: skip
def test_a_heap_comes_apart_with_every_round_of_tiles(tiles: int, workers: int, steps: bool, worn: float) -> None:
    assert memory.wear(np.array(tiles), workers, steps) == pytest.approx(worn)


def test_what_segments_leave_in_the_heap_does_not_grow_for_ever() -> None:
    assert memory.leftover(1) == 0 < memory.leftover(2) < memory.leftover(4)
    assert memory.leftover(1 + memory.LEAVING) == memory.leftover(60)


@pytest.mark.parametrize(
    ("channels", "edge", "fixed", "keeps"),
    [
        (8, 3000, {"tile": (250, 250)}, True),
        (8, 3000, {"tile": (3000, 3000)}, False),  # maps of 275 MiB have pages of their own
        (8, 3000, {"tile": (250, 250), "boundaries": ["0"], "placement": "host"}, True),
        (8, 1200, {"tile": (300, 300), "boundaries": ["0", "2"], "placement": "host"}, False),  # three segments
        (40, 1200, {"tile": (300, 300)}, False),  # PyTorch's convolutions
    ],
)
def test_a_step_leaves_its_heap_where_its_tiles_take_everything_from_there(
    channels: int, edge: int, fixed: dict[str, Any], keeps: bool
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(channels, 1, 1),
    )  # fmt: skip
    plan = wg.plan(model, mean_square, torch.zeros(3, edge, edge), None, budget="16GiB", **fixed)
    assert plan.keeps_heap is keeps

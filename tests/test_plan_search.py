"""Any plan is valid whatever graph and budget, more memory is never slower, and small searches match brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wholegrad as wg
from test_random_nets import RandomNet, flat_ratio, mean_square, nets
from wholegrad.commands.common import blank
from wholegrad.errors import BudgetError, PlanError
from wholegrad.graph.geometry import Interval
from wholegrad.graph.graph import Graph
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan import search
from wholegrad.plan.boundaries import candidates
from wholegrad.plan.check import check_plan
from wholegrad.plan.cuttings import Cutting
from wholegrad.plan.plan import Placement, Plan
from wholegrad.plan.planner import Planner, Request

FACTOR = 1.05  # of the best of all plans: what the search may miss


def graph_of(net: torch.nn.Module, loss: Any, image: torch.Tensor) -> Graph:
    return wg.plan(net, loss, image, None).graph


def made(planner: Planner, budget: int) -> Plan | None:
    try:
        return planner.plan(budget)
    except BudgetError:
        return None


@settings(max_examples=40)
@given(nets(), st.sampled_from([mean_square, flat_ratio]), st.integers(1, 3), st.data())
def test_every_plan_is_valid_and_more_memory_is_never_slower(
    drawn: tuple[RandomNet, torch.Tensor, int], loss: Any, workers: int, data: st.DataObject
) -> None:
    net, image, _ = drawn
    large = image.new_zeros(()).expand(*image.shape[:2], *(64 * n for n in image.shape[-2:]))
    graph = graph_of(net, loss, large)
    planner = Planner(graph, Request(None, 1 << 20, True, workers))
    smallest = planner.smallest()
    more = st.integers(0, 1 << 28) | st.integers(0, 1 << 22)
    budgets = sorted(smallest + data.draw(more) for _ in range(5))
    plans = [planner.plan(budget) for budget in budgets]
    for plan in plans:
        check_plan(plan)
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    again = Planner(graph, Request(None, 1 << 20, True, workers))
    for plan, budget in zip(reversed(plans), reversed(budgets), strict=True):  # whatever was planned before
        other = again.plan(budget)
        assert (other.seconds, other.placements, [part.tile for part in other.segments]) == (
            plan.seconds, plan.placements, [part.tile for part in plan.segments],
        )  # fmt: skip


def everything(planner: Planner, room: float) -> float:
    """The least predicted seconds over all sets of boundaries, placements and tiles."""
    pool = candidates(planner.graph)
    best = float("inf")
    for count in range(len(pool) + 1):
        for chosen in combinations(pool, count):
            for cutting in planner.cuttings.of(frozenset(chosen)):
                for places in product(
                    (Placement.HOST, Placement.DISK), repeat=count
                ):  # there is no device: it would be free
                    best = min(best, fastest(cutting, dict(zip(chosen, places, strict=True)), room))
    return best


def fastest(cutting: Cutting, places: dict[Any, Placement], room: float) -> float:
    """By trying each tile of each segment by itself, every tile of its grid looked at."""
    held = cutting.held([ref for ref, place in places.items() if place is Placement.HOST])
    seconds = cutting.away_seconds(places)
    for k, piece in enumerate(cutting.pieces):
        fitting = []
        for option in piece.fine:
            piece.settle(option.tile)
            ahead, back = piece.needs(option.tile)
            peaks = [held.backward[k] + back] + ([] if piece.fused else [held.forward[k] + ahead])
            if max(peaks) + cutting.leftover <= room:
                fitting.append(option.seconds)
        seconds += min(fitting, default=float("inf"))
    return seconds


class Small(torch.nn.Module):
    """Five convolutions, one strided, with a norm and a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.a, self.norm = torch.nn.Conv2d(1, c, 5, padding=2), torch.nn.InstanceNorm2d(c)
        self.b, self.c = torch.nn.Conv2d(c, 2 * c, 3, 2, 1), torch.nn.Conv2d(2 * c, 2 * c, 3, padding=4, dilation=4)
        self.d, self.e = torch.nn.ConvTranspose2d(2 * c, c, 2, 2), torch.nn.Conv2d(2 * c, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = torch.relu(self.norm(self.a(x)))
        y = torch.relu(self.d(torch.relu(self.c(torch.relu(self.b(skip))))))
        found: torch.Tensor = self.e(torch.cat([skip, y], 1))
        return found


@pytest.mark.parametrize(("channels", "more"), [(2, 64 << 20), (16, 1 << 20), (16, 512 << 20), (24, 1 << 20)])
def test_the_search_comes_close_to_brute_force(channels: int, more: int) -> None:
    image = torch.zeros(()).expand(1, 1, 1024, 1536)
    planner = Planner(graph_of(Small(channels), mean_square, image), Request(None, 1 << 20, True, 2))
    budget = planner.smallest() + more
    found = planner.plan(budget).seconds - planner.request.rates.step
    best = everything(planner, budget - planner.request.reserved - planner.always)
    assert best <= found <= FACTOR * best


def test_a_planner_gives_what_planning_anew_gives() -> None:
    plan = wg.plan(unet4492(seed=0), LOSSES["bce"], blank(3, 4000, 16000), blank(1, 4000, 16000), budget="3GiB")
    planner = Planner(plan.graph, Request(None, plan.reserved, True, plan.workers))
    plans = [made(planner, plan.reserved + (n << 20)) for n in (50, 100, 200, 400, 800, 1600, 3200)]
    seconds = [plan.seconds for plan in plans if plan is not None]
    assert len(seconds) >= 5 and seconds == sorted(seconds, reverse=True)
    for each in plans:
        if each is not None:
            check_plan(each)


class Pyramid(torch.nn.Module):
    """Three levels of convolutions with norms, down and up again, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3, 2, 1) for a, b in ((1, 16), (16, 32), (32, 64)))
        self.same = torch.nn.ModuleList(torch.nn.Conv2d(c, c, 3, 1, 1) for c in (16, 32, 64))
        self.up = torch.nn.ModuleList(torch.nn.ConvTranspose2d(a, b, 2, 2) for a, b in ((64, 32), (64, 16), (32, 1)))
        self.norm = torch.nn.functional.instance_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for down, same in zip(self.down, self.same, strict=True):
            x = torch.relu(self.norm(same(torch.relu(self.norm(down(x))))))
            skips.append(x)
        for k, up in enumerate(self.up):
            x = torch.relu(self.norm(up(x if k == 0 else torch.cat([x, skips[2 - k]], 1))))
        return x


def test_a_plan_without_a_budget_before_changes_none_after() -> None:
    graph = graph_of(Pyramid(), mean_square, torch.zeros(()).expand(1, 1, 2048, 2048))
    request = Request(None, 1 << 20, True, 2)
    first, other = Planner(graph, request), Planner(graph, request)
    budgets = [int(more * first.smallest()) for more in (1.2, 1.7, 2.4, 3.4)]
    straight = [first.plan(budget) for budget in budgets]
    mixed = []
    for budget in budgets:
        other.plan(None)
        mixed.append(other.plan(budget))
    assert [(plan.seconds, plan.placements) for plan in mixed] == [(plan.seconds, plan.placements) for plan in straight]
    assert other.plan(None).seconds <= first.plan(1 << 45).seconds


def test_the_search_for_all_budgets_comes_close_to_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(Pyramid(), mean_square, torch.zeros(()).expand(1, 1, 4096, 4096))
    request = Request(None, 1 << 20, True, 2, placement=Placement.HOST)
    planner = Planner(graph, request)
    for more in (1.2, 1.5, 2.0, 2.5, 3.2, 4.0, 5.0):
        budget = int(more * planner.smallest())
        found = planner.plan(budget).seconds
        with monkeypatch.context() as patch:
            patch.setattr(search, "LADDER", (budget - request.reserved - planner.always,))
            assert found <= 1.2 * Planner(graph, request).plan(budget).seconds, more


@pytest.fixture(scope="module")
def sound() -> Plan:
    net = unet4492(seed=0)
    return wg.plan(net, LOSSES["bce"], blank(3, 300, 500), blank(1, 300, 500), boundaries=["down1"], tile=(64, 80))


def broken(plan: Plan, which: int, axis: str, **changes: Any) -> Plan:
    """The plan with the tiles of one segment changed along one axis."""
    grid = plan.grid(which)
    grids = {i: plan.grid(i) for i in range(len(plan.segments))}
    grids[which] = replace(grid, **{axis: replace(getattr(grid, axis), **changes)})
    return replace(plan, _grids=grids)


def test_the_check_finds_each_broken_rule(sound: Plan) -> None:
    check_plan(sound)
    last = len(sound.segments) - 1
    rows, cols = sound.grid(last).rows, sound.grid(last).cols
    ref = next(iter(rows.owned[0]))
    twice = ({**rows.owned[0], ref: Interval(0, rows.owned[0][ref].hi + 1)}, *rows.owned[1:])
    with pytest.raises(PlanError, match="rule 1: tiles do not own every element"):
        check_plan(broken(sound, last, "rows", owned=twice))
    with pytest.raises(PlanError, match="rule 1"):
        check_plan(broken(sound, last, "cols", owned=cols.owned[1:], spans=cols.spans[1:], count=cols.count - 1))
    image = sound.graph.image.index
    past = ({**cols.spans[0], image: Interval(-1, cols.spans[0][image].hi)}, *cols.spans[1:])
    with pytest.raises(PlanError, match="rule 2: a tile reaches past a map's end"):
        check_plan(broken(sound, last, "cols", spans=past))
    with pytest.raises(PlanError, match=r"rule 1: reads .*no earlier segment made"):
        check_plan(replace(sound, segments=sound.segments[::-1], _grids={}))
    with pytest.raises(PlanError, match="rule 1: no segment makes"):
        check_plan(replace(sound, segments=sound.segments[:-1]))
    with pytest.raises(PlanError, match="rule 7: projects"):
        check_plan(replace(sound, budget=sound.projected - 1))


def test_the_check_finds_a_tensor_past_the_limit() -> None:
    huge = wg.plan(unet4492(seed=0), LOSSES["bce"], blank(3, 65536, 65536), blank(1, 65536, 65536), budget="9000GiB")
    planner = Planner(huge.graph, Request(None, huge.reserved, True, tile=(65536, 65536)))
    check_plan(huge)
    with pytest.raises(PlanError, match=r"2\*\*31 elements"):
        check_plan(planner.plan(None))

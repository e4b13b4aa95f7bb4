"""Plans: tiles partition every map (rule 1), budgets are kept or refused (rule 7), nothing is gigantic (rule 8)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wholegrad as wg
from wholegrad.commands.common import blank
from wholegrad.errors import BudgetError, PlanError
from wholegrad.graph.graph import Kind
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan.plan import Plan, parse_bytes, show_bytes

GIGAPIXEL = (16000, 64000)


@pytest.fixture(autouse=True)
def _a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets count this process's own memory, which depends on the tests that ran before."""
    monkeypatch.setattr("wholegrad.run.process.resident", lambda: 320 << 20)
    monkeypatch.setattr("wholegrad.run.process.has_run", lambda: False)


def plan_for(size: tuple[int, int], loss: str = "bce", **fixed: Any) -> Plan:
    return wg.plan(unet4492(seed=0), LOSSES[loss], blank(3, *size), blank(1, *size), **fixed)


def check(plan: Plan) -> None:
    """What must hold of every plan."""
    graph = plan.graph
    made = [ref for part in plan.segments for ref in part.segment.outputs]
    assert sorted(made) == sorted(plan.boundaries), "each boundary is made by exactly one segment"
    summed = [index for part in plan.segments for index in part.segment.reductions]
    assert sorted(summed) == [node.index for node in graph.of_kind(Kind.REDUCTION)]
    known = {node.index for node in graph.of_kind(Kind.IMAGE, Kind.TARGET)}
    for i, part in enumerate(plan.segments):
        assert all(ref.node in known for ref in part.segment.maps), "a segment reads what earlier ones left"
        known |= {ref.node for ref in part.segment.outputs}
        for ref in part.segment.owned(graph):
            spec = graph.spec(ref)
            times = np.zeros((spec.rows, spec.cols), np.uint8)
            for tile in plan.grid(i):
                if ref in tile.owned:
                    rows, cols = tile.owned[ref].slices()
                    times[rows, cols] += 1
                    assert tile.boxes[ref.node].holds(tile.owned[ref])
            assert (times == 1).all(), "every element belongs to exactly one tile"
        for tile in plan.grid(i):
            for index, box in tile.boxes.items():
                spec = graph.nodes[index].outputs[0]
                assert 0 <= box.y0 < box.y1 <= spec.rows and 0 <= box.x0 < box.x1 <= spec.cols
                assert box.area * spec.pixel_bytes // spec.dtype.itemsize < 2**31
    if plan.budget is not None:
        assert plan.projected <= plan.budget
    assert plan.memory.total == plan.projected, "the parts are all there is"


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 100), st.integers(1, 100)),
    st.sampled_from(sorted(LOSSES)),
    st.none() | st.lists(st.sampled_from(["down1", "down2", "middle", "up2", "fuse2", "up1", "fuse1", "head"])),
)
def test_tiles_partition_every_map(
    size: tuple[int, int], tile: tuple[int, int], loss: str, boundaries: list[str] | None
) -> None:
    tile = (max(tile[0], size[0] // 8 + 1), max(tile[1], size[1] // 8 + 1))
    check(plan_for(size, loss, tile=tile, boundaries=boundaries))


@pytest.mark.parametrize("budget", ["0.75GiB", "1.5GiB", "4GiB"])
def test_a_gigapixel_plan_fits_its_budget_and_says_what_whole_image_training_would_need(budget: str) -> None:
    plan = plan_for(GIGAPIXEL, budget=budget)
    assert plan.projected <= parse_bytes(budget)
    assert 100e9 < plan.whole_image < 140e9  # the paper reports over 100 GB
    assert 1 <= plan.recompute < 1.5
    text = str(plan)
    assert "projected peak" in text and show_bytes(plan.whole_image) in text and "one pass" in text


def test_a_larger_budget_is_never_slower() -> None:
    seconds = [plan_for(GIGAPIXEL, budget=budget).seconds for budget in ("0.7GiB", "1GiB", "2GiB", "8GiB")]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("loss", ["bce", "dice"])
def test_a_budget_too_small_is_refused_with_the_smallest_that_would_do(loss: str) -> None:
    with pytest.raises(BudgetError, match="too small for an image of 1 x 3 x 16000 x 64000; the smallest") as caught:
        plan_for(GIGAPIXEL, loss, budget="100MiB")
    smallest = caught.value.smallest
    assert smallest is not None and 100 << 20 < smallest < 1 << 30
    assert plan_for(GIGAPIXEL, loss, budget=smallest + (8 << 20)).projected <= smallest + (8 << 20)


def test_images_past_torchs_element_limit_are_planned_in_tiles_that_stay_under_it() -> None:
    plan = plan_for((65536, 65536), budget="64GiB")
    for i, part in enumerate(plan.segments):
        tiles = plan.grid(i)
        for index in part.segment.nodes:
            area = tiles.rows.largest[index] * tiles.cols.largest[index]
            assert area * plan.graph.nodes[index].outputs[0].pixel_bytes < 2**31
    with pytest.raises(PlanError, match=r"2\*\*31 elements"):
        plan_for((65536, 65536), budget="9000GiB", tile=(65536, 65536))


def test_the_loss_decides_whether_the_last_segment_runs_in_one_pass() -> None:
    fused = {name: plan_for((200, 200), name).segments[-1].fused for name in LOSSES}
    assert fused == {"bce": True, "focal": True, "dice": False, "bce+dice": False}


@pytest.mark.parametrize("size", [(1, 33), (1, 5000), (5000, 1), (1, 1)])
def test_a_map_of_one_row_is_planned_however_wide(size: tuple[int, int]) -> None:
    model = torch.nn.Conv2d(3, 2, 3, padding=1)
    check(wg.plan(model, lambda y, t: y.mean(), torch.zeros(()).expand(3, *size), None))


def test_what_is_fixed_is_obeyed_and_what_is_unknown_is_refused() -> None:
    plan = plan_for((200, 300), tile=(64, 80), boundaries=["middle", "down1"], placement="disk")
    assert {part.tile for part in plan.segments} == {(64, 80)}
    assert len(plan.boundaries) == 2 and set(plan.placements.values()) == {"disk"}
    with pytest.raises(PlanError, match=r"boundary 'nothing'.*choose from: .*down1"):
        plan_for((200, 300), boundaries=["nothing"])
    with pytest.raises(PlanError, match="placement: 'moon' is unknown"):
        plan_for((200, 300), placement="moon")
    with pytest.raises(PlanError, match="tile"):
        plan_for((200, 300), tile=(0, 5))


@pytest.mark.parametrize(("text", "count"), [("1.5GiB", 3 << 29), ("800 MB", 800_000_000), (12345, 12345)])
def test_budgets_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["12", "GiB", "-1GiB", "much", 0, ""])
def test_budgets_that_cannot_be_read_are_refused(text: str | int) -> None:
    with pytest.raises(PlanError, match="budget"):
        plan_for((64, 64), budget=text)


def test_a_plan_belongs_to_its_shape_metrics_and_mode() -> None:
    model, loss = unet4492(seed=0), LOSSES["bce"]
    image, labels = torch.rand(3, 40, 48), torch.ones(1, 40, 48, dtype=torch.uint8)
    plan = wg.plan(model, loss, image, labels)
    with pytest.raises(PlanError, match="was made for an image of"):
        wg.backward(model, loss, image[:, :, :32], labels[:, :, :32], plan=plan)
    with pytest.raises(PlanError, match="metrics"):
        wg.backward(model, loss, image, labels, plan=plan, metrics={"n": lambda o, t: o.sum()})
    with pytest.raises(PlanError, match="mode"):
        wg.backward(model.eval(), loss, image, labels, plan=plan)


def test_a_plan_as_json_has_every_decision() -> None:
    plan = plan_for((400, 600), tile=(128, 160), boundaries=["middle", "down1"], placement="disk")
    found = json.loads(plan.to_json())
    assert [part["makes"] for part in found["segments"] if part["makes"]] == [["down1"], ["middle"]]
    assert {each["map"]: (each["placement"], each["bytes"]) for each in found["boundaries"]} == {
        plan.graph.nodes[ref.node].path: ("disk", plan.stored_bytes(ref)) for ref in plan.placements
    }
    assert [part["tiles"] for part in found["segments"]] == [part.tiles for part in plan.segments]
    assert found["seconds"] == plan.seconds and found["projected"] == plan.projected
    text = str(plan)
    assert "predicted" in text and "down1" in text.split("boundary", 1)[1] and "disk" in text


def test_an_image_that_nobody_has_is_planned_in_moments() -> None:
    found = plan_for((100_000, 150_000), budget="4GiB")
    assert found.projected <= 4 << 30 and found.tiles > 1000 and found.whole_image > 1e12

"""Blocks of memory serve maps of their size again, and go back to the system by so many bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from wholegrad.graph.graph import Ref
from wholegrad.plan.plan import Placement, Plan
from wholegrad.run import process
from wholegrad.run.blocks import Blocks, drop_all, left_by
from wholegrad.run.boundaries import Boundaries
from wholegrad.run.device import Device
from wholegrad.run.heap import Heap
from wholegrad.run.spill import Spill


def given_back(blocks: Blocks, *sizes: int) -> list[int]:
    """Take blocks of these sizes, give them all back; their addresses."""
    taken = [blocks.take(size, zero=False) for size in sizes]
    for block in taken:
        blocks.give(block.fill_(7))
    return [block.data_ptr() for block in taken]


def test_a_block_serves_the_next_map_of_its_size_and_no_other() -> None:
    blocks = Blocks()
    large, small = given_back(blocks, 3 << 20, 1 << 20)
    other = blocks.take(2 << 20, zero=False)
    assert other.data_ptr() not in (large, small) and not other.any()
    again = blocks.take(3 << 20, zero=True)
    assert again.data_ptr() == large and not again.any()
    assert (blocks.take(1 << 20, zero=False) == 7).all()


def test_what_is_missing_counts_each_free_block_once() -> None:
    blocks = Blocks()
    given_back(blocks, 5, 5, 9)
    assert blocks.missing([5, 5, 9]) == 0
    assert blocks.missing([5, 5, 5, 9, 7]) == 12


def test_wanted_blocks_do_not_go() -> None:
    blocks = Blocks()
    given_back(blocks, 5, 9, 5, 9)
    blocks.shrink(0, [])
    assert blocks.missing([5, 9, 5, 9]) == 0
    blocks.shrink(1, [9, 5])  # one of each is not wanted
    assert blocks.missing([9, 5]) == 0 and blocks.missing([9, 5, 9, 5]) in (5, 9)
    blocks.shrink(1 << 30, [9, 5])
    assert blocks.missing([9, 5]) == 0 and blocks.missing([9, 5, 9, 5]) == 14
    blocks.shrink(1 << 30, [])
    assert blocks.missing([9]) == 9


def test_all_together_stay_below_what_the_plan_has() -> None:
    blocks = Blocks()
    blocks.most = 30
    given_back(blocks, 10, 20)
    used = blocks.take(4, zero=False)  # takes the place of the last one
    assert blocks.missing([10]) == 0 and blocks.missing([20]) == 20
    blocks.take(16, zero=False)
    assert blocks.missing([10]) == 0
    blocks.take(1, zero=False)
    assert blocks.missing([10]) == 10
    blocks.give(used)
    assert blocks.missing([4]) == 0


class Crowded:
    """A step's boundaries in a process of so many bytes, of which the heap gives ``heap`` back when asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: int, heap: int, keeps: bool = True) -> None:
        self.held, self.heap, self.asked = held, heap, 0
        self.kept = object.__new__(Boundaries)
        self.kept.plan = cast(
            Plan, SimpleNamespace(host_peak=1000, placements={Ref(0): Placement.HOST}, keeps_heap=keeps)
        )
        self.kept.device = cast(Device, SimpleNamespace(apart=False))
        self.kept.spill, self.kept._beside, self.kept.blocks, self.kept.heap = None, 50, Blocks(), Heap()
        monkeypatch.setattr(process, "release_memory", self.release)
        monkeypatch.setattr(process, "times_given_back", lambda: self.asked)
        monkeypatch.setattr(process, "resident", lambda: self.held + self.kept.blocks._free_bytes())

    def release(self) -> None:
        self.asked, self.held, self.heap = self.asked + 1, self.held - self.heap, 0


def test_with_room_nothing_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Crowded(monkeypatch, held=400, heap=200)
    given_back(step.kept.blocks, 40, 60)
    step.kept.make_room(200, {Ref(0): 100})  # 500 held, 100 new, 200 of tiles, 50 beside, 100 to spare
    assert step.asked == 0 and step.kept.blocks.missing([40, 60]) == 0


def test_the_heap_gives_back_before_blocks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Crowded(monkeypatch, held=600, heap=400)
    given_back(step.kept.blocks, 40, 60)
    step.kept.make_room(200, {Ref(0): 100})
    assert step.asked == 1 and step.kept.blocks.missing([40, 60]) == 0


def test_then_go_blocks_that_nobody_wants_and_no_more_than_must(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Crowded(monkeypatch, held=600, heap=0)
    given_back(step.kept.blocks, 40, 60, 80)
    step.kept.make_room(200, {Ref(0): 60})  # 780 where 750 may be, and half of what tiles take to spare
    assert step.asked == 1
    assert step.kept.blocks.missing([60]) == 0 and step.kept.blocks.missing([40, 80]) == 120
    step = Crowded(monkeypatch, held=500, heap=0)
    given_back(step.kept.blocks, 40, 60, 80)
    step.kept.make_room(200, {Ref(0): 60})  # 680: there is room, but 30 less to spare
    assert step.asked == 0 and step.kept.blocks.missing([40, 60, 80]) == 40


def test_what_is_beside_and_the_spill_pool_count(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Crowded(monkeypatch, held=600, heap=100)
    step.kept.make_room(300, {})
    assert step.asked == 0  # 600 + 300 + 50 of 1000
    step = Crowded(monkeypatch, held=600, heap=100)
    step.kept.spill = cast(Spill, SimpleNamespace(limit=80, held=20))
    step.kept.make_room(300, {})
    assert step.asked == 1  # and 60 that the pool may still take


def test_before_tiles_that_find_what_others_left_nothing_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Crowded(monkeypatch, held=400, heap=200)
    step.kept.make_room(200, {})
    step.kept.make_room(300, {})
    assert step.asked == 0
    step.held += 300  # what the tiles left
    step.kept.make_room(300, {})
    step.kept.make_room(200, {})  # as much, or less
    step.kept.make_room(450, {})  # 150 beside
    assert step.asked == 0
    step.kept.make_room(250 + 450 + 1, {})
    assert step.asked == 1
    step.kept.make_room(250, {})
    step.held += 300
    step.kept.heap = Heap()  # of another plan
    step.kept.make_room(250, {})
    assert step.asked == 2


def test_tiles_of_many_segments_find_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Crowded(monkeypatch, held=400, heap=200, keeps=False)
    step.kept.make_room(300, {})
    step.held += 300
    step.kept.make_room(300, {})
    assert step.asked == 1


def test_what_went_back_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Crowded(monkeypatch, held=700, heap=0)
    step.kept.make_room(200, {})
    process.release_memory()
    step.kept.make_room(300, {})
    assert step.asked == 2


def test_nor_do_blocks_that_fitted_beside_what_such_a_sweep_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Crowded(monkeypatch, held=400, heap=0)
    given_back(step.kept.blocks, 60, 40)
    step.kept.make_room(200, {Ref(0): 60})
    step.held += 200  # what its tiles left
    step.kept.make_room(200, {Ref(0): 60})
    assert step.asked == 0 and step.kept.blocks.missing([60, 40]) == 0
    step.held += 260  # beside what tiles use again: 960, blocks among them, where 950 may be
    step.kept.make_room(200, {Ref(0): 60})
    assert step.asked == 1 and step.kept.blocks.missing([60]) == 0 < step.kept.blocks.missing([40])


class Owner:
    """Stands for a plan."""


def test_what_a_plan_left_goes_with_it_and_before_another_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [False]
    gone: list[int] = []

    def let_go() -> None:
        kept[0] = False
        gone.append(1)

    drop_all()
    monkeypatch.setattr(process, "let_go", let_go)
    monkeypatch.setattr(process, "keeps", lambda: kept[0])
    first, second = Owner(), Owner()
    heap = left_by(first)[1]
    kept[0] = True  # as after a step
    assert left_by(first)[1] is heap and not gone
    assert left_by(second)[1] is not heap and len(gone) == 1
    kept[0] = True
    del first
    assert len(gone) == 1, "a plan that left nothing any more"
    del second
    assert len(gone) == 2
    drop_all()
    assert len(gone) == 2, "nothing is kept"
    kept[0] = True  # after a step in the middle of which another plan was made
    left_by(Owner())
    assert len(gone) == 3

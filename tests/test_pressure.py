"""Budgets that follow what is free: the arithmetic, a run whose memory others take, and that it stays exact."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import wholegrad as wg
from wholegrad.errors import BudgetError
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.run import pressure, process
from wholegrad.run.budget import Automatic
from wholegrad.run.pressure import PATIENCE, STEP, Governor, Look
from wholegrad.train.config import load_config
from wholegrad.train.events import Watch
from wholegrad.train.loop import train

MIB, GIB = 1 << 20, 1 << 30


class Machine:
    """A probe whose answer a test sets."""

    def __init__(self, held: int, free: int, stalled: float = 0.0) -> None:
        self.now = Look(held, free, stalled)

    def __call__(self) -> Look:
        return self.now


def test_a_budget_falls_at_once_and_rises_with_patience() -> None:
    machine = Machine(400 * MIB, 8 * GIB)
    governor = Governor(5 * GIB, machine)
    assert governor.changed() is None
    machine.now = Look(400 * MIB, 2 * GIB)
    assert governor.changed() == machine.now
    small = governor.budget
    assert small == machine.now.safe < 400 * MIB + 2 * GIB and small % STEP == 0
    assert governor.changed() is None, "the same again is no change"
    machine.now = Look(400 * MIB, 6 * GIB)
    assert [governor.changed() is None for _ in range(PATIENCE)] == [True] * (PATIENCE - 1) + [False]
    assert governor.budget == machine.now.safe > small
    machine.now = Look(400 * MIB, 80 * GIB)
    assert [governor.changed() is None for _ in range(2 * PATIENCE)].count(False) == 1
    assert governor.budget == 5 * GIB, "no more than at first"


def test_memory_that_comes_and_goes_changes_nothing_twice() -> None:
    machine = Machine(400 * MIB, 2 * GIB)
    governor = Governor(5 * GIB, machine)
    assert governor.changed() is not None
    for i in range(8):  # free again, but never for long
        machine.now = Look(400 * MIB, (8 if i % 2 else 2) * GIB)
        assert governor.changed() is None


def test_what_the_next_step_needs_counts_not_the_whole_budget() -> None:
    machine = Machine(400 * MIB, 2 * GIB)
    governor = Governor(5 * GIB, machine)
    assert governor.changed(peak=GIB) is None
    assert not governor.squeezed(GIB)
    assert governor.squeezed(3 * GIB)


def test_waiting_for_memory_is_pressure(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_text("some avg10=23.50 avg60=1.00 avg300=0.00 total=5\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    assert pressure.stalled(path) == 23.5
    assert pressure.stalled(tmp_path / "none") == 0.0
    machine = Machine(400 * MIB, 4 * GIB, stalled=23.5)
    governor = Governor(4 * GIB, machine)
    assert governor.changed(peak=GIB) is not None and governor.budget == machine.now.safe


def test_calls_in_a_row_get_the_same_automatic_budget() -> None:
    machine = Machine(400 * MIB, 4 * GIB)
    automatic = Automatic(machine)
    first = automatic.budget()
    for free in (3.9, 3.6, 4.2):
        machine.now = Look(420 * MIB, int(free * GIB))
        assert automatic.budget() == first
    machine.now = Look(420 * MIB, GIB)
    assert 420 * MIB < automatic.budget() <= 420 * MIB + GIB
    machine.now = Look(420 * MIB, 4 * GIB)
    assert automatic.budget() >= first


def test_a_look_at_this_machine_is_cheap_and_sane() -> None:
    seen = pressure.look()
    assert seen.held > 0 and seen.free >= 0 and 0 <= seen.stalled <= 100
    assert seen.fits(seen.held) and not seen.fits(seen.held + seen.free)


def test_the_smallest_budget_that_is_named_does(tmp_path: Path) -> None:
    image = np.broadcast_to(np.uint8(7), (3, 2000, 4000))
    model = unet4492(seed=0)
    with pytest.raises(BudgetError, match="the smallest that would do is") as refused:
        wg.plan(model, LOSSES["bce"], image, image[:1], budget="60MiB")
    assert refused.value.smallest is not None and "\n" not in str(refused.value)
    plan = wg.plan(model, LOSSES["bce"], image, image[:1], budget=refused.value.smallest)
    assert plan.projected <= refused.value.smallest
    assert torch.isfinite(wg.backward(model, LOSSES["bce"], image, image[:1], plan=plan))


CONFIG = """
[data]
train = ["a"]
[train]
steps = 6
{budget}
panels = false
out = "out"
"""


def run(
    folder: Path, budget: str, after: Callable[[int], None] = lambda step: None
) -> tuple[list[dict[str, float]], list[str], list[wg.Plan]]:
    """The log, the notes and the plans of a run; ``after`` is called after each step."""
    (folder / "run.toml").write_text(CONFIG.format(budget=budget))
    notes: list[str] = []
    plans: list[wg.Plan] = []
    watch = Watch(
        on_note=notes.append, on_plan=lambda name, plan: plans.append(plan), on_step=lambda event: after(event.step)
    )
    train(load_config(folder / "run.toml"), watch)
    return [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()], notes, plans


@pytest.fixture
def eaten(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Makes the machine seem to have so many bytes free."""

    def set_free(free: Callable[[], int]) -> None:
        def look() -> Look:
            return Look(pressure.process.resident(), free())

        monkeypatch.setattr(pressure.Governor.__init__, "__defaults__", (look,))
        monkeypatch.setattr("wholegrad.run.budget._automatic", Automatic(look))

    return set_free


def test_a_run_whose_memory_others_take_goes_on_by_smaller_plans(
    tmp_path: Path,
    write_case: Callable[..., None],
    eaten: Callable[[Callable[[], int]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wholegrad.train.plans.LOOK_EVERY", float("inf"))  # only between steps
    write_case(tmp_path, "a", size=(700, 900))
    free = 4 * GIB
    eaten(lambda: free)
    for name in ("first", "calm"):  # what stays of the first, libraries and pieces of heap, is not the second's need
        calm, notes, plans = run(tmp_path, "")
        assert [line["kind"] for line in calm] == ["step"] * 6 and not notes and len(plans) == 1
        (tmp_path / "out").rename(tmp_path / name)
        gc.collect()
        process.release_memory()

    need = plans[0].projected - pressure.look().held
    assert need > 8 * MIB, "else nothing could squeeze it"

    def others(step: int) -> None:
        nonlocal free
        free = need // 4 if step == 1 else 4 * GIB

    log, notes, plans = run(tmp_path, 'budget = "auto"', others)
    kinds = [line["kind"] for line in log]
    assert kinds.count("replan") == 2 and kinds.count("step") == 6
    down, up = (line for line in log if line["kind"] == "replan")
    assert down["budget"] < down["before"] and up["budget"] > up["before"]
    assert "other processes took memory" in notes[0] and "memory is free again" in notes[1]
    assert len(plans) == 3 and plans[1].budget < plans[0].budget
    losses = [[line["loss"] for line in each if line["kind"] == "step"] for each in (calm, log)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_fixed_budget_is_kept_whatever_others_take(
    tmp_path: Path, write_case: Callable[..., None], eaten: Callable[[Callable[[], int]], None]
) -> None:
    write_case(tmp_path, "a")
    eaten(lambda: 0)
    log, notes, plans = run(tmp_path, 'budget = "3GiB"')
    assert [line["kind"] for line in log] == ["step"] * 6 and not notes and len(plans) == 1


def test_a_step_that_is_squeezed_is_given_up_and_taken_again(
    tmp_path: Path,
    write_case: Callable[..., None],
    eaten: Callable[[Callable[[], int]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_case(tmp_path, "a")
    monkeypatch.setattr("wholegrad.train.plans.LOOK_EVERY", 0.0)
    eaten(lambda: 4 * GIB)
    calm, _, _ = run(tmp_path, "")
    (tmp_path / "out").rename(tmp_path / "calm")
    given_up = []
    squeezed = Governor.squeezed

    def once(self: Governor, peak: int) -> bool:
        found = not given_up or squeezed(self, peak)
        given_up.append(peak)
        return found

    monkeypatch.setattr(Governor, "squeezed", once)
    log, _, _ = run(tmp_path, "")
    assert len(given_up) > 6
    losses = [[line["loss"] for line in each if line["kind"] == "step"] for each in (calm, log)]
    assert losses[0] == losses[1], "nothing of the step that was given up is left"


def test_free_memory_goes_back_near_the_projected_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, released = iter([GIB // 2, GIB, GIB]), []
    monkeypatch.setattr("wholegrad.run.process.resident", lambda: next(sizes))
    monkeypatch.setattr("wholegrad.run.process.release_memory", lambda: released.append(1))
    monkeypatch.setattr("wholegrad.run.process.LOOK_EVERY", 0.0)
    ceiling = process.Ceiling(GIB + MIB)
    ceiling.look()
    assert not released
    for _ in range(3):  # looked at once, then not for a while
        ceiling.look()
    assert released == [1]

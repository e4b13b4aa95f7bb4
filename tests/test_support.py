"""docs/support.md claims only what is measured here."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import wholegrad as wg
from support_cases import REFUSED, Refusal, named_cases, refused_model
from support_page import (
    BFLOAT16,
    LOSSES,
    PAGE,
    Found,
    autocast_errors,
    autocast_networks,
    bounds,
    could_hold,
    double_errors,
    exercised,
    own_prose,
    page,
    prose,
    recorded,
    recorded_autocast,
    write,
    zoo,
    zoo_losses,
)
from wholegrad import errors
from wholegrad.commands.common import blank
from wholegrad.graph.rules import registered
from wholegrad.graph.rules.reduction import GATHER
from wholegrad.verify import EXACT

pytestmark = [
    pytest.mark.filterwarnings("ignore:TF32 acceleration"),
    pytest.mark.filterwarnings("ignore:.*reduce argument of torch.scatter"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
aten = torch.ops.aten
COMPOSITE = "PyTorch takes it apart before the capture sees it"
READ_THROUGH = "the capture reads through it"
HELD_WHOLE = {
    f"Without locality (on maps held whole): {name}"
    for name in (
        "multi-head attention over pooled pixels", "flatten and linear", "pool, flatten and linear",
        "attention over all pixels", "attention within windows", "mean of a row", "softmax along a row",
        "cumulative sum along columns", "sampling by a grid", "a Fourier filter", "the best pixel",
        "bilinear with antialiasing", "trilinear", "3-d convolution", "median of everything",
        "logsumexp over the map", "fractions by sorting",
    )
}  # fmt: skip
LOSSES_HELD_WHOLE = {f"{LOSSES}: {name}" for name in ("Lovasz hinge", "Lovasz softmax")}
UNTESTED = {
    aten.chunk.default: COMPOSITE,
    aten.narrow.default: COMPOSITE,
    aten.repeat_interleave.self_int: COMPOSITE,
    aten.reshape.default: COMPOSITE,
    aten.where.Scalar: COMPOSITE,
    aten.where.ScalarOther: COMPOSITE,
    aten.where.ScalarSelf: COMPOSITE,
    aten._fused_rms_norm.default: COMPOSITE,
    aten.alias.default: READ_THROUGH,
    aten.lift_fresh_copy.default: READ_THROUGH,
}


@pytest.fixture(scope="session", autouse=True)
def rewritten() -> None:
    """With WHOLEGRAD_WRITE_SUPPORT=1 (``make support``) the page is measured and written before it is checked."""
    if os.environ.get("WHOLEGRAD_WRITE_SUPPORT") == "1":
        write()


@pytest.mark.parametrize("name", named_cases())
def test_every_row_is_exact(name: str) -> None:
    wrong = {tensor: error for tensor, error in double_errors(name).items() if not error <= EXACT}
    assert not wrong, f"relative errors above {EXACT}: {wrong}"


def test_the_page_lists_exactly_these_cases_and_networks() -> None:
    rows = recorded(PAGE.read_text())
    losses = [f"{LOSSES}: {entry.name}" for entry in zoo_losses()]
    networks = [f"Networks: {entry.name}" for entry in zoo()]
    assert list(rows) == [*named_cases(), *losses, *networks], "run `make support`"
    assert list(recorded_autocast(PAGE.read_text())) == list(autocast_networks()), "run `make support`"


def test_every_error_on_the_page_is_within_its_claim() -> None:
    for row in recorded(PAGE.read_text()).values():
        assert could_hold(row), row
    for name, (ours, own) in recorded_autocast(PAGE.read_text()).items():
        assert bounds(ours)[0] <= 2 * max(bounds(own)[1], BFLOAT16), name


@pytest.mark.parametrize(
    ("shown", "least", "most"), [(3e-7, 2.5e-7, 3.5e-7), (1e-6, 0.95e-6, 1.5e-6), (9e-15, 8.5e-15, 9.5e-15)]
)
def test_what_one_digit_leaves_open(shown: float, least: float, most: float) -> None:
    assert bounds(shown) == pytest.approx((least, most), rel=1e-9, abs=0)
    for inside in (least * (1 + 1e-9), most * (1 - 1e-9)):
        assert f"{inside:.0e}" == f"{shown:.0e}"
    for outside in (least * (1 - 1e-9), most * (1 + 1e-9)):
        assert f"{outside:.0e}" != f"{shown:.0e}"


def test_an_error_that_no_rounding_excuses_is_noticed() -> None:
    assert could_hold(Found("", "", 1e-12, 7e-6, 3e-6)) and not could_hold(Found("", "", 1e-12, 8e-6, 3e-6))
    assert could_hold(Found("", "", 1e-12, 2e-6, 1e-9)) and not could_hold(Found("", "", 1e-12, 3e-6, 1e-9))
    assert not could_hold(Found("", "", 2e-12, 1e-9, 1e-9))


@pytest.mark.parametrize("name", autocast_networks())
def test_every_network_under_autocast_is_as_good_as_whole_image_autocast(name: str) -> None:
    ours, own = autocast_errors(name)
    assert ours <= 2 * max(own, BFLOAT16)


def test_the_page_says_what_its_generator_says() -> None:
    assert prose(PAGE.read_text()) == own_prose(PAGE.read_text()), "run `make support`"


def test_a_page_reads_back_as_it_was_written() -> None:
    rows = [Found(f"{group}: x, y", "add, mul", 1e-15, 2e-7, 3e-7) for group in ("Pooling", LOSSES, "Networks")]
    text = page(rows[:1], rows[1:2], rows[2:], {"a network": (2e-3, 3e-3)})
    assert list(recorded(text).values()) == rows and recorded_autocast(text) == {"a network": (2e-3, 3e-3)}
    assert prose(text) == own_prose(text)
    for changed in (
        text.replace("never exceeds", "rarely exceeds"),
        text + "\nAnd more.",
        text.replace("Of what chance", ""),
    ):
        assert prose(changed) != own_prose(changed)


def test_every_rule_occurs_in_a_case() -> None:
    seen = frozenset().union(*(exercised(name) for name in named_cases()))
    missing = {str(op) for op in registered().keys() - seen - UNTESTED.keys()}
    assert not missing, f"add a case to support_cases.py for {sorted(missing)}"
    needless = {str(op) for op in UNTESTED.keys() & seen}
    assert not needless, f"is in a case after all: {sorted(needless)}"


def test_only_what_has_no_locality_is_held_whole() -> None:
    """A rule that is lost still gives exact results, on maps that are far too large."""
    assert {name for name in named_cases() if GATHER in exercised(name)} == HELD_WHOLE


def test_the_page_says_which_are_held_whole() -> None:
    networks = {f"Networks: {entry.name}" for entry in zoo()}
    said = {name for name, row in recorded(PAGE.read_text()).items() if "held whole" in row.ops}
    assert said - networks == HELD_WHOLE | LOSSES_HELD_WHOLE, "run `make support`"


@pytest.mark.parametrize("op", [op for op, reason in UNTESTED.items() if reason is COMPOSITE], ids=str)
def test_what_is_said_to_be_taken_apart_is(op: Any) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.what[:40])
def test_what_the_page_calls_refused_is(case: Refusal) -> None:
    model: nn.Module = refused_model(case)
    image = blank(3, *case.size)
    with pytest.raises(getattr(errors, case.error), match=case.match) as caught:
        wg.plan(model, case.loss, image, budget=case.budget)
        wg.backward(model, case.loss, image)
    assert "\n" not in str(caught.value)
    assert f"| {case.what} | {case.remedy} | `{case.error}` |" in PAGE.read_text(), "run `make support`"

"""docs/support.md claims only what is measured here."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from torch import nn

import wholegrad as wg
from support_cases import REFUSED, Refusal, named_cases, refused_model
from support_page import PAGE, double_errors, exercised, holds, recorded, write, zoo
from wholegrad import errors
from wholegrad.commands.common import blank
from wholegrad.graph.rules import registered
from wholegrad.graph.rules.reduction import GATHER
from wholegrad.verify import EXACT

pytestmark = [
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
    networks = {f"Networks: {entry.name}" for entry in zoo()}
    assert [name for name in rows if name not in networks] == list(named_cases()), "run `make support`"
    assert networks <= set(rows), "run `make support`"


def test_every_error_on_the_page_is_within_its_claim() -> None:
    for row in recorded(PAGE.read_text()).values():
        assert holds(dataclasses.replace(row, single=row.single / 1.2)), row  # one digit is shown


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
    assert said - networks == HELD_WHOLE, "run `make support`"


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

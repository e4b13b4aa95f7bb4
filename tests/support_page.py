"""Measure the cases of ``support_cases`` and the networks of ``zoo``, and write and read docs/support.md."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from support_cases import REFUSED, SupportCase, named_cases
from wholegrad.given import given
from wholegrad.graph.capture import capture
from wholegrad.graph.graph import Graph, Kind
from wholegrad.run.reference import Reference
from wholegrad.verify import EXACT, FLOOR, Case, Row, by_chance, errors

aten = torch.ops.aten
PAGE = Path(__file__).parent.parent / "docs" / "support.md"
SEED = 11
# Tiles of rows and columns; a few columns wide, every boundary the planner's; a few rows high, every boundary on disk.
Plans = tuple[dict[str, Any], ...]
PLANS: Plans = (
    {"tile": (7, 9), "boundaries": []},
    {"tile": (64, 5)},
    {"tile": (5, 64), "placement": "disk"},
)


@dataclass(frozen=True)
class Found:
    """One row: worst relative errors over every tensor and plan.

    Attributes:
        double: of wholegrad in float64 against whole-image autograd in float64.
        single, whole: of wholegrad and of whole-image autograd in float32 against the same.
        wrong: tensors whose float32 error is beyond what rule 5 allows.
    """

    name: str
    ops: str
    double: float
    single: float
    whole: float
    wrong: tuple[str, ...] = ()


def worst(case: Case, wanted: Reference, plans: Plans = PLANS) -> dict[str, float]:
    """Each tensor's worst relative error over the plans."""
    result: dict[str, float] = {}
    for fixed in plans:
        if fixed.get("placement") == "disk":
            found = case.tiled(fixed["tile"], "disk")
        else:
            found = case.run(case.plan(**fixed), fixed["tile"])
        for name, error in errors(found, wanted.tensors).items():
            result[name] = max(result.get(name, 0.0), error)
    return result


def in_dtype(entry: SupportCase, dtype: torch.dtype) -> Case:
    return Case(entry.build(), entry.loss, entry.image(), entry.target(), dtype, SEED)


@cache
def double_errors(name: str) -> dict[str, float]:
    """Errors of one case in float64, measured once."""
    case = in_dtype(named_cases()[name], torch.float64)
    return worst(case, case.reference())


def measured(
    name: str,
    double: Case,
    single: Case,
    shown: str,
    known: dict[str, float] | None = None,
    plans: Plans = PLANS,
    wholes: Callable[[Case], list[Reference]] = lambda case: [case.reference()],
    chance: bool = False,
) -> Found:
    """One row.

    Args:
        known: the float64 errors, if they were measured already.
        wholes: whole-image float32, in one way or several.
        chance: whether a tensor beyond its own claim may be put down to chance.
    """
    wanted = double.reference()
    exact = known or worst(double, wanted, plans)
    ours, whole = worst(single, wanted, plans), [errors(each.tensors, wanted.tensors) for each in wholes(single)]
    own = {tensor: max(each[tensor] for each in whole) for tensor in ours}
    rows = [Row(tensor, exact[tensor], ours[tensor], own[tensor]) for tensor in ours]
    wrong = () if by_chance(rows) and chance else tuple(row.name for row in rows if not row.ok)
    return Found(name, shown, max(exact.values()), max(ours.values()), max(own.values()), wrong)


def graphs(entry: SupportCase) -> tuple[Graph, Graph]:
    """The graph of the model alone, and with its loss."""
    model = entry.build()
    alone = capture(model, None, given(entry.image(), None, torch.float64).inputs)
    return alone, capture(model, entry.loss, given(entry.image(), entry.target(), torch.float64).inputs)


def by_rule(graph: Graph) -> set[Any]:
    """The overloads that run tile by tile."""
    return {node.op for node in graph.of_kind(Kind.MAP, Kind.REDUCTION)}


@cache
def exercised(name: str) -> frozenset[Any]:
    """The overloads that one case runs tile by tile."""
    return frozenset(by_rule(graphs(named_cases()[name])[1]))


def shown_ops(entry: SupportCase) -> str:
    """The ops that the row is about, as PyTorch names them."""
    alone, joint = graphs(entry)
    mine = by_rule(joint) - by_rule(alone) if entry.group == "Losses" else by_rule(alone)
    mine = (mine - {aten.convolution.default}) or {aten.convolution.default}
    names = {op.name().split("::")[0] + "::" + op._schema.name.split("::")[1] for op in mine}
    words = sorted(name.removeprefix("aten::") for name in names)
    whole = "gather" if "wholegrad::gather" in words else ""
    words = [word for word in words if word != "wholegrad::gather"]
    return ", ".join([*words[:8], *(["..."] if len(words) > 8 else []), *(["held whole"] if whole else [])])


# The page.

HEAD = """# What is exact, measured

Every row below is a small network that contains the op, with convolutions before and after it where it leaves a map, so
that gradients pass through the op to parameters on both sides. wholegrad runs it under three plans: tiles of 7 x 9
pixels in one segment; tiles 5 columns wide with the planner's boundaries; tiles 5 rows high with every boundary that
there could be, on disk. Loss, outputs, every parameter's gradient and every buffer are compared with whole-image
autograd.

- **float64** is the worst relative error of any of these tensors under any of these plans, both sides in float64. The
  claim is that it never exceeds 1e-12.
- **float32** is the same for wholegrad in float32 against the float64 reference; **PyTorch's own** is what whole-image
  autograd in float32 makes of it. The claim, tensor by tensor, is that ours is at most twice PyTorch's own or sixteen
  roundings (1.9e-6), whichever is more.

An error is relative to the tensor's largest element. "held whole" among the ops says that a map was put together in
memory, since some op has no locality. Images are 20 x 26 pixels, so that a tile's halo, the image's border and a slim
last tile all occur.

`make support` measures this page anew and writes it. `tests/test_support.py` measures every float64 error at every test
run, and fails if a row is missing, an error exceeds its claim, or an op with a rule occurs in no row.

Measured with `make support` on {machine}, PyTorch {torch}, {date}.
"""

NETWORKS = """## Networks

Whole networks from public libraries and papers, each with a loss that it is trained with. Plans are alike, with tiles
that suit each network's size; `tests/test_zoo.py` runs them at every test run. PyTorch's own float32 is here the worst
of its kernels (planar and channels last, with and without oneDNN). Of many tensors, on maps this small, a few ratios
are chance: where a ReLU's input is zero but for rounding, one run takes the one slope and the next the other. Of
networks the claim is therefore that either each tensor is off by at most twice its own, or the errors in order are: the
largest at most twice PyTorch's largest, the second largest at most twice its second largest, and so on.
"""

REFUSALS = """## What is refused

Before any pixel is read (or, where only pixels can tell, before any gradient is left) these end in an error of one line
that names the module, the op and the remedy. `tests/test_support.py` provokes each.

| what | what to do | error |
|---|---|---|
"""

TAIL = """
An op that has no rule is not refused: it runs on whole maps where these fit into memory and budget (the rows "held
whole" above). [How to give it a rule](adding-an-op.md) so that it runs tile by tile.

Two things are not compared here. Random ops that are not drawn pixel by pixel (`torch.randperm`, `torch.multinomial` on
small tensors) take their numbers from PyTorch's own generator, once a step, so that no second run can be compared with
the first. And ties: `sort`, `mode` or `argmax` over equal values may pick either, in PyTorch as here.
"""

COLUMNS = "| {} | ops | float64 | float32 | PyTorch's own |\n|---|---|---|---|---|\n"
ROW = re.compile(r"^\| (?P<name>[^|]+?) \| (?P<ops>[^|]*?) \| (?P<double>\S+) \| (?P<single>\S+) \| (?P<whole>\S+) \|$")


def machine() -> str:
    """Cores, memory and kind of this machine, as the page names it."""
    cores = os.cpu_count() or 1
    return f"{cores} cores, {round(psutil.virtual_memory().total / 2**30)} GiB, CPU"


def holds(found: Found) -> bool:
    """Whether a row's worst errors are within the claims."""
    return found.double <= EXACT and found.single <= max(2 * found.whole, FLOOR)


def row(found: Found) -> str:
    name = found.name.partition(": ")[2] or found.name
    return f"| {name} | {found.ops} | {found.double:.0e} | {found.single:.0e} | {found.whole:.0e} |\n"


def table(heading: str, first: str, rows: Iterable[Found]) -> str:
    return f"\n## {heading}\n\n" + COLUMNS.format(first) + "".join(map(row, rows))


def page(found: list[Found], networks: list[Found]) -> str:
    """docs/support.md."""
    text = HEAD.format(machine=machine(), torch=torch.__version__.partition("+")[0], date=date.today().isoformat())
    groups = dict.fromkeys(each.name.partition(": ")[0] for each in found)
    for group in groups:
        text += table(group, "op", (each for each in found if each.name.partition(": ")[0] == group))
    if networks:
        text += "\n" + NETWORKS + "\n" + COLUMNS.format("network") + "".join(map(row, networks))
    text += "\n" + REFUSALS + "".join(f"| {case.what} | {case.remedy} | `{case.error}` |\n" for case in REFUSED)
    return text + TAIL


def recorded(text: str) -> dict[str, Found]:
    """The rows of the page, by group and name."""
    result, group = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            group = line.removeprefix("## ")
        elif (match := ROW.match(line)) and match["double"] not in ("float64", "---"):
            name = f"{group}: {match['name']}"
            numbers = (float(match[key]) for key in ("double", "single", "whole"))
            result[name] = Found(name, match["ops"], *numbers)
    return result


def zoo() -> list[Any]:
    """The networks of tests/zoo_networks.py, if it is there: entries with name, build, loss, image, target and size."""
    return list(import_module("zoo_networks").NETWORKS) if find_spec("zoo_networks") else []


def network_plans(height: int, width: int) -> tuple[dict[str, Any], ...]:
    """Tiles that do not divide the image, slim ones, and every boundary that there could be, on disk."""
    return (
        {"tile": (height // 3 + 2, width // 4 + 3)},
        {"tile": (height // 5 + 1, width)},
        {"tile": (height // 2 + 1, width // 3 + 2), "placement": "disk"},
    )


def network_row(entry: Any) -> Found:
    """One network's row; the calls that it runs tile by tile are counted, not listed."""
    double, single = (
        Case(entry.build(), entry.loss, entry.image(*entry.size), entry.target(*entry.size), dtype, SEED)
        for dtype in (torch.float64, torch.float32)
    )
    nodes = double.plan().graph.of_kind(Kind.MAP, Kind.REDUCTION)
    whole = ", some held whole" if any("gather" in str(node.op) and "whole" in str(node.op) for node in nodes) else ""
    return measured(
        f"Networks: {entry.name}",
        double,
        single,
        f"{len(nodes)} calls{whole}",
        plans=network_plans(*entry.size),
        wholes=import_module("test_zoo").whole_float32,
        chance=True,
    )


def write(say: Callable[[str], None] = print) -> None:
    """Measure everything and write the page.

    Raises:
        AssertionError: a claim does not hold; nothing is written.
    """
    found = []
    for name, entry in named_cases().items():
        double, single = (in_dtype(entry, dtype) for dtype in (torch.float64, torch.float32))
        found.append(measured(name, double, single, shown_ops(entry), double_errors(name)))
        say(row(found[-1]).strip())
    networks = []
    for entry in zoo():
        networks.append(network_row(entry))
        say(row(networks[-1]).strip())
    wrong = [each for each in found if each.wrong]
    wrong += [each for each in (*found, *networks) if not holds(each)]
    assert not wrong, f"not written, since these break a claim: {wrong}"
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(found, networks))

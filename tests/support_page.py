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
from statistics import median
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import wholegrad as wg
from support_cases import REFUSED, SupportCase, named_cases, pixels
from wholegrad.given import given
from wholegrad.graph.capture import capture
from wholegrad.graph.graph import Graph, Kind
from wholegrad.run.reference import Reference
from wholegrad.verify import EXACT, FLOOR, Case, Row, by_chance, errors, random_labels

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


BFLOAT16 = 2.0**-8  # one rounding


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


def plainly(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with the buffers of a wrapped loss named as those of the loss itself."""
    return {name.replace("buffer loss.loss.", "buffer loss."): value for name, value in tensors.items()}


def worst(case: Case, wanted: Reference, plans: Plans = PLANS) -> dict[str, float]:
    """Each tensor's worst relative error over the plans."""
    result: dict[str, float] = {}
    for fixed in plans:
        if fixed.get("placement") == "disk":
            found = case.tiled(fixed["tile"], "disk")
        else:
            found = case.run(case.plan(**fixed), fixed["tile"])
        for name, error in errors(plainly(found), plainly(wanted.tensors)).items():
            result[name] = max(result.get(name, 0.0), error)
    return result


def in_dtype(entry: SupportCase, dtype: torch.dtype, flipped: tuple[int, ...] = ()) -> Case:
    """A case, with its images flipped along these dimensions."""
    image = tree_map_only(torch.Tensor, lambda t: t.flip(flipped), entry.image())
    return Case(entry.build(), entry.loss, image, entry.target(), dtype, SEED)


def op_row(name: str, entry: SupportCase) -> Found:
    """One op's row; where a float32 error is beyond its claim, the median of three: of the image and of it flipped."""
    shown, draws = shown_ops(entry), []
    for flipped in ((), (-1,), (-2,)):
        double, single = (in_dtype(entry, dtype, flipped) for dtype in (torch.float64, torch.float32))
        draws.append(measured(name, double, single, shown, None if flipped else double_errors(name)))
        if not draws[0].wrong:
            return draws[0]
    single, whole = (median(getattr(draw, column) for draw in draws) for column in ("single", "whole"))
    found = Found(name, shown, draws[0].double, single, whole)
    return found if holds(found) else draws[0]


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
    ours, whole = (
        worst(single, wanted, plans),
        [errors(plainly(each.tensors), plainly(wanted.tensors)) for each in wholes(single)],
    )
    own = {tensor: max(each[tensor] for each in whole) for tensor in ours}
    rows = [Row(tensor, exact[tensor], ours[tensor], own[tensor]) for tensor in exact]  # a cast may untie buffers
    wrong = () if by_chance(rows) and chance else tuple(row.name for row in rows if not row.ok)
    worst_of = (max(getattr(row, column) for row in rows) for column in ("double", "single", "whole_single"))
    return Found(name, shown, *worst_of, wrong)


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
  roundings (1.9e-6), whichever is more; where one image is beyond that, the median of three counts: of the image as it
  is and flipped either way.

An error is relative to the tensor's largest element. "held whole" among the ops says that a map was put together in
memory, since some op has no locality. Images are 20 x 26 pixels, so that a tile's halo, the image's border and a slim
last tile all occur.

`make support` measures this page anew and writes it. `tests/test_support.py` measures every float64 error at every test
run, and fails if a row is missing, an error exceeds its claim, or an op with a rule occurs in no row.

Measured with `make support` on {machine}, PyTorch {torch}, {date}.
"""

NETWORKS = """## Networks

Whole networks from public libraries and papers, each with a loss that it is trained with. In float64 plans are alike,
with tiles that suit each network's size. In float32 one plan is compared with the worst of PyTorch's own kernels
(planar and channels last, with and without oneDNN), on three images: as it is, and flipped either way. A tensor's
error is its median over the three, since where a ReLU's input is zero but for rounding, one run takes the one slope
and the next the other, and on maps this small that shows. Of what chance is left the claim takes care: either each
tensor is off by at most twice its own, or the errors in order are: the largest at most twice PyTorch's largest, the
second largest at most twice its second largest, and so on. `tests/test_zoo.py` checks all that at every test run.
"""

LOSSES = "Losses on a segmentation network"
LOSSES_TEXT = """PyTorch's and MONAI's losses, and some written out, behind one small network that halves the map and
doubles it again, on two images of 46 x 60 pixels with plans and claims as for networks; `tests/test_zoo.py` runs them
at every test run. MONAI's losses cast to float32 inside, whatever they are given: in the float64 column they are made
to cast to float64 instead (`Double` in `tests/zoo_losses.py`), so that there is something to be exact about; in the
float32 columns they are as they come. Lovasz losses sort: in float32 nearly equal errors change places, and whether
ours or PyTorch's do so more is chance, from one image to the next.
"""

AUTOCAST = """## Autocast

Under `torch.autocast("cpu", torch.bfloat16)` the casts are part of the graph, and values are rounded where whole-image
autocast rounds them. Below is the worst relative error of any parameter's gradient against whole-image float64, of two
networks on 64 x 72 pixels, with tiles of 20 x 24 under the planner's boundaries and under two others on disk. The claim
is at most twice PyTorch's own or two roundings (7.8e-3), whichever is more.

| network | bfloat16 | PyTorch's own |
|---|---|---|
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
AUTOCAST_ROW = re.compile(r"^\| (?P<name>[^|]+?) \| (?P<ours>\de\S+) \| (?P<own>\de\S+) \|$")
ROW = re.compile(r"^\| (?P<name>[^|]+?) \| (?P<ops>[^|]*?) \| (?P<double>\S+) \| (?P<single>\S+) \| (?P<whole>\S+) \|$")


def machine() -> str:
    """Cores, memory and kind of this machine, as the page names it."""
    cores = os.cpu_count() or 1
    return f"{cores} cores, {round(psutil.virtual_memory().total / 2**30)} GiB, CPU"


def holds(found: Found) -> bool:
    """Whether a row's worst errors are within the claims."""
    return found.double <= EXACT and found.single <= max(2 * found.whole, FLOOR)


def bounds(shown: float) -> tuple[float, float]:
    """The least and the largest number that is printed with one digit as ``shown``."""
    digit, power = f"{shown:.0e}".split("e")
    unit = 10.0 ** int(power)
    return shown - unit * (0.05 if digit == "1" else 0.5), shown + unit * 0.5


def could_hold(shown: Found) -> bool:
    """Whether numbers that are printed as these are may be within the claims."""
    least = bounds(shown.single)[0]
    return bounds(shown.double)[0] <= EXACT and least <= max(2 * bounds(shown.whole)[1], FLOOR)


def row(found: Found) -> str:
    name = found.name.partition(": ")[2] or found.name
    return f"| {name} | {found.ops} | {found.double:.0e} | {found.single:.0e} | {found.whole:.0e} |\n"


def table(heading: str, first: str, rows: Iterable[Found]) -> str:
    return f"\n## {heading}\n\n" + COLUMNS.format(first) + "".join(map(row, rows))


def page(
    found: list[Found], losses: list[Found], networks: list[Found], autocast: dict[str, tuple[float, float]]
) -> str:
    """docs/support.md."""
    text = HEAD.format(machine=machine(), torch=torch.__version__.partition("+")[0], date=date.today().isoformat())
    groups = dict.fromkeys(each.name.partition(": ")[0] for each in found)
    for group in groups:
        text += table(group, "op", (each for each in found if each.name.partition(": ")[0] == group))
    if losses:
        text += f"\n## {LOSSES}\n\n{LOSSES_TEXT}\n" + COLUMNS.format("loss") + "".join(map(row, losses))
    if networks:
        text += "\n" + NETWORKS + "\n" + COLUMNS.format("network") + "".join(map(row, networks))
    if autocast:
        text += "\n" + AUTOCAST
        text += "".join(f"| {name} | {ours:.0e} | {own:.0e} |\n" for name, (ours, own) in autocast.items())
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


def recorded_autocast(text: str) -> dict[str, tuple[float, float]]:
    """The rows on autocast, by network."""
    found = (AUTOCAST_ROW.match(line) for line in text.splitlines())
    return {match["name"]: (float(match["ours"]), float(match["own"])) for match in found if match}


def prose(text: str) -> str:
    """What is left of the page without tables and headings of groups."""
    kept = [line for line in text.splitlines() if not line.startswith(("| ", "|-", "## "))]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(kept)).strip()


def own_prose(text: str) -> str:
    """What it should be, with the machine, the version and the date that the page gives."""
    given = re.search(r"^Measured with `make support` on (.+), PyTorch (\S+), (\S+)\.$", text, re.MULTILINE)
    machine, version, day = given.groups() if given else ("", "", "")
    parts = [HEAD.format(machine=machine, torch=version, date=day), LOSSES_TEXT, NETWORKS, AUTOCAST, REFUSALS, TAIL]
    return prose("\n".join(parts))


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


def zoo_losses() -> list[Any]:
    """The losses of tests/zoo_losses.py, if it is there."""
    return list(import_module("zoo_losses").LOSSES) if find_spec("zoo_losses") else []


def loss_row(entry: Any) -> Found:
    """One loss's row; its ops are those that the network alone has not."""
    image, target = entry.image(*entry.size), entry.target(*entry.size)
    as_it_comes = entry.loss.loss if isinstance(entry.loss, import_module("zoo_losses").Double) else entry.loss
    double = Case(entry.build(), entry.loss, image, target, torch.float64, SEED)
    single = Case(entry.build(), as_it_comes, image, target, torch.float32, SEED)
    shown = shown_ops(SupportCase("Losses", entry.name, entry.build, entry.loss, lambda: image, lambda: target))
    plans = network_plans(*entry.size)
    wholes = import_module("test_zoo").whole_float32
    return measured(f"{LOSSES}: {entry.name}", double, single, shown, plans=plans, wholes=wholes, chance=True)


def instance_norm_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.InstanceNorm2d(8, affine=True), nn.GELU(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.GroupNorm(1, 8), nn.SiLU(), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(8, 1, 3, padding=1),
    )  # fmt: skip


def autocast_networks() -> dict[str, Callable[[], nn.Module]]:
    """By the name of the row."""
    return {
        "batch norm, max pooling, group norm, softmax": import_module("test_autocast").network,
        "instance norm, GELU, group norm, bilinear": instance_norm_network,
    }


@cache
def autocast_errors(name: str) -> tuple[float, float]:
    """Worst relative error of a gradient under autocast: ours under two plans, and whole-image PyTorch's."""
    model, loss = autocast_networks()[name](), wg.losses.LOSSES["bce"]
    image, labels = pixels(1, 3, (64, 72), seed=1)[0].float(), random_labels((64, 72), 0)
    whole = import_module("test_autocast").whole
    wanted, theirs = whole(model, image, labels, False), whole(model, image, labels, True)

    def off(found: dict[str, torch.Tensor]) -> float:
        return max(((found[key] - exact).abs().max() / exact.abs().max()).item() for key, exact in wanted.items())

    ours = []
    for fixed in ({}, {"boundaries": ["0", "4"], "placement": "disk"}):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            plan = wg.plan(model, loss, image, labels, tile=(20, 24), **fixed)
            wg.backward(model, loss, image, labels, plan=plan)
        ours.append(off({key: p.grad.double() for key, p in model.named_parameters() if p.grad is not None}))
    return max(ours), off(theirs)


def network_row(entry: Any) -> Found:
    """One network's row; the calls that it runs tile by tile are counted, not listed."""
    target = entry.target(*entry.size)
    double = Case(entry.build(), entry.loss, entry.image(*entry.size), target, torch.float64, SEED)
    nodes = double.plan().graph.of_kind(Kind.MAP, Kind.REDUCTION)
    whole = ", some held whole" if any("gather" in str(node.op) and "whole" in str(node.op) for node in nodes) else ""
    exact = worst(double, double.reference(), network_plans(*entry.size))
    zoo = import_module("test_zoo")
    rows = zoo.medians([zoo.float32_rows(entry, flipped) for flipped in zoo.DRAWS])
    wrong = () if by_chance(rows) else tuple(row.name for row in rows if not row.ok)
    ours, own = max(row.single for row in rows), max(row.whole_single for row in rows)
    return Found(f"Networks: {entry.name}", f"{len(nodes)} calls{whole}", max(exact.values()), ours, own, wrong)


def write(say: Callable[[str], None] = print) -> None:
    """Measure everything and write the page.

    Raises:
        AssertionError: a claim does not hold; nothing is written.
    """
    found = []
    for name, entry in named_cases().items():
        found.append(op_row(name, entry))
        say(row(found[-1]).strip())
    losses, networks = [], []
    for entry in zoo_losses():
        losses.append(loss_row(entry))
        say(row(losses[-1]).strip())
    for entry in zoo():
        networks.append(network_row(entry))
        say(row(networks[-1]).strip())
    wrong = [each for each in (*found, *losses) if each.wrong]
    wrong += [each for each in (*found, *losses, *networks) if not holds(each)]
    assert not wrong, f"not written, since these break a claim: {wrong}"
    PAGE.parent.mkdir(exist_ok=True)
    autocast = {name: autocast_errors(name) for name in autocast_networks()}
    PAGE.write_text(page(found, losses, networks, autocast))

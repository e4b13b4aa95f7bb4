"""Time against memory: what every strategy is predicted to take under each of many budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import wholegrad as wg
from wholegrad.errors import BudgetError, ConfigError, TooLargeError
from wholegrad.explore.plot import Panel, Series, figure
from wholegrad.plan.plan import Plan, parse_bytes, show_bytes
from wholegrad.plan.strategies import ON_CPU, Strategy, WholePlan

PLENTY = 1 << 60  # bytes
AN_OCTAVE = 2  # budgets
GIB = float(2**30)
SHOWN = (*ON_CPU, Strategy.STREAM)


@dataclass(frozen=True)
class Row:
    """A strategy under a budget.

    Attributes:
        projected, seconds, recompute: of its plan; where none fits, ``projected`` is the smallest budget that would do.
        segments, tiles: of tiles; of whole maps ``segments`` are chunks.
        fits: whether there is a plan.
        said: why not.
    """

    budget: int
    strategy: str
    projected: int | None
    seconds: float | None
    recompute: float | None
    segments: int | None
    tiles: int | None
    fits: bool
    said: str = ""


def read_budgets(text: str) -> list[int]:
    """Bytes of ``"0.6GiB..64GiB"`` (both ends, and between them the half octaves) or of ``"1GiB,2GiB"``.

    Raises:
        ConfigError: something else.
    """
    try:
        ends = [parse_bytes(part) for part in text.split("..")] if ".." in text else []
        if not ends:
            return sorted({parse_bytes(part) for part in text.split(",")})
        low, high = ends
        if low > high:
            raise ValueError("the first is larger than the second")
    except ValueError as error:
        raise ConfigError(f"budgets {text!r}", str(error), 'write for example "0.6GiB..64GiB"') from error
    steps = max(1, round(AN_OCTAVE * math.log2(high / low)))
    return sorted({low, high, *(int(low * (high / low) ** (k / steps)) for k in range(1, steps))})


def trade_off(make: Callable[[int, str], Plan], budgets: Sequence[int]) -> list[Row]:
    """A row for each budget and strategy.

    Args:
        make: the plan within so many bytes by this strategy.
    """
    rows: list[Row] = []
    for strategy in SHOWN:
        if strategy in ON_CPU:  # one plan, whatever the budget
            rows += _whole(make, strategy, budgets)
        else:
            rows += [_row(make, strategy, budget) for budget in budgets]
    return rows


def _row(make: Callable[[int, str], Plan], strategy: str, budget: int) -> Row:
    try:
        return _of(make(budget, strategy), budget)
    except BudgetError as error:
        return Row(budget, strategy, error.smallest, None, None, None, None, False, str(error))


def _whole(make: Callable[[int, str], Plan], strategy: str, budgets: Sequence[int]) -> list[Row]:
    try:
        plan = make(PLENTY, strategy)
    except TooLargeError as error:
        return [
            Row(budget, strategy, error.needed, error.seconds, None, None, None, False, str(error))
            for budget in budgets
        ]
    return [
        _of(plan, budget)
        if plan.projected <= budget
        else Row(budget, strategy, plan.projected, plan.seconds, None, None, None, False, "does not fit")
        for budget in budgets
    ]


def _of(plan: Plan, budget: int) -> Row:
    whole = isinstance(plan, WholePlan)
    segments = max(len(plan.chunks), 1) if isinstance(plan, WholePlan) else len(plan.segments)
    tiles = None if whole else plan.tiles
    return Row(budget, plan.strategy, plan.projected, plan.seconds, plan.recompute, segments, tiles, True)


def table(rows: Sequence[Row]) -> str:
    """Rows of text: of tiles one for each budget, of whole maps one for each strategy, since their plan is the same."""
    head = ("budget", "strategy", "projected", "seconds", "forward work", "segments", "tiles")
    cells = [head]
    for row in rows:
        first = next((each for each in rows if each.strategy == row.strategy and each.fits), None)
        if row.strategy in ON_CPU and row is not (first or next(r for r in rows if r.strategy == row.strategy)):
            continue
        budget = show_bytes(row.budget)
        if not row.fits:
            needs = f"needs {show_bytes(row.projected)}" if row.projected else "does not fit"
            cells.append((budget if row.strategy not in ON_CPU else "any", row.strategy, needs, "", "", "", ""))
            continue
        assert row.projected is not None and row.seconds is not None and row.recompute is not None
        budget = f"from {budget}" if row.strategy in ON_CPU else budget
        numbers = (show_bytes(row.projected), f"{row.seconds:.3g}", f"x {row.recompute:.2f}")
        cells.append((budget, row.strategy, *numbers, str(row.segments), "" if row.tiles is None else str(row.tiles)))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    notes = dict.fromkeys(row.said for row in rows if "2**31" in row.said)
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], *notes])


def drawing(rows: Sequence[Row]) -> str:
    """Predicted seconds against projected memory, as SVG; a plan that is the same for several budgets is one dot.

    Circles are whole maps that fit into none of the budgets, or have a tensor that is too large.
    """
    series = []
    for i, strategy in enumerate(SHOWN):
        mine = [row for row in rows if row.strategy == strategy and row.projected and row.seconds]
        dots, circles = ({_point(row) for row in mine if row.fits is fits} for fits in (True, False))
        if dots or circles:
            series.append(Series(strategy, sorted(dots), () if dots else sorted(circles), i))
    return figure([Panel("predicted seconds a training step", "projected memory, GiB", series)])


def _point(row: Row) -> tuple[float, float]:
    return round((row.projected or 0) / GIB, 2), row.seconds or 0.0


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain values."""
    return [asdict(row) for row in rows]


def planner(model: Any, loss_fn: Any, image: Any, target: Any) -> Callable[[int, str], Plan]:
    """What :func:`trade_off` asks for plans."""

    def make(budget: int, strategy: str) -> Plan:
        return wg.plan(model, loss_fn, image, target, budget=budget, strategy=strategy)

    return make

"""A budget in words, in bytes, and under the limits that the system sets.

Without a budget, or with ``"auto"``, a safe share of what is free is taken; consecutive calls get the same one while it
is neither too much nor far too little, so that steps in a loop run by like plans.
"""

from __future__ import annotations

from collections.abc import Callable

from wholegrad.errors import BudgetError, PlanError
from wholegrad.plan.plan import parse_bytes, show_bytes
from wholegrad.run import limits
from wholegrad.run.pressure import RECOVERED, Look, look

AUTO = "auto"


class Automatic:
    """The budget where nobody names one.

    Args:
        probe: how to look at what is free.
    """

    def __init__(self, probe: Callable[[], Look] = look) -> None:
        self.probe = probe
        self._last: int | None = None

    def budget(self) -> int:
        """For a plan that is made now."""
        seen, last = self.probe(), self._last
        if last is None or last <= seen.held or not seen.fits(last) or last * RECOVERED < seen.safe:
            self._last = last = max(seen.safe, 1)
        return last


_automatic = Automatic()


def is_automatic(budget: str | int | None) -> bool:
    """Whether a budget follows what is free."""
    return budget is None or (isinstance(budget, str) and budget.strip().lower() == AUTO)


def budget_bytes(budget: str | int | None, name: str = "budget") -> int:
    """Bytes of a budget; of none or ``"auto"``, a safe share of what is free, on top of what this process has already.

    What is free is counted under the limits of control groups (containers, jobs).

    Args:
        name: what the caller knows it by.

    Raises:
        PlanError: the budget cannot be read.
    """
    if is_automatic(budget):
        return _automatic.budget()
    assert budget is not None
    try:
        return parse_bytes(budget)
    except (ValueError, AttributeError) as error:
        raise PlanError(name, str(error), 'write for example "1.5GiB", or "auto"') from error


def limit_note(budget: int) -> str | None:
    """That a limit of the system forbids so large a process, with figures; None if it does not."""
    found = limits.tightest()
    if found is None or found.limit >= budget:
        return None
    return f"{found.name} {show_bytes(found.limit)} is below the budget {show_bytes(budget)}"


def check_limit(projected: int) -> None:
    """Refuse a run that the system would kill, before anything runs (rule 7).

    Args:
        projected: the peak of its plan.

    Raises:
        BudgetError: a control group's limit is below that.
    """
    found = limits.tightest()
    if found is not None and projected > found.limit:
        raise BudgetError(
            f"{found.name} {show_bytes(found.limit)}",
            f"is below the {show_bytes(projected)} that the plan needs",
            'plan with budget="auto", or raise the limit',
        )

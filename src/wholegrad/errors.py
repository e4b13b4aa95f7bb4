"""Every error that wholegrad raises on purpose: one line with the place, the cause and the remedy.

All share one base, so that a caller (the command line above all) can tell a plain refusal from a defect.
"""

from __future__ import annotations


class WholegradError(Exception):
    """A refusal in plain words.

    Args:
        where: the file, module path or argument that the error is about.
        cause: what is wrong, with the values that show it.
        remedy: what the user can do.
    """

    def __init__(self, where: str, cause: str, remedy: str) -> None:
        self.where, self.cause, self.remedy = where, cause, remedy
        super().__init__(f"{where}: {cause}; {remedy}")

    def __reduce__(self) -> tuple[type[WholegradError], tuple[str, str, str]]:
        return type(self), (self.where, self.cause, self.remedy)


class ShapeError(WholegradError):
    """An image, target or box has the wrong rank, size or dtype."""


class CaptureError(WholegradError):
    """Model and loss could not be captured as one graph."""


class UnsupportedOpError(WholegradError):
    """The graph has an op without a rule, or one used in a way that its rule does not cover."""


class BudgetError(WholegradError):
    """No plan fits the budget; ``smallest`` is the least budget in bytes that would do, or None if none would."""

    def __init__(self, where: str, cause: str, remedy: str, smallest: int | None = None) -> None:
        super().__init__(where, cause, remedy)
        self.smallest = smallest


class PlanError(WholegradError):
    """A plan does not belong to this model, loss and image, or what was asked of it cannot be planned."""


class TooLargeError(PlanError):
    """A tensor of a plan has too many elements, whatever the budget; ``needed`` bytes, ``seconds`` are the plan's."""

    def __init__(
        self, where: str, cause: str, remedy: str, needed: int | None = None, seconds: float | None = None
    ) -> None:
        super().__init__(where, cause, remedy)
        self.needed, self.seconds = needed, seconds


class NumericsError(WholegradError):
    """The loss or a gradient is not finite, or a boundary holds values too large for the dtype it is stored in."""


class SpillError(WholegradError):
    """A boundary on disk: its folder cannot be written or is full, or what was read is not what was written."""


class SlideError(WholegradError):
    """A slide or mask file is missing, truncated, corrupt, of an unknown format, or does not match its partner."""


class ConfigError(WholegradError):
    """A configuration file or command line asks for something unknown or impossible."""


class RankError(WholegradError):
    """Ranks that share a step disagree about it, or one of them failed, fell silent or was cut off."""

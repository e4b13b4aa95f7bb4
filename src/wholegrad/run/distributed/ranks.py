"""Who takes part in a step: the ranks that share one image, and those that have others."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from wholegrad.errors import PlanError, RankError
from wholegrad.plan.bands import Bands, bands
from wholegrad.plan.traffic import ASSUMED, Link
from wholegrad.run.distributed.measure import measured_link
from wholegrad.run.distributed.wire import Wire

TILES, SLIDES = "tiles", "slides"
COMBINE = ("mean", "sum")
STATISTICS = ("slide", "batch")


@dataclass(frozen=True, eq=False)
class Ranks:
    """Processes that take a step together.

    Attributes:
        tiles: the group whose ranks share one image; None if this process has it to itself.
        slides: the group whose ranks have an image each; None if there is only one.
        layout: bands along rows and along columns (their product is the number of ranks); None for the shortest cuts.
        shares: how much of the image each rank of ``tiles`` owns, relative to the others; None for the same.
        combine: whether gradients (and losses) of several slides are averaged (``"mean"``) or added (``"sum"``).
        statistics: of which batch norms in training mode take theirs: each ``"slide"``, or the ``"batch"`` of all.
        timeout: seconds that a rank waits for another before the step ends with an error; None for what the plan's
            predicted time suggests, at least :data:`LEAST`.
        link: how fast they talk, for plans: assumed, unless :meth:`measured` found it out.
        held: bytes that the caller holds beside each step, for what it does with gradients of several slides.
    """

    tiles: dist.ProcessGroup | None = None
    slides: dist.ProcessGroup | None = None
    layout: tuple[int, int] | None = None
    shares: tuple[float, ...] | None = None
    combine: str = "mean"
    timeout: float | None = None
    link: Link = ASSUMED
    held: int = 0
    statistics: str = "slide"

    def __post_init__(self) -> None:
        if self.combine not in COMBINE:
            raise PlanError("combine", f"is {self.combine!r}", f"choose {' or '.join(COMBINE)}")
        if self.statistics not in STATISTICS:
            raise PlanError("statistics", f"is {self.statistics!r}", f"choose {' or '.join(STATISTICS)}")
        if self.timeout is not None and not self.timeout > 0:
            raise PlanError("timeout", f"is {self.timeout}", "give seconds, or None")

    @property
    def count(self) -> int:
        """Ranks that share the image."""
        return 1 if self.tiles is None else dist.get_world_size(self.tiles)

    @property
    def rank(self) -> int:
        """Which of those that share the image this process is."""
        return 0 if self.tiles is None else dist.get_rank(self.tiles)

    def measured(self) -> Ranks:
        """The same with the speed of its connections measured, for the predicted times of plans; all ranks call it."""
        if self.tiles is None:
            return self
        wire = wire_of(self.tiles, timeout_of(self, 0.0))
        with wire.step():
            return replace(self, link=measured_link(wire))


def open_ranks(
    group: object,
    *,
    layout: tuple[int, int] | None = None,
    shares: Sequence[float] | None = None,
    combine: str = "mean",
    timeout: float | None = None,
    statistics: str = "slide",
) -> Ranks:
    """Who takes part, with options, for ``group=`` of every call.

    Args:
        group: a process group, whose ranks share one image; or a ``DeviceMesh`` with dimensions called ``"tiles"``
            (whose ranks share one image), ``"slides"`` (whose ranks have an image each), or both.
        layout, shares, combine, timeout, statistics: see :class:`Ranks`.

    Raises:
        RankError: it is neither, has dimensions of other names, or this process is not in it.
    """
    owned = None if shares is None else tuple(shares)
    options: dict[str, Any] = {"layout": layout, "shares": owned, "combine": combine, "statistics": statistics}
    found = replace(_opened(group), timeout=timeout, **options)
    if layout is not None and layout[0] * layout[1] != found.count:
        raise PlanError("layout", f"is {layout} for {found.count} ranks", "give two numbers whose product that is")
    return found


def ranks_of(group: object) -> Ranks | None:
    """What ``group=`` says; None for this process alone."""
    if group is None:
        return None
    return group if isinstance(group, Ranks) else _opened(group)


def _opened(group: object) -> Ranks:
    if not dist.is_available() or not dist.is_initialized():
        raise RankError("group", "is given, but there is no process group", "call torch.distributed.init_process_group")
    if isinstance(group, Ranks):
        return group
    if isinstance(group, dist.ProcessGroup):
        return Ranks(tiles=_mine(group))
    names = getattr(group, "mesh_dim_names", None)
    if hasattr(group, "get_group") and hasattr(group, "mesh"):
        if not names or not set(names) <= {TILES, SLIDES}:
            cause = f"is a DeviceMesh with dimensions {names}"
            raise RankError("group", cause, f"name them {SLIDES!r} and {TILES!r} (either alone will do)")
        found = {name: _mine(group.get_group(name)) for name in names}
        return Ranks(tiles=found.get(TILES), slides=found.get(SLIDES))
    raise RankError("group", f"is {type(group).__name__}", "give a ProcessGroup, a DeviceMesh or wg.open_ranks(...)")


def _mine(group: dist.ProcessGroup) -> dist.ProcessGroup:
    if dist.get_rank(group) < 0:
        raise RankError("group", "does not have this process in it", "call only where it is a member")
    return group


LEAST, TIMES = 120.0, 20.0  # seconds of a time-out that nobody named, and how many times a rank's predicted step


def timeout_of(ranks: Ranks, seconds: float) -> float:
    """The time-out of a step that is predicted to take so many seconds."""
    return ranks.timeout or max(LEAST, TIMES * seconds)


_wires: weakref.WeakKeyDictionary[dist.ProcessGroup, Wire] = weakref.WeakKeyDictionary()


def wire_of(group: dist.ProcessGroup, timeout: float) -> Wire:
    """This process's connections in a group: one for as long as the group lives, so that phases count on."""
    if group not in _wires:
        _wires[group] = Wire(group, timeout)
    _wires[group].timeout = timeout
    return _wires[group]


def bands_of(ranks: Ranks, size: tuple[int, int], layout: tuple[int, int]) -> Bands:
    """The bands of an image of this size in that layout."""
    return bands(size, layout, ranks.shares)

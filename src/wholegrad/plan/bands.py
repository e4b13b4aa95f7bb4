"""Which part of every map each rank owns, when several processes share one image: integers only.

The image is cut into bands along its rows, along its columns, or into blocks along both; rank ``r`` of ``P x Q`` owns
the block at ``divmod(r, Q)``. The same cuts, in proportion, fall on every map (:func:`carried`), and tiles are counted
anew from each, so that every tile is one rank's (rule 1). What a rank's tiles read beyond its own block is its *halo*:
of images it reads that from the file like any other pixels, of boundaries it is sent that by its owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from wholegrad.errors import PlanError
from wholegrad.graph.layout import Role


def carried(cut: int, base: int, size: int) -> int:
    """Where a cut of the base map falls on a map of another size."""
    return cut * size // base


MANY = 64  # ranks up to which each is looked at


@dataclass(frozen=True)
class Bands:
    """Where the image is cut for its ranks.

    Attributes:
        rows, cols: positions ``0 = c0 <= c1 <= ... = size`` in the image's pixels; equal neighbours own nothing.
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Bands along rows, and along columns."""
        return len(self.rows) - 1, len(self.cols) - 1

    @property
    def ranks(self) -> int:
        return self.shape[0] * self.shape[1]

    def place(self, rank: int) -> tuple[int, int]:
        """Which band along rows and which along columns a rank owns."""
        return divmod(rank, self.shape[1])

    def on(self, role: Role, size: int) -> tuple[int, ...]:
        """The cuts of an axis on a map of ``size`` rows or columns."""
        mine = self.rows if role is Role.ROW else self.cols
        return tuple(carried(cut, mine[-1], size) for cut in mine)

    def widest(self, role: Role, size: int) -> int:
        """Pixels of the widest band on a map of ``size`` rows or columns."""
        return max(hi - lo for lo, hi in pairwise(self.on(role, size)))

    def largest(self, role: Role, size: int) -> tuple[int, int]:
        """From where to where the widest band reaches on such a map; of several one inside, which reads most."""
        edges = self.on(role, size)
        middle = (len(edges) - 2) / 2
        _, _, lo, hi = min((lo - hi, abs(k - middle), lo, hi) for k, (lo, hi) in enumerate(pairwise(edges)))
        return lo, hi

    @property
    def share(self) -> float:
        """Of the image, what the rank with most owns."""
        return self.widest(Role.ROW, self.rows[-1]) * self.widest(Role.COL, self.cols[-1]) / self.area

    @property
    def area(self) -> int:
        """Pixels of the image."""
        return self.rows[-1] * self.cols[-1]

    @property
    def busiest(self) -> list[int]:
        """Ranks among which one sends most: all, but of very many that own alike those at corners, edges, inside."""
        if self.ranks <= MANY or not self.even:
            return list(range(self.ranks))
        down, across = self.shape
        return sorted({y * across + x for y in (0, down // 2, down - 1) for x in (0, across // 2, across - 1)})

    @property
    def even(self) -> bool:
        """Whether bands along each axis differ by one pixel at most."""
        return all(
            max(widths) - min(widths) <= 1
            for widths in ([b - a for a, b in pairwise(cuts)] for cuts in (self.rows, self.cols))
        )

    def __str__(self) -> str:
        down, across = self.shape
        if down * across == 1:
            return "1 band"
        kind = f"{down} bands of rows" if across == 1 else f"{across} bands of columns"
        return kind if min(self.shape) == 1 else f"{down} x {across} blocks"


def bands(size: tuple[int, int], shape: tuple[int, int], shares: Sequence[float] | None = None) -> Bands:
    """Bands of an image of ``size`` (rows, columns), ``shape`` of them along its rows and along its columns.

    Args:
        shares: how much of the image each rank owns, relative to the others; zero for one that owns nothing. Without
            them all own the same. Only for bands along one axis.

    Raises:
        PlanError: not one share for each rank, one that is negative, or blocks along both axes.
    """
    down, across = shape
    if shares is None:
        return Bands(_cuts(size[0], [1.0] * down), _cuts(size[1], [1.0] * across))
    if min(shape) > 1:
        raise PlanError("shares", f"are given for {down} x {across} blocks", "give them for bands along one axis")
    good = len(shares) == down * across and all(0 <= share < float("inf") for share in shares) and sum(shares) > 0
    if not good:
        cause = f"are {list(shares)} for {down * across} ranks"
        raise PlanError("shares", cause, "give each rank a number that is not negative, and not all of them zero")
    along = down > 1
    return Bands(_cuts(size[0], shares if along else [1.0]), _cuts(size[1], [1.0] if along else shares))


def _cuts(size: int, shares: Sequence[float]) -> tuple[int, ...]:
    total = sum(shares)
    inner = [round(size * part / total) for part in accumulate(shares)]
    return (0, *inner[:-1], size)

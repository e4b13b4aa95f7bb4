"""Look for sets of boundaries worth their cost, for every budget at once.

Budgets stand on a ladder (``LADDER``, four rungs to a doubling), whatever the budget that is asked for. On each
rung a greedy search adds the boundary that saves the most predicted time while one does, and then drops what no longer
pays, and tries to do without each of the largest ones for the sake of others; it starts from what the rung below ended
with, and on the lowest that has room from no boundary, from the maps that norms sum and from every candidate. The best
sets of each rung are kept. A budget is given the sets of the next rung above it and of all below: so a larger budget
has every set that a smaller one has.
"""

from __future__ import annotations

from collections.abc import Sequence

from wholegrad.graph.graph import Graph, Ref
from wholegrad.plan.boundaries import candidates, summed
from wholegrad.plan.cuttings import Cuttings

DOUBLING = 4  # rungs
ANEW = 8  # rungs, of which the first looks at every boundary anew; the others go by what was known
LADDER = tuple(int(2 ** (k / DOUBLING)) for k in range(24 * DOUBLING, 60 * DOUBLING))  # bytes beyond the constant
LOOKED_AT = 8  # boundaries weighed anew at each step
WORTHWHILE = 0.98  # of the predicted time, to which a change of boundaries must bring it
WORTH_A_LAST_LOOK = 0.997  # the same once none of those is left, and what does not pay is dropped
SWAPPED = 4  # of the largest boundaries, without each of which the search is tried again
FEW = 16  # candidates up to which each is also tried alone
BEST = 3  # sets kept of each rung
HOST_SHARES = (1.5, 1.0, 0.5, 0.0)  # of the room, for boundaries and gradients as if all were held at once
NEVER = float("inf")

Set = frozenset[Ref]


class Search:
    """The sets of boundaries for any budget.

    Args:
        fixed: boundaries of every set.
        free: whether others may be added.
    """

    def __init__(self, graph: Graph, cuttings: Cuttings, fixed: Set, free: bool) -> None:
        self.cuttings = cuttings
        self.pool = [ref for ref in candidates(graph) if ref not in fixed] if free else []
        self.fixed = fixed
        self.starts: list[Set] = list(
            dict.fromkeys([fixed, fixed | summed(graph, self.pool), fixed | frozenset(self.pool)])
        )
        self.singles = [fixed | {ref} for ref in self.pool] if len(self.pool) <= FEW else []
        self._rungs: list[list[Set]] = []
        self._best: Set | None = None
        self._known: dict[Ref, float] = {}  # of the last rung

    def sets(self, room: float) -> list[Set]:
        """Those for so many bytes; infinitely many for no limit."""
        if not self.pool:
            return self.starts
        if room == NEVER:
            return list(dict.fromkeys([*self.starts, *_Rung(self, NEVER, {}, True).run(None)]))
        above = next((k for k, rung in enumerate(LADDER) if rung >= room), len(LADDER) - 1)
        while len(self._rungs) <= above:
            number = len(self._rungs)
            rung = _Rung(self, LADDER[number], self._known if number % ANEW else {}, number % DOUBLING == 0)
            found, self._known = rung.run(self._best), rung.known
            self._best = found[0] if found else self._best
            self._rungs.append(found)
        known = [boundaries for rung in self._rungs[: above + 1] for boundaries in rung]
        return list(dict.fromkeys([*known, *self.starts, *self.singles]))


class _Rung:
    """The search with one amount of room.

    Args:
        known: what the rung below predicted with what it ended with and one boundary more, of those of which it did.
        anew: whether the last look is at every boundary anew.
    """

    def __init__(self, search: Search, room: float, known: dict[Ref, float], anew: bool) -> None:
        self.search, self.room, self.known, self.anew = search, room, known, anew
        self.tried: dict[Set, float] = {}

    def run(self, before: Set | None) -> list[Set]:
        """The best sets, the best first; none if none fits."""
        starts = [*self.search.starts, *self.search.singles] if before is None else [before]
        best, _, chosen = min((self.seconds(start), i, start) for i, start in enumerate(starts))
        if best == NEVER:
            return []
        for worth in (WORTHWHILE, WORTH_A_LAST_LOOK):
            if worth == WORTH_A_LAST_LOOK and self.anew:
                self.known = {}
            best, chosen = self.grown(best, chosen, worth)
            best, chosen = self.thinned(best, chosen)
        best, chosen = self.swapped(best, chosen)
        ranked = sorted((seconds, sorted(found)) for found, seconds in self.tried.items() if seconds < NEVER)
        return [frozenset(found) for _, found in ranked[:BEST]]

    def swapped(self, best: float, chosen: Set) -> tuple[float, Set]:
        """Do without each of the largest boundaries, and use its room for others, if that is faster."""
        graph = self.search.cuttings.graph
        sizes = sorted(chosen - self.search.fixed, key=lambda ref: (-graph.spec(ref).nbytes, ref))
        for ref in sizes[:SWAPPED]:
            without = self.seconds(chosen - {ref})
            if without == NEVER:
                continue
            found, others = self.grown(without, chosen - {ref}, WORTHWHILE, ref)
            if found < WORTH_A_LAST_LOOK * best:
                best, chosen = self.thinned(found, others)
        return best, chosen

    def grown(self, best: float, chosen: Set, worth: float, barred: Ref | None = None) -> tuple[float, Set]:
        """Add boundaries greedily, but for the one ``barred``.

        A saving rarely grows as others are added, so the last ones known bound the next.
        """
        known = [(self.estimate(chosen, ref), ref) for ref in self.search.pool if ref not in chosen and ref != barred]
        while known:
            known.sort()
            fresh = {known[0][1]: self.seconds(chosen | {known[0][1]})}
            while len(fresh) < min(LOOKED_AT, len(known)) and min(fresh.values()) > known[len(fresh)][0]:
                ref = known[len(fresh)][1]
                fresh[ref] = self.seconds(chosen | {ref})
            seconds, ref = min((seconds, ref) for ref, seconds in fresh.items())
            if seconds > worth * best or seconds == NEVER:
                break
            change = best - seconds
            best, chosen = seconds, chosen | {ref}
            known = [(fresh.get(other, old - change), other) for old, other in known if other != ref]
        if barred is None:
            self.known = {ref: seconds for seconds, ref in known if seconds < NEVER}
        return best, chosen

    def estimate(self, chosen: Set, ref: Ref) -> float:
        """Of one boundary more: what was known of it for another set or less room, if anything."""
        known = self.known.get(ref)
        return self.seconds(chosen | {ref}) if known is None else known

    def thinned(self, best: float, chosen: Set) -> tuple[float, Set]:
        """Drop boundaries that do not pay, the largest first."""
        graph = self.search.cuttings.graph
        for ref in sorted(chosen - self.search.fixed, key=lambda ref: (-graph.spec(ref).nbytes, ref)):
            seconds = self.seconds(chosen - {ref})
            if seconds <= best:
                best, chosen = seconds, chosen - {ref}
        return best, chosen

    def seconds(self, boundaries: Set) -> float:
        """Predicted for the best of a few tiles and placements; infinite if none fits."""
        if boundaries not in self.tried:
            self.tried[boundaries] = min(self._ways(boundaries), default=NEVER)
        return self.tried[boundaries]

    def _ways(self, boundaries: Set) -> Sequence[float]:
        found = []
        for cutting in self.search.cuttings.of(boundaries):
            shares = HOST_SHARES if self.room < NEVER else (1.0,)
            for count in {cutting.fitting(self.room * share) for share in shares}:
                choice = cutting.choose(self.room, cutting.filled(count), coarse=True)
                if choice is not None:
                    found.append(choice.seconds)
        return found

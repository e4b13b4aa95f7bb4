"""Scores of whole slides, shared out over the ranks of a run: the largest slides first, each to who has least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wholegrad.errors import SlideError
from wholegrad.train.cases import Case
from wholegrad.train.metrics import Score
from wholegrad.train.team import Team

Skipped = Callable[[Case, SlideError], None]


def divided(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of so many things each rank does, so that their sizes come out about even; the same on every rank."""
    loads, shares = [0] * ranks, [list[int]() for _ in range(ranks)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[index]
        shares[rank].append(index)
    return [sorted(share) for share in shares]


def judged(
    team: Team,
    cases: Sequence[Case],
    scores: Callable[[list[Case], Skipped], list[Score]],
    on_skip: Skipped | None = None,
    on_case: Callable[[Score], None] | None = None,
) -> list[Score]:
    """The score of each case, in order, on every rank.

    Args:
        scores: of some cases, on this rank; told what to do with one that cannot be read.
        on_skip: told of each that is left out; without it the first one ends everything.
        on_case: told of each score.

    Raises:
        SlideError: a slide cannot be read and none may be left out, or none at all could be read.
    """
    mine = divided([case.size[0] * case.size[1] for case in cases], team.size)[team.rank]
    skipped: dict[int, SlideError] = {}
    found: dict[int, Score] = {}
    with team.together("scoring"):
        for index in mine:

            def skip(case: Case, error: SlideError, index: int = index) -> None:
                if on_skip is None:
                    raise error
                skipped[index] = error

            for score in scores([cases[index]], skip):
                found[index] = score
                if on_case is not None and team.alone:
                    on_case(score)
    everything = team.gather((found, skipped), "the scores")
    all_found = {index: score for each, _ in everything for index, score in each.items()}
    all_skipped = {index: error for _, each in everything for index, error in each.items()}
    for index in sorted(all_skipped):
        assert on_skip is not None
        on_skip(cases[index], all_skipped[index])
    if on_case is not None and not team.alone:
        for index in sorted(all_found):
            on_case(all_found[index])
    if all_skipped and not all_found:
        raise all_skipped[min(all_skipped)]
    return [all_found[index] for index in sorted(all_found)]

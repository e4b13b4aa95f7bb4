"""One thing that was looked at: what was found, whether it is well, and what to mend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from wholegrad.errors import WholegradError


class State(StrEnum):
    """How something is."""

    OK = "ok"
    ABSENT = "absent"  # an extra, a GPU: nothing is wrong without it
    ADVICE = "advice"  # works, and could be better
    BROKEN = "broken"  # does not do what it should


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        name: of what was looked at.
        text: what was found, for people.
        value: the same for programs: numbers in bytes, pixels and seconds.
        mend: what to do, for any state but ``ok``; an absent extra's is how to get it.
    """

    name: str
    text: str
    value: Any = None
    state: State = State.OK
    mend: str | None = None


Findings = Iterator[Finding]


def all_of(name: str, look: Callable[[], Findings]) -> list[Finding]:
    """What ``look`` finds; that it fails is itself a finding."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except Exception as error:  # whatever a broken library raises
        said = " ".join(str(error).split())[:300]
        text = said if isinstance(error, WholegradError) else f"{type(error).__name__}: {said}"
        mend = _remedy(error, name)
        found.append(Finding(name, text, None, State.BROKEN, mend))
    return found


def _remedy(error: Exception, name: str) -> str:
    if isinstance(error, WholegradError):
        return error.remedy
    if isinstance(error, OSError):
        return "see that the folder is there and has room, and that you may write to it (TMPDIR for temporary files)"
    return f"this should not happen: report it with {name}"

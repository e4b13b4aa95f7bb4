"""Looks at what a run depends on and says what to mend: machine, versions, memory, disks, threads, kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from wholegrad.doctor.finding import Finding, Findings, State, all_of
from wholegrad.doctor.folders import look_at_kernels, look_at_spill
from wholegrad.doctor.machine import look_at_devices, look_at_machine, look_at_memory
from wholegrad.doctor.reading import look_at_reading
from wholegrad.doctor.software import look_at_extras, look_at_versions
from wholegrad.doctor.step import look_at_step
from wholegrad.doctor.threads import look_at_threads

__all__ = ["Finding", "Section", "State", "as_json", "broken", "examine", "mendings"]


@dataclass(frozen=True)
class Section:
    """What was found about one subject."""

    name: str
    findings: tuple[Finding, ...]


def examine(quick: bool = False, progress: Callable[[str], None] | None = None) -> Iterator[Section]:
    """Every section, as it is done.

    Args:
        quick: measure the least and import nothing that is not needed: about a second beside PyTorch's own start.
        progress: called with the name of what is looked at next.
    """
    looks: dict[str, Callable[[], Findings]] = {
        "machine": look_at_machine,
        "versions": partial(look_at_versions, quick),
        "devices": look_at_devices,
        "memory": look_at_memory,
        "threads": look_at_threads,
        "decoders": partial(look_at_reading, quick),
        "boundaries on disk": partial(look_at_spill, quick),
        "kernels": partial(look_at_kernels, quick),
        "extras": look_at_extras,
    }
    if not quick:
        looks["a step"] = look_at_step
    for name, look in looks.items():
        if progress is not None:
            progress(name)
        yield Section(name, tuple(all_of(name, look)))


def broken(sections: list[Section]) -> bool:
    """Whether anything does not do what it should."""
    return any(finding.state is State.BROKEN for section in sections for finding in section.findings)


def mendings(sections: list[Section]) -> list[tuple[State, str]]:
    """What to do, what is broken first; absent extras are nobody's fault and left out."""
    found = [
        (each.state, f"{section.name}, {each.name}: {each.text}; {each.mend}")
        for section in sections
        for each in section.findings
        if each.state in (State.BROKEN, State.ADVICE)
    ]
    return sorted(found, key=lambda each: each[0] is not State.BROKEN)


def as_json(sections: list[Section]) -> str:
    """Everything, for programs."""
    told: dict[str, Any] = {
        "ok": not broken(sections),
        "mend": [{"state": state, "what": what} for state, what in mendings(sections)],
        "sections": {section.name: [asdict(each) for each in section.findings] for section in sections},
    }
    return json.dumps(told, indent=1)

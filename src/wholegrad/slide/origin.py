"""What a copy of a slide, or a prediction of a part of it, remembers of where it came from, as text in its own file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from xml.sax.saxutils import unescape

from wholegrad.slide.placement import Axis, Placement

MARK = "wholegrad copy "


@dataclass(frozen=True)
class Origin:
    """The source's level-0 size ``(H, W)`` and the part of it that the copy shows, each axis as one long pixel."""

    size: tuple[int, int]
    rows: Axis
    cols: Axis


def describe(source: str, placement: Placement, shape: tuple[int, int]) -> str:
    """The text that a copy of shape ``(H, W)`` carries."""
    parts = {
        name: [str(axis.start), str(axis.step * length)]
        for name, axis, length in zip(("rows", "cols"), (placement.rows, placement.cols), shape, strict=True)
    }
    return MARK + json.dumps({"source": source, "size": placement.size, **parts})


def read_origin(description: str) -> Origin | None:
    """The origin that a file's description, or that within its OME-XML, tells; None if it is no copy."""
    if description.startswith("<?xml"):
        within = re.search(r"<Description>(.*?)</Description>", description, re.DOTALL)
        description = unescape(within[1]) if within else ""
    if not description.startswith(MARK):
        return None
    told = json.loads(description[len(MARK) :])
    rows, cols = (Axis(Fraction(start), Fraction(length)) for start, length in (told["rows"], told["cols"]))
    return Origin((int(told["size"][0]), int(told["size"][1])), rows, cols)

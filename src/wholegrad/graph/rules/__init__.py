"""The rule registry: for each ATen op its geometry and how it runs on a box.

A rule answers three questions about one node. ``layouts``: where are rows and columns in its outputs?
``needs``: which interval of an operand does an interval of the output depend on? ``run``: given exactly those
intervals of its operands, what are the outputs on this box? Rows and columns never mix in any supported op, so
``needs`` is asked per axis. A reduction answers ``partial``, ``merge``, ``finish`` and ``pull`` instead of
``run`` (see :mod:`wholegrad.graph.rules.reduction`).
"""

from __future__ import annotations

from wholegrad.graph.rules.base import (
    LayoutRequest,
    MapRule,
    ReductionRule,
    Rule,
    State,
    Tile,
    register,
    registered,
    rule_for,
)

# Each module registers the rules of one family when it is imported.
from wholegrad.graph.rules import (  # noqa: F401  isort: skip
    bins,
    channels,
    fill,
    index,
    interpolate,
    matmul,
    normalize,
    pad,
    pointwise,
    pool,
    random,
    reduction,
    shape,
    shuffle,
    strip,
    unfold,
    unpool,
    variance,
    window,
)

__all__ = [
    "LayoutRequest",
    "MapRule",
    "ReductionRule",
    "Rule",
    "State",
    "Tile",
    "register",
    "registered",
    "rule_for",
]

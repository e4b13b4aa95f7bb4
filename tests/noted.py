"""What is found in a graph's segments, strips or tails, noted while a step runs, on blocks small enough to test."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from wholegrad.graph.graph import Graph
from wholegrad.plan import search


def note(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, called: str, height: int, width: int
) -> list[tuple[Graph, Any]]:
    """A list that fills with each graph and what ``module.find`` found of one of its segments, or None.

    Args:
        called: the name by which ``graph/inline.py`` knows that function.
        height, width: pixels of a block, in place of those that are chosen from; and no boundary is stored.
    """
    monkeypatch.setattr(search, "candidates", lambda graph: [])
    monkeypatch.setattr(module, "HEIGHTS", (height,))
    monkeypatch.setattr(module, "WIDTHS", (width,))
    kept: list[tuple[Graph, Any]] = []
    find = module.find

    def noted(graph: Graph, segment: object, how: object) -> Any:
        kept.append((graph, find(graph, segment, how)))
        return kept[-1][1]

    monkeypatch.setattr(f"wholegrad.graph.inline.{called}", noted)
    return kept

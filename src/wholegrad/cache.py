"""Captured graphs, kept by shape: the next step with the same model, loss and shapes does not trace again.

A graph is used again only if everything is the same that tracing might have seen (:mod:`wholegrad.looks`). Weights may
change freely.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from wholegrad.graph.graph import Graph

KEPT = 8  # graphs for each model
_graphs: WeakKeyDictionary[nn.Module, list[tuple[Any, Graph]]] = WeakKeyDictionary()


def cached(
    model: nn.Module, key: Callable[[], Any], valid: Callable[[Graph], bool], make: Callable[[], Graph]
) -> Graph:
    """The graph that was made for this key, or a new one.

    Args:
        key: compared by equality, must not hold the model; asked again once a graph is made, since a first run may set
            things up.
        valid: whether a graph that was kept still holds.
    """
    kept = _graphs.setdefault(model, [])
    now = key()
    for other, graph in kept:
        if other == now and valid(graph):
            return graph
    graph = make()
    kept.append((key(), graph))
    del kept[:-KEPT]
    return graph

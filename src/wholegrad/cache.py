"""Captured graphs, kept by shape: the next step with the same model, loss and shapes does not trace again.

A graph is used again only if everything is the same that tracing might have seen: shapes, modes, which parameters are
trained, the attributes of every module, and what the functions involved refer to. Weights may change freely.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from wholegrad.graph.graph import Graph

KEPT = 8  # graphs for each model
_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.Size)
_SEEN_BY_NAME = {"_parameters", "_buffers", "_modules"}  # names and shapes are compared apart
_graphs: WeakKeyDictionary[nn.Module, list[tuple[Any, Any, Graph]]] = WeakKeyDictionary()


def cached(model: nn.Module, parts: list[Any], key: Any, make: Callable[[], Graph]) -> Graph:
    """The graph that was made for ``key`` while model and parts looked as they do now, or a new one.

    Args:
        parts: loss and metrics, modules or functions.
        key: compared by equality.
    """
    looks = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), *(_looks(p) for p in (model, *parts)))
    kept = _graphs.setdefault(model, [])
    for other_key, other_looks, graph in kept:
        if other_key == key and other_looks == looks:
            return graph
    graph = make()
    kept.append((key, looks, graph))
    del kept[:-KEPT]
    return graph


def _looks(part: Any) -> Any:
    """What tracing could see of a module or function, comparable by equality."""
    if not isinstance(part, nn.Module):
        return _value(part, 3)
    modules = list(part.modules())
    types = dict.fromkeys(type(module) for module in modules)
    own = [kind for kind in types if not kind.__module__.startswith("torch.")]
    forwards = tuple(_function(kind.forward, 2) for kind in own if isinstance(kind.forward, FunctionType))
    return tuple(types), forwards, tuple(_attributes(module) for module in modules)


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    items = ((name, value) for name, value in vars(module).items() if name not in _SEEN_BY_NAME)
    return tuple((name, _value(value, 1)) for name, value in items)


def _value(value: Any, depth: int) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, tuple | list | set):
        return type(value).__name__, tuple(_value(item, depth) for item in value)
    if isinstance(value, dict):
        return tuple((repr(key), _value(item, depth)) for key, item in value.items())
    if isinstance(value, FunctionType) and depth > 0:
        return _function(value, depth)
    if (
        depth > 0
        and type(value).__module__.split(".")[0] not in ("torch", "numpy", "builtins")
        and hasattr(value, "__dict__")
    ):
        return id(value), tuple((name, _value(item, depth - 1)) for name, item in vars(value).items())
    return id(value)


def _function(function: FunctionType, depth: int) -> Any:
    """A function's code, defaults and what it refers to in closures and globals."""
    try:
        found = inspect.getclosurevars(function)
    except ValueError:  # a cell that is still empty
        return id(function)
    names = {**found.nonlocals, **found.globals}
    return (
        id(function.__code__),
        _value(function.__defaults__, 0),
        tuple((name, _value(value, depth - 1)) for name, value in sorted(names.items()) if not inspect.ismodule(value)),
    )

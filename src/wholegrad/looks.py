"""What tracing a model or a loss may see of it, beside weights and pixels: flat, comparable, told apart by name.

A captured graph holds for code and settings, so it may be used again only while these are the same. This walks a model
or function as far as its own code can reach: attributes of modules and objects, containers, code, defaults and closures
of functions, the globals that they name, the functions of classes. Plain values are compared by content, so that a copy
of a model looks like the model; arrays by a digest; tensors that are no parameters and objects that show nothing of
themselves, by identity. The code of installed libraries is compared by identity and not walked.

Not seen: what functions of libraries refer to, and numbers that code draws itself (``random``, the clock).
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import os
import sys
import sysconfig
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

LIMIT = 200_000  # entries, beyond which the rest is not walked
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format, np.generic, np.dtype,
)  # fmt: skip
_CONTAINERS = {dict, list, tuple, set, frozenset, OrderedDict, deque}
_LIBRARIES = (  # PyTorch may lie elsewhere than this environment's own packages: in a system's, or on PYTHONPATH
    *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")),
    *(str(Path(package.__file__ or "").parent) + os.sep for package in (torch, np)),
)
_PACKAGES = {"site-packages", "dist-packages"}
_SKIPPED = {"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__firstlineno__"}
Looks = dict[str, Any]


class _Same:
    """An object compared by identity, not kept alive where that can be avoided."""

    def __init__(self, value: Any) -> None:
        try:
            self._value: Any = weakref.ref(value)
        except TypeError:  # of a builtin type
            self._value = lambda: value

    def __eq__(self, other: object) -> bool:
        mine = self._value()
        return isinstance(other, _Same) and mine is not None and mine is other._value()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return type(self._value()).__name__


def looks(**parts: Any) -> Looks:
    """What tracing may see of these parts, by a name such as ``model.layers.0.p``."""
    walk = _Walk()
    walk.run(list(parts.items()))
    return walk.found


def difference(old: Looks, new: Looks) -> str | None:
    """The name of the first thing that is not the same, and how it changed; None if all is."""
    if old == new:
        return None
    names = [name for name in {**old, **new} if name not in old or name not in new or old[name] != new[name]]
    name = names[0]
    if name in old and name in new and isinstance(old[name], tuple) and old[name][0] == new[name][0] in _VALUE_TYPES:
        return f"{name} = {old[name][1]}"
    return f"another {name}"


_VALUE_TYPES = {"bool", "int", "float", "str", "NoneType"}


class _Walk:
    """A walk with a list of what is still to be looked at, so that depth does not matter."""

    def __init__(self) -> None:
        self.found: Looks = {}
        self.names: dict[int, str] = {}
        self.held: list[Any] = []  # what the walk made itself must live on, or its id would serve another

    def run(self, todo: list[tuple[str, Any]]) -> None:
        todo.reverse()
        while todo:
            name, value = todo.pop()
            if len(self.found) >= LIMIT:
                self.found["everything"] = "more than can be compared"
                return
            todo.extend(reversed(list(self._look(name, value))))

    def _look(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
            self.found[name] = (type(value).__name__, repr(value))
            return
        if not isinstance(value, tuple):  # of which equal ones need not be the same
            if id(value) in self.names:
                self.found[name] = ("same as", self.names[id(value)])
                return
            self.names[id(value)] = name
            self.held.append(value)
        if type(value) in _CONTAINERS:
            yield from self._container(name, value)
        elif isinstance(value, torch.Tensor):
            self.found[name] = _tensor(value)
        elif isinstance(value, np.ndarray):
            self.found[name] = _array(value)
        else:
            yield from self._inside(name, value)

    def _inside(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, enum.Enum | ModuleType | BuiltinFunctionType):
            self.found[name] = _Same(value)
        elif isinstance(value, FunctionType):
            yield from self._function(name, value)
        elif isinstance(value, MethodType):
            yield from [(f"{name}.__func__", value.__func__), (f"{name}.__self__", value.__self__)]
        elif isinstance(value, staticmethod | classmethod):
            yield f"{name}.__func__", value.__func__
        elif isinstance(value, property):
            yield from [(f"{name}.fget", value.fget), (f"{name}.fset", value.fset)]
        elif isinstance(value, functools.partial):
            yield from [
                (f"{name}.func", value.func),
                (f"{name}.args", value.args),
                (f"{name}.keywords", value.keywords),
            ]
        elif isinstance(value, type):
            yield from self._class(name, value)
        elif type(value).__module__.partition(".")[0] in ("torch", "numpy") and not isinstance(value, nn.Module):
            self.found[name] = _Same(value)  # what PyTorch keeps for itself changes as it is used
        else:
            yield from self._object(name, value)

    def _function(self, name: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
        code = function.__code__
        if _installed(code.co_filename):
            self.found[name] = ("code", _Same(code))
        else:
            self.found[name] = ("code", *_code(code))
            yield from self._globals(name, function)
        yield f"{name}.__defaults__", function.__defaults__
        yield f"{name}.__kwdefaults__", function.__kwdefaults__
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield f"{name}.{variable}", cell.cell_contents
            except ValueError:  # still empty
                self.found[f"{name}.{variable}"] = "empty"
        yield from ((f"{name}.{key}", item) for key, item in vars(function).items())

    def _globals(self, name: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
        known = function.__globals__
        named, attributes = _names(function.__code__)
        for each in named:
            if each in known:
                yield from _reached(f"{known.get('__name__', name)}.{each}", known[each], attributes)

    def _class(self, name: str, kind: type) -> Iterator[tuple[str, Any]]:
        self.found[name] = ("class", kind.__module__, kind.__qualname__)
        for base in kind.__mro__:
            place = f"{base.__module__}.{base.__qualname__}"
            if base is object or (id(base) in self.names and base is not kind):
                continue
            self.names[id(base)] = place
            for key, item in vars(base).items():
                if key in _SKIPPED:
                    continue
                if not _of_library(base.__module__):
                    yield f"{place}.{key}", item
                elif isinstance(item, FunctionType):  # which might be replaced, if hardly changed
                    self.found[f"{place}.{key}"] = _Same(item)

    def _object(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        yield f"{name}.__class__", type(value)
        attributes = _attributes(value)
        if isinstance(value, (*_CONTAINERS,)):
            yield from self._container(name, value)
        elif attributes is None:
            self.found[name] = _Same(value)
        yield from ((f"{name}.{key}", item) for key, item in (attributes or {}).items())
        if isinstance(value, nn.Module):
            yield from self._module(name, value)

    def _container(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        self.found[name] = (type(value).__name__, len(value))
        if isinstance(value, dict):
            yield from ((f"{name}[{key!r}]", item) for key, item in list(value.items()))
        else:
            items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(items))

    def _module(self, name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """Parameters and buffers by what a graph takes for granted: shapes, and which of them are the same."""
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            place = f"{name}.{key}"
            if tensor is None or id(tensor) in self.names:
                self.found[place] = ("same as", None if tensor is None else self.names[id(tensor)])
                continue
            self.names[id(tensor)] = place
            self.found[place] = ("tensor", tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        yield from ((f"{name}.{key}", child) for key, child in module._modules.items())


def _attributes(value: Any) -> dict[str, Any] | None:
    """An object's attributes in its dictionary and slots; None if it has no place for any."""
    skipped = {"_parameters", "_buffers", "_modules"} if isinstance(value, nn.Module) else set()
    found: dict[str, Any] | None = None
    if hasattr(value, "__dict__"):
        found = {key: item for key, item in list(vars(value).items()) if key not in skipped}
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for key in [slots] if isinstance(slots, str) else slots:
            if hasattr(value, key) and key not in ("__weakref__", "__dict__"):
                found = {**(found or {}), key: getattr(value, key)}
    return found


def _tensor(value: torch.Tensor) -> tuple[Any, ...]:
    """A tensor that is no parameter or buffer: the same one, not written into since."""
    version = 0 if value.is_inference() else value._version
    return "tensor", _Same(value), version, tuple(value.shape), value.dtype, value.requires_grad


def _array(value: np.ndarray) -> tuple[Any, ...]:
    if value.dtype.hasobject:
        return "array", _Same(value)
    digest = hashlib.blake2b(np.ascontiguousarray(value).view(np.uint8).data, digest_size=16).hexdigest()
    return "array", value.shape, value.dtype.str, digest


def _code(code: CodeType) -> tuple[Any, ...]:
    """What a function's code does, wherever it was compiled."""
    constants = tuple(_code(c) if isinstance(c, CodeType) else (type(c).__name__, repr(c)) for c in code.co_consts)
    return code.co_code, code.co_names, constants


@functools.cache
def _names(code: CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The globals that code and the functions inside it name, and whatever else they name."""
    found = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    others = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            named, attributes = _names(constant)
            found.extend(named)
            others.extend(attributes)
    return tuple(dict.fromkeys(found)), tuple(dict.fromkeys(others))


def _reached(name: str, value: Any, named: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """A global, or what is named of it if it is a module of the user's own."""
    todo, done = [(name, value)], set()
    while todo:
        place, item = todo.pop()
        if not isinstance(item, ModuleType):
            yield place, item
        elif id(item) not in done and not _of_library(item.__name__):
            done.add(id(item))
            todo.extend((f"{item.__name__}.{each}", getattr(item, each)) for each in named if hasattr(item, each))


@functools.cache
def _of_library(name: str) -> bool:
    """Whether a module of this name belongs to Python or an installed library."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return name.partition(".")[0] in sys.stdlib_module_names - {"__main__"} or (file is not None and _installed(file))


@functools.cache
def _installed(file: str) -> bool:
    """Whether a file belongs to Python or an installed library."""
    return file.startswith(("<frozen", *_LIBRARIES)) or not _PACKAGES.isdisjoint(Path(file).parts)

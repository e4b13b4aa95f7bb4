"""The captured graph: frozen nodes over one small op vocabulary, whatever library the model came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Any

import torch

from wholegrad.errors import UnsupportedOpError
from wholegrad.graph.layout import Layout, Role, extent, is_map, plain_size, shape_of


class Kind(StrEnum):
    """How a node runs."""

    IMAGE = "image"  # a map read by box
    TARGET = "target"  # likewise, handed to the loss
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    VALUE = "value"  # a small tensor that the caller hands to the loss: a slide's label
    MAP = "map"  # maps (and small tensors) to a map, tile by tile
    REDUCTION = "reduction"  # a map to a small tensor (rule 3), or to itself held whole (rule 10)
    SMALL = "small"  # small tensors to small tensors, held whole
    SPREAD = "spread"  # a small tensor that runs along the image, read by box like a map
    KEPT = "kept"  # a boundary's own values, read back by box (only in the graph of a backward sweep)


SOURCES = frozenset({Kind.IMAGE, Kind.TARGET, Kind.PARAMETER, Kind.BUFFER, Kind.CONSTANT, Kind.VALUE})
READERS = frozenset({Kind.IMAGE, Kind.TARGET})


@dataclass(frozen=True, order=True)
class Ref:
    """One output of one node."""

    node: int
    out: int = 0

    def __hash__(self) -> int:  # planning looks millions of them up
        return self.node << 4 ^ self.out


@dataclass(frozen=True)
class Spec:
    """Shape (with rows and columns marked) and dtype of a value at the true image size."""

    layout: Layout
    dtype: torch.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.layout)

    @cached_property
    def is_map(self) -> bool:
        return is_map(self.layout)

    @cached_property
    def rows(self) -> int:
        return extent(self.layout, Role.ROW) or 1

    @cached_property
    def cols(self) -> int:
        return extent(self.layout, Role.COL) or 1

    @cached_property
    def pixel_bytes(self) -> int:
        """Bytes per pixel of a map: every axis that is neither row nor column."""
        return plain_size(self.layout) * self.dtype.itemsize

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @cached_property
    def wide(self) -> bool:
        """Whether a small value of this Spec is held in float64."""
        return self.dtype.is_floating_point and self.numel <= WIDE_ELEMENTS

    @cached_property
    def held_bytes(self) -> int:
        """Bytes of a small value as it is held."""
        return self.numel * (8 if self.wide else self.dtype.itemsize)


WIDE_ELEMENTS = 1 << 16  # small values of up to this many elements are held in float64


def substitute(value: Any, table: Callable[[Ref], Any]) -> Any:
    """``value`` with every Ref inside it replaced by ``table(ref)``."""
    if isinstance(value, Ref):
        return table(value)
    if isinstance(value, tuple | list):
        return type(value)(substitute(item, table) for item in value)
    return value


def references(value: Any) -> Iterator[Ref]:
    """Every Ref inside nested arguments, in order."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from references(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from references(item)


@dataclass(frozen=True)
class Node:
    """One op of the graph, or one of its sources.

    Attributes:
        op: the ATen overload; None for a source.
        args, kwargs: as the op takes them, with a Ref in place of every tensor.
        operands: the Refs of args and kwargs in order.
        outputs: what the node returns, one Spec a tensor.
        path: module path of the call in the user's model, for messages.
        needs_grad: whether a parameter's gradient flows through here.
        draw: for a random op, its number among the random calls of model and loss; -1 for any other.
    """

    index: int
    name: str
    kind: Kind
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[Ref, ...]
    outputs: tuple[Spec, ...]
    path: str
    needs_grad: bool
    draw: int = -1

    @cached_property
    def refs(self) -> tuple[Ref, ...]:
        """Every output."""
        return tuple(Ref(self.index, i) for i in range(len(self.outputs)))

    def call(self, table: Callable[[Ref], Any], device: torch.device | None = None) -> tuple[Any, ...]:
        """Run the op as PyTorch would, on the tensors that ``table`` gives; always a tuple of outputs.

        Args:
            device: where an op that makes a tensor from nothing makes it; None for the CPU.
        """
        kwargs = {key: substitute(value, table) for key, value in self.kwargs.items()}
        made = device is not None and not self.operands
        if made and any(argument.name == "device" for argument in self.op._schema.arguments):
            kwargs["device"] = device
        result = self.op(*substitute(self.args, table), **kwargs)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    @property
    def place(self) -> str:
        """``module.path (aten.op)`` for messages."""
        return f"{self.path or 'model'} ({self.op or self.kind.value})"


@dataclass(frozen=True, eq=False)
class Graph:
    """Model, loss and metrics at one image shape.

    Attributes:
        nodes: in topological order; ``nodes[i].index == i``.
        constants: tensors that the capture found lying in the code, by node name.
        outputs: the model's outputs, maps or small tensors, in the order of its nested result.
        loss: the loss, or None for a graph that only predicts.
        metrics: small tensors computed beside the loss, by name.
        training: whether the model was in training mode when captured.
        updates: what the buffers that the model writes (running statistics) hold afterwards, by buffer name.
        looked_at: buffers whose values the code looked at while it was traced, as they were, by name.
        spans_known: a memory for :func:`wholegrad.graph.segment.spans`, which asks the same things many times.
    """

    nodes: tuple[Node, ...]
    constants: dict[str, torch.Tensor]
    outputs: tuple[Ref, ...]
    loss: Ref | None
    metrics: dict[str, Ref]
    training: bool
    updates: dict[str, Ref]
    looked_at: dict[str, torch.Tensor] = field(default_factory=dict)
    spans_known: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)
    _consumers: dict[int, tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found: dict[int, list[int]] = {node.index: [] for node in self.nodes}
        for node in self.nodes:
            for ref in dict.fromkeys(ref.node for ref in node.operands):
                found[ref].append(node.index)
        object.__setattr__(self, "_consumers", {key: tuple(value) for key, value in found.items()})

    def spec(self, ref: Ref) -> Spec:
        return self.nodes[ref.node].outputs[ref.out]

    def consumers(self, node: int) -> tuple[int, ...]:
        """Indices of the nodes that read an output of this one."""
        return self._consumers[node]

    def of_kind(self, *kinds: Kind) -> list[Node]:
        return [node for node in self.nodes if node.kind in kinds]

    @cached_property
    def image(self) -> Node:
        """The first image."""
        return self.of_kind(Kind.IMAGE)[0]

    @cached_property
    def random(self) -> bool:
        """Whether the model or the loss draws random numbers."""
        return any(node.draw >= 0 for node in self.nodes)

    def ancestors(self, roots: list[int]) -> set[int]:
        """Indices of the nodes that ``roots`` depend on, themselves included."""
        return _reached(roots, lambda index: (ref.node for ref in self.nodes[index].operands))

    def descendants(self, roots: list[int]) -> set[int]:
        """Indices of the nodes that depend on ``roots``, themselves included."""
        return _reached(roots, self.consumers)


def _reached(roots: list[int], following: Callable[[int], Iterable[int]]) -> set[int]:
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        index = stack.pop()
        if index not in seen:
            seen.add(index)
            stack.extend(following(index))
    return seen


def unsupported(node_place: str, cause: str) -> UnsupportedOpError:
    """The error for an op that cannot run tile by tile."""
    return UnsupportedOpError(
        node_place,
        cause,
        "register a rule with wholegrad.graph.rules.register, or rewrite this part of the model",
    )

"""What a step is called with: images and targets by name and shape, and how they go into model and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_unflatten

from wholegrad.graph.graph import Kind


@dataclass(frozen=True)
class Input:
    """One tensor that the caller hands over.

    Attributes:
        kind: ``Kind.IMAGE`` or ``Kind.TARGET`` for a map, ``Kind.VALUE`` for a small tensor.
        shape: at full size.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Constant:
    """An argument that is no tensor: a number, a string, None."""

    value: Any


Leaf = Input | Constant


@dataclass(frozen=True)
class Inputs:
    """Everything that model and loss are called with, flattened.

    Attributes:
        images: the model's arguments, in the order of ``image_tree``, which nests them as ``(args, kwargs)``.
        targets: the leaves of the loss's second argument.
    """

    images: tuple[Leaf, ...]
    image_tree: TreeSpec
    targets: tuple[Leaf, ...]
    target_tree: TreeSpec

    @property
    def tensors(self) -> tuple[Input, ...]:
        """Those that are tensors, images first."""
        return tuple(leaf for leaf in (*self.images, *self.targets) if isinstance(leaf, Input))

    def nested(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """The model's positional and keyword arguments and the loss's target, from a value for each of ``tensors``."""
        given = iter(tensors)

        def leaves(wanted: tuple[Leaf, ...]) -> list[Any]:
            return [leaf.value if isinstance(leaf, Constant) else next(given) for leaf in wanted]

        args, kwargs = tree_unflatten(leaves(self.images), self.image_tree)
        return tuple(args), kwargs, tree_unflatten(leaves(self.targets), self.target_tree)

"""Images and targets as the user hands them over: nested, lazy or in memory, maps or small tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from wholegrad.errors import ShapeError
from wholegrad.graph.graph import Kind
from wholegrad.graph.inputs import Constant, Input, Inputs, Leaf
from wholegrad.run.reader import MapReader
from wholegrad.run.sources import Source
from wholegrad.slide.arrays import as_reader


@dataclass(frozen=True)
class Given:
    """What a step is called with.

    Attributes:
        inputs: names, shapes and nesting.
        sources: where the pixels of each map come from, by name.
        values: the small tensors, by name.
    """

    inputs: Inputs
    sources: dict[str, Source]
    values: dict[str, torch.Tensor]

    @property
    def cache_bytes(self) -> int:
        return sum(source.cache_bytes for source in self.sources.values())

    def whole(self) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Everything as whole contiguous tensors, nested as model and loss take it: for the oracle."""
        tensors = [
            self.sources[each.name].whole().contiguous() if each.name in self.sources else self.values[each.name]
            for each in self.inputs.tensors
        ]
        return self.inputs.nested(tensors)

    def check_sizes(self) -> None:
        """Where one image and a target map differ in size, say so.

        Raises:
            ShapeError: they do.
        """
        images = [leaf for leaf in self.inputs.images if isinstance(leaf, Input) and leaf.kind is Kind.IMAGE]
        for leaf in self.inputs.targets:
            if isinstance(leaf, Input) and leaf.kind is Kind.TARGET and len(images) == 1:
                mine, other = leaf.shape[-2:], images[0].shape[-2:]
                if mine != other:
                    raise ShapeError(
                        leaf.name,
                        f"is {mine[0]} x {mine[1]} but the image is {other[0]} x {other[1]} pixels",
                        "give both the same height and width (open_mask aligns a mask to its slide)",
                    )


def given(image: Any, target: Any, dtype: torch.dtype) -> Given:
    """Images and targets, flattened and named.

    Args:
        image: one image; a tuple or list of them, for ``model(*images)``; or a dictionary, for ``model(**images)``. An
            image is a reader, NumPy array, memmap, Zarr array or tensor of shape ``(C, H, W)``, which gets a batch
            axis in front, or ``(N, C, H, W)``.
        target: what the loss gets, nested as it likes: maps, small tensors (a slide's label), numbers. Beside an
            image without batch axis, maps of shape ``(C, H, W)`` and ``(H, W)`` get a batch axis too, and so does a
            tensor without dimensions.

    Raises:
        ShapeError: a rank that is none of these.
    """
    sources: dict[str, Source] = {}
    values: dict[str, torch.Tensor] = {}
    call: tuple[tuple[Any, ...], dict[str, Any]]
    if isinstance(image, dict):
        call, names = ((), image), [f"image.{key}" for key in image]
    elif isinstance(image, tuple | list):
        call, names = (tuple(image), {}), [f"image.{i}" for i in range(len(image))]
    else:
        call, names = ((image,), {}), ["image"]
    leaves, tree = tree_flatten(call, is_leaf=_is_leaf)
    if len(leaves) != len(names):
        raise ShapeError("image", "is nested", "give one image, a tuple for model(*images) or a dictionary")
    images = tuple(_image(name, leaf, dtype, sources, values) for name, leaf in zip(names, leaves, strict=True))
    first = next((leaf for leaf in images if isinstance(leaf, Input) and leaf.kind is Kind.IMAGE), None)
    if first is None:
        raise ShapeError("image", "has no pixels", "give at least one map (C, H, W)")
    batched = any(len(getattr(leaf, "shape", ())) == 4 for leaf in leaves)
    found, target_tree = tree_flatten(target, is_leaf=_is_leaf)
    words = ["target"] if len(found) == 1 else [f"target.{i}" for i in range(len(found))]
    targets = tuple(
        _target(name, leaf, batched, first.shape[0], sources, values) for name, leaf in zip(words, found, strict=True)
    )
    return Given(Inputs(images, tree, targets, target_tree), sources, values)


def in_dtype(target: Any, dtype: torch.dtype) -> Any:
    """A nested target with its floating-point tensors in ``dtype``."""
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, target)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, MapReader | Source) or value is None


def _image(
    name: str, image: Any, dtype: torch.dtype, sources: dict[str, Source], values: dict[str, torch.Tensor]
) -> Leaf:
    if isinstance(image, Source):
        return _map(name, Kind.IMAGE, image, sources)
    rank = len(getattr(image, "shape", ()))
    if not isinstance(image, MapReader) and rank < 3 and name != "image":
        return _value(name, image, values)
    return _map(name, Kind.IMAGE, Source(_readers(image, name), dtype, scale=True), sources)


def _target(
    name: str, target: Any, batched: bool, batch: int, sources: dict[str, Source], values: dict[str, torch.Tensor]
) -> Leaf:
    if isinstance(target, Source):
        return _map(name, Kind.TARGET, target, sources)
    shape = tuple(getattr(target, "shape", ()))
    reader = isinstance(target, MapReader)
    labels = len(shape) < 2 or (len(shape) == 2 and (batched or shape[0] == batch))
    if not reader and labels:
        return _value(name, target, values, unbatched=not batched)
    if not reader and batched and len(shape) == 3:
        readers: Sequence[MapReader] = [as_reader(target[i][None], name=name) for i in range(shape[0])]
        return _map(name, Kind.TARGET, Source(readers, None, scale=False, rank=3), sources)
    rank = 3 if not reader and len(shape) == 2 else 4
    return _map(name, Kind.TARGET, Source(_readers(target, name), None, scale=False, rank=rank), sources)


def _map(name: str, kind: Kind, source: Source, sources: dict[str, Source]) -> Input:
    sources[name] = source
    return Input(name, kind, source.shape, source.out_dtype)


def _value(name: str, value: Any, values: dict[str, torch.Tensor], unbatched: bool = False) -> Leaf:
    if isinstance(value, np.ndarray | np.generic):
        value = torch.as_tensor(np.array(value))
    if not isinstance(value, torch.Tensor):
        return Constant(value)
    if value.device.type == "meta":
        raise ShapeError(name, "is a tensor on meta, without values", "give one that has some")
    tensor = value.detach().to("cpu")
    values[name] = tensor.reshape(1) if unbatched and tensor.dim() == 0 else tensor
    return Input(name, Kind.VALUE, tuple(values[name].shape), tensor.dtype)


def _readers(value: Any, name: str) -> Sequence[MapReader]:
    if isinstance(value, MapReader):
        return [value]
    shape = tuple(getattr(value, "shape", ()))
    if len(shape) == 4 and shape[0] > 0:
        return [as_reader(value[i], name=name) for i in range(shape[0])]
    if len(shape) == 3 or (len(shape) == 2 and name.startswith("target")):
        return [as_reader(value, name=name)]
    raise ShapeError(name, f"has shape {shape}", "give (C, H, W), or (N, C, H, W) for a batch")

"""What a step on whole maps would hold at most: it is run on tensors without memory, and what lives is counted.

Every op runs in PyTorch's fake-tensor mode at the true shape, the user's own code included; a dispatch mode notes each
storage as it comes and, by a weak reference, as it goes. What kernels take for themselves meanwhile is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wholegrad.graph.graph import Graph, Kind, Node, Ref
from wholegrad.graph.inputs import Inputs
from wholegrad.plan.strategies import Footprint
from wholegrad.run import offload
from wholegrad.run.recompute import Chunks, Recompute
from wholegrad.run.whole import meaning
from wholegrad.run.whole_image import Parts, StandIns, whole_step


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of storages that are alive, and notes the tensor of most elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.largest = 0
        self.place = ""
        self._known: set[int] = set()

    def count(self, value: Any, place: str) -> None:
        """Note every tensor in ``value``."""
        for leaf in tree_leaves(value):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            if id(storage) not in self._known:
                self._known.add(id(storage))
                size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self._gone, id(storage), size).atexit = False
            if leaf.numel() > self.largest:
                self.largest, self.place = leaf.numel(), place
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result, str(func))
        return result


class _Saved:
    """Hooks that count what is saved for the backward pass; with ``away``, large tensors are let go meanwhile."""

    def __init__(self, away: bool, leaves: Mapping[str, torch.Tensor]) -> None:
        self.away, self.bytes, self.moved = away, 0, 0
        self._kept = {id(leaf.untyped_storage()) for leaf in leaves.values()}
        self._seen: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def saving(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size()
        known = self._seen.get(id(storage))
        if id(storage) in self._kept:
            return tensor
        if known is None or known() is not storage:
            self._seen[id(storage)] = weakref.ref(storage)
            self.bytes += size
            self.moved += size if size >= offload.LEAST else 0
        if not self.away or size < offload.LEAST:
            return tensor
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        shape, stride, dtype, device = packed
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _fakes(inputs: Inputs, last: bool) -> list[torch.Tensor]:
    """Images and targets without memory; with ``last``, images with their pixels interleaved."""
    made = []
    for each in inputs.tensors:
        interleaved = last and each.kind is Kind.IMAGE and len(each.shape) == 4
        form = torch.channels_last if interleaved else torch.contiguous_format
        made.append(torch.empty(each.shape, dtype=each.dtype, memory_format=form))
    return made


def rehearse_whole(
    parts: Parts, tensors: Mapping[str, torch.Tensor], inputs: Inputs, away: bool, interleaved: bool
) -> Footprint:
    """The step of :func:`wholegrad.run.whole_image.whole_step`.

    Args:
        away: whether what the backward pass needs waits elsewhere.
        interleaved: whether images have their channels last.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Living() as living:
        leaves = StandIns(parts, tensors, _empty)
        given = inputs.nested(_fakes(inputs, interleaved))
        saved = _Saved(away, leaves.named)
        whole_step(parts, leaves, given, keeping=saved.saving())
    return Footprint(living.peak, saved.bytes, saved.moved if away else 0, living.largest, living.place)


def rehearse_chunks(
    graph: Graph, chunks: Chunks, tensors: Mapping[str, torch.Tensor], inputs: Inputs, interleaved: bool
) -> Footprint:
    """The step of :class:`wholegrad.run.recompute.Recompute`."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Living() as living:
        fakes = dict(zip((each.name for each in inputs.tensors), _fakes(inputs, interleaved), strict=True))
        leaves = {name: _empty(tensor, False) for name, tensor in tensors.items()}
        step = Recompute(graph, chunks, {**leaves, **fakes}, 0, run=_without_numbers)
        held = living.now
        kept = [0]

        def note(sweep: str) -> None:
            if sweep == "forward":
                kept[0] = max(kept[0], living.now - held)

        step.progress = note
        step.step()
    return Footprint(living.peak, kept[0], 0, living.largest, living.place)


def _without_numbers(node: Node, values: Mapping[Ref, torch.Tensor], seed: int) -> tuple[torch.Tensor, ...]:
    if node.draw >= 0:
        return (torch.empty(node.outputs[0].shape, dtype=node.outputs[0].dtype),)
    return meaning(node, values, seed)


def _empty(tensor: torch.Tensor, buffer: bool) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

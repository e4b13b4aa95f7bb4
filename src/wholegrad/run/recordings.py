"""Bodies of tiles recorded once for each kind and replayed: hundreds of launches become one.

A recording reads and writes tensors that stay where they are. So a lane has one block of memory for what bodies read
and one for what they make; a tile's inputs are copied into the first, the recording runs, and what it made is copied
out of the second. Recordings of one lane share their working memory too, because a lane runs one tile at a time.

They belong to a plan and are kept from step to step, as long as no other plan runs. What cannot be recorded (an op that
waits for the host, a tile like few others) runs as it would without.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from wholegrad.run.device import Device, Recording

ALIGNED = 512  # bytes at which every tensor of a block starts
TENSOR = "a tensor"  # in its place
FEWEST = 2  # tiles of a kind for each lane that records it: recording takes the time of a few tiles


class _Lane:
    """Memory of one lane: what bodies read, and what they make."""

    def __init__(self) -> None:
        self.blocks: dict[str, torch.Tensor] = {}

    def places(self, name: str, like: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        """Tensors of these shapes and strides in the block of this name, one after another."""
        starts, size = [], 0
        for each in like:
            starts.append(size)
            size += -(-each.numel() * each.element_size() // ALIGNED) * ALIGNED
        block = self.blocks.get(name)
        if block is None or block.numel() < size:  # an older one stays with the recordings that use it
            block = self.blocks[name] = torch.empty(max(size, ALIGNED), dtype=torch.uint8, device=device)
        found = []
        for start, each in zip(starts, like, strict=True):
            flat = block[start : start + each.numel() * each.element_size()].view(each.dtype)
            found.append(flat.as_strided(each.shape, _dense(each)))
        return found


def _dense(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides in the order of the tensor's own, without gaps."""
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim] == 1, -dim))
    strides, step = [0] * tensor.dim(), 1
    for dim in order:
        strides[dim] = step
        step *= tensor.shape[dim]
    return tuple(strides)


class _Recorded(NamedTuple):
    """One kind in one lane: how what a body reads and makes is made up, where it lies, and the recording."""

    recording: Recording
    read: list[torch.Tensor]
    reads: TreeSpec
    rest: list[Any]
    made: list[torch.Tensor]
    others: list[Any]
    makes: TreeSpec


class Recordings:
    """Of one plan on one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._lanes = [_Lane() for _ in range(device.options.at_once)]
        self._kinds: dict[Hashable, Mapping[int, Hashable]] = {}
        self._kept: dict[tuple[Hashable, Hashable, int], _Recorded] = {}
        self._tried: set[tuple[Hashable, Hashable]] = set()

    def begin(self, name: Hashable, kinds: Mapping[int, Hashable]) -> None:
        """Say which kind each tile of a pass is of."""
        self._kinds[name] = kinds

    def wanted(self, name: Hashable, kind: Hashable, count: int) -> bool:
        """Whether so many tiles of a kind are worth a recording that nobody tried yet."""
        return kind is not None and (name, kind) not in self._tried and count >= FEWEST * len(self._lanes)

    def record(self, name: Hashable, kind: Hashable, given: Any, body: Callable[[Any], Any]) -> None:
        """Record a kind in every lane, where it can be; no tile may be running."""
        self._tried.add((name, kind))
        for number, lane in enumerate(self._lanes):
            found = self._recorded(lane, number, given, body)
            if found is None:
                return
            self._kept[name, kind, number] = found

    def _recorded(self, lane: _Lane, number: int, given: Any, body: Callable[[Any], Any]) -> _Recorded | None:
        leaves, reads = tree_flatten(given)
        tensors, rest = _parted(leaves)
        read = lane.places("read", tensors, self.device.torch)
        _copied(read, tensors)
        given = _filled(reads, rest, read)
        trial, makes = tree_flatten(body(given))
        wanted, others = _parted(trial)
        made = lane.places("made", wanted, self.device.torch)
        del trial, wanted, tensors, leaves

        def work() -> None:
            _copied(made, _parted(tree_flatten(body(given))[0])[0])

        done = self.device.recorded(work, number)
        if done is None:
            return None
        return _Recorded(done, read, reads, rest, made, others, makes)

    def replayed(self, name: Hashable, lane: int, tile: int, given: Any) -> Any | None:
        """What a tile's body makes of ``given``; None where there is no recording of its kind."""
        found = self._kept.get((name, self._kinds.get(name, {}).get(tile), lane))
        if found is None:
            return None
        leaves, reads = tree_flatten(given)
        tensors, rest = _parted(leaves)
        if reads != found.reads or rest != found.rest or not _alike(found.read, tensors):
            return None
        _copied(found.read, tensors)
        found.recording.replay()
        return _filled(found.makes, found.others, [each.clone() for each in found.made])

    @property
    def count(self) -> int:
        """How many recordings there are."""
        return len(self._kept)


def _parted(leaves: list[Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """The tensors, and all leaves with ``TENSOR`` in their places."""
    tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
    return tensors, [TENSOR if isinstance(each, torch.Tensor) else each for each in leaves]


def _filled(tree: TreeSpec, rest: list[Any], tensors: list[torch.Tensor]) -> Any:
    """The containers with these tensors in their places."""
    places = iter(tensors)
    return tree_unflatten([next(places) if each is TENSOR else each for each in rest], tree)


def _alike(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def _copied(to: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for place, each in zip(to, found, strict=True):
            place.copy_(each)


def _same(a: Device, b: Device) -> bool:
    return a.name == b.name and a.options == b.options


class _Held:
    """The recordings of the plan that ran last."""

    def __init__(self) -> None:
        self.owner: weakref.ref[object] | None = None
        self.found: Recordings | None = None

    def of(self, owner: object, device: Device) -> Recordings:
        if (
            self.owner is None
            or self.owner() is not owner
            or self.found is None
            or not _same(self.found.device, device)
        ):
            self.drop()
            self.owner, self.found = weakref.ref(owner, lambda gone: self._gone(gone)), Recordings(device)
        return self.found

    def _gone(self, gone: weakref.ref[object]) -> None:
        if gone is self.owner:
            self.drop()

    def drop(self) -> None:
        if self.found is not None:
            self.found.device.forget_recordings()
        self.owner, self.found = None, None


_held = _Held()


def recordings_of(owner: object, device: Device) -> Recordings:
    """The recordings that steps of this plan share; those of any other are dropped."""
    return _held.of(owner, device)


def drop_recordings() -> None:
    """Give back what no step is using."""
    _held.drop()

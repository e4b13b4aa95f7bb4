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
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from wholegrad.run.device import Device, Recording

ALIGNED = 512  # bytes at which every tensor of a block starts
READ, MADE = "read", "made"
TENSOR = "a tensor"  # in its place
FEWEST = 2  # tiles of a kind for each lane that records it: recording takes the time of a few tiles


class _Form(NamedTuple):
    """Tensors one after another in a block: its bytes, and where each starts, its dtype, shape and strides."""

    size: int
    places: list[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]]

    @staticmethod
    def of(like: list[torch.Tensor]) -> _Form:
        places, size = [], 0
        for each in like:
            places.append((size, each.dtype, tuple(each.shape), _dense(each)))
            size += -(-each.numel() * each.element_size() // ALIGNED) * ALIGNED
        return _Form(size, places)

    def tensors(self, block: torch.Tensor) -> list[torch.Tensor]:
        """Views of such a block."""
        found = []
        for start, dtype, shape, strides in self.places:
            flat = block[start : start + prod(shape) * dtype.itemsize].view(dtype)
            found.append(flat.as_strided(shape, strides))
        return found


def _dense(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides in the order of the tensor's own, without gaps."""
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim] == 1, -dim))
    strides, step = [0] * tensor.dim(), 1
    for dim in order:
        strides[dim] = step
        step *= tensor.shape[dim]
    return tuple(strides)


class _Tree(NamedTuple):
    """Containers without their tensors."""

    spec: TreeSpec
    rest: list[Any]

    @staticmethod
    def of(value: Any) -> tuple[_Tree, list[torch.Tensor]]:
        leaves, spec = tree_flatten(value)
        rest = [TENSOR if isinstance(each, torch.Tensor) else each for each in leaves]
        return _Tree(spec, rest), [each for each in leaves if isinstance(each, torch.Tensor)]

    def filled(self, tensors: list[torch.Tensor]) -> Any:
        """The containers with these tensors in their places."""
        places = iter(tensors)
        return tree_unflatten([next(places) if each is TENSOR else each for each in self.rest], self.spec)


class _Constants:
    """What all bodies of a pass read in one lane; ``of`` whose values lie there."""

    def __init__(self, value: Any) -> None:
        self.tree, tensors = _Tree.of(value)
        self.tensors = [each.detach().clone(memory_format=torch.contiguous_format) for each in tensors]
        self.of = value


class _Recorded(NamedTuple):
    """One kind in one lane: how what a body reads and makes is made up, where it lies, and the recording."""

    recording: Recording
    given: _Tree
    read: list[torch.Tensor]
    makes: _Tree
    made: _Form


class Recordings:
    """Of one plan on one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.lanes = device.options.at_once
        self._blocks: dict[str, list[torch.Tensor]] = {READ: [], MADE: []}  # one for each lane
        self._kinds: dict[Hashable, Mapping[int, Hashable]] = {}
        self._kept: dict[tuple[Hashable, Hashable, int], _Recorded] = {}
        self._constants: dict[tuple[Hashable, int], _Constants] = {}

    def knows(self, name: Hashable) -> bool:
        """Whether a pass was begun, in an earlier step."""
        return name in self._kinds

    def begin(self, name: Hashable, kinds: Mapping[int, Hashable]) -> None:
        """Say which kind each tile of a pass is of."""
        self._kinds[name] = kinds

    def wanted(self, kind: Hashable, count: int) -> bool:
        """Whether so many tiles of a kind are worth a recording."""
        return kind is not None and count >= FEWEST * self.lanes

    def record(self, name: Hashable, kind: Hashable, given: Any, constants: Any, body: Callable[..., Any]) -> None:
        """Record ``body(given, constants)`` in every lane, where it can be; no tile may be running.

        Args:
            given: what a tile reads of its own.
            constants: what all tiles of the pass read.
        """
        for lane in range(self.lanes):
            if (name, lane) not in self._constants:
                self._constants[name, lane] = _Constants(constants)
        bodies = [partial(self._run, body, self._constants[name, lane]) for lane in range(self.lanes)]
        tree, tensors = _Tree.of(given)
        reads = _Form.of(tensors)
        self._reserve(READ, reads.size, name)
        makes, trial = _Tree.of(bodies[0](tree.filled(tensors)))
        made = _Form.of(trial)
        del trial
        self._reserve(MADE, made.size, name)
        for lane in range(self.lanes):
            read = reads.tensors(self._blocks[READ][lane])
            _copied(read, tensors)
            places = made.tensors(self._blocks[MADE][lane])
            work = partial(self._work, bodies[lane], tree.filled(read), places)
            done = self.device.recorded(work, lane)
            if done is None:
                return
            self._kept[name, kind, lane] = _Recorded(done, tree, read, makes, made)

    def _reserve(self, what: str, size: int, name: Hashable) -> None:
        """Blocks of at least so many bytes. Recordings that use smaller ones go, to be made again in the next step."""
        blocks = self._blocks[what]
        if blocks and blocks[0].numel() >= size:
            return
        if self._kept:
            self._kept.clear()
            self.device.forget_recordings()
        self._kinds = {known: kinds for known, kinds in self._kinds.items() if known == name}
        blocks.clear()
        for _ in range(self.lanes):
            blocks.append(torch.empty(max(size, ALIGNED), dtype=torch.uint8, device=self.device.torch))

    @staticmethod
    def _run(body: Callable[..., Any], held: _Constants, given: Any) -> Any:
        return body(given, held.tree.filled(held.tensors))

    @staticmethod
    def _work(body: Callable[[Any], Any], given: Any, places: list[torch.Tensor]) -> None:
        _copied(places, _Tree.of(body(given))[1])

    def replayed(self, name: Hashable, lane: int, tile: int, given: Any, constants: Any) -> Any | None:
        """What a tile's body makes of these; None where there is no recording of its kind."""
        found = self._kept.get((name, self._kinds.get(name, {}).get(tile), lane))
        if found is None:
            return None
        tree, tensors = _Tree.of(given)
        if tree != found.given or not _alike(found.read, tensors) or not self._renewed(name, lane, constants):
            return None
        _copied(found.read, tensors)
        found.recording.replay()
        return found.makes.filled(found.made.tensors(self._blocks[MADE][lane][: found.made.size].clone()))

    def _renewed(self, name: Hashable, lane: int, constants: Any) -> bool:
        """Bring a pass's constants to a lane, once a step; False if they are not like those that were recorded."""
        held = self._constants[name, lane]
        if held.of is not constants:
            tree, tensors = _Tree.of(constants)
            if tree != held.tree or not _alike(held.tensors, tensors):
                return False
            _copied(held.tensors, tensors)
            held.of = constants
        return True

    @property
    def count(self) -> int:
        """How many recordings there are."""
        return len(self._kept)


def _alike(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def _copied(to: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    with torch.no_grad():
        if to:
            torch._foreach_copy_(to, found)  # one launch for many small ones


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

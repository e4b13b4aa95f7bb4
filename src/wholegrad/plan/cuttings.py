"""One set of boundaries: the segments that it makes, where boundaries may live, and what is held while each runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wholegrad.graph import fusion
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.recall import recallable
from wholegrad.graph.segment import Cutter, Segment
from wholegrad.plan import cost, memory
from wholegrad.plan.pieces import Option, Piece, Terms
from wholegrad.plan.plan import Placement
from wholegrad.plan.spill import spill_bytes
from wholegrad.plan.storage import stored_bytes

Bytes = npt.NDArray[np.int64]
WAYS = 16  # numbers of boundaries in host memory that are tried, in each order


class Held(NamedTuple):
    """Bytes of boundaries and their gradients in host memory while each segment runs forward, and backward."""

    forward: Bytes
    backward: Bytes


class Choice(NamedTuple):
    """A tile for each segment, where boundaries live, and the predicted seconds of it all."""

    seconds: float
    options: tuple[Option, ...]
    places: dict[Ref, Placement]


class Cutting:
    """The segments of one set of boundaries.

    Args:
        placement: of all boundaries, or of some; the rest is open.
    """

    def __init__(
        self,
        graph: Graph,
        terms: Terms,
        pieces: Sequence[Piece],
        boundaries: Sequence[Ref],
        placement: Placement | Mapping[Ref, Placement] | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.graph, self.terms, self.pieces, self.dtype = graph, terms, tuple(pieces), dtype
        self.boundaries = tuple(sorted(boundaries, key=lambda ref: (self.stored(ref), ref)))
        fixed = dict.fromkeys(boundaries, placement) if isinstance(placement, Placement) else dict(placement or {})
        self.fixed = {ref: place for ref, place in fixed.items() if ref in boundaries}
        self.open = tuple(ref for ref in self.boundaries if ref not in self.fixed)
        self.leftover = memory.leftover(len(self.pieces))

    def stored(self, ref: Ref) -> int:
        """Bytes of a boundary as it is stored."""
        return stored_bytes(self.graph.spec(ref), self.dtype)

    def gradient(self, ref: Ref) -> int:
        """Bytes of its gradient, which keeps the graph's dtype; 0 if there is none."""
        wanted = self.terms.backward and self.graph.nodes[ref.node].needs_grad
        return self.graph.spec(ref).nbytes if wanted else 0

    @cached_property
    def lives(self) -> dict[Ref, Held]:
        """What each boundary in host memory adds to what is held."""
        count = len(self.pieces)
        made: dict[Ref, int] = {}
        read: dict[Ref, list[int]] = {ref: [] for ref in self.boundaries}
        for k, piece in enumerate(self.pieces):
            made |= dict.fromkeys(piece.segment.outputs, k)
            for ref in piece.segment.maps:
                if ref in read:
                    read[ref].append(k)
        found = {}
        for ref in self.boundaries:
            first, last = made[ref], max(read[ref], default=made[ref])
            held = Held(np.zeros(count, np.int64), np.zeros(count, np.int64))
            size = self.stored(ref)
            held.forward[first : count if self.terms.backward else last + 1] += size
            if self.terms.backward:
                recalled = recallable(self.graph, self.pieces[first].segment, {ref})
                held.backward[first if recalled else min(read[ref], default=last + 1) :] += size
                held.backward[first : last + 1] += self.gradient(ref)
            found[ref] = held
        return found

    def held(self, hosts: Sequence[Ref]) -> Held:
        """With these boundaries in host memory."""
        zero = np.zeros(len(self.pieces), np.int64)
        return Held(
            sum((self.lives[ref].forward for ref in hosts), zero),
            sum((self.lives[ref].backward for ref in hosts), zero),
        )

    def ways(self) -> list[dict[Ref, Placement]]:
        """Placements worth trying: the first so many in host memory, by size and by how long each would stay there."""
        if not self.open:
            return [self.fixed]
        short = sorted(
            self.open, key=lambda ref: (int(np.count_nonzero(self.lives[ref].backward)), self.stored(ref), ref)
        )
        count = len(self.open)
        numbers = sorted({count * k // WAYS for k in range(WAYS + 1)}, reverse=True)
        found = {tuple(sorted(order[:number])): None for number in numbers for order in (self.open, tuple(short))}
        return [self.placed(hosts) for hosts in found]

    def filled(self, room: float) -> dict[Ref, Placement]:
        """Host memory for the smallest boundaries and their gradients, up to ``room`` bytes."""
        hosts = []
        for ref in self.open:
            room -= self.stored(ref) + self.gradient(ref)
            if room < 0:
                break
            hosts.append(ref)
        return self.placed(hosts)

    def placed(self, hosts: Sequence[Ref]) -> dict[Ref, Placement]:
        """These in host memory, every other open one on disk, and the fixed ones."""
        kept = set(hosts)
        found = {ref: Placement.HOST if ref in kept else Placement.DISK for ref in self.open}
        return {ref: self.fixed.get(ref) or found[ref] for ref in self.boundaries}

    def disk_seconds(self, places: Mapping[Ref, Placement]) -> float:
        """What boundaries on disk cost more than in host memory."""
        on_disk = [ref for ref, place in places.items() if place is Placement.DISK]
        return sum(cost.disk_seconds(self.terms.rates, self.stored(ref), self.gradient(ref)) for ref in on_disk)

    @cached_property
    def least_seconds(self) -> float:
        """Of every segment with its fastest tile, boundaries not counted."""
        return sum(piece.fine[0].seconds if piece.fine else float("inf") for piece in self.pieces)

    def choose(self, room: float, places: dict[Ref, Placement], coarse: bool = False) -> Choice | None:
        """The fastest tiles that fit into ``room`` bytes beside boundaries in these places; None if none do."""
        held = self.held([ref for ref, place in places.items() if place is Placement.HOST])
        room -= self.leftover + self.spill(places)
        found = []
        for piece, ahead, back in zip(self.pieces, held.forward.tolist(), held.backward.tolist(), strict=True):
            if (back if piece.fused else max(ahead, back)) > room:
                return None
            option = piece.fastest(piece.coarse if coarse else piece.fine, room - ahead, room - back)
            if option is None:
                return None
            found.append(option)
        seconds = sum(option.seconds for option in found) + self.disk_seconds(places)
        return Choice(seconds, tuple(found), places)

    def peak(self, choice: Choice) -> int:
        """Bytes beyond what is there whatever the plan."""
        held = self.held([ref for ref, place in choice.places.items() if place is Placement.HOST])
        most = 0
        for k, (piece, option) in enumerate(zip(self.pieces, choice.options, strict=True)):
            ahead, back = piece.needs(option.tile)
            if not piece.fused:
                most = max(most, int(held.forward[k]) + ahead)
            if self.terms.backward:
                most = max(most, int(held.backward[k]) + back)
        return most + self.leftover + self.spill(choice.places)

    def spill(self, places: Mapping[Ref, Placement]) -> int:
        """Bytes of memory that boundaries on disk take."""
        spilled = [ref for ref, place in places.items() if place is Placement.DISK]
        return spill_bytes(self.graph, spilled, self.dtype, self.terms.workers)

    def on_disk(self, places: Mapping[Ref, Placement]) -> int:
        """Bytes there at most, boundaries' gradients included."""
        held = self.held([ref for ref, place in places.items() if place is Placement.DISK])
        return max((int(each.max(initial=0)) for each in held), default=0)

    @cached_property
    def smallest(self) -> Choice | None:
        """The least memory: smallest tiles, all open boundaries on disk; None if a tile is too large for rule 8."""
        options = [piece.least for piece in self.pieces]
        found = tuple(option for option in options if option is not None)
        return Choice(0.0, found, self.placed([])) if len(found) == len(options) else None

    def settle(self, choice: Choice) -> None:
        """Look at every tile that a choice uses."""
        for piece, option in zip(self.pieces, choice.options, strict=True):
            piece.settle(option.tile)


class Cuttings:
    """Every set of boundaries that was ever looked at, for one graph and request."""

    def __init__(
        self,
        graph: Graph,
        terms: Terms,
        placement: Placement | Mapping[Ref, Placement] | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.graph, self.terms, self.placement, self.dtype = graph, terms, placement, dtype
        self.macs = cost.pixel_macs(graph)
        self._cutter = Cutter(graph, apart=dtype is not None)  # sums see boundaries as they are stored
        self._pieces: dict[tuple[int, bool], Piece] = {}
        self._known: dict[frozenset[Ref], list[Cutting]] = {}
        self._one_pass: dict[tuple[int, ...], tuple[bool, frozenset[int]]] = {}
        self._written = {ref for ref in terms.sinks if not graph.consumers(ref.node)}  # and read no more

    def of(self, boundaries: frozenset[Ref]) -> list[Cutting]:
        """The ways to cut along these boundaries."""
        if boundaries not in self._known:
            self._known[boundaries] = [self._cutting(*way, boundaries) for way in self._variants(boundaries)]
        return self._known[boundaries]

    def _cutting(self, segments: Sequence[Segment], fused: bool, boundaries: frozenset[Ref]) -> Cutting:
        last = len(segments) - 1
        pieces = [self._piece(segment, fused and k == last) for k, segment in enumerate(segments)]
        kept = [ref for ref in boundaries if ref not in self._written]
        return Cutting(self.graph, self.terms, pieces, kept, self.placement, self.dtype)

    def _piece(self, segment: Segment, fused: bool) -> Piece:
        key = (id(segment), fused)  # the cutter keeps segments, each once
        if key not in self._pieces:
            self._pieces[key] = Piece(self.graph, self.macs, self.terms, segment, fused)
        return self._pieces[key]

    def _variants(self, boundaries: frozenset[Ref]) -> list[tuple[tuple[Segment, ...], bool]]:
        """Ways to cut, each with whether its last segment may run in one pass."""
        plain = self._cutter.cut(boundaries)
        if not self.terms.backward or not plain or plain[-1].outputs:
            return [(plain, False)]
        known, free = self._fusible(plain[-1].reductions)
        if known:
            return [(plain, True)]
        if free and len(plain) == 1:
            return [(self._cutter.cut(boundaries, free), True), (plain, False)]
        return [(plain, False)]

    def _fusible(self, reductions: tuple[int, ...]) -> tuple[bool, frozenset[int]]:
        """Whether gradients are known before these sums are; else those after which the others' are, if any."""
        if reductions not in self._one_pass:
            known, free = fusion.known_before(self.graph, reductions), frozenset[int]()
            if not known:
                free = fusion.free_reductions(self.graph, reductions)
                rest = tuple(index for index in reductions if index not in free)
                free = free if rest and free and fusion.known_before(self.graph, rest) else frozenset()
            self._one_pass[reductions] = (known, free)
        return self._one_pass[reductions]

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
from wholegrad.plan import cost, devices, memory
from wholegrad.plan.pieces import Option, Piece, Terms
from wholegrad.plan.plan import Placement
from wholegrad.plan.spill import spill_bytes
from wholegrad.plan.storage import stored_bytes

Bytes = npt.NDArray[np.int64]
WAYS = 16  # numbers of boundaries in host memory that are tried, in each order


class Held(NamedTuple):
    """Bytes of boundaries and their gradients in some memory while each segment runs forward, and backward."""

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
        self.near = Placement.HOST if terms.apart is None else Placement.DEVICE
        self.leftover = memory.leftover(len(self.pieces)) if terms.apart is None else 0  # what the host's heap leaves

    def stored(self, ref: Ref) -> int:
        """Bytes of a boundary as it is stored."""
        return stored_bytes(self.graph.spec(ref), self.dtype)

    def gradient(self, ref: Ref) -> int:
        """Bytes of its gradient, which keeps the graph's dtype; 0 if there is none."""
        wanted = self.terms.backward and self.graph.nodes[ref.node].needs_grad
        return self.graph.spec(ref).nbytes if wanted else 0

    @cached_property
    def lives(self) -> dict[Ref, Held]:
        """What each boundary adds to what the memory that it lives in holds."""
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
        """With these boundaries."""
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
        ways = [self.placed(hosts) for hosts in found]
        if self.terms.apart is not None:
            ways += [self.placed(nears, on_host=False) for nears in found]
        return ways

    def filled(self, room: float) -> dict[Ref, Placement]:
        """Memory near the tiles for the smallest boundaries and their gradients, up to ``room`` bytes."""
        hosts = []
        for ref in self.open:
            room -= self.stored(ref) + self.gradient(ref)
            if room < 0:
                break
            hosts.append(ref)
        return self.placed(hosts)

    def placed(self, nears: Sequence[Ref], on_host: bool = True) -> dict[Ref, Placement]:
        """These in the memory near the tiles, every other open one farther away, and the fixed ones.

        Args:
            on_host: of a device's boundaries, whether the smallest go to the host's memory as long as they fit there.
        """
        kept = {ref for ref in nears if self._fits_near(ref)}
        found = {ref: self.near if ref in kept else Placement.DISK for ref in self.open}
        apart = self.terms.apart
        if apart is not None and on_host:
            room = float("inf") if apart.host_budget is None else apart.host_budget - apart.host_reserved
            for ref in (ref for ref in self.open if ref not in kept):
                room -= self.stored(ref) + self.gradient(ref)
                if room < 0:
                    break
                found[ref] = Placement.HOST
        return {ref: self.fixed.get(ref) or found[ref] for ref in self.boundaries}

    def _fits_near(self, ref: Ref) -> bool:
        """Whether a device takes tensors as large as a boundary or its gradient (rule 8)."""
        most = None if self.terms.apart is None else self.terms.apart.most_bytes
        return most is None or max(self.stored(ref), self.gradient(ref)) < most

    def away_seconds(self, places: Mapping[Ref, Placement]) -> float:
        """What boundaries on disk cost more than in host memory, and there more than in a device's."""
        seconds = 0.0
        for ref in (ref for ref, place in places.items() if place is not self.near):
            size = self.stored(ref), self.gradient(ref)
            if self.terms.apart is not None:
                seconds += devices.ACROSS * (3 * size[0] + 2 * size[1])  # written and read twice; added to and read
            if places[ref] is Placement.DISK:
                seconds += cost.disk_seconds(self.terms.rates, *size)
        return seconds

    @cached_property
    def least_seconds(self) -> float:
        """Of every segment with its fastest tile, boundaries not counted."""
        return sum(piece.fine[0].seconds if piece.fine else float("inf") for piece in self.pieces)

    def choose(self, room: float, places: dict[Ref, Placement], coarse: bool = False) -> Choice | None:
        """The fastest tiles that fit into ``room`` bytes beside boundaries in these places; None if none do."""
        held = self.held([ref for ref, place in places.items() if place is self.near])
        room -= self.leftover + (self.spill(places) if self.terms.apart is None else 0)
        found = []
        for piece, ahead, back in zip(self.pieces, held.forward.tolist(), held.backward.tolist(), strict=True):
            if (back if piece.fused else max(ahead, back)) > room:
                return None
            option = piece.fastest(piece.coarse if coarse else piece.fine, room - ahead, room - back)
            if option is None:
                return None
            found.append(option)
        seconds = sum(option.seconds for option in found) + self.away_seconds(places)
        made = Choice(seconds, tuple(found), places)
        return made if self._host_allows(made) else None

    def _host_allows(self, choice: Choice) -> bool:
        apart = self.terms.apart
        if apart is None or apart.host_budget is None:
            return True
        return apart.host_reserved + self.host_peak(choice) <= apart.host_budget

    def host_peak(self, choice: Choice) -> int:
        """Bytes of the host's memory, beyond what is there whatever the plan, of tiles that run on a device."""
        held = self.held([ref for ref, place in choice.places.items() if place is Placement.HOST])
        most = 0
        for k, (piece, option) in enumerate(zip(self.pieces, choice.options, strict=True)):
            most = max(most, int(max(held.forward[k], held.backward[k])) + piece.staging(option.tile))
        return most + self.spill(choice.places)

    def peak(self, choice: Choice) -> int:
        """Bytes beyond what is there whatever the plan."""
        held = self.held([ref for ref, place in choice.places.items() if place is self.near])
        most = 0
        for k, (piece, option) in enumerate(zip(self.pieces, choice.options, strict=True)):
            ahead, back = piece.needs(option.tile)
            if not piece.fused:
                most = max(most, int(held.forward[k]) + ahead)
            if self.terms.backward:
                most = max(most, int(held.backward[k]) + back)
        return most + self.leftover + (self.spill(choice.places) if self.terms.apart is None else 0)

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
        return Choice(0.0, found, self.placed([], on_host=False)) if len(found) == len(options) else None

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

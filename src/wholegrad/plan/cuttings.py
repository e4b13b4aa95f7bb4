"""One set of boundaries: the segments that it makes, where boundaries may live, and what is held while each runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wholegrad.graph import fusion
from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.recall import is_wide
from wholegrad.graph.segment import Cutter, Segment
from wholegrad.plan import cost, memory
from wholegrad.plan.halos import halos
from wholegrad.plan.pieces import Ground, Option, Piece, Terms
from wholegrad.plan.plan import Placement
from wholegrad.plan.spill import spill_bytes
from wholegrad.plan.storage import stored_bytes
from wholegrad.plan.traffic import at_once, shared

Bytes = npt.NDArray[np.int64]
WAYS = 16  # numbers of boundaries in host memory that are tried, in each order


class Held(NamedTuple):
    """Bytes of boundaries and their gradients in some memory while each segment runs forward, and backward."""

    forward: Bytes
    backward: Bytes


class Boundary(NamedTuple):
    """What one boundary takes wherever it is one.

    Attributes:
        stored: bytes as it is stored.
        gradient: bytes of its gradient, which keeps the graph's dtype; 0 if there is none.
        recalled: whether the backward sweep of the segment that makes it reads it back.
    """

    stored: int
    gradient: int
    recalled: bool


class Way(NamedTuple):
    """Where boundaries live, and what follows.

    Attributes:
        held: what those take that live next to the tiles: in host memory, or in that of a device.
        spill: bytes of host memory that those on disk take.
        seconds: what those elsewhere cost more.
        far: of a device's, what those in host memory take.
    """

    places: dict[Ref, Placement]
    held: Held
    spill: int
    seconds: float
    far: Held | None = None


class Choice(NamedTuple):
    """A tile for each segment, where boundaries live, and the predicted seconds of it all."""

    seconds: float
    options: tuple[Option, ...]
    way: Way

    @property
    def tiles(self) -> tuple[Any, ...]:
        """What decides what ranks hold."""
        return tuple(option.tile for option in self.options), tuple(self.way.places.items())


class Cutting:
    """The segments of one set of boundaries.

    Args:
        boundaries: all there are, and what each takes.
        placement: of all boundaries, or of some; the rest is open.
    """

    def __init__(
        self,
        graph: Graph,
        terms: Terms,
        pieces: Sequence[Piece],
        boundaries: Mapping[Ref, Boundary],
        placement: Placement | Mapping[Ref, Placement] | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.graph, self.terms, self.pieces, self.dtype = graph, terms, tuple(pieces), dtype
        self.boundaries = dict(sorted(boundaries.items(), key=lambda each: (each[1].stored, each[0])))
        fixed = dict.fromkeys(boundaries, placement) if isinstance(placement, Placement) else dict(placement or {})
        self.fixed = {ref: place for ref, place in fixed.items() if ref in boundaries}
        self.open = tuple(ref for ref in self.boundaries if ref not in self.fixed)
        self.near = Placement.HOST if terms.apart is None else Placement.DEVICE
        self.leftover = memory.leftover(len(self.pieces)) if terms.apart is None else 0  # what the host's heap leaves
        self._filled: dict[int, Way] = {}
        self._shared: dict[tuple[Any, ...], tuple[Held, int]] = {}  # by tiles and places: what ranks hold, and send

    @cached_property
    def lives(self) -> Held:
        """What each boundary adds to what the memory that it lives in holds: a row for each of ``boundaries``."""
        return self._lives(self.boundaries)

    def _lives(self, boundaries: Mapping[Ref, Boundary]) -> Held:
        made: dict[Ref, int] = {}
        read: dict[Ref, list[int]] = {}
        for k, piece in enumerate(self.pieces):
            made |= dict.fromkeys(piece.segment.outputs, k)
            for ref in piece.segment.maps:
                read.setdefault(ref, []).append(k)
        spans, sizes = [], []
        for ref, boundary in boundaries.items():
            first, readers = made[ref], read.get(ref, [])
            last = readers[-1] if readers else first
            again = first if boundary.recalled else (readers[0] if readers else last + 1)
            spans.append((first, last, again))
            sizes.append((boundary.stored, boundary.gradient))
        now, count = np.arange(len(self.pieces)), len(boundaries)
        first, last, again = np.array(spans, np.int64).reshape(count, 3).T[:, :, None]
        stored, gradient = np.array(sizes, np.int64).reshape(count, 2).T[:, :, None]
        if not self.terms.backward:
            return Held(stored * ((first <= now) & (now <= last)), np.zeros((count, len(now)), np.int64))
        return Held(stored * (first <= now), stored * (again <= now) + gradient * ((first <= now) & (now <= last)))

    def held(self, hosts: Collection[Ref]) -> Held:
        """With these boundaries."""
        kept = set(hosts)
        rows = [k for k, ref in enumerate(self.boundaries) if ref in kept]
        return Held(self.lives.forward[rows].sum(0), self.lives.backward[rows].sum(0))

    def ways(self) -> list[Way]:
        """Placements worth trying: the first so many in host memory, by size and by how long each would stay there."""
        if not self.open:
            return [self.way(())]
        stays = dict(zip(self.boundaries, np.count_nonzero(self.lives.backward, 1).tolist(), strict=True))
        short = sorted(self.open, key=lambda ref: (stays[ref], self.boundaries[ref].stored, ref))
        count = len(self.open)
        numbers = sorted({count * k // WAYS for k in range(WAYS + 1)}, reverse=True)
        found = {tuple(sorted(order[:number])): None for number in numbers for order in (self.open, tuple(short))}
        ways = [self.way(nears) for nears in found]
        if self.terms.apart is not None:
            ways += [self.way(nears, on_host=False) for nears in found]
        return ways

    def fitting(self, room: float) -> int:
        """How many of the smallest open boundaries and their gradients together take at most ``room`` bytes."""
        for count, ref in enumerate(self.open):
            room -= self.boundaries[ref].stored + self.boundaries[ref].gradient
            if room < 0:
                return count
        return len(self.open)

    def filled(self, count: int) -> Way:
        """Memory next to the tiles for so many of the smallest open boundaries."""
        if count not in self._filled:
            self._filled[count] = self.way(self.open[:count])
        return self._filled[count]

    def way(self, nears: Collection[Ref], on_host: bool = True) -> Way:
        """These in the memory next to the tiles, every other open one farther away, and the fixed ones.

        Args:
            on_host: of a device's boundaries, whether the smallest go to the host's memory as long as they fit there.
        """
        kept = {ref for ref in nears if self._fits_near(ref)}
        places = {ref: self.near if ref in kept else Placement.DISK for ref in self.boundaries} | self.fixed
        apart = self.terms.apart
        if apart is not None and on_host:
            room = float("inf") if apart.host_budget is None else apart.host_budget - apart.host_reserved
            for ref in (ref for ref in self.open if ref not in kept):
                room -= self.boundaries[ref].stored + self.boundaries[ref].gradient
                if room < 0:
                    break
                places[ref] = Placement.HOST
        kept = {ref for ref, place in places.items() if place is self.near}
        spilled = [ref for ref, place in places.items() if place is Placement.DISK]
        spill = spill_bytes(self.graph, spilled, self.dtype, self.terms.workers)
        far = None if apart is None else self.held([ref for ref, place in places.items() if place is Placement.HOST])
        return Way(places, self.held(kept), spill, self.away_seconds(places), far)

    def _fits_near(self, ref: Ref) -> bool:
        """Whether a device takes tensors as large as a boundary or its gradient (rule 8)."""
        most = None if self.terms.apart is None else self.terms.apart.most_bytes
        return most is None or max(self.boundaries[ref].stored, self.boundaries[ref].gradient) < most

    def away_seconds(self, places: Mapping[Ref, Placement]) -> float:
        """What boundaries on disk cost more than in host memory, and there more than in a device's."""
        seconds = 0.0
        for ref in (ref for ref, place in places.items() if place is not self.near):
            each = self.boundaries[ref]
            if self.terms.apart is not None:  # written and read twice; the gradient added to and read
                seconds += self.terms.apart.across * (3 * each.stored + 2 * each.gradient)
            if places[ref] is Placement.DISK:
                seconds += cost.disk_seconds(self.terms.rates, each.stored, each.gradient)
        return seconds

    @cached_property
    def least_seconds(self) -> float:
        """Of every segment with its fastest tile, boundaries not counted."""
        return sum(piece.fine[0].seconds if piece.fine else float("inf") for piece in self.pieces)

    @property
    def talk(self) -> float:
        """Of the seconds of any choice, those in which ranks send each other halos."""
        return sum(sum(piece.talk) for piece in self.pieces)

    def choose(self, room: float, way: Way, coarse: bool = False) -> Choice | None:
        """The fastest tiles that fit into ``room`` bytes beside boundaries in these places; None if none do.

        Of ranks that share the image that is a guess until :meth:`settle` was called; what was found too large then is
        not chosen again.
        """
        made, left = self._choose(room, way, coarse), room
        while made is not None and made.tiles in self._shared and (over := self.peak(made) - room) > 0:
            left = min(left, self._peak(made, way.held, 0)) - over
            made = self._choose(left, way, coarse)
        return made

    def _choose(self, room: float, way: Way, coarse: bool) -> Choice | None:
        room -= self.leftover + (way.spill if way.far is None else 0)
        found = []
        most = max((int(each.max(initial=0)) for each in way.held), default=0)
        for piece, ahead, back in zip(self.pieces, *(each.tolist() for each in way.held), strict=True):
            if (back if piece.fused else max(ahead, back)) > room:
                return None
            spare = (room - ahead, room - back)
            if self._recorded:  # half for tiles that run, half for what recordings of any segment keep
                spare = ((room - most) / 2, (room - most) / 2)
            option = piece.fastest(piece.coarse if coarse else piece.fine, *spare)
            if option is None:
                return None
            found.append(option)
        made = Choice(sum(option.seconds for option in found) + way.seconds, tuple(found), way)
        return made if self._host_allows(made) else None

    def _host_allows(self, choice: Choice) -> bool:
        apart = self.terms.apart
        if apart is None or apart.host_budget is None:
            return True
        return apart.host_reserved + self.host_peak(choice) <= apart.host_budget

    def host_peak(self, choice: Choice) -> int:
        """Bytes of the host's memory, beyond what is there whatever the plan, of tiles that run on a device."""
        held, most = choice.way.far, 0
        assert held is not None
        for k, (piece, option) in enumerate(zip(self.pieces, choice.options, strict=True)):
            most = max(most, int(max(held.forward[k], held.backward[k])) + piece.staging(option.tile))
        return most + choice.way.spill

    @property
    def _recorded(self) -> bool:
        return self.terms.apart is not None and self.terms.apart.graphs

    def recordings(self, choice: Choice) -> int:
        """Bytes that recordings keep: as much as the tiles of the segment that need the most, whichever runs."""
        if not self._recorded:
            return 0
        return max(max(piece.needs(option.tile)) for piece, option in zip(self.pieces, choice.options, strict=True))

    def peak(self, choice: Choice) -> int:
        """Bytes beyond what is there whatever the plan."""
        return self._peak(choice, *self._shared.get(choice.tiles, (choice.way.held, 0)))

    def _peak(self, choice: Choice, held: Held, messages: int) -> int:
        most = 0
        for k, (piece, option) in enumerate(zip(self.pieces, choice.options, strict=True)):
            ahead, back = piece.needs(option.tile)
            if not piece.fused:
                most = max(most, int(held.forward[k]) + ahead)
            if self.terms.backward:
                most = max(most, int(held.backward[k]) + back)
        beside = self.leftover + messages + self.recordings(choice)
        return most + beside + (choice.way.spill if choice.way.far is None else 0)

    def on_disk(self, places: Mapping[Ref, Placement]) -> int:
        """Bytes there at most, boundaries' gradients included."""
        held = self.held([ref for ref, place in places.items() if place is Placement.DISK])
        return max((int(each.max(initial=0)) for each in held), default=0)

    @cached_property
    def smallest(self) -> Choice | None:
        """The least memory: smallest tiles, all open boundaries on disk; None if a tile is too large for rule 8."""
        options = [piece.least for piece in self.pieces]
        found = tuple(option for option in options if option is not None)
        return Choice(0.0, found, self.way((), on_host=False)) if len(found) == len(options) else None

    def settle(self, choice: Choice) -> None:
        """Look at every tile that a choice uses."""
        for piece, option in zip(self.pieces, choice.options, strict=True):
            piece.settle(option.tile)
        bands = self.terms.bands
        if bands is None or choice.tiles in self._shared:
            return
        grids = [piece.planned(option)[1] for piece, option in zip(self.pieces, choice.options, strict=True)]
        cut = [piece.segment for piece in self.pieces]
        found = halos(self.graph, cut, grids, bands, self.terms.backward)
        exact = {}
        for ref, each in self.boundaries.items():
            spec = self.graph.spec(ref)
            stored, gradient = stored_bytes(spec, self.dtype), spec.nbytes if each.gradient else 0
            part = [shared(spec, found[ref], size) for size in (stored, gradient)]
            exact[ref] = Boundary(part[0], part[1], each.recalled)
        lives, near = self._lives(exact), {ref for ref, place in choice.way.places.items() if place is self.near}
        rows = [k for k, ref in enumerate(self.boundaries) if ref in near]
        held = Held(lives.forward[rows].sum(0), lives.backward[rows].sum(0))
        self._shared[choice.tiles] = held, at_once(self.graph, cut, found, bands, self.terms.backward)


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
        self.ground = Ground(graph, terms)
        self._cutter = Cutter(graph, apart=dtype is not None)  # sums see boundaries as they are stored
        self._pieces: dict[tuple[int, bool, bool], Piece] = {}
        self._known: dict[frozenset[Ref], list[Cutting]] = {}
        self._boundaries: dict[Ref, Boundary] = {}
        self._one_pass: dict[tuple[int, ...], tuple[bool, frozenset[int]]] = {}
        self._written = {ref for ref in terms.sinks if not graph.consumers(ref.node)}  # and read no more

    def of(self, boundaries: frozenset[Ref]) -> list[Cutting]:
        """The ways to cut along these boundaries."""
        if boundaries not in self._known:
            self._known[boundaries] = [self._cutting(*way, boundaries) for way in self._variants(boundaries)]
        return self._known[boundaries]

    def _cutting(self, segments: Sequence[Segment], fused: bool, boundaries: frozenset[Ref]) -> Cutting:
        last, new = len(segments) - 1, len(segments) <= memory.FEW
        pieces = [self._piece(segment, fused and k == last, new) for k, segment in enumerate(segments)]
        kept = {ref: self._boundary(ref) for ref in boundaries if ref not in self._written}
        return Cutting(self.graph, self.terms, pieces, kept, self.placement, self.dtype)

    def _boundary(self, ref: Ref) -> Boundary:
        if ref not in self._boundaries:
            spec, node = self.graph.spec(ref), self.graph.nodes[ref.node]
            gradient = spec.nbytes if self.terms.backward and node.needs_grad else 0
            stored, share = stored_bytes(spec, self.dtype), 1.0 if self.terms.bands is None else self.terms.bands.share
            self._boundaries[ref] = Boundary(int(stored * share), int(gradient * share), is_wide(self.graph, node))
        return self._boundaries[ref]

    def _piece(self, segment: Segment, fused: bool, new: bool) -> Piece:
        key = (id(segment), fused, new)  # the cutter keeps segments, each once
        if key not in self._pieces:
            self._pieces[key] = Piece(self.ground, segment, fused, new)
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

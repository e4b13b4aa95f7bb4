"""The plan: what will run, in numbers. It prints, it compares, and the executor follows it to the letter."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from wholegrad.graph.graph import Graph, Ref
from wholegrad.graph.segment import Segment
from wholegrad.plan.bands import Bands
from wholegrad.plan.devices import Apart, Host
from wholegrad.plan.halos import Halo, halos
from wholegrad.plan.memory import Kept, Working, held_whole, kept
from wholegrad.plan.parts import Parts, parts
from wholegrad.plan.spill import spill_bytes
from wholegrad.plan.storage import dtype_name, stored_bytes, stored_dtype
from wholegrad.plan.tiles import Grid, grid
from wholegrad.plan.traffic import at_once, shared, traffic


class Placement(StrEnum):
    """Where a boundary lives: ``device`` only where tiles run on one with memory of its own."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Room(int):
    """A budget counted in bytes beyond what the process holds already, so that a plan does not depend on that."""


HELD_WORTH_SAYING = 16 << 20  # bytes

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_bytes(budget: str | int) -> int:
    """Bytes from ``"1.5GiB"``, ``"800 MB"`` or a number of bytes.

    Raises:
        ValueError: no number, no unit, or not positive.
    """
    if isinstance(budget, int):
        value = budget
    else:
        text = budget.strip()
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
        unit = text[len(digits) :].strip().upper()
        if unit not in _UNITS:
            raise ValueError(f"budget {budget!r} needs a unit such as MiB or GiB")
        value = int(float(digits) * _UNITS[unit])
    if value <= 0:
        raise ValueError(f"budget {budget!r} is not positive")
    return value


def show_bytes(count: float) -> str:
    """``1.50 GiB``, ``12.0 MiB``."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if unit in ("GiB", "TiB") else f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


@dataclass(frozen=True)
class SegmentPlan:
    """How one segment runs.

    Attributes:
        tile: height and width of a tile in pixels of ``segment.base``.
        tiles: how many there are.
        fused: forward and backward in one pass, in the backward sweep (rule 4).
        working: bytes of the largest tiles that run side by side.
        forward_macs: multiply-adds of one forward run over all tiles.
        again_macs: multiply-adds of running forward again in the backward sweep.
        seconds: predicted seconds of one forward run over all tiles.
        backward_seconds: predicted seconds of running all tiles again and pulling them back.
        staging: bytes of the host's memory through which tiles on a device come and go.
        from_heap: whether all tensors of tiles come from the heap, and hardly anything else does.
    """

    segment: Segment
    tile: tuple[int, int]
    tiles: int
    fused: bool
    working: Working
    forward_macs: float
    again_macs: float
    seconds: float
    backward_seconds: float
    staging: int = 0
    from_heap: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """What will run, and what it will need.

    Attributes:
        graph: the captured model, loss and metrics.
        segments: in forward order.
        placements: where each boundary lives.
        budget: bytes allowed for the whole process (of tensors on the device, if that has memory of its own); None if
            nobody asked.
        reserved: bytes of interpreter and libraries (of what is on the device already).
        projected: predicted peak of the same in bytes, at most ``budget`` (but for managed memory, of which a part
            lies in the host's: :attr:`wholegrad.plan.strategies.WholePlan.beyond`).
        whole_image: bytes of maps and gradients that whole-image autograd would hold; nothing is counted in for the
            process itself, as it is in ``projected``.
        recompute: multiply-adds of all forward runs over those of one whole-image forward.
        seconds: predicted, up to the speed of the machine.
        workers: tiles that run side by side.
        spill_dir: folder of the boundaries on disk.
        on_disk: bytes there at most, boundaries' gradients included.
        boundary_dtype: in which boundaries of a wider dtype are stored; None for the graph's own.
        made_for: what the plan was made for, as the caller saw it; compared before a run.
        strategy: how activations are held (:mod:`wholegrad.plan.strategies`); a plan of tiles is ``stream``.
        apart: the device with memory of its own on which tiles run; None on the CPU.
        host: the host's side of such a plan.
        made_on: the device as the caller gave it.
        bands: how the image is shared out, if ranks share it; bytes and seconds are then those of the rank with most.
        talk: of ``seconds``, those in which ranks send each other what they need.
    """

    graph: Graph
    segments: tuple[SegmentPlan, ...]
    placements: dict[Ref, Placement]
    budget: int | None
    reserved: int
    projected: int
    whole_image: int
    recompute: float
    seconds: float
    backward: bool
    workers: int = 1
    spill_dir: Path | None = None
    on_disk: int = 0
    boundary_dtype: torch.dtype | None = None
    made_for: object = None
    strategy: str = "stream"
    apart: Apart | None = None
    host: Host | None = None
    made_on: object = None
    bands: Bands | None = None
    talk: float = 0.0
    _grids: dict[int, Grid] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Every decision and figure as plain values; see :mod:`wholegrad.plan.describe`."""
        from wholegrad.plan.describe import as_dict

        return as_dict(self)

    def to_json(self) -> str:
        """:meth:`as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    @property
    def tiles(self) -> int:
        """Tiles over all segments."""
        return sum(part.tiles for part in self.segments)

    @property
    def device(self) -> str:
        """Where tiles run: ``cpu``, ``cuda:0``."""
        return "cpu" if self.apart is None else self.apart.name

    @property
    def host_peak(self) -> int:
        """Predicted peak of the whole process in bytes."""
        return self.projected if self.host is None else self.host.projected

    @property
    def keeps_heap(self) -> bool:
        """Whether a step leaves its heap to the next: only where its tiles find there all that they want."""
        return self.backward and self.apart is None and all(part.from_heap for part in self.segments)

    @property
    def near(self) -> Placement:
        """The memory next to the arithmetic, for which ``budget`` is."""
        return Placement.HOST if self.apart is None else Placement.DEVICE

    @property
    def boundaries(self) -> frozenset[Ref]:
        return frozenset(self.placements)

    def stored_dtype(self, ref: Ref) -> torch.dtype:
        """In which dtype a boundary is stored."""
        return stored_dtype(self.graph.spec(ref), self.boundary_dtype)

    def stored_bytes(self, ref: Ref) -> int:
        """Bytes of a boundary as it is stored, its gradient not counted."""
        return stored_bytes(self.graph.spec(ref), self.boundary_dtype)

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """``(N, C, H, W)``"""
        return self.graph.image.outputs[0].shape

    @cached_property
    def memory(self) -> Parts:
        """What ``projected`` is made up of."""
        moments = []
        for part, now in zip(self.segments, self._held_in(self.near), strict=True):
            if not part.fused:
                moments.append((now.forward, 0, part.working.forward, part.working.slack))
            if self.backward:
                moments.append((now.backward, now.gradients, part.working.backward, part.working.slack))
        spilled = [ref for ref, place in self.placements.items() if place is Placement.DISK]
        spill = spill_bytes(self.graph, spilled, self.boundary_dtype, self.workers)
        if self.apart is not None:
            beside = {"messages": self.messages, "recordings": self._recorded_bytes}
            return parts(self.graph, self.reserved, moments, 0, **beside)
        return parts(self.graph, self.reserved, moments, len(self.segments), spill, self.messages)

    @cached_property
    def most_of_boundaries(self) -> int:
        """Bytes of boundaries and their gradients in the host's memory, when they are most."""
        held = self._held_in(Placement.HOST)
        return max((max(now.forward, now.backward + now.gradients) for now in held), default=0)

    def _held_in(self, place: Placement) -> list[Kept]:
        """What boundaries in one kind of memory take while each segment runs."""
        there = [ref for ref, where in self.placements.items() if where is place]
        cut = [part.segment for part in self.segments]
        return kept(self.graph, cut, there, self.boundary_dtype, self.backward, self.here)

    @property
    def _recorded_bytes(self) -> int:
        """What recordings keep on a device: as much as the tiles that need the most."""
        if self.apart is None or not self.apart.graphs:
            return 0
        sweeps = [(0 if part.fused else part.working.forward, part.working.backward) for part in self.segments]
        return max((max(each[0], each[1] * self.backward) for each in sweeps), default=0)

    def here(self, ref: Ref, size: int) -> int:
        """Of a boundary's bytes, what the rank with most of it holds; all where nobody shares it."""
        return size if self.bands is None else shared(self.graph.spec(ref), self.halos[ref], size)

    @property
    def messages(self) -> int:
        """Bytes that ranks send and receive at once."""
        cut = [part.segment for part in self.segments]
        return 0 if self.bands is None else at_once(self.graph, cut, self.halos, self.bands, self.backward)

    def grid(self, index: int) -> Grid:
        """The tiles of segment ``index``."""
        if index not in self._grids:
            part = self.segments[index]
            self._grids[index] = grid(self.graph, part.segment, part.tile, self.bands)
        return self._grids[index]

    @cached_property
    def halos(self) -> dict[Ref, Halo]:
        """What each rank holds of each boundary; nothing where one has all."""
        if self.bands is None:
            return {}
        segments, grids = [part.segment for part in self.segments], [self.grid(k) for k in range(len(self.segments))]
        return halos(self.graph, segments, grids, self.bands, self.backward)

    def describe_segment(self, index: int) -> tuple[str, str, str, str, str]:
        """Module paths, what it yields, tile, tiles, and bytes of the tiles that run side by side, as text."""
        part = self.segments[index]
        paths = [self.graph.nodes[i].path for i in part.segment.nodes]
        named = [path for path in dict.fromkeys(paths) if path]
        inside = ", ".join(named) if len(named) <= 4 else f"{named[0]} ... {named[-1]} ({len(named)} modules)"
        yields = [f"map {'x'.join(map(str, self.graph.spec(ref).shape))}" for ref in part.segment.outputs]
        if part.segment.reductions:
            yields.append(f"{len(part.segment.reductions)} sums")
        mode = ", one pass" if part.fused else ""
        working = part.working.backward if self.backward else part.working.forward
        return (
            inside or "labels",
            " + ".join(yields) + mode,
            f"{part.tile[0]} x {part.tile[1]}",
            str(part.tiles),
            show_bytes(working),
        )

    def _describe_boundaries(self) -> str:
        """How many bytes, where, and as what if they are rounded."""
        if not self.placements:
            return "no boundaries"
        kept = sum(self.here(ref, self.stored_bytes(ref)) for ref in self.placements)
        where = " and ".join(sorted({str(place) for place in self.placements.values()}))
        narrow = any(self.stored_dtype(ref) != self.graph.spec(ref).dtype for ref in self.placements)
        rounded = f", rounded to {dtype_name(self.boundary_dtype)}" if narrow and self.boundary_dtype else ""
        return f"boundaries {show_bytes(kept)} in {where}{rounded}"

    def _boundary_lines(self) -> list[str]:
        """Each boundary: module, shape, where it lives, bytes."""
        rows = [("boundary", "shape", "lives in", "memory")]
        for ref, place in sorted(self.placements.items()):
            node, size = self.graph.nodes[ref.node], show_bytes(self.here(ref, self.stored_bytes(ref)))
            rows.append((node.path or node.name, "x".join(map(str, self.graph.spec(ref).shape)), str(place), size))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return ["  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    @property
    def _of_device(self) -> str:
        return "" if self.apart is None else f"on {self.device} "

    def _host_lines(self) -> list[str]:
        if self.host is None:
            return []
        held, asked = show_bytes(self.host.reserved), self.host.budget
        allowed = f" of a budget of {show_bytes(asked)}" if asked else ""
        return [f"projected peak of the process {show_bytes(self.host.projected)} (of which reserved {held}){allowed}"]

    def _rank_lines(self) -> list[str]:
        if self.bands is None:
            return []
        sent = [traffic(self, rank) for rank in self.bands.busiest]
        most, rounds = max(each.total for each in sent), max(each.rounds for each in sent)
        kind = "" if self.bands.even else ", uneven"
        return [
            f"shared by {self.bands.ranks} ranks: {self.bands}{kind}; memory and seconds are of the rank with most; "
            f"each sends up to {show_bytes(most)} a step in {rounds} rounds"
        ]

    def __str__(self) -> str:
        rows = [("segment", "yields", "tile", "tiles", "memory")]
        rows += [self.describe_segment(i) for i in range(len(self.segments))]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        shape = " x ".join(map(str, self.image_shape))
        if (held := held_whole(self.graph)) > HELD_WORTH_SAYING:
            lines.append(f"held whole, for ops without locality: {show_bytes(held)}")
        if self.placements:
            lines += ["", *self._boundary_lines()]
        lines += [
            "",
            f"predicted {self.seconds:.3g} s " + ("a step" if self.backward else "forward"),
            f"image {shape}; {self._describe_boundaries()}; forward work x {self.recompute:.2f}",
            f"projected peak {self._of_device}{show_bytes(self.projected)} "
            f"(of which reserved {show_bytes(self.reserved)})"
            + (f" of a budget of {show_bytes(self.budget)}" if self.budget else "")
            + f"; whole-image autograd would need {show_bytes(self.whole_image)} for its maps alone",
            *self._rank_lines(),
            "made up of " + ", ".join(f"{name} {show_bytes(size)}" for name, size in self.memory.rows() if size),
            *self._host_lines(),
        ]
        return "\n".join(lines)

"""Pixels of the next tiles, decoded and on their way to the device while present ones are computed (rule 9).

Threads of their own read a tile's boxes into staging memory and start the transfer; a tile then waits for its pixels at
most as long as they still take. 8-bit images travel as bytes, a fourth of what they are as floats, and become fractions
on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from wholegrad import clock
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import READERS, Graph, Ref
from wholegrad.graph.recall import Recall
from wholegrad.plan.devices import BEYOND
from wholegrad.plan.tiles import Tile
from wholegrad.run.device import Device, Moving
from wholegrad.run.sources import Source


class Ahead:
    """Reads for the tiles of one step.

    Args:
        sources: by the names that the graph has for images and targets.
    """

    def __init__(self, graph: Graph, sources: Mapping[str, Source], device: Device) -> None:
        self.graph, self.sources, self.device = graph, sources, device
        self._pool = ThreadPoolExecutor(device.options.at_once + BEYOND, "wholegrad-ahead")
        found = {Ref(node.index): sources[node.name].lying_on(device.torch) for node in graph.of_kind(*READERS)}
        self._there = {ref: held for ref, held in found.items() if held is not None}
        self._asked: dict[tuple[Ref, Box], Future[Moving]] = {}

    def ask(self, again: Recall, tile: Tile) -> None:
        """Start to read what a tile of this segment reads of images and targets."""
        for ref in again.segment.maps:
            if again.graph.nodes[ref.node].kind in READERS and ref.node in tile.boxes and ref not in self._there:
                box = tile.boxes[ref.node]
                self._asked[ref, box] = self._pool.submit(self._sent, ref, box)

    def take(self, ref: Ref, box: Box) -> torch.Tensor:
        """The elements of an image or a target on ``box``, on the device, as they came: :meth:`seen` makes the rest."""
        if ref in self._there:
            return self._source(ref).cut_out(self._there[ref], box)
        asked = self._asked.pop((ref, box), None)
        moving = self._sent(ref, box) if asked is None else asked.result()
        return self.device.arrived(moving)

    def seen(self, ref: Ref, staged: torch.Tensor) -> torch.Tensor:
        """What the model sees of what :meth:`take` gave."""
        return self._source(ref).of_staged(staged)

    def forget(self) -> None:
        """Drop what was asked for and never taken."""
        for asked in list(self._asked.values()):
            asked.cancel()
        self._asked.clear()

    def close(self) -> None:
        """End the threads."""
        self.forget()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _source(self, ref: Ref) -> Source:
        return self.sources[self.graph.nodes[ref.node].name]

    def _sent(self, ref: Ref, box: Box) -> Moving:
        with clock.span("reading", "ahead") as span:
            found = self._source(ref).staged(box, self.device.staging)
            span.moved(found)
        return self.device.send(found)

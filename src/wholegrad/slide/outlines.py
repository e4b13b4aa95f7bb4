"""Writes a label map's outlines as GeoJSON that QuPath opens: an annotation for each connected piece, holes in it.

GeoJSON (RFC 7946) with QuPath's properties: ``objectType``, ``classification`` with name and colour. Coordinates are
pixels of the slide's level 0. The outlines that :mod:`wholegrad.slide.trace` finds run along pixel edges, and
:mod:`wholegrad.slide.simplify` takes the stairs out of them. A polygon that is not valid then (a hole smaller than the
tolerance has come to lie outside, say) is simplified by less, in the end not at all.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import shapely

from wholegrad.slide.bigtiff import PartialFile
from wholegrad.slide.grid import Grid, OutlineOptions
from wholegrad.slide.output import Array, ClassNames, Output
from wholegrad.slide.simplify import simplify
from wholegrad.slide.trace import Rings, Tracer

NAMESPACE = uuid.UUID("6f0a9d0e-6f0c-5f0e-9a43-5f1c1d7d2c11")  # of the ids, which are the same for the same outline
HALVINGS = 3


class OutlineWriter(Output):
    """A GeoJSON file of a label map ``(1, H, W)``.

    Raises:
        ConfigError: options that make no sense.
        SlideError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        mpp: float | None,
        classes: ClassNames,
        grid: Grid | None = None,
        options: OutlineOptions | None = None,
    ) -> None:
        area, hole, self._tolerance = (options or OutlineOptions()).in_pixels(mpp)
        self._classes, self._grid = classes, grid or Grid()
        self._tracer = Tracer(width, area, hole)
        self.held_bytes = 4 * self._tracer.held_bytes  # and what the outlines take, which nobody knows before
        self._file = PartialFile(Path(path))

    def write(self, y0: int, band: Array) -> None:
        self._tracer.add(band[0])

    def seal(self) -> None:
        self._file.append(b'{"type": "FeatureCollection", "features": [')
        before = b"\n"
        for label, piece in pieces(self._tracer.finish()):
            self._file.join(before + self._feature(label, piece).encode())
            before = b",\n"
        self._file.join(b"\n]}\n")
        self._file.seal()

    def publish(self) -> None:
        self._file.publish()

    def abort(self) -> None:
        self._file.discard()

    def _feature(self, label: int, piece: Rings) -> str:
        outline = polygon(piece, self._tolerance, self._grid)
        rings = [_coordinates(ring) for ring in (outline.exterior, *outline.interiors)]
        classification = {"name": self._classes.name(label), "color": list(self._classes.colour(label))}
        feature = {
            "type": "Feature",
            "id": str(uuid.uuid5(NAMESPACE, f"{label} {rings[0]}")),
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {"objectType": "annotation", "classification": classification, "isLocked": False},
        }
        return json.dumps(feature, ensure_ascii=False)


def pieces(rings: Rings) -> Iterator[tuple[int, Rings]]:
    """The rings of each connected piece, the outer one first, with its label: by label, then from the top."""
    order = np.lexsort((-rings.areas, rings.pieces, rings.labels))
    numbers = rings.pieces[order]
    bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)) if len(order) else np.zeros(1, np.int64)
    for start, stop in pairwise(bounds):
        chosen = order[start:stop]
        if rings.areas[chosen[0]] > 0:  # else the piece was too small, but not its hole
            yield int(rings.labels[chosen[0]]), _chosen(rings, chosen)


def _chosen(rings: Rings, numbers: npt.NDArray[np.intp]) -> Rings:
    xy = [rings.xy[rings.starts[n] : rings.starts[n + 1]] for n in numbers]
    starts = np.cumsum([0, *map(len, xy)], dtype=np.int64)
    return Rings(np.concatenate(xy), starts, rings.labels[numbers], rings.pieces[numbers], rings.areas[numbers])


def polygon(piece: Rings, tolerance: float, grid: Grid) -> shapely.Polygon:
    """A piece as a valid polygon in level-0 coordinates; outlines move by ``tolerance`` pixels at most."""
    for halving in range(HALVINGS):
        if tolerance == 0:
            break
        made = _polygon(piece, simplify(piece.xy, piece.starts, tolerance / 2**halving), grid)
        if made.is_valid:
            return made
    return _polygon(piece, np.ones(len(piece.xy), np.bool_), grid)


def _polygon(piece: Rings, kept: npt.NDArray[np.bool_], grid: Grid) -> shapely.Polygon:
    placed = grid.place(piece.xy)
    spans = zip(piece.starts[:-1], piece.starts[1:], strict=True)
    outer, *holes = (placed[start:stop][kept[start:stop]] for start, stop in spans)
    return shapely.Polygon(outer, holes)


def _coordinates(ring: shapely.LinearRing) -> list[list[float]]:
    """A closed ring's ``[x, y]``, as integers where all are."""
    xy = shapely.get_coordinates(ring)
    whole = xy.astype(np.int64)
    found: list[list[float]] = (whole if (whole == xy).all() else xy).tolist()
    return found

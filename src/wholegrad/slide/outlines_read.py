"""Outlines of annotations as polygons with a class each: what every annotation format comes down to."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import shapely
from shapely.geometry.base import BaseGeometry

from wholegrad.errors import SlideError

UNCLASSIFIED = "Unclassified"
LARGEST = 1e9  # of coordinates, pixels
SAME_AREA = 1e-6  # relative; a ring that merely touches itself keeps its area when it is repaired


@dataclass(frozen=True)
class Outline:
    """An area on a slide: a valid (multi)polygon in level-0 pixels, and the name of its class."""

    name: str
    area: BaseGeometry


@dataclass(frozen=True)
class Drawn:
    """An area as it was drawn, which may cross itself, without the ``holes`` that were drawn apart from it."""

    name: str
    area: BaseGeometry
    where: str
    holes: BaseGeometry | None = None


def polygon(where: str, shell: Sequence[Any], holes: Iterable[Sequence[Any]] = ()) -> BaseGeometry:
    """A polygon of rings of points ``(x, y, ...)``, closed or not.

    Raises:
        SlideError: a ring has fewer than three points, or one that is no number.
    """
    try:
        rings = [[(float(point[0]), float(point[1])) for point in ring] for ring in (shell, *holes)]
        if not all(abs(value) < LARGEST for ring in rings for point in ring for value in point):
            raise ValueError("a corner is no number")
        made = shapely.Polygon(rings[0], rings[1:])
    except (TypeError, ValueError, IndexError, KeyError, OverflowError, shapely.errors.GEOSException) as error:
        raise SlideError(where, f"is no polygon ({' '.join(str(error).split())})", "delete or redraw it") from None
    return made


def repaired(path: str, drawn: Iterable[Drawn]) -> list[Outline]:
    """Outlines of what was drawn; areas that cross themselves are mended, with a warning.

    A loop of a crossing ring counts where it is inside by the even-odd rule.
    """
    found, mended = list[Outline](), list[str]()
    for each in drawn:
        valid = each.area if each.area.is_valid else _polygons(shapely.make_valid(each.area))
        if abs(valid.area - abs(each.area.area)) > SAME_AREA * valid.area:
            mended.append(each.where)
        valid = valid if each.holes is None else _polygons(valid.difference(each.holes))
        if valid.area > 0:
            found.append(Outline(each.name, valid))
    if mended:
        many = "an outline crosses itself" if len(mended) == 1 else f"{len(mended)} outlines cross themselves"
        warnings.warn(f"{path}: {many}, repaired here ({'; '.join(mended[:3])}); redraw if wrong", stacklevel=4)
    return found


def _polygons(area: BaseGeometry) -> BaseGeometry:
    """The polygons of a collection, without the lines and points that repairing leaves."""
    parts = [part for part in shapely.get_parts(area, return_index=False) if part.area > 0]
    flat = [piece for part in parts for piece in shapely.get_parts(part)]
    return shapely.MultiPolygon([piece for piece in flat if piece.geom_type == "Polygon"])

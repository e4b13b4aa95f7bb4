"""Outlines from the XML files of ASAP and of Aperio ImageScope, both in level-0 pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import shapely
from shapely.geometry.base import BaseGeometry

from wholegrad.errors import SlideError
from wholegrad.slide.outlines_read import UNCLASSIFIED, Drawn, Outline, polygon, repaired

ASAP_AREAS = ("Polygon", "Spline", "Rectangle")  # the others are points and measurements
ELLIPSE, WITHOUT_AREA = "2", ("3", "4", "5")  # Aperio's types of region: arrows, rulers, points
ELLIPSE_CORNERS = 64


def read_xml(path: str) -> list[Outline]:
    """The areas of an annotation file, in its order. ASAP's class is the group, Aperio's the annotation layer.

    Raises:
        SlideError: the file cannot be read, is neither format, or has a broken polygon.
    """
    try:
        root = ElementTree.fromstring(Path(path).read_bytes())
    except OSError as error:
        raise SlideError(path, f"cannot be read ({(error.strerror or str(error)).lower()})", "check the path") from None
    except ElementTree.ParseError as error:
        raise SlideError(path, f"is not XML ({error})", "it is probably cut off: export it again") from None
    if root.tag == "ASAP_Annotations":
        return repaired(path, _asap(path, root))
    if root.tag == "Annotations":
        return repaired(path, _aperio(path, root))
    raise SlideError(path, f"is XML of another kind (<{root.tag}>)", "export ASAP or Aperio XML, or GeoJSON")


def _asap(path: str, root: Element) -> Iterator[Drawn]:
    for number, drawn in enumerate(root.iter("Annotation"), 1):
        if drawn.get("Type", "Polygon") not in ASAP_AREAS:
            continue
        where = drawn.get("Name") or f"annotation {number}"
        group = drawn.get("PartOfGroup") or "None"
        points = sorted(drawn.iter("Coordinate"), key=lambda point: _order(f"{path}, {where}", point))
        corners = [(point.get("X"), point.get("Y")) for point in points]
        yield Drawn(UNCLASSIFIED if group == "None" else group, polygon(f"{path}, {where}", corners), where)


def _order(where: str, point: Element) -> float:
    told = point.get("Order", "0")
    try:
        return float(told)
    except ValueError:
        raise SlideError(where, f"has a corner whose order is {told!r}", "export it again") from None


def _aperio(path: str, root: Element) -> Iterator[Drawn]:
    """One area a layer: its regions together, without the negative ones."""
    for number, layer in enumerate(root.iter("Annotation"), 1):
        name = layer.get("Name") or _attribute(layer) or f"Layer {layer.get('Id', number)}"
        positive, negative = list[tuple[BaseGeometry, str]](), list[BaseGeometry]()
        for count, region in enumerate(layer.iter("Region"), 1):
            where = f"layer {name}, region {region.get('Id', count)}"
            area = _region(f"{path}, {where}", region)
            if area is not None and region.get("NegativeROA") == "1":
                negative.append(shapely.make_valid(area))
            elif area is not None:
                positive.append((area, where))
        holes = shapely.union_all(negative) if negative else None
        for area, where in positive:
            yield Drawn(name, area, where, holes)


def _attribute(layer: Element) -> str:
    """The first attribute that says something, where a layer has no name."""
    told = [attribute.get("Value") or attribute.get("Name") or "" for attribute in layer.iter("Attribute")]
    return next((text for text in told if text), "")


def _region(where: str, region: Element) -> BaseGeometry | None:
    kind = region.get("Type", "0")
    if kind in WITHOUT_AREA:
        return None
    corners = [(vertex.get("X"), vertex.get("Y")) for vertex in region.iter("Vertex")]
    if kind == ELLIPSE and len(corners) <= 4:
        return _ellipse(where, corners)
    return polygon(where, corners)


def _ellipse(where: str, corners: list[tuple[str | None, str | None]]) -> BaseGeometry:
    """The ellipse in the rectangle of the corners, as a polygon."""
    try:
        xs, ys = ([float(value or "nan") for value in values] for values in zip(*corners, strict=True))
    except ValueError as error:
        raise SlideError(where, f"is no ellipse ({error})", "delete or redraw it") from None
    (x, y), (a, b) = ((max(v) + min(v)) / 2 for v in (xs, ys)), ((max(v) - min(v)) / 2 for v in (xs, ys))
    turns = [2 * math.pi * i / ELLIPSE_CORNERS for i in range(ELLIPSE_CORNERS)]
    return polygon(where, [(x + a * math.cos(t), y + b * math.sin(t)) for t in turns])

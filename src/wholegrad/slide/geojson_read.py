"""Outlines from GeoJSON as QuPath exports it: level-0 pixels, a feature an annotation, its class in the properties.

Follows RFC 7946 for geometry and QuPath's conventions for the rest: a FeatureCollection or a bare list of features,
``classification`` with a ``name`` (derived classes read "Tumor: Positive") or a list of ``names``. Points and lines
have no area and are left out, and so are TMA cores, which are no annotation.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry.base import BaseGeometry

from wholegrad.errors import SlideError
from wholegrad.slide.outlines_read import UNCLASSIFIED, Drawn, Outline, polygon, repaired

NO_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")


def read_geojson(path: str) -> list[Outline]:
    """The areas of a GeoJSON file, in its order.

    Raises:
        SlideError: the file cannot be read, is not GeoJSON, or has a broken polygon.
    """
    return repaired(path, _areas(path, _features(path, _parsed(path))))


def _parsed(path: str) -> Any:
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
        return json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, EOFError, RecursionError, zlib.error, gzip.BadGzipFile) as error:
        detail = " ".join(str(error).split())[:100]
        raise SlideError(path, f"is not JSON ({detail})", "it is probably cut off: export it again") from None
    except OSError as error:
        raise SlideError(path, f"cannot be read ({(error.strerror or str(error)).lower()})", "check the path") from None


def _features(path: str, told: Any) -> list[Any]:
    kind = told.get("type") if isinstance(told, dict) else None
    features = told.get("features") if kind == "FeatureCollection" else told
    if isinstance(features, list):
        return features
    if kind is not None:
        return [told if kind == "Feature" else {"geometry": told}]
    raise SlideError(path, "is JSON, but not GeoJSON", "in QuPath: File > Export objects as GeoJSON")


def _areas(path: str, features: list[Any]) -> Iterator[Drawn]:
    for number, feature in enumerate(features, 1):
        where = f"feature {number}"
        if not isinstance(feature, dict) or "geometry" not in feature:
            raise SlideError(f"{path}, {where}", "has no geometry", "in QuPath: File > Export objects as GeoJSON")
        try:
            yield from _areas_of(f"{path}, {where}", where, feature)
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            detail = f"{type(error).__name__}: {error}"
            remedy = "in QuPath: File > Export objects as GeoJSON"
            raise SlideError(f"{path}, {where}", f"is not laid out as GeoJSON is ({detail})", remedy) from None


def _areas_of(place: str, where: str, feature: dict[str, Any]) -> Iterator[Drawn]:
    properties = feature.get("properties") or {}
    kind = str(properties.get("objectType", properties.get("object_type", ""))).lower().replace("_", "")
    name = _class_of(properties)
    for area in _polygons(place, feature["geometry"]) if kind != "tmacore" else ():
        yield Drawn(name, area, f"{where}, class {name}")


def _class_of(properties: dict[str, Any]) -> str:
    told = properties.get("classification")
    if isinstance(told, dict):
        told = told.get("name") or ": ".join(told.get("names") or ())
    return str(told) if told else UNCLASSIFIED


def _polygons(where: str, geometry: Any) -> Iterator[BaseGeometry]:
    """The area of one geometry, if it has one."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "GeometryCollection":
        for part in geometry.get("geometries", ()):
            yield from _polygons(where, part)
    elif kind in ("Polygon", "MultiPolygon"):
        told = geometry.get("coordinates") or []
        rings = [told] if kind == "Polygon" else told
        parts = [polygon(where, each[0], each[1:]) for each in rings if each]
        if parts:
            yield parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    elif kind not in NO_AREA and geometry is not None:
        raise SlideError(where, f"has a geometry of type {kind}", "export polygons")

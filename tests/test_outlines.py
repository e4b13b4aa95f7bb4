"""Outlines are exact, valid, what QuPath opens, and found in memory that does not grow with the map's height."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from wholegrad.errors import ConfigError, ShapeError, SlideError
from wholegrad.slide.outlines import Grid, OutlineOptions, OutlineWriter, pieces, polygon
from wholegrad.slide.output import ClassNames
from wholegrad.slide.simplify import simplify
from wholegrad.slide.trace import Rings, Tracer

MAPS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, 3))


def traced(labels: Any, heights: list[int] | None = None, **limits: float) -> Rings:
    tracer, top = Tracer(labels.shape[1], **limits), 0
    for height in [*(heights or []), len(labels)]:
        tracer.add(labels[top : top + height])
        top += height
    return tracer.finish()


def filled(rings: Rings, shape: tuple[int, int]) -> Any:
    """The map again: a pixel is inside where an odd number of vertical edges lies to its left."""
    out = np.zeros(shape, np.uint8)
    for label in np.unique(rings.labels):
        edges = np.zeros((shape[0], shape[1] + 1), np.uint8)
        for i in np.flatnonzero(rings.labels == label):
            ring = rings.xy[rings.starts[i] : rings.starts[i + 1]]
            for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0), strict=True):
                assert (x0 == x1) != (y0 == y1)
                if x0 == x1:
                    edges[min(y0, y1) : max(y0, y1), x0] ^= 1
        inside = np.bitwise_xor.accumulate(edges, axis=1)[:, :-1] > 0
        assert not out[inside].any()
        out[inside] = label
    return out


@settings(max_examples=100, deadline=None)
@given(MAPS, st.lists(st.integers(1, 9), max_size=5))
def test_unsimplified_outlines_give_the_map_back_bit_for_bit(labels: Any, heights: list[int]) -> None:
    rings = traced(labels, heights)
    assert np.array_equal(filled(rings, labels.shape), labels)
    for label in np.unique(labels[labels > 0]):
        found = [piece for one, piece in pieces(rings) if one == label]
        assert len(found) == ndimage.label(labels == label)[1]
        assert sum(int(piece.areas.sum()) for piece in found) == (labels == label).sum()
        for piece in found:
            made = polygon(piece, 0, Grid())
            assert made.is_valid and made.area == piece.areas.sum()


@settings(max_examples=60, deadline=None)
@given(MAPS, st.floats(0.3, 6))
def test_simplified_outlines_are_valid_and_near(labels: Any, tolerance: float) -> None:
    for _, piece in pieces(traced(labels)):
        kept = simplify(piece.xy, piece.starts, tolerance)
        for start, stop in zip(piece.starts[:-1], piece.starts[1:], strict=True):
            ring, stays = piece.xy[start:stop], kept[start:stop]
            assert stays.sum() >= 4
            line = shapely.LinearRing(ring[stays])
            assert shapely.distance(line, shapely.points(ring)).max() <= tolerance + 1e-9
        assert polygon(piece, tolerance, Grid((1.37, 1.37), (3, 4))).is_valid


def ragged(size: int, seed: int = 0) -> Any:
    noise = np.random.default_rng(seed).standard_normal((size, size))
    return (ndimage.gaussian_filter(noise, 2) > 0).astype(np.uint8)


def test_simplifying_leaves_out_most_of_a_ragged_outline() -> None:
    rings = traced(ragged(400))
    kept = [simplify(piece.xy, piece.starts, 1.0) for _, piece in pieces(rings)]
    assert sum(map(np.sum, kept)) < 0.4 * sum(map(len, kept))


def test_lines_that_would_cross_get_vertices_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import wholegrad.slide.simplify as module

    def invalid() -> int:
        made = (
            shapely.Polygon(*_rings(piece, simplify(piece.xy, piece.starts, 3.0)))
            for _, piece in pieces(traced(ragged(300)))
        )
        return sum(not one.is_valid for one in made)

    repaired = invalid()
    monkeypatch.setattr(module, "_crossing", lambda xy, lines, *_: np.zeros(len(lines), bool))
    assert invalid() > repaired


def _rings(piece: Rings, kept: Any) -> tuple[Any, list[Any]]:
    shell, *holes = (piece.xy[a:b][kept[a:b]] for a, b in zip(piece.starts[:-1], piece.starts[1:], strict=True))
    return shell, holes


def test_small_pieces_and_holes_go_by_area() -> None:
    labels = np.zeros((40, 60), np.uint8)
    labels[2:30, 2:30], labels[5:8, 5:8], labels[10:20, 10:20] = 1, 0, 0  # holes of 9 and 100
    labels[12:18, 12:18], labels[14, 14] = 1, 0  # a piece of 36 in a hole, with a hole
    labels[35:38, 50:55] = 2
    everything = {(label, len(piece.areas)) for label, piece in pieces(traced(labels))}
    assert everything == {(1, 3), (1, 2), (2, 1)}
    kept = list(pieces(traced(labels, min_area=20, min_hole=10)))
    assert [(label, piece.areas.tolist()) for label, piece in kept] == [(1, [784, -100]), (1, [36])]
    alone = list(pieces(traced(labels, min_area=40)))  # the small piece's hole goes with it
    assert [piece.areas.tolist() for _, piece in alone] == [[784, -9, -100]]
    assert not list(pieces(traced(labels * 0)))


def test_what_is_held_does_not_grow_with_the_height() -> None:
    rng = np.random.default_rng(0)
    tracer, held = Tracer(3000, min_area=50), []
    for _ in range(12):
        band = (rng.random((256, 3000)) < 0.02).astype(np.uint8)
        band[:, 1000:2000] |= 1  # one piece that never ends
        tracer.add(band)
        held.append(tracer.held_bytes)
    grown = (held[-1] - held[3]) / 8
    assert grown < 256 * 4 * 16 + 4 * 3000 * 12  # bytes a band: the outline's own new vertices, not its area or specks


def test_old_pieces_are_forgotten() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, (60, 50)).astype(np.uint8)
    tracer = Tracer(50)
    for row in labels:
        tracer._compact_at = 0
        tracer.add(row[None])
    rings = tracer.finish()
    assert np.array_equal(filled(rings, labels.shape), labels)
    assert len(list(pieces(rings))) == sum(ndimage.label(labels == k)[1] for k in (1, 2))
    assert tracer._counters[6] < 2000


def written(path: Path, labels: Any, names: tuple[str, ...] = ("Tissue",), mpp: float | None = 0.5, **kw: Any) -> Any:
    writer = OutlineWriter(path, labels.shape[1], mpp, ClassNames(names), **kw)
    for top in range(0, len(labels), 7):
        writer.write(top, labels[None, top : top + 7])
    writer.seal()
    writer.publish()
    return json.loads(path.read_text())


def test_geojson_is_what_qupath_opens(tmp_path: Path) -> None:
    labels = np.zeros((60, 80), np.uint8)
    labels[5:50, 5:70], labels[20:30, 20:30], labels[35:40, 30:60], labels[:3, :3] = 1, 0, 2, 255
    told = written(tmp_path / "a.geojson", labels, ("Tumor", 'Strömä "x"'), grid=Grid((4.0, 4.0), (100.0, 7.0)))
    assert told["type"] == "FeatureCollection" and len(told["features"]) == 3
    by_name = {feature["properties"]["classification"]["name"]: feature for feature in told["features"]}
    assert set(by_name) == {"Tumor", 'Strömä "x"', "Ignore*"}
    for feature in told["features"]:
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        assert feature["properties"]["objectType"] == "annotation" and feature["properties"]["isLocked"] is False
        assert all(0 <= part <= 255 for part in feature["properties"]["classification"]["color"])
        uuid.UUID(feature["id"])
        rings = feature["geometry"]["coordinates"]
        assert all(ring[0] == ring[-1] for ring in rings)
        signed = [shapely.is_ccw(shapely.LinearRing(ring)) for ring in rings]
        assert signed == [True] + [False] * (len(rings) - 1)  # RFC 7946
        assert shapely.geometry.shape(feature["geometry"]).is_valid
    tumor = shapely.geometry.shape(by_name["Tumor"]["geometry"])
    assert tumor.bounds == (120, 27, 380, 207) and len(tumor.interiors) == 2
    assert tumor.area == 16 * (labels == 1).sum()
    again = written(tmp_path / "b.geojson", labels, ("Tumor", 'Strömä "x"'), grid=Grid((4.0, 4.0), (100.0, 7.0)))
    assert again == told
    assert written(tmp_path / "c.geojson", labels * 0)["features"] == []


def test_areas_and_distances_are_in_um(tmp_path: Path) -> None:
    labels = np.zeros((60, 60), np.uint8)
    labels[10:20, 10:20] = labels[30:50, 30:50] = 1
    assert len(written(tmp_path / "a.json", labels, options=OutlineOptions(min_area=25.0))["features"]) == 2
    assert len(written(tmp_path / "b.json", labels, options=OutlineOptions(min_area=25.1))["features"]) == 1
    for options, said in ((OutlineOptions(min_area=-1), "is -1"), (OutlineOptions(simplify=float("nan")), "is nan")):
        with pytest.raises(ConfigError, match=said):
            options.in_pixels(0.5)
    with pytest.raises(ConfigError, match="does not tell its um a pixel"):
        OutlineOptions(min_hole=3).in_pixels(None)
    assert OutlineOptions(simplify=3.0).in_pixels(2.0) == (0, 0, 1.5)


def test_what_cannot_be_outlined_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="give labels"):
        Tracer(10).add(np.zeros((3, 9), np.uint8))
    with pytest.raises(SlideError, match="folder exists"):
        OutlineWriter(tmp_path / "none/a.geojson", 10, None, ClassNames(("Tissue",)))
    with pytest.raises(ConfigError, match="give 2 different names"):
        ClassNames.of(["a"], 2)

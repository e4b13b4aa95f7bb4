"""Outlines become labels by one rule, whatever the tiling; formats, classes and faulty files are told apart plainly."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image

import wholegrad as wg
from slide_helpers import data_folder, mask_of, picture, random_boxes
from wholegrad.errors import ConfigError, ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import as_reader
from wholegrad.slide.slide import open_slide
from wholegrad.slide.thumbnail import thumbnail

SLIDE = as_reader(np.broadcast_to(np.uint8(0), (3, 300, 400)), name="slide")
SQUARE = [[10, 10], [110, 10], [110, 110], [10, 110], [10, 10]]
HOLE = [[40, 40], [60, 40], [60, 60], [40, 60], [40, 40]]


def feature(rings: Any, name: Any = "Tissue", kind: str = "Polygon", **more: Any) -> dict[str, Any]:
    properties = {"objectType": "annotation", **more}
    if name is not None:
        properties["classification"] = name if isinstance(name, dict) else {"name": name, "color": [200, 0, 0]}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": rings}, "properties": properties}


def write(path: Path, features: list[Any], bare: bool = False) -> Path:
    text = json.dumps(features if bare else {"type": "FeatureCollection", "features": features})
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def labels(path: Path, like: Any = SLIDE, **options: Any) -> Any:
    mask = wg.open_mask(path, like=like, **options)
    return mask.read(Box(0, mask.shape[1], 0, mask.shape[2]))[0].copy()


def star(rng: np.random.Generator, corners: int) -> Any:
    """A ragged polygon around a random centre, partly off the slide, holes inside."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    centre, reach = rng.uniform((20, 20), (380, 280)), rng.uniform(10, 60, corners)
    rings = [centre + (share * reach)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1) for share in (1, 0.4)]
    return shapely.Polygon(np.clip(rings[0], 0, (400, 300)), [np.clip(rings[1], 0, (400, 300))]).buffer(0)


def test_a_pixel_belongs_if_its_centre_does_for_any_tiling_and_resolution(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    areas = [star(rng, 40) for _ in range(12)]
    drawn = [feature(shapely.geometry.mapping(a)["coordinates"], f"c{i % 3}", a.geom_type) for i, a in enumerate(areas)]
    write(tmp_path / "a.geojson", drawn)
    classes = {"c2": 7, "c0": 1, "c1": 3}
    for height, width in [(300, 400), (150, 200), (137, 183), (601, 799)]:
        image = as_reader(np.broadcast_to(np.uint8(0), (3, 300, 400)))
        mask = wg.open_mask(tmp_path / "a.geojson", like=image, classes=classes).at(height, width)
        whole = mask.read(Box(0, height, 0, width))[0].copy()
        x, y = np.meshgrid((np.arange(width) + 0.5) * 400 / width, (np.arange(height) + 0.5) * 300 / height)
        expected = np.zeros((height, width), np.uint8)
        for name, label in classes.items():  # the class named later wins
            for area in areas[int(name[1]) :: 3]:
                expected[shapely.contains_xy(area, x, y)] = label
        assert np.array_equal(whole, expected)
        for box in random_boxes(mask.shape, 40):
            assert np.array_equal(mask.read(box)[0], whole[box.slices()]), box


def test_areas_that_share_an_edge_leave_no_gap_and_no_overlap(tmp_path: Path) -> None:
    """Corners at pixel centres, where the rule decides."""
    rng = np.random.default_rng(1)
    points = np.round(rng.uniform(0, (400, 300), (60, 2))) + 0.5
    cells = shapely.get_parts(shapely.delaunay_triangles(shapely.MultiPoint(points)))
    seen = np.zeros((300, 400), int)
    for cell in cells:
        write(tmp_path / "a.geojson", [feature([[*map(list, cell.exterior.coords)]])])
        seen += labels(tmp_path / "a.geojson")
    hull = shapely.MultiPoint(points).convex_hull
    x, y = np.meshgrid(np.arange(400) + 0.5, np.arange(300) + 0.5)
    inside = shapely.contains_xy(hull, x, y)
    assert (seen[inside] == 1).all()
    assert seen.max() == 1


def test_holes_multipolygons_lists_and_compressed_files(tmp_path: Path) -> None:
    expected = np.zeros((300, 400), np.uint8)
    expected[10:110, 10:110] = 1
    expected[40:60, 40:60] = 0
    far = [[[200, 200], [220, 200], [220, 230], [200, 230], [200, 200]]]
    assert np.array_equal(labels(write(tmp_path / "a.geojson", [feature([SQUARE, HOLE])])), expected)
    assert np.array_equal(labels(write(tmp_path / "a.json", [feature([SQUARE, HOLE])], bare=True)), expected)
    assert np.array_equal(labels(write(tmp_path / "a.geojson.gz", [feature([SQUARE, HOLE])])), expected)
    expected[200:230, 200:220] = 1
    both = [feature([[SQUARE, HOLE], far], kind="MultiPolygon"), feature([5, 5], kind="Point")]
    assert np.array_equal(labels(write(tmp_path / "a.geojson", both)), expected)
    shifted = labels(tmp_path / "a.geojson", origin=(30, 50))
    assert np.array_equal(shifted[50:, 30:], expected[:-50, :-30])


def test_classes_ignored_areas_and_what_is_not_named(tmp_path: Path) -> None:
    inner = [[20, 20], [50, 20], [50, 50], [20, 50], [20, 20]]
    ignored = [[30, 30], [200, 30], [200, 60], [30, 60], [30, 30]]
    drawn = [
        feature([ignored], "Ignore*"),
        feature([inner], {"names": ["Tumor", "Positive"]}),
        feature([SQUARE], "Tissue"),
        feature([[[300, 200], [399, 200], [399, 299], [300, 299]]], "A1", objectType="tma_core"),
    ]
    path = write(tmp_path / "a.geojson", drawn)
    with pytest.raises(SlideError, match=r"holds 2 classes.*classes=\{'Tissue': 1, 'Tumor: Positive': 2\}"):
        wg.open_mask(path, like=SLIDE)
    out = labels(path, classes={"Tissue": 1, "Tumor: Positive": 2})
    assert [int(out[y, x]) for y, x in [(5, 5), (15, 15), (25, 25), (40, 40), (40, 150), (250, 350)]] == [
        0,
        1,
        2,
        255,
        255,
        0,
    ]
    assert labels(path, classes={"Tumor: Positive": 2, "Tissue": 1})[25, 25] == 1
    assert labels(path, classes={"Tissue": 0, "Tumor: Positive": 5})[15, 15] == 0
    assert labels(path, classes={"Tissue": 1, "Tumor: Positive": None})[25, 25] == 1
    assert labels(path, classes={"*": 4})[25, 25] == 4
    out = labels(path, classes={"Ignore*": 9, "*": 1}, ignore=["Tissue"])
    assert (out[15, 15], out[40, 150]) == (255, 9)
    with pytest.raises(
        ConfigError, match=r"has the class 'Tumor: Positive', which classes \{'Tissue': 1\} does not name"
    ):
        wg.open_mask(path, like=SLIDE, classes={"Tissue": 1})
    with pytest.raises(ConfigError, match="label 300"):
        wg.open_mask(path, like=SLIDE, classes={"*": 300})
    for label in ("1", 1.5, True):
        with pytest.raises(ConfigError, match=rf"classes: label {label!r} of 'Tissue' is no whole number; give small"):
            wg.open_mask(path, like=SLIDE, classes={"Tissue": label, "*": 1})
    for option in ({"classes": "Tissue"}, {"ignore": "Tissue"}):
        with pytest.raises(ConfigError, match=r"(classes|ignore): is 'Tissue'; give"):
            wg.open_mask(path, like=SLIDE, **option)
    assert labels(write(tmp_path / "b.geojson", [feature([SQUARE], None)]))[50, 20] == 1
    assert labels(tmp_path / "b.geojson", classes={"Unclassified": 3})[50, 20] == 3


ASAP = """<?xml version="1.0"?><ASAP_Annotations><Annotations>
<Annotation Name="Annotation 0" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58"><Coordinates>
<Coordinate Order="1" X="110" Y="10"/><Coordinate Order="0" X="10" Y="10"/>
<Coordinate Order="2" X="110" Y="110"/><Coordinate Order="3" X="10" Y="110"/></Coordinates></Annotation>
<Annotation Name="Annotation 1" Type="Rectangle" PartOfGroup="Exclusion" Color="#F4FA58"><Coordinates>
<Coordinate Order="0" X="40" Y="40"/><Coordinate Order="1" X="60" Y="40"/>
<Coordinate Order="2" X="60" Y="60"/><Coordinate Order="3" X="40" Y="60"/></Coordinates></Annotation>
<Annotation Name="Annotation 2" Type="Dot" PartOfGroup="None" Color="#F4FA58"><Coordinates>
<Coordinate Order="0" X="5" Y="5"/></Coordinates></Annotation></Annotations>
<AnnotationGroups><Group Name="Tumor" PartOfGroup="None" Color="#0"/></AnnotationGroups></ASAP_Annotations>"""

VERTICES = {
    "square": [(10, 10), (110, 10), (110, 110), (10, 110)],
    "hole": [(40, 40), (60, 40), (60, 60), (40, 60)],
    "far": [(200, 200), (240, 220)],
}


def aperio_region(number: int, corners: str, kind: int = 0, negative: int = 0) -> str:
    told = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in VERTICES[corners])
    return f'<Region Id="{number}" Type="{kind}" NegativeROA="{negative}"><Vertices>{told}</Vertices></Region>'


def test_asap_and_aperio(tmp_path: Path) -> None:
    expected = np.zeros((300, 400), np.uint8)
    expected[10:110, 10:110] = 1
    expected[40:60, 40:60] = 0
    (tmp_path / "asap.xml").write_text(ASAP.format(group="Tumor"))
    assert np.array_equal(labels(tmp_path / "asap.xml", classes={"Tumor": 1, "Exclusion": 0}), expected)
    regions = aperio_region(1, "square") + aperio_region(2, "hole", 1, 1) + aperio_region(3, "far", 4)
    layer = '<Annotation Id="1" Name="{}" LineColor="65280"><Attributes/><Regions>{}</Regions></Annotation>'
    (tmp_path / "aperio.xml").write_text(
        f'<Annotations MicronsPerPixel="0.5">{layer.format("", regions)}</Annotations>'
    )
    assert np.array_equal(labels(tmp_path / "aperio.xml"), expected)
    assert np.array_equal(labels(tmp_path / "aperio.xml", classes={"Layer 1": 1}), expected)
    round_ = layer.format("Vessel", aperio_region(1, "far", 2))
    (tmp_path / "aperio.xml").write_text(f"<Annotations>{round_}</Annotations>")
    assert labels(tmp_path / "aperio.xml").sum() == pytest.approx(np.pi * 20 * 10, rel=0.02)


def test_an_outline_that_crosses_itself_is_repaired_and_told(tmp_path: Path) -> None:
    bow = [[10, 10], [110, 110], [110, 10], [10, 110], [10, 10]]
    path = write(tmp_path / "a.geojson", [feature([SQUARE], "Other"), feature([bow])])
    with pytest.warns(
        UserWarning, match=r"an outline crosses itself, repaired here \(feature 2, class Tissue\)"
    ) as told:
        out = labels(path, classes={"Other": None, "Tissue": 1})
    assert len(told) == 1
    assert out.sum() == pytest.approx(5000, rel=0.02)
    assert (out[60, 20], out[60, 100], out[20, 60], out[100, 60]) == (1, 1, 0, 0)  # the two wings
    touching = [[10, 10], [60, 60], [110, 10], [110, 110], [60, 60], [10, 110], [10, 10]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels(write(tmp_path / "b.geojson", [feature([touching])])).sum() == pytest.approx(5000, rel=0.02)


BAD = {
    "empty.geojson": ('{"type": "FeatureCollection", "features": []}', "holds no outline with an area; draw"),
    "points.geojson": (json.dumps([feature([5, 5], kind="Point")]), "holds no outline with an area"),
    "ignored.geojson": (json.dumps([feature([SQUARE], "Ignore*")]), "holds only areas to ignore"),
    "cut.geojson": ('{"type": "FeatureCollection", "feat', "is not JSON"),
    "other.json": ('{"a": 1}', "is JSON, but not GeoJSON"),
    "short.geojson": (json.dumps([feature([[[1, 1], [2, 2]]])]), "feature 1: is no polygon"),
    "nan.geojson": (json.dumps([feature([[[1, 1], [9, 1], [9, float("nan")]]])]), "a corner is no number"),
    "text.geojson": (json.dumps([feature([[["a", 1], [9, 1], [9, 9]]])]), "feature 1: is no polygon"),
    "curve.geojson": (json.dumps([feature([], kind="Curve")]), "feature 1: has a geometry of type Curve"),
    "none.geojson": ('[{"type": "Feature"}]', "feature 1: has no geometry"),
    "outside.geojson": (json.dumps([feature([[[390, 10], [500, 10], [500, 90]]])]), r"beyond slide \(400 x 300"),
    "number.geojson": (json.dumps([feature(5)]), "feature 1: is not laid out as GeoJSON is"),
    "huge.geojson": (json.dumps([feature([[[10**400, 1], [9, 1], [9, 9]]])]), "feature 1: is no polygon"),
    "listed.geojson": (json.dumps([{**feature([SQUARE]), "properties": [1]}]), "feature 1: is not laid out as"),
    "deep.geojson": ("[" * 100_000, "is not JSON"),
    "order.xml": (ASAP.format(group="Tumor").replace('Order="1"', 'Order="last"', 1), "whose order is 'last'"),
    "cut.xml": ("<Annotations><Annot", "is not XML"),
    "html.xml": ("<html/>", "is XML of another kind"),
    "dots.xml": (ASAP.replace("Polygon", "Dot").replace("Rectangle", "Dot"), "holds no outline"),
    "corner.xml": (ASAP.format(group="Tumor").replace('X="110"', 'X="far"', 1), "Annotation 0: is no polygon"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_faulty_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    text, match = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(SlideError, match=match) as refusal:
        wg.open_mask(tmp_path / name, like=SLIDE)
    assert "\n" not in str(refusal.value) and name in str(refusal.value)
    with pytest.raises(SlideError, match="cannot be read"):
        wg.open_mask(tmp_path / f"no{name}", like=SLIDE)


def test_an_empty_file_is_all_background_where_classes_say_so(tmp_path: Path) -> None:
    assert not labels(write(tmp_path / "a.geojson", []), classes={"Tissue": 1}).any()


def test_label_pictures_arrays_and_what_is_none(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).choice(np.array([0, 1, 255], np.uint8), (150, 200))
    Image.fromarray(stored).save(tmp_path / "grey.png")
    palette = Image.fromarray(stored)
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    np.save(tmp_path / "a.npy", stored)
    expected = stored.repeat(2, axis=0).repeat(2, axis=1)
    for name in ("grey.png", "palette.png", "a.npy"):
        assert np.array_equal(labels(tmp_path / name), expected), name
    Image.fromarray(picture(150, 200)).save(tmp_path / "rgb.png")
    with pytest.raises(ShapeError, match="has 3 channels"):
        wg.open_mask(tmp_path / "rgb.png", like=SLIDE)
    Image.fromarray(stored).save(tmp_path / "a.jpg")
    with pytest.raises(SlideError, match="a JPEG, which blurs labels"):
        wg.open_mask(tmp_path / "a.jpg", like=SLIDE)
    with pytest.raises(ConfigError, match="is a label map"):
        wg.open_mask(tmp_path / "grey.png", like=SLIDE, classes={"Tissue": 1})


def test_outlines_follow_the_slides_level_and_region(tmp_path: Path) -> None:
    image = picture(300, 400)
    options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "resolution": (20000, 20000)}
    tifffile.imwrite(tmp_path / "a.tif", image, resolutionunit="CENTIMETER", **options)
    path = write(tmp_path / "a.geojson", [feature([SQUARE, HOLE])])
    with open_slide(tmp_path / "a.tif") as full, open_slide(tmp_path / "a.tif", region=(15, 30, 70, 60)) as part:
        assert np.array_equal(labels(path, part), labels(path, full)[30:90, 15:85])
        drawn = wg.open_mask(path, like=full)
        assert np.array_equal(thumbnail(drawn, 100)[..., 0], drawn.at(75, 100).read(Box(0, 75, 0, 100))[0])
    with open_slide(tmp_path / "a.tif", mpp=1.0) as half:
        expected = np.zeros((150, 200), np.uint8)
        expected[5:55, 5:55], expected[20:30, 20:30] = 1, 0
        assert np.array_equal(labels(path, half), expected)


@pytest.mark.parametrize(
    "name", ["PASAB_PAS-AB_mixed_1.01mpp.tif", "TCGA-DU-6399-01A-01-TS1.svs", "spleen_HE_4.04mpp.tif"]
)
def test_real_outlines_agree_with_the_label_maps_that_they_were_made_from(name: str) -> None:
    """They were traced and simplified: labels may differ within two mask pixels of an edge, and few do."""
    folder = data_folder()
    stored = tifffile.imread(mask_of(folder, name))
    height, width = stored.shape
    with open_slide(folder / "slides" / name) as slide:
        mask = wg.open_mask(folder / "masks" / f"{Path(name).stem}.geojson", like=slide)
        drawn = mask.at(height, width).read(Box(0, height, 0, width))[0] == 1
    counts, tissue = stored != 255, stored == 1  # areas to ignore are not in the GeoJSON
    dice = 2 * (drawn & tissue & counts).sum() / ((drawn & counts).sum() + tissue.sum())
    assert dice > 0.9995
    near = np.zeros_like(tissue)
    near[1:] |= tissue[1:] != tissue[:-1]
    near[:, 1:] |= tissue[:, 1:] != tissue[:, :-1]
    for shift in (-2, -1, 1, 2):
        near |= np.roll(near, shift, 0)
    for shift in (-2, -1, 1, 2):
        near |= np.roll(near, shift, 1)
    assert not ((drawn != tissue) & counts & ~near).any()

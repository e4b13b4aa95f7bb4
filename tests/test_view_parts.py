"""Predictions of a part of a slide, and probabilities of several classes, in the viewer."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import wholegrad as wg
from test_view import body, finished, make_labels, make_slide, rgba, serving, told
from wholegrad.cli import main
from wholegrad.errors import ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import as_reader
from wholegrad.slide.origin import read_origin
from wholegrad.slide.partial import BEYOND, of_part
from wholegrad.view import paint
from wholegrad.view.ladder import TILE
from wholegrad.view.scene import Files, Scene

HEIGHT, WIDTH = 1500, 2300
REGION = (300, 200, 1001, 702)  # x, y, width, height


class Bright(nn.Module):
    """Logits of a pixel alone: one class, or two against a background."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 1)
        with torch.no_grad():
            self.layer.weight[:] = torch.tensor([[4.0, -1, 0], [0, 4, -1], [-1, 0, 4]])[:classes, :, None, None]
            self.layer.bias[:] = torch.tensor([-1.5] if classes == 1 else [-1.5, -1.5, -1.5])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(image)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts")
    make_slide(path / "case.tif")
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    truth[:, 100:1100] = 1
    truth[400:500, 500:600] = 255
    make_labels(path / "case.mask.tif", truth)
    with wg.open_slide(path / "case.tif", region=REGION) as part:
        wg.predict(Bright(), part, out=[path / "part.tif", path / "part.ome.tif", path / "part.npy"])
        wg.predict(Bright(3), part, out=[path / "p3.tif", path / "p3.ome.tif", path / "p3.npy"], kind="probability")
    with wg.open_slide(path / "case.tif", level=1, region=REGION) as part:
        wg.predict(Bright(), part, out=path / "coarse.tif")
    with wg.open_slide(path / "case.tif") as slide:
        wg.predict(Bright(3), slide, out=[path / "all3.ome.tif", path / "all3.tif"], kind="probability")
        wg.predict(Bright(), slide, out=path / "all.tif")
    return path


def expected(folder: Path) -> np.ndarray[Any, Any]:
    """What a prediction of the region says of every pixel of the slide."""
    x, y, width, height = REGION
    whole = np.full((HEIGHT, WIDTH), BEYOND, np.uint8)
    whole[y : y + height, x : x + width] = np.load(folder / "part.npy")[0]
    return whole


def test_what_is_predicted_of_a_part_knows_where_it_lies(folder: Path) -> None:
    x, y, width, height = REGION
    for name in ("part.tif", "part.ome.tif", "p3.tif", "p3.ome.tif"):
        with tifffile.TiffFile(folder / name) as tiff:
            page = tiff.pages.first
            assert isinstance(page, tifffile.TiffPage)
            told = read_origin(page.description)
        assert told is not None and told.size == (HEIGHT, WIDTH), name
        assert (told.rows.start, told.rows.step, told.cols.start, told.cols.step) == (y, height, x, width)
    for name in ("all.tif", "all3.ome.tif", "all3.tif"):
        with tifffile.TiffFile(folder / name) as tiff:
            page = tiff.pages.first
            assert isinstance(page, tifffile.TiffPage) and read_origin(page.description) is None


@pytest.mark.parametrize(("name", "region"), [("part.tif", None), ("part.ome.tif", None), ("part.npy", REGION)])
def test_a_part_lies_where_it_was_predicted(folder: Path, name: str, region: tuple[int, int, int, int] | None) -> None:
    files = Files(folder / "case.tif", folder / "case.mask.tif", folder / name, region=region)
    whole = expected(folder)
    truth = tifffile.imread(folder / "case.mask.tif")
    with serving(files) as server:
        scene = server.app.scene  # type: ignore[attr-defined]
        screen = scene.layers["prediction"].screen
        np.testing.assert_array_equal(screen.read(0, Box(0, HEIGHT, 0, WIDTH)), whole)
        _, found = scene.layers["error"].verdict(0, Box(0, TILE, 0, TILE), 128), rgba(body(server, "tiles/error/0/0_0"))
        verdict = paint.judge(truth[:TILE, :TILE], whole[:TILE, :TILE])
        assert {tuple(c) for c in found[verdict == paint.LEFT_OUT]} == {(*paint.VERDICTS[paint.LEFT_OUT][1], 255)}
        drawn = rgba(body(server, "tiles/prediction/0/0_0"))
        assert not drawn[whole[:TILE, :TILE] == BEYOND].any(), "nothing is drawn where nothing was predicted"
        assert told(server, "at/10_10")["prediction"] == "not predicted"
        score = finished(server, "score.json")
    x, y, width, height = REGION
    inside = np.s_[y : y + height, x : x + width]
    counted = truth[inside] != 255
    tp = ((whole[inside] == 1) & (truth[inside] == 1) & counted).sum()
    fp = ((whole[inside] == 1) & (truth[inside] == 0) & counted).sum()
    fn = ((whole[inside] == 0) & (truth[inside] == 1) & counted).sum()
    assert score["classes"][0]["tp"] == tp and score["classes"][0]["fp"] == fp and score["classes"][0]["fn"] == fn
    assert score["metrics"]["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    for region_found in score["worst"]:
        left, top, wide, high = region_found["box"]
        assert left < x + width and left + wide > x and top < y + height and top + high > y


def test_a_part_of_another_resolution(folder: Path) -> None:
    with wg.open_slide(folder / "case.tif", level=1, region=REGION) as part:
        placed, (_, h, w) = part.placement, part.shape
        said = wg.predict(Bright(), part)
    assert said is not None
    with serving(Files(folder / "case.tif", prediction=folder / "coarse.tif")) as server:
        found = server.app.scene.layers["prediction"].screen.read(0, Box(0, HEIGHT, 0, WIDTH)).copy()  # type: ignore[attr-defined]
    for y, x in ((200, 300), (201, 301), (555, 777), (900, 1299)):
        row = int((Fraction(2 * y + 1, 2) - placed.rows.start) // placed.rows.step)
        col = int((Fraction(2 * x + 1, 2) - placed.cols.start) // placed.cols.step)
        assert 0 <= row < h and 0 <= col < w and found[y, x] == said[0, row, col]
    assert (found[:198] == BEYOND).all() and (found[:, 1303:] == BEYOND).all()


@given(st.data())
@settings(max_examples=30)
def test_a_part_is_the_whole_cut_out_whatever_the_grid(data: st.DataObject) -> None:
    """At any size, a pixel is within if its centre is, and has the label stored there."""
    height, width = (data.draw(st.integers(4, 40)) for _ in "hw")
    y0, x0 = data.draw(st.integers(0, height - 2)), data.draw(st.integers(0, width - 2))
    side = data.draw(st.integers(1, min(height - y0, width - x0)))
    scale = data.draw(st.sampled_from([1, 2, 3]))
    stored = np.random.default_rng(0).integers(0, 9, (1, scale * side, scale * side)).astype(np.uint8)
    like = as_reader(np.zeros((3, height, width), np.uint8))
    part = (Fraction(y0), Fraction(y0 + side), Fraction(x0), Fraction(x0 + side))
    rows, cols = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    mask = of_part(as_reader(stored), like, part).at(rows, cols)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    box = Box(top, data.draw(st.integers(top + 1, rows)), left, data.draw(st.integers(left + 1, cols)))
    found = mask.read(box)[0].copy()
    for y in range(box.y0, box.y1):
        for x in range(box.x0, box.x1):
            at_y, at_x = Fraction(2 * y + 1, 2) * height / rows, Fraction(2 * x + 1, 2) * width / cols
            within = y0 <= at_y < y0 + side and x0 <= at_x < x0 + side
            want = stored[0, int((at_y - y0) * scale), int((at_x - x0) * scale)] if within else BEYOND
            assert found[y - box.y0, x - box.x0] == want


def test_outlines_of_a_part_count_within_it(folder: Path, tmp_path: Path) -> None:
    x, y, width, height = REGION
    square = [[x - 50, y + 100], [x + 200, y + 100], [x + 200, y + 300], [x - 50, y + 300], [x - 50, y + 100]]
    drawn = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [square]}, "properties": {}}
    (tmp_path / "part.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [drawn]}))
    scene = Scene(Files(folder / "case.tif", prediction=tmp_path / "part.geojson", region=REGION))
    try:
        layer = scene.layers["prediction"]
        found = layer.screen.read(0, Box(0, HEIGHT, 0, WIDTH))  # type: ignore[attr-defined]
        want = np.full((HEIGHT, WIDTH), BEYOND)
        want[y : y + height, x : x + width] = 0
        want[y + 100 : y + 300, x : x + 200] = 1
        np.testing.assert_array_equal(found, want)
    finally:
        scene.close()


@pytest.mark.parametrize(
    ("region", "said"), [((1500, 200, 1001, 702), "beyond"), ((300, 200, 702, 1001), "at another scale")]
)
def test_a_region_that_cannot_be_is_refused(folder: Path, region: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(SlideError, match=said):
        Scene(Files(folder / "case.tif", prediction=folder / "part.npy", region=region))


def test_a_part_of_another_slide_is_refused(folder: Path, tmp_path: Path) -> None:
    make_slide(tmp_path / "other.tif", 1400, 2000)
    with pytest.raises(SlideError, match="shows a part of a slide of 1500 x 2300 pixels"):
        Scene(Files(tmp_path / "other.tif", prediction=folder / "part.tif"))


# Probabilities of several classes.


@pytest.mark.parametrize("name", ["p3.tif", "p3.ome.tif", "p3.npy"])
def test_the_class_is_chosen(folder: Path, name: str) -> None:
    """Whether channels lie apart, side by side, or in an array; the first one shown is that of label 1."""
    values = np.load(folder / "p3.npy")
    x, y, width, height = REGION
    region = REGION if name.endswith(".npy") else None
    bytes_ = np.rint(values * 255).astype(np.uint8)
    with serving(Files(folder / "case.tif", probability=folder / name, region=region)) as server:
        (about,) = (layer for layer in told(server, "scene.json")["layers"] if layer["key"] == "probability")
        assert about["channels"][0] == "background" and len(about["channels"]) == 3 and about["channel"] == 1
        at_x, at_y = x + 100, y + 50
        for channel, query in ((0, "?c=0"), (1, ""), (1, "?c=1"), (2, "?c=2")):
            found = told(server, f"at/{at_x}_{at_y}{query}")
            assert found["probability"] == round(int(bytes_[channel, 50, 100]) / 255, 3), query
        assert told(server, "at/5_5")["probability"] == 0
        assert len({body(server, f"tiles/probability/0/1_1?c={channel}") for channel in range(3)}) == 3
        labels = server.app.scene.layers["prediction"].screen.read(0, Box(y, y + height, x, x + width))  # type: ignore[attr-defined]
        np.testing.assert_array_equal(labels, bytes_.argmax(0))


def test_the_background_is_not_taken_for_the_first_class(folder: Path) -> None:
    """An OME-TIFF whose channels lie apart opens with its first, which is that of the background."""
    with serving(Files(folder / "case.tif", probability=folder / "all3.ome.tif")) as apart:
        seen = body(apart, "tiles/probability/1/0_0")
        other = body(apart, "tiles/probability/1/0_0?c=0")
    with serving(Files(folder / "case.tif", probability=folder / "all3.tif")) as beside:
        assert body(beside, "tiles/probability/1/0_0") == seen != other


def test_several_channels_are_no_labels(folder: Path) -> None:
    for name in ("all3.ome.tif", "all3.tif"):
        with pytest.raises(ShapeError, match="has 3 channels"):
            Scene(Files(folder / "case.tif", prediction=folder / name))


def test_a_channel_that_is_not_there_is_the_first_class(folder: Path) -> None:
    with serving(Files(folder / "case.tif", probability=folder / "all3.tif")) as server:
        assert body(server, "tiles/probability/1/0_0?c=200") == body(server, "tiles/probability/1/0_0")


def test_the_command_takes_a_region(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["view", str(folder / "case.tif"), "--prediction", str(folder / "part.npy"), "--no-browser"]
    assert main([*words, "--region", "bounds"]) == 2
    assert "give X,Y,WIDTH,HEIGHT" in capsys.readouterr().err
    assert main([*words, "--region", "0,0,5,500"]) == 2
    assert "at another scale" in capsys.readouterr().err

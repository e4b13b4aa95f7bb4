"""What a prediction is written to opens in other programs' readers; all of it appears, or nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import shapely
import tifffile
import torch
import zarr
from PIL import Image
from torch import nn

import wholegrad as wg
from slide_helpers import picture
from wholegrad.errors import ConfigError, SlideError, WholegradError
from wholegrad.graph.geometry import Box
from wholegrad.slide import bigtiff
from wholegrad.slide.arrays import as_reader
from wholegrad.slide.output import ClassNames
from wholegrad.slide.overlay import OverlayWriter, round_length
from wholegrad.slide.slide import open_slide
from wholegrad.slide.write import PyramidWriter
from wholegrad.slide.zarr_write import ZarrWriter

OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
EVERY = ("m.ome.tif", "m.tif", "m.zarr", "m.npy", "m.geojson", "m.png")


class Bright(nn.Module):
    """Logits of one class, or of several, that follow the image's first channel."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-5, 12, classes) if classes > 1 else torch.tensor([12.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, :1] - 0.5) * self.scale[:, None, None]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def slide(tmp_path: Path) -> Any:
    with PyramidWriter(tmp_path / "s.tif", (3, 330, 520), tile=64, mpp=0.5) as writer:
        writer.write_rows(picture(330, 520))
    with open_slide(tmp_path / "s.tif", level=1) as opened:
        yield opened


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_every_file_holds_the_same_mask(slide: Any, out: Path) -> None:
    wg.predict(Bright(), slide, out=[out / name for name in EVERY], tile=(50, 70), simplify=0)
    mask = wg.predict(Bright(), slide)
    assert mask is not None and 0.1 < mask.mean() < 0.9
    assert np.array_equal(tifffile.imread(out / "m.ome.tif"), mask[0])
    assert np.array_equal(tifffile.imread(out / "m.tif"), mask[0])
    assert np.array_equal(np.load(out / "m.npy"), mask)
    assert np.array_equal(zarr.open_group(out / "m.zarr", mode="r")["0"][:], mask)
    told = json.loads((out / "m.geojson").read_text())["features"]
    area = sum(shapely.geometry.shape(feature["geometry"]).area for feature in told)
    assert area == pytest.approx(4 * mask.sum())  # in pixels of level 0
    with Image.open(out / "m.png") as page:
        assert page.width > 260 and page.height > 165
    assert names_in(out) == sorted(EVERY)


@pytest.mark.parametrize(
    "options", [{"level": 0}, {"level": 1}, {"mpp": 1.3}, {"level": 1, "region": (101, 60, 333, 201)}]
)
def test_outlines_read_back_as_the_mask(slide: Any, out: Path, options: dict[str, Any]) -> None:
    """At every resolution and region: where the pixels lie on the slide is what writing and reading agree on."""
    with open_slide(slide.path, **options) as shown:
        mask = wg.predict(Bright(), shown, out=out / "m.geojson", simplify=0) or wg.predict(Bright(), shown)
        with wg.open_mask(out / "m.geojson", like=shown) as read:
            assert np.array_equal(read.read(Box(0, shown.shape[1], 0, shown.shape[2])), mask)


def test_ome_tiff_is_a_pyramid_to_openslide_tifffile_and_ome_readers(tmp_path: Path) -> None:
    labels = np.zeros((700, 901), np.uint8)
    labels[100:400, 100:700] = 3
    path = tmp_path / "a & b.ome.tif"
    with PyramidWriter(path, (1, 700, 901), tile=128, mpp=0.25, label=True, channels=["Labels"]) as writer:
        writer.write_rows(labels)
    with openslide.OpenSlide(path) as seen:
        assert seen.level_dimensions == ((901, 700), (451, 350), (226, 175), (113, 88))
        assert float(seen.properties["openslide.mpp-x"]) == pytest.approx(0.25, rel=1e-6)
        assert seen.properties["openslide.mpp-x"] == seen.properties["openslide.mpp-y"]
        assert np.array_equal(np.asarray(seen.read_region((0, 0), 0, (901, 700)))[..., 0], labels)
        assert np.array_equal(np.asarray(seen.read_region((0, 0), 2, (226, 175)))[..., 0], labels[::4, ::4])
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome and len(tiff.series) == 1
        assert [level.shape for level in tiff.series[0].levels] == [(700, 901), (350, 451), (175, 226), (88, 113)]
        first = tiff.pages.first
        assert len(first.subifds or ()) == 3 and first.subfiletype == 0 and first.is_tiled
        told = tiff.ome_metadata
    root = ET.fromstring(told)
    pixels = root.find(f"{OME}Image/{OME}Pixels")
    assert pixels is not None and pixels.get("PhysicalSizeX") == pixels.get("PhysicalSizeY") == "0.25"
    assert pixels.get("PhysicalSizeXUnit") == "\u00b5m" and pixels.get("SizeC") == "1"
    channel = pixels.find(f"{OME}Channel")
    assert channel is not None and channel.get("Name") == "Labels" and channel.get("SamplesPerPixel") == "1"
    image = root.find(f"{OME}Image")
    assert image is not None and image.get("Name") == path.name


@pytest.mark.parametrize("depth", ["uint8", "float32"])
def test_probabilities_of_classes_are_named_channels(slide: Any, out: Path, depth: Any) -> None:
    names = ("p.ome.tif", "p.tif", "p.zarr", "p.npy")
    paths = [out / name for name in names]
    wg.predict(Bright(3), slide, out=paths, kind="probability", classes=["Tumor", "Stroma"], depth=depth, tile=(99, 99))
    exact = np.load(out / "p.npy")
    assert exact.shape == (3, 165, 260) and exact.dtype == np.float32
    near = {"atol": 0.5 / 255 + 1e-6} if depth == "uint8" else {"atol": 0}
    unit = 255 if depth == "uint8" else 1
    with tifffile.TiffFile(out / "p.ome.tif") as tiff:
        series = tiff.series[0]
        assert series.axes == "CYX" and series.dtype == depth and len(series.levels) == 1
        np.testing.assert_allclose(series.asarray() / unit, exact, **near)
        channels = ET.fromstring(tiff.ome_metadata).iter(f"{OME}Channel")
        assert [channel.get("Name") for channel in channels] == ["Background", "Tumor", "Stroma"]
    np.testing.assert_allclose(tifffile.imread(out / "p.tif").transpose(2, 0, 1) / unit, exact, **near)
    group = zarr.open_group(out / "p.zarr", mode="r")
    np.testing.assert_allclose(group["0"][:] / unit, exact, **near)
    assert [one["label"] for one in dict(group.attrs)["omero"]["channels"]] == ["Background", "Tumor", "Stroma"]


def test_channels_of_an_ome_tiff_have_pyramids_each(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((2, 300, 200), dtype=np.float32)
    with PyramidWriter(tmp_path / "a.ome.tif", image.shape, np.float32, tile=64, channels=["a", "<b>"]) as writer:
        writer.write_rows(image.transpose(1, 2, 0))
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        levels = [level.asarray() for level in tiff.series[0].levels]
        assert len(tiff.pages) == 2
    assert [level.shape for level in levels] == [(2, 300, 200), (2, 150, 100), (2, 75, 50), (2, 38, 25)]
    assert np.array_equal(levels[0], image)
    np.testing.assert_allclose(levels[1], image.reshape(2, 150, 2, 100, 2).mean(axis=(2, 4)), rtol=1e-6)


def test_zarr_tells_levels_units_and_leaves_out_empty_chunks(tmp_path: Path) -> None:
    labels = np.zeros((300, 500), np.uint8)
    labels[10:20, 10:20] = 2
    with ZarrWriter(tmp_path / "a.zarr", (1, 300, 500), tile=128, mpp=0.5, label=True) as writer:
        for top in range(0, 300, 77):
            writer.write_rows(labels[top : top + 77])
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    (told,) = dict(group.attrs)["multiscales"]
    assert told["version"] == "0.4" and [axis["name"] for axis in told["axes"]] == ["c", "y", "x"]
    assert {axis.get("unit") for axis in told["axes"][1:]} == {"micrometer"}
    levels = [group[dataset["path"]][:][0] for dataset in told["datasets"]]
    scales = [dataset["coordinateTransformations"][0]["scale"] for dataset in told["datasets"]]
    assert scales == [[1, 0.5, 0.5], [1, 1, 1], [1, 2, 2]]
    assert np.array_equal(levels[0], labels)
    assert all(np.array_equal(below, above[::2, ::2]) for above, below in pairwise(levels))
    assert len([path for path in (tmp_path / "a.zarr/0").rglob("*") if path.is_file()]) == 2  # a chunk and .zarray


def test_a_store_is_replaced_whole_and_other_folders_never(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    for value in (1, 2):
        with ZarrWriter(path, (1, 40, 40), tile=16) as writer:
            writer.write_rows(np.full((40, 40), value, np.uint8))
        assert (zarr.open_group(path, mode="r")["0"][:] == value).all()
    writer = ZarrWriter(path, (1, 40, 40), tile=16)
    writer.write_rows(np.full((20, 40), 3, np.uint8))
    with pytest.raises(SlideError, match="only 20 of 40 rows"):
        writer.close()
    assert (zarr.open_group(path, mode="r")["0"][:] == 2).all()
    assert names_in(tmp_path) == ["a.zarr"]
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr/notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is no Zarr store"):
        ZarrWriter(tmp_path / "mine.zarr", (1, 40, 40))


@pytest.mark.parametrize("broken", range(len(EVERY)))
def test_one_file_that_fails_leaves_none(slide: Any, out: Path, monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    """The disk fills up at each point at which a file is synced."""
    seen = 0

    def full(handle: int, true: Any = os.fsync) -> None:
        nonlocal seen
        seen += 1
        if seen > broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        true(handle)

    (out / "m.npy").write_bytes(b"as it was")
    monkeypatch.setattr(bigtiff.os, "fsync", full)
    with pytest.raises(SlideError, match=r"No space left on device\); free disk space"):
        wg.predict(Bright(), slide, out=[out / name for name in EVERY], tile=(50, 70))
    assert names_in(out) == ["m.npy"] and (out / "m.npy").read_bytes() == b"as it was"


@pytest.mark.parametrize("name", ["p.ome.tif", "p.zarr"])
def test_a_disk_that_fills_up_while_tiles_are_written(out: Path, name: str) -> None:
    """In a process of its own, since the limit is the process's."""
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from wholegrad.slide.write import PyramidWriter; from wholegrad.slide.zarr_write import ZarrWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "kind = ZarrWriter if sys.argv[1].endswith('zarr') else PyramidWriter\n"
        "with kind(sys.argv[1], (1, 1024, 1024), tile=512) as writer:\n"
        "    writer.write_rows(np.random.default_rng(0).integers(0, 255, (1024, 1024), dtype=np.uint8))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(out / name)], capture_output=True, text=True, check=False)
    assert "SlideError" in run.stderr and "cannot be written (File too large); free disk space" in run.stderr
    assert names_in(out) == []


def test_what_cannot_be_written_is_refused_before_anything_is_computed(slide: Any, out: Path) -> None:
    class Never(Bright):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("computed")

    (out / "full.zarr").mkdir()
    (out / "full.zarr/x").write_text("")
    for names, options, said in (
        (["m.xyz"], {}, "has an ending that says nothing; name it .ome.tif, "),
        (["m"], {}, "has an ending that says nothing"),
        (["m.tif", "m.tif"], {}, "names a file twice"),
        ([], {}, "names no file"),
        (["m.geojson"], {"kind": "probability"}, "cannot show probability"),
        (["m.png"], {"kind": "logits"}, "cannot show logits"),
        (["none/m.tif"], {}, "check that the folder exists"),
        (["full.zarr"], {}, "is no Zarr store"),
        (["m.tif"], {"depth": "int4"}, "depth: is 'int4'"),
        (["m.geojson"], {"min_area": -1.0}, "min_area: is -1.0"),
    ):
        with pytest.raises(WholegradError, match=said):
            wg.predict(Never(), slide, out=[out / name for name in names], **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is the slide itself"):
        wg.predict(Never(), slide, out=slide.path)
    with pytest.raises(ConfigError, match="give 2 different names"):
        wg.predict(Bright(3), slide, out=out / "m.tif", classes=["a"])
    with pytest.raises(ConfigError, match="does not tell its um a pixel"):
        wg.predict(Bright(), np.zeros((3, 40, 40), np.uint8), out=out / "m.geojson", min_hole=3)
    with pytest.raises(ConfigError, match="cannot show 3 channels of float32"):
        wg.predict(Bright(), np.zeros((3, 40, 40), np.float32), out=[out / "m.geojson", out / "m.png"])
    assert names_in(out) == ["full.zarr"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(slide: Any, out: Path) -> None:
    out.chmod(0o555)
    with pytest.raises(SlideError, match="not writable"):
        wg.predict(Bright(), slide, out=out / "m.tif")


def test_the_picture_shows_classes_where_they_are(tmp_path: Path) -> None:
    image = np.full((3, 400, 1000), 250, np.uint8)
    labels = np.zeros((200, 500), np.uint8)
    labels[50:150, 50:200], labels[50:150, 300:450] = 1, 2
    names = ClassNames(("One", "Two"))
    writer = OverlayWriter(tmp_path / "o.png", labels.shape, as_reader(image), names, 2.0, "a slide")
    for top in range(0, 200, 33):
        writer.write(top, labels[None, top : top + 33])
    writer.seal()
    writer.publish()
    with Image.open(tmp_path / "o.png") as opened:
        page = np.asarray(opened).astype(int)
    pixels = page[72:472, 28:1028]
    assert (pixels[200, 50] == 250).all()
    for x, label in ((200, 1), (700, 2)):
        inside = np.abs(pixels[200, x] - (250 + 0.22 * (np.array(names.colour(label)) - 250)))
        assert inside.max() <= 1
    assert np.abs(pixels[200, 102] - np.array(names.colour(1))).max() <= 1  # the outline
    assert [round_length(most) for most in (0.7, 1, 4.9, 99, 5000)] == [0.5, 1, 2, 50, 5000]


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    """All writers at once; the mask four times as high takes no more memory but for its outlines."""
    code = (
        "import sys, numpy as np\n"
        "from wholegrad.outputs import Result, open_outputs; from wholegrad.slide.output import ClassNames\n"
        "from wholegrad.run.process import peak_resident\n"
        "h, w = int(sys.argv[2]), 8192\n"
        "image = np.broadcast_to(np.uint8(240), (3, h, w))\n"
        "result = Result((1, h, w), 'mask', np.dtype(np.uint8), 0.5, image, ClassNames(('Tissue',)))\n"
        "paths = [__import__('pathlib').Path(sys.argv[1]) / n for n in ('m.ome.tif', 'm.zarr', 'm.geojson', 'm.png')]\n"
        "all = open_outputs(paths, result, None)\n"
        "band = np.zeros((1, 1024, w), np.uint8)\n"
        "for y in range(0, h, 1024):\n"
        "    band[:] = 0; band[0, 100:900, 500 + y // 64 : 7000] = 1; all.write(y, band)\n"
        "all.seal(); all.publish(); print(peak_resident())"
    )
    peaks = []
    for height in (4096, 16384):
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(height)], capture_output=True, text=True, check=True
        )
        peaks.append(int(run.stdout))
    assert peaks[1] - peaks[0] < 24 << 20  # a hundred MB more pixels

"""Tissue out of the box: on slides however lit and stained; files complete or absent; slides that fail."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import wholegrad as wg
from wholegrad.cli import main
from wholegrad.errors import ConfigError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.metrics.files import find_pairs
from wholegrad.segment import Segmented, segment
from wholegrad.slide.synth import synthesize
from wholegrad.slide.write import PyramidWriter

SIZE = 900, 1200


def write(path: Path, pixels: np.ndarray, mpp: float | None = 4.0) -> Path:
    with PyramidWriter(path, (3, *pixels.shape[:2]), compression="deflate", mpp=mpp) as out:
        out.write_rows(pixels)
    return path


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A synthetic slide that the network never saw, its pixels and its mask."""
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(*SIZE, 4242, folder / "s.tif", folder / "m.tif", mpp=4.0)
    return folder / "s.tif", tifffile.imread(folder / "s.tif"), tifffile.imread(folder / "m.tif").squeeze() == 1


@pytest.mark.parametrize(("ink", "tint"), [(1.0, (1, 1, 1)), (0.25, (1, 1, 1)), (0.7, (0.93, 0.86, 0.94))])
def test_tissue_is_found_however_faint_or_tinted(
    synthetic: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, ink: float, tint: tuple[float, float, float]
) -> None:
    _, pixels, truth = synthetic
    light = 243 * np.array(tint) * (np.maximum(pixels, 1) / 243.0) ** ink
    noise = np.random.default_rng(0).normal(0, 1, (*SIZE, 1))
    path = write(tmp_path / "slide.tif", np.clip(np.round(light + noise), 0, 255).astype(np.uint8))
    result = wg.segment(path, tmp_path / "mask.npy")
    found = np.load(tmp_path / "mask.npy")[0] == 1
    assert dice(found, truth) > 0.95
    assert result.tissue == pytest.approx(found.mean())
    assert result.area == pytest.approx(found.sum() * 16e-6, rel=1e-3)


def test_bare_glass_is_no_tissue(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    glass = np.clip(np.round(240 + rng.normal(0, 1.5, (600, 700, 1)) + np.zeros(3)), 0, 255).astype(np.uint8)
    assert wg.segment(write(tmp_path / "glass.tif", glass), tmp_path / "mask.npy").tissue < 0.01


def test_slides_that_fail_are_reported_and_skipped(
    synthetic: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, pixels, truth = synthetic
    cut = tmp_path / "cut.tif"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    nowhere = write(tmp_path / "nowhere.tif", pixels[:64, :64], mpp=None)
    out = tmp_path / "out"
    assert main(["segment", str(cut), str(nowhere), str(good), "--out", str(out)]) == 1
    printed, said = capfd.readouterr()
    assert "cut.tif" in said and "nowhere.tif" in said and "2 of 3 slides failed" in said
    assert "um a pixel" in said  # what to do about the one without
    assert "s " in printed
    assert sorted(path.name for path in out.iterdir()) == ["s.mask.geojson", "s.mask.ome.tif", "s.mask.png"]
    assert dice(tifffile.imread(out / "s.mask.ome.tif", level=0).squeeze() == 1, truth) > 0.95
    outlines = json.loads((out / "s.mask.geojson").read_text())
    assert {feature["properties"]["classification"]["name"] for feature in outlines["features"]} == {"Tissue"}


def test_nothing_half_written_where_the_slide_breaks(
    synthetic: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.tif"
    blob = bytearray(synthetic[0].read_bytes())
    with tifffile.TiffFile(synthetic[0]) as file:
        page = file.pages[0]
        start, count = page.dataoffsets[-1], page.databytecounts[-1]
    blob[start : start + count] = bytes(count)
    bad.write_bytes(blob)
    with pytest.raises(SlideError, match=r"bad\.tif"):
        wg.segment(bad, [tmp_path / "m.ome.tif", tmp_path / "m.geojson"])
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tif"]


def test_pictures_are_slides_too_and_never_written_over(
    synthetic: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    _, pixels, truth = synthetic
    path = tmp_path / "slide.png"
    Image.fromarray(pixels).save(path)
    before = path.read_bytes()
    wg.segment(path, tmp_path / "mask.npy", slide_mpp=4.0)
    assert dice(np.load(tmp_path / "mask.npy")[0] == 1, truth) > 0.95
    with pytest.raises(ConfigError, match="the slide itself"):
        wg.segment(path, path, slide_mpp=4.0)
    assert path.read_bytes() == before


def test_what_a_library_raises_on_one_slide_stops_no_other(
    synthetic: tuple[Path, np.ndarray, np.ndarray],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks(slide: Path, *args: object, **more: object) -> Segmented:
        if slide.name == "a.svs":
            raise ZeroDivisionError("within a decoder")
        return segment(slide, *args, **more)

    monkeypatch.setattr("wholegrad.commands.segment.segment", breaks)
    assert main(["segment", "a.svs", str(synthetic[0]), "--out", str(tmp_path), "--only", "mask"]) == 1
    assert "a.svs: ZeroDivisionError: within a decoder" in capfd.readouterr().err
    (pair,) = find_pairs(tmp_path, tmp_path)  # and evaluate knows whose mask it is
    assert pair.name == "s"


def test_a_full_disk_is_said_of_the_folder(synthetic: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(SlideError) as error:
            wg.segment(synthetic[0], out / "mask.tif")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value) == f"{out}: cannot be written (File too large); free disk space"
    assert not list(out.iterdir())


@pytest.mark.parametrize("option", [["--mpp", "0"], ["--mpp", "1000"], ["--min-area", "-5"], ["--budget", "lots"]])
def test_a_wrong_option_is_said_once(option: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["segment", "a.svs", "b.svs", "--out", str(tmp_path / "out"), *option]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif("WHOLEGRAD_DATA" not in os.environ, reason="WHOLEGRAD_DATA names no folder of real slides")
def test_tissue_of_real_slides(tmp_path: Path) -> None:
    """The network was trained on them: this tells whether it is fed as it was then, not how good it is."""
    root = Path(os.environ["WHOLEGRAD_DATA"])
    slides = sorted((root / "slides").glob("[Cm]*"))
    assert len(slides) >= 3
    for slide in slides:
        wg.segment(slide, tmp_path / "mask.npy")
        with (
            wg.open_slide(slide, mpp=4.0) as image,
            wg.open_mask(root / "masks" / f"{slide.stem}.mask.tif", image) as m,
        ):
            truth = m.read(Box(0, image.shape[1], 0, image.shape[2]))[0].copy()
        found = np.load(tmp_path / "mask.npy")[0]
        assert dice((found == 1) & (truth != 255), truth == 1) > 0.96, slide.name

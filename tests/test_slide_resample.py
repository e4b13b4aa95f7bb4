"""Any resolution is the exact mean of what each pixel covers, whatever the tiling; regions and copies stay aligned."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import wholegrad as wg
from slide_helpers import data_folder, mask_of, picture, random_boxes, write_pyramid
from wholegrad.cli import main
from wholegrad.errors import ConfigError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import ArrayReader
from wholegrad.slide.pyramid import HeldPixels
from wholegrad.slide.resample import Resampled
from wholegrad.slide.slide import open_slide

RESOLUTION = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}  # 0.5 um a pixel


def weights(stored: int, size: int) -> list[dict[int, Fraction]]:
    """How much of each stored pixel each pixel covers, by the definition."""
    found = []
    for i in range(size):
        lo, hi = Fraction(i * stored, size), Fraction((i + 1) * stored, size)
        found.append({j: min(hi, Fraction(j + 1)) - max(lo, Fraction(j)) for j in range(int(lo), -int(-hi // 1))})
    return found


def by_definition(image: Any, height: int, width: int) -> Any:
    """The mean over each pixel's area in fractions, rounded half up; ``(C, h, w)``."""
    rows, cols = weights(image.shape[1], height), weights(image.shape[2], width)
    area = Fraction(image.shape[1] * image.shape[2], height * width)
    out = np.empty((image.shape[0], height, width), np.uint8)
    for c, y, x in np.ndindex(out.shape):
        total = sum(int(image[c, j, i]) * wy * wx for j, wy in rows[y].items() for i, wx in cols[x].items())
        out[c, y, x] = int(total / area + Fraction(1, 2))
    return out


@pytest.mark.parametrize("size", [(7, 5), (12, 10), (13, 17), (24, 31), (30, 40), (1, 1)])
def test_pixels_are_the_exact_mean_of_the_area_they_cover(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 24, 31), dtype=np.uint8)
    resampled = Resampled(HeldPixels(image, "image"), *size)
    assert np.array_equal(resampled.read(Box(0, size[0], 0, size[1])), by_definition(image, *size))


@pytest.mark.parametrize("mpp", [0.3, 0.7, 1.2345, 2.9, 17.0])
def test_any_tiling_gives_the_same_bytes(tmp_path: Path, mpp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(531, 777)
    levels = [image, np.ascontiguousarray(image[::4, ::4])]
    write_pyramid(tmp_path / "a.tif", levels, tile=(64, 64), photometric="rgb", **RESOLUTION)
    with open_slide(tmp_path / "a.tif", mpp=mpp) as slide:
        height, width = (round(size * 0.5 / mpp) for size in (531, 777))
        assert slide.shape == (3, height, width) and slide.resampled
        assert slide.level == (1 if mpp > 2 else 0)
        assert slide.mpp == pytest.approx(mpp, rel=0.5 / min(height, width) + 1e-9)
        pixels = slide.read(Box(0, height, 0, width)).copy()
        monkeypatch.setattr("wholegrad.slide.resample.READ_PIXELS", 4000)
        for box in random_boxes(slide.shape, 40):
            assert np.array_equal(slide.read(box), pixels[:, box.y0 : box.y1, box.x0 : box.x1]), box


def test_a_level_that_fits_is_taken_as_it_is_and_nearest_never_resamples(tmp_path: Path) -> None:
    image = picture(400, 600)
    levels = [image, np.ascontiguousarray(image[::4, ::4])]
    write_pyramid(tmp_path / "a.tif", levels, tile=(64, 64), photometric="rgb", **RESOLUTION)
    for mpp, level, resampled in [
        (0.505, 0, False),
        (0.512, 0, True),
        (1.97, 1, False),
        (1.9, 0, True),
        (2.1, 1, True),
    ]:
        with open_slide(tmp_path / "a.tif", mpp=mpp) as slide:
            assert (slide.level, slide.resampled) == (level, resampled), mpp
    with open_slide(tmp_path / "a.tif", mpp=1.9, nearest=True) as slide:
        assert (slide.level, slide.resampled) == (1, False)
    with pytest.raises(SlideError, match=r"no finer level than 0\.5 um a pixel, 5\.0 times as coarse as mpp=0\.1"):
        open_slide(tmp_path / "a.tif", mpp=0.1)
    with pytest.raises(ConfigError, match="nearest=True was asked for without mpp"):
        open_slide(tmp_path / "a.tif", nearest=True)


@pytest.mark.parametrize("how", [{}, {"level": 1}, {"mpp": 1.3}])
def test_a_region_is_a_crop_of_the_whole_and_masks_follow(tmp_path: Path, how: dict[str, Any]) -> None:
    image, labels = picture(400, 600), np.random.default_rng(1).integers(0, 5, (50, 75), dtype=np.uint8)
    levels = [image, np.ascontiguousarray(image[::2, ::2])]
    write_pyramid(tmp_path / "a.tif", levels, tile=(64, 64), photometric="rgb", **RESOLUTION)
    with (
        open_slide(tmp_path / "a.tif", **how) as full,
        open_slide(tmp_path / "a.tif", region=(150, 100, 222, 161), **how) as part,
    ):
        scale = full.shape[2] / 600
        top, left = (200 * full.shape[1] + 400) // 800, (300 * full.shape[2] + 600) // 1200  # nearest pixel, half up
        inside = Box(top, top + part.shape[1], left, left + part.shape[2])
        assert abs(part.shape[1] - 161 * scale) <= 1 and abs(part.shape[2] - 222 * scale) <= 1
        assert np.array_equal(_all(part), full.read(inside))
        over = wg.open_mask(labels, like=full).read(inside).copy()
        assert np.array_equal(_all(wg.open_mask(labels, like=part)), over)
        of_part = np.random.default_rng(2).integers(0, 5, part.shape[1:], dtype=np.uint8)
        assert np.array_equal(_all(wg.open_mask(of_part, like=part))[0], of_part)  # a prediction of the region
    for bad in [(500, 0, 101, 10), (-1, 0, 10, 10), (0, 0, 0, 10)]:
        with pytest.raises(ConfigError, match="region="):
            open_slide(tmp_path / "a.tif", region=bad, **how)


def _all(reader: Any) -> Any:
    return reader.read(Box(0, reader.shape[1], 0, reader.shape[2])).copy()


@pytest.mark.parametrize(
    "how", [{"region": (90, 31, 501, 300)}, {"mpp": 1.3, "region": (90, 31, 400, 300)}, {"level": 1}]
)
def test_a_copy_holds_the_same_pixels_and_fits_the_same_masks(tmp_path: Path, how: dict[str, Any]) -> None:
    image, labels = picture(400, 600), np.random.default_rng(1).integers(0, 5, (200, 300), dtype=np.uint8)
    levels = [image, np.ascontiguousarray(image[::2, ::2])]
    write_pyramid(tmp_path / "a.tif", levels, tile=(64, 64), photometric="rgb", compression="jpeg", **RESOLUTION)
    with open_slide(tmp_path / "a.tif", **how) as slide:
        wg.copy_slide(slide, tmp_path / "copy.tif")
        with open_slide(tmp_path / "copy.tif") as copy:
            assert np.array_equal(_all(copy), _all(slide))
            assert copy.mpp == pytest.approx(slide.mpp, rel=1e-6)
            assert copy.placement == slide.placement and copy.size == slide.size
            theirs = _all(wg.open_mask(labels, like=slide))
            assert np.array_equal(_all(wg.open_mask(labels, like=copy)), theirs)
        inside = (120, 60, 100, 80)  # a region of the slide, not of the copy
        with open_slide(tmp_path / "copy.tif", region=inside) as part:
            whole, here = slide.placement, part.placement
            y = int((here.rows.start - whole.rows.start) / whole.rows.step)
            x = int((here.cols.start - whole.cols.start) / whole.cols.step)
            box = Box(y, y + part.shape[1], x, x + part.shape[2])
            assert np.array_equal(_all(part), slide.read(box))


def test_copying_leaves_nothing_behind_when_the_slide_is_damaged(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture(300, 300), photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        offset = tiff.pages[0].dataoffsets[22]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[offset : offset + 400] = bytes(400)
    (tmp_path / "a.tif").write_bytes(data)
    with open_slide(tmp_path / "a.tif") as slide:
        with pytest.raises(SlideError, match="is corrupt"):
            wg.copy_slide(slide, tmp_path / "copy.tif")
        with pytest.raises(ConfigError, match="is the slide itself"):
            wg.copy_slide(slide, tmp_path / "a.tif")
        with pytest.raises(ConfigError, match="is no name for a copy"):
            wg.copy_slide(slide, tmp_path / "copy.ome.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_cache_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture(300, 400), photometric="rgb", tile=(64, 64), **RESOLUTION)
    flags = ["--mpp", "1", "--region", "100,40,200,100", "--out", str(tmp_path / "fast" / "b.tif")]
    assert main(["cache", str(tmp_path / "a.tif"), *flags]) == 0
    with open_slide(tmp_path / "fast" / "b.tif") as copy:
        assert copy.shape == (3, 50, 100) and copy.mpp == pytest.approx(1.0)
    assert main(["cache", str(tmp_path / "a.tif"), *flags]) == 2
    assert "exists already" in capsys.readouterr().err


def test_real_slide_between_its_levels_has_its_colours_and_its_mask() -> None:
    folder = data_folder()
    name = "CMU-1-Small-Region.svs"
    with open_slide(folder / "slides" / name, mpp=4.0) as slide, open_slide(folder / "slides" / name) as full:
        assert slide.resampled and slide.shape == (3, 370, 277)
        assert _all(slide).mean(axis=(1, 2)) == pytest.approx(_all(full).mean(axis=(1, 2)), abs=0.1)
        few, many = (wg.open_mask(mask_of(folder, name), like=each) for each in (slide, full))
        assert (_all(few) == 1).mean() == pytest.approx((_all(many) == 1).mean(), abs=2e-3)


def test_resampling_counts_what_it_holds() -> None:
    level = HeldPixels(np.zeros((3, 3000, 4000), np.uint8), "image")
    assert isinstance(level, ArrayReader)
    assert Resampled(level, 300, 400).cache_bytes >= level.cache_bytes + 3 * 1000 * 1000

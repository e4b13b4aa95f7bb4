"""Pyramids written in bands: what is read back, their levels, and that no half file is ever left."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile

from slide_helpers import picture
from wholegrad.errors import ConfigError, ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.mask import open_mask
from wholegrad.slide.slide import open_slide
from wholegrad.slide.thumbnail import thumbnail
from wholegrad.slide.write import PyramidWriter


def write(path: Path, image: np.ndarray[Any, Any], band: int = 100, **options: Any) -> None:
    rows = image if image.ndim == 3 else image[..., None]
    shape = (rows.shape[2], rows.shape[0], rows.shape[1])
    with PyramidWriter(path, shape, image.dtype, **options) as writer:
        for top in range(0, len(image), band):
            writer.write_rows(image[top : top + band])


@pytest.mark.parametrize("compression", ["jpeg", "deflate", None])
@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif"])
@pytest.mark.parametrize("size", [(700, 901), (64, 64), (130, 33)])
def test_round_trip(tmp_path: Path, compression: Any, name: str, size: tuple[int, int]) -> None:
    path, image = tmp_path / name, picture(*size)
    write(path, image, tile=64, compression=compression, mpp=0.25, quality=95)
    with open_slide(path) as slide:
        pixels = slide.read(Box(0, size[0], 0, size[1])).transpose(1, 2, 0).copy()
        assert slide.mpp == pytest.approx(0.25, rel=1e-4)
        assert max(slide.level_shapes[-1]) <= 64
        assert all(a[0] == (b[0] + 1) // 2 for b, a in pairwise(slide.level_shapes))
        levels = len(slide.level_shapes)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        assert tiff.is_ome == name.endswith(".ome.tif")
        assert len(tiff.series[0].levels) == levels
        assert np.array_equal(tiff.series[0].levels[0].asarray(), pixels)
    difference = np.abs(pixels.astype(int) - image)
    assert difference.max() == 0 if compression != "jpeg" else difference.mean() < 4
    assert np.abs(pixels.reshape(-1, 3).mean(axis=0) - image.reshape(-1, 3).mean(axis=0)).max() < 1


def test_bytes_do_not_depend_on_the_bands(tmp_path: Path) -> None:
    image = picture(300, 200)
    for number, band in enumerate((64, 1, 300, 77)):
        write(tmp_path / f"{number}.tif", image, band=band, tile=64, compression="jpeg", threads=1 + number % 2)
        assert (tmp_path / f"{number}.tif").read_bytes() == (tmp_path / "0.tif").read_bytes()


def test_lower_levels_are_means_of_the_pixels_above(tmp_path: Path) -> None:
    image = picture(200, 130)
    write(tmp_path / "a.tif", image, tile=64)
    wide = image.astype(int)
    expected = (wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2] + 2) // 4
    with open_slide(tmp_path / "a.tif", level=1) as slide:
        assert np.array_equal(slide.read(Box(0, 100, 0, 65)).transpose(1, 2, 0), expected)


def test_labels_never_mix(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).choice(np.array([0, 3, 255], np.uint8), (333, 517))
    write(tmp_path / "m.tif", labels, tile=64, label=True)
    with tifffile.TiffFile(tmp_path / "m.tif") as tiff:
        levels = [level.asarray() for level in tiff.series[0].levels]
    assert len(levels) == 5
    assert np.array_equal(levels[0], labels)
    for above, below in pairwise(levels):
        assert np.array_equal(below, above[::2, ::2])
    mask = open_mask(tmp_path / "m.tif", like=open_mask(labels, like=_like(333, 517)))
    assert np.array_equal(mask.read(Box(0, 333, 0, 517))[0], labels)


def _like(height: int, width: int) -> Any:
    from wholegrad.slide.arrays import as_reader

    return as_reader(np.zeros((3, height, width), np.uint8))


def test_other_dtypes_are_kept(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(90, 70)).astype(np.float32)
    write(tmp_path / "f.tif", image, tile=32)
    assert np.array_equal(tifffile.imread(tmp_path / "f.tif"), image)


def test_boxes_in_raster_order(tmp_path: Path) -> None:
    image = picture(150, 110)
    with PyramidWriter(tmp_path / "a.tif", (3, 150, 110), tile=32) as writer:
        for top in range(0, 150, 40):
            for left in range(0, 110, 50):
                box = Box(top, min(top + 40, 150), left, min(left + 50, 110))
                writer.write_box(box, image[box.slices()].transpose(2, 0, 1))
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), image)
    writer = PyramidWriter(tmp_path / "b.tif", (3, 150, 110))
    with pytest.raises(ShapeError, match="does not follow"):
        writer.write_box(Box(0, 40, 50, 100), image[:40, 50:100].transpose(2, 0, 1))
    writer.abort()


def test_nothing_is_left_unless_it_is_whole(tmp_path: Path) -> None:
    path, image = tmp_path / "a.tif", picture(100, 100)
    path.write_bytes(b"what was there before")
    writer = PyramidWriter(path, (3, 100, 100), tile=32)
    writer.write_rows(image[:50])
    assert path.read_bytes() == b"what was there before"  # as it would be after a kill
    assert len(list(tmp_path.iterdir())) == 2
    writer.abort()
    with pytest.raises(SlideError, match="is closed or given up"):
        writer.write_rows(image[50:])
    with pytest.raises(SlideError, match="only 50 of 100 rows"), PyramidWriter(path, (3, 100, 100)) as writer:
        writer.write_rows(image[:50])
    with pytest.raises(ZeroDivisionError), PyramidWriter(path, (3, 100, 100)) as writer:
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]
    assert path.read_bytes() == b"what was there before"
    write(path, image)
    assert np.array_equal(tifffile.imread(path), image)


def test_wrong_rows_and_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with pytest.raises(ConfigError, match="JPEG cannot keep labels"):
        PyramidWriter(path, (1, 64, 64), compression="jpeg", label=True)
    with pytest.raises(ConfigError, match="multiple of 16"):
        PyramidWriter(path, (1, 64, 64), tile=100)
    with pytest.raises(SlideError, match="cannot be written"):
        PyramidWriter(tmp_path / "none" / "a.tif", (1, 64, 64))
    writer = PyramidWriter(path, (3, 64, 64))
    for rows in (
        np.zeros((2, 63, 3), np.uint8),
        np.zeros((2, 64, 3), np.int16),
        np.zeros((65, 64, 3), np.uint8),
    ):
        with pytest.raises(ShapeError):
            writer.write_rows(rows)
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_thumbnail_averages_and_uses_a_lower_level(tmp_path: Path) -> None:
    image = picture(640, 960)
    write(tmp_path / "a.tif", image, tile=64)
    with open_slide(tmp_path / "a.tif") as slide:
        small = thumbnail(slide, 120)
    expected = image.reshape(80, 8, 120, 8, 3).mean(axis=(1, 3))
    assert small.shape == (80, 120, 3)
    assert np.abs(small - expected).max() < 2
    assert np.abs(thumbnail(_reader(image), 120) - expected).max() <= 0.5
    with open_slide(tmp_path / "a.tif") as slide:
        assert thumbnail(slide, 5000).shape == (640, 960, 3)


def _reader(image: np.ndarray[Any, Any]) -> Any:
    from wholegrad.slide.arrays import as_reader

    return as_reader(np.ascontiguousarray(image.transpose(2, 0, 1)))


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("compression", ["deflate", None])
def test_tiles_of_one_value_keep_theirs_at_every_level(
    tmp_path: Path, label: bool, compression: Literal["deflate"] | None
) -> None:
    tiles = np.array([[0, 7, 7, 9], [7, 0, 9, 9], [9, 9, 0, 0], [9, 9, 7, 3]], np.uint8)
    image = tiles.repeat(32, 0).repeat(32, 1)
    image[5, 6] = 200  # and one that is not of one value
    with PyramidWriter(tmp_path / "m.tif", (1, 128, 128), tile=32, label=label, compression=compression) as out:
        out.write_rows(image)
    expected = image.astype(np.int64)
    with tifffile.TiffFile(tmp_path / "m.tif") as file:
        levels = file.series[0].levels
        assert len(levels) == 3
        for level in levels:
            assert np.array_equal(level.asarray().squeeze(), expected)
            four = expected.reshape(len(expected) // 2, 2, -1, 2)
            expected = four[:, 0, :, 0] if label else (four.sum(axis=(1, 3)) + 2) >> 2

"""Label masks lie over their slide at every level, and masks of other slides are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from slide_helpers import SLIDES, data_folder, mask_of, picture, random_boxes
from wholegrad.errors import ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import as_reader
from wholegrad.slide.mask import open_mask
from wholegrad.slide.slide import open_slide
from wholegrad.slide.thumbnail import thumbnail


def labels(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).choice(np.array([0, 1, 7, 255], np.uint8), (height, width))


def nearest(stored: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """The label at each pixel's centre, in floating point where the reader uses integers."""
    rows = np.floor((np.arange(height) + 0.5) * stored.shape[0] / height).astype(int)
    cols = np.floor((np.arange(width) + 0.5) * stored.shape[1] / width).astype(int)
    return stored[rows][:, cols]


@pytest.mark.parametrize("size", [(31, 47), (62, 94), (248, 376), (124, 188), (125, 189)])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_nearest_label_by_box(tmp_path: Path, size: tuple[int, int], cache_bytes: int) -> None:
    slide, stored = as_reader(np.zeros((3, 124, 188), np.uint8)), labels(*size)
    tifffile.imwrite(tmp_path / "m.tif", stored, tile=(32, 32), compression="zlib")
    expected = nearest(stored, 124, 188)
    with open_mask(tmp_path / "m.tif", like=slide, cache_bytes=cache_bytes) as mask:
        assert mask.shape == (1, 124, 188)
        for box in random_boxes(mask.shape, 40):
            assert np.array_equal(mask.read(box)[0], expected[box.slices()]), box
    from_array = open_mask(stored, like=slide)
    assert np.array_equal(from_array.read(Box(0, 124, 0, 188))[0], expected)


@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 9, "compression": "lzw"}, {"bigtiff": True}])
def test_stripped_masks_of_any_compression(tmp_path: Path, options: dict[str, Any]) -> None:
    stored = labels(60, 90)
    tifffile.imwrite(tmp_path / "m.tif", stored, **options)
    mask = open_mask(tmp_path / "m.tif", like=as_reader(np.zeros((3, 120, 180), np.uint8)))
    assert np.array_equal(mask.read(Box(0, 120, 0, 180))[0], nearest(stored, 120, 180))


def test_other_fields_of_view_are_refused(tmp_path: Path) -> None:
    slide = as_reader(np.zeros((3, 1000, 2000), np.uint8), name="slide")
    for good in [(250, 500), (251, 500), (249, 501), (63, 125), (1000, 2000)]:
        open_mask(np.zeros(good, np.uint8), like=slide)
    for bad in [(260, 500), (250, 520), (500, 250), (1000, 1990)]:
        with pytest.raises(SlideError, match="at another scale"):
            open_mask(np.zeros(bad, np.uint8), like=slide)
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, picture(100, 200), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    with open_slide(path) as real:
        open_mask(np.zeros((50, 100), np.uint8), like=real, mpp=1.0)
        with pytest.raises(SlideError, match="shows 200 x 400 um, but"):
            open_mask(np.zeros((50, 100), np.uint8), like=real, mpp=4.0)


def test_what_is_not_a_label_map_is_refused(tmp_path: Path) -> None:
    slide = as_reader(np.zeros((3, 100, 200), np.uint8))
    tifffile.imwrite(tmp_path / "rgb.tif", picture(50, 100), photometric="rgb")
    with pytest.raises(ShapeError, match="has 3 channels"):
        open_mask(tmp_path / "rgb.tif", like=slide)
    with pytest.raises(ShapeError, match="has 3 channels"):
        open_mask(np.zeros((3, 50, 100), np.uint8), like=slide)
    with pytest.raises(ShapeError, match="float32"):
        open_mask(np.zeros((50, 100), np.float32), like=slide)
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((50, 100), np.uint16))
    with pytest.raises(SlideError, match="16-bit"):
        open_mask(tmp_path / "deep.tif", like=slide)
    for name in (".", "labels.png", "labels.npy", "labels.tif", "labels.geojson"):
        (tmp_path / name).mkdir(exist_ok=True)
        with pytest.raises(SlideError, match=r"\(is a (folder|directory)\)"):
            open_mask(tmp_path / name, like=slide)


@pytest.mark.parametrize("name", SLIDES)
def test_real_masks_lie_over_their_slides_at_every_level(name: str) -> None:
    folder = data_folder()
    stored = tifffile.imread(mask_of(folder, name))
    with open_slide(folder / "slides" / name) as slide:
        levels = len(slide.level_shapes)
    for level in range(levels):
        with open_slide(folder / "slides" / name, level=level) as slide:
            mask = open_mask(mask_of(folder, name), like=slide)
            assert mask.shape[1:] == slide.shape[1:]
            small = thumbnail(mask, 1500)[..., 0]
            assert (small == 1).mean() == pytest.approx((stored == 1).mean(), rel=0.03, abs=1e-4)


def test_real_masks_of_other_slides_are_refused() -> None:
    folder = data_folder()
    for name in SLIDES:
        with open_slide(folder / "slides" / name) as slide:
            for other in SLIDES:
                if other[:4] != name[:4] and not (other.startswith("meta") and name.startswith("meta")):
                    with pytest.raises(SlideError):
                        open_mask(mask_of(folder, other), like=slide)


def test_real_tissue_is_darker_than_glass() -> None:
    folder = data_folder()
    name = "metaplasia_HE_stomach_0.506mpp.tif"
    with open_slide(folder / "slides" / name, level=1) as slide:
        mask = open_mask(mask_of(folder, name), like=slide)
        box = Box(0, slide.shape[1], 0, slide.shape[2])
        pixels, tissue = slide.read(box).mean(axis=0), mask.read(box)[0]
    assert pixels[tissue == 1].mean() < pixels[tissue == 0].mean() - 40

"""Every format gives the pixels that its own library gives; what a file does not hold has the colour of its glass."""

from __future__ import annotations

import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from slide_helpers import SLIDES, data_folder, picture, random_boxes, write_pyramid
from slide_makers import GLASS, write_dicom, write_ome_zarr, write_scn
from wholegrad.errors import SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.openslides import OpenSlidePyramid
from wholegrad.slide.slide import open_slide

openslide = pytest.importorskip("openslide")


def halves(image: Any, levels: int) -> list[Any]:
    return [np.ascontiguousarray(image[:: 2**n, :: 2**n]) for n in range(levels)]


def whole(reader: Any) -> Any:
    return reader.read(Box(0, reader.shape[1], 0, reader.shape[2])).transpose(1, 2, 0).copy()


@pytest.mark.parametrize("name", SLIDES)
def test_real_slides_have_the_pixels_levels_and_mpp_that_openslide_reads(name: str) -> None:
    path = data_folder() / "slides" / name
    with openslide.OpenSlide(path) as theirs, open_slide(path, threads=1) as slide:
        assert slide.level_shapes == tuple((h, w) for w, h in theirs.level_dimensions)
        assert slide.mpp == pytest.approx(float(theirs.properties["openslide.mpp-x"]), rel=1e-6)
        off = 1 if path.suffix == ".svs" and "TCGA" in name else 0  # JPEG 2000: two decoders round differently
        for number, (height, width) in enumerate(slide.level_shapes):
            mine, h, w = slide.at(number), min(height, 300), min(width, 300)
            corners = [(0, 0)] if number else [(0, 0), ((height - h) // 2, (width - w) // 3)]
            for y, x in corners:  # elsewhere on lower levels OpenSlide blends pixels, as its positions are level 0's
                rgba = np.asarray(theirs.read_region((x, y), number, (w, h))).astype(int)
                pixels = mine.read(Box(y, y + h, x, x + w)).transpose(1, 2, 0)
                assert rgba[..., 3].min() == 255
                assert abs(pixels - rgba[..., :3]).max() <= off
            mine.close()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "spleen_HE_4.04mpp.tif"])
def test_openslide_path_reads_what_the_quick_path_reads(name: str) -> None:
    path = data_folder() / "slides" / name
    with open_slide(path) as quick:
        slow = OpenSlidePyramid(str(path))
        reader = slow.level(0, 8 << 20, 2)
        assert slow.level_shapes == quick.level_shapes
        for box in [Box(5, 700, 300, 1111), Box(quick.shape[1] - 300, quick.shape[1], 0, quick.shape[2])]:
            assert np.array_equal(reader.read(box), quick.read(box))
        reader.close()
        slow.close()


@pytest.mark.parametrize("cache_bytes", [0, 64 << 20])
def test_scn_reads_through_openslide_with_glass_between_its_areas(tmp_path: Path, cache_bytes: int) -> None:
    write_scn(tmp_path / "a.scn")
    with open_slide(tmp_path / "a.scn", cache_bytes=cache_bytes) as slide:
        assert slide.shape == (3, 1500, 2000) and slide.mpp == pytest.approx(0.5)
        assert slide.level_shapes == ((1500, 2000), (375, 500))
        pixels = whole(slide)
        for box in random_boxes(slide.shape, 6):
            assert np.array_equal(slide.read(box).transpose(1, 2, 0), pixels[box.slices()]), box
    assert abs(pixels[350:450, 250:350].astype(int) - (180, 80, 150)).max() <= 2
    scanned = np.zeros((1500, 2000), bool)
    scanned[200:712, 100:612] = scanned[700:1212, 1000:1512] = True
    assert abs(pixels[0, 0].astype(int) - GLASS).max() <= 2  # neither black nor white
    assert (pixels[~scanned] == pixels[0, 0]).all()
    with open_slide(tmp_path / "a.scn", region="bounds") as part:
        assert part.shape == (3, 1012, 1412)
        assert np.array_equal(whole(part), pixels[200:1212, 100:1512])


def test_dicom_reads_through_wsidicom(tmp_path: Path) -> None:
    pytest.importorskip("wsidicom")
    levels = halves(picture(300, 420), 2)
    write_dicom(tmp_path / "case", levels, 0.5)
    for path in (tmp_path / "case", tmp_path / "case" / "0.dcm"):
        with open_slide(path) as slide:
            assert slide.level_mpps[0] == pytest.approx(0.5)
            for box in random_boxes(slide.shape, 10):
                assert np.array_equal(slide.read(box).transpose(1, 2, 0), levels[0][box.slices()])
    with open_slide(tmp_path / "case", mpp=1.0) as low:
        assert low.level == 1
        assert np.array_equal(whole(low), levels[1])
    (tmp_path / "case" / "0.dcm").write_bytes((tmp_path / "case" / "0.dcm").read_bytes()[:700])
    with pytest.raises(SlideError, match=r"0\.dcm: cannot be read by wsidicom"):
        open_slide(tmp_path / "case" / "0.dcm")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("axes", ["cyx", "yxc", "tczyx"])
def test_ome_zarr_of_both_versions(tmp_path: Path, version: int, axes: str) -> None:
    pytest.importorskip("zarr")
    levels = halves(picture(300, 420), 3)
    write_ome_zarr(tmp_path / "a.zarr", levels, 0.25, version, axes)
    for number, level in enumerate(levels):
        with open_slide(tmp_path / "a.zarr", level=number, cache_bytes=0) as slide:
            assert slide.mpp == pytest.approx(0.25 * 2**number, rel=0.01)
            for box in random_boxes(slide.shape, 5):
                assert np.array_equal(slide.read(box).transpose(1, 2, 0), level[box.slices()])


def test_zarr_arrays_empty_chunks_and_a_store_that_goes_away(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    image = picture(300, 420) // 2
    image[:, 300:] = GLASS
    image[:64, :96] = 0  # is not stored
    array = zarr.create_array(tmp_path / "a.zarr", shape=image.shape, dtype="uint8", chunks=(64, 96, 3))
    array[...] = image
    slide = open_slide(tmp_path / "a.zarr", cache_bytes=0, threads=1)
    pixels = whole(slide)
    assert slide.mpp is None
    assert np.array_equal(pixels[64:], image[64:])
    shutil.move(tmp_path / "a.zarr", tmp_path / "b.zarr")
    with pytest.raises(SlideError, match=r"a\.zarr: is gone"):
        slide.read(Box(200, 300, 0, 50))
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    group.create_array("x", shape=(4, 4), dtype="uint8")
    with pytest.raises(SlideError, match="without multiscales"):
        open_slide(tmp_path / "g.zarr")
    zarr.create_array(tmp_path / "d.zarr", shape=(3, 8, 8), dtype="uint16")
    with pytest.raises(SlideError, match="uint16"):
        open_slide(tmp_path / "d.zarr")


def test_pictures_are_decoded_once_whatever_their_mode(tmp_path: Path) -> None:
    image = picture(120, 90)
    Image.fromarray(image).save(tmp_path / "a.png", dpi=(50800, 50800))
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=90)
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    for name, expected in [("a.png", image), ("grey.png", np.stack([image[..., 0]] * 3, axis=-1))]:
        with open_slide(tmp_path / name) as slide:
            assert np.array_equal(whole(slide), expected)
            assert slide.cache_bytes == expected.nbytes
    with open_slide(tmp_path / "a.jpg") as slide:
        assert np.array_equal(whole(slide), np.asarray(Image.open(tmp_path / "a.jpg")))
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
    rgba = np.dstack([image // 2, np.full((120, 90), 255, np.uint8)])
    rgba[50:], rgba[100:, :, 3] = (*GLASS, 255), 0
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    with open_slide(tmp_path / "clear.png") as slide:
        assert (whole(slide)[50:] == GLASS).all()
    for bad, match in [("cut.png", "cannot be decoded|damaged"), ("cut.jpg", "cannot be decoded")]:
        data = (tmp_path / f"a{Path(bad).suffix}").read_bytes()
        (tmp_path / bad).write_bytes(data[: len(data) // 2])
        with pytest.raises(SlideError, match=match):
            open_slide(tmp_path / bad)
    Image.fromarray(image[..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(SlideError, match="8 bits a channel"):
        open_slide(tmp_path / "deep.png")


def test_npy_is_read_by_box_and_pickled_slides_reopen(tmp_path: Path) -> None:
    image = picture(120, 90)
    np.save(tmp_path / "a.npy", np.ascontiguousarray(image.transpose(2, 0, 1)))
    with open_slide(tmp_path / "a.npy", slide_mpp=0.5, mpp=1.0, region=(0, 0, 40, 60)) as slide:
        assert slide.shape == (3, 30, 20) and slide.resampled
        again = pickle.loads(pickle.dumps(slide))
        assert np.array_equal(whole(again), whole(slide))
        again.close()
    np.save(tmp_path / "b.npy", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(SlideError, match=r"an image is \(3, H, W\) of uint8"):
        open_slide(tmp_path / "b.npy")


MPP_TEXT = {
    "aperio": "Aperio Image|AppMag = 20|MPP = nan|Left = 3",
    "ome": '<OME xmlns="x"><Image><Pixels PhysicalSizeX="NaN"/></Image></OME>',
    "negative": "Aperio Image|MPP = -0.5",
}


@pytest.mark.parametrize("kind", MPP_TEXT)
def test_a_file_whose_mpp_is_no_size_is_refused_unless_told(tmp_path: Path, kind: str) -> None:
    write_pyramid(tmp_path / "a.tif", [picture(64, 64)], photometric="rgb", tile=(32, 32), description=MPP_TEXT[kind])
    with pytest.raises(SlideError, match=r"says that its pixels are nan um wide; give slide_mpp") as refusal:
        open_slide(tmp_path / "a.tif")
    assert "\n" not in str(refusal.value)
    with open_slide(tmp_path / "a.tif", slide_mpp=0.25) as slide:
        assert slide.mpp == 0.25


def test_a_slide_without_mpp_asks_for_one(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture(64, 64), photometric="rgb", tile=(32, 32))
    with pytest.raises(SlideError, match="give slide_mpp, um a pixel of its level 0"):
        open_slide(tmp_path / "a.tif", mpp=1.0)
    with open_slide(tmp_path / "a.tif", mpp=1.0, slide_mpp=0.5) as slide:
        assert slide.shape == (3, 32, 32) and slide.mpp == pytest.approx(1.0)


def test_corrupt_tile_in_openslides_path_is_named_and_others_still_read(tmp_path: Path) -> None:
    write_scn(tmp_path / "a.scn")
    good = open_slide(tmp_path / "a.scn")
    expected = good.read(Box(700, 1212, 1000, 1512)).copy()
    good.close()
    with tifffile.TiffFile(tmp_path / "a.scn") as tiff:
        offset, count = tiff.pages[1].dataoffsets[0], tiff.pages[1].databytecounts[0]
    data = bytearray((tmp_path / "a.scn").read_bytes())
    data[offset : offset + count] = bytes(count)
    (tmp_path / "a.scn").write_bytes(data)
    with open_slide(tmp_path / "a.scn", cache_bytes=0, threads=2) as slide:
        with pytest.raises(SlideError, match=r"a\.scn: tile row 0, column 0 of level 0 is corrupt"):
            slide.read(Box(200, 400, 100, 300))
        assert np.array_equal(slide.read(Box(700, 1212, 1000, 1512)), expected)


def test_unknown_and_unreadable_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.ndpi").write_bytes(b"II*\0" + bytes(50))
    for path in (tmp_path / "folder", tmp_path / "cut.ndpi", tmp_path / "none.svs"):
        with pytest.raises(SlideError) as refusal:
            open_slide(path)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["scn", "dicom", "zarr", "resampled"])
def test_several_threads_read_at_once(tmp_path: Path, kind: str) -> None:
    path, image = tmp_path / "case", picture(700, 900)
    if kind == "scn":
        path = tmp_path / "a.scn"
        write_scn(path)
    elif kind == "dicom":
        pytest.importorskip("wsidicom")
        write_dicom(path, [image], 0.5)
    elif kind == "zarr":
        pytest.importorskip("zarr")
        write_ome_zarr(path, [image], 0.5, 3)
    else:
        tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), compression="zlib")
    options: dict[str, Any] = {"slide_mpp": 0.5, "mpp": 0.71} if kind == "resampled" else {}
    with open_slide(path, **options) as slide:
        pixels = whole(slide)
    with open_slide(path, cache_bytes=0, threads=2, **options) as slide, ThreadPoolExecutor(4) as pool:
        assert slide.concurrent
        boxes = random_boxes(slide.shape, 24, seed=5)
        same = pool.map(lambda box: np.array_equal(slide.read(box).transpose(1, 2, 0), pixels[box.slices()]), boxes)
        assert all(same)


def test_a_slide_removed_while_it_is_read_is_named(tmp_path: Path) -> None:
    write_scn(tmp_path / "a.scn")
    write_pyramid(tmp_path / "a.tif", [picture(256, 256)], photometric="rgb", tile=(64, 64))
    for name in ("a.scn", "a.tif"):
        slide = open_slide(tmp_path / name)
        (tmp_path / name).unlink()
        with pytest.raises(SlideError, match=rf"{name}: cannot be opened \(no such file"):
            slide.at(0)


@pytest.mark.parametrize(("package", "extra", "name"), [("zarr", "zarr", "a.zarr"), ("wsidicom", "dicom", "a.dcm")])
def test_a_library_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str, name: str
) -> None:
    if extra == "zarr":
        (tmp_path / name).mkdir()
        (tmp_path / name / ".zarray").write_text("{")
    else:
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
    with pytest.raises(SlideError, match=r"cannot be read (by wsidicom|as Zarr)"):
        open_slide(tmp_path / name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SlideError, match=rf"which {package} reads; pip install 'wholegrad\[{extra}\]'"):
        open_slide(tmp_path / name)

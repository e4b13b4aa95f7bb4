"""Boxes read from files of every layout agree with tifffile's whole image; faulty files are named plainly."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from slide_helpers import SLIDES, data_folder, picture, random_boxes, write_pyramid
from wholegrad.errors import ConfigError, ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.reader import MapReader
from wholegrad.slide.slide import open_slide

RESOLUTION = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}  # 0.5 um a pixel

LAYOUTS: dict[str, dict[str, Any]] = {
    "jpeg": {"tile": (64, 64), "compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)},
    "jpeg-rgb": {"tile": (64, 80), "compression": "jpeg", "photometric": "rgb"},
    "jpeg2000": {"tile": (64, 64), "compression": "jpeg2000", "photometric": "rgb"},
    "deflate": {"tile": (48, 64), "compression": "zlib", "photometric": "rgb"},
    "deflate-predictor": {"tile": (48, 64), "compression": "zlib", "photometric": "rgb", "predictor": True},
    "lzw": {"tile": (64, 64), "compression": "lzw", "photometric": "rgb"},
    "raw": {"tile": (64, 64), "photometric": "rgb"},
    "bigtiff": {"tile": (64, 64), "photometric": "rgb", "bigtiff": True},
    "strips": {"rowsperstrip": 7, "compression": "zlib", "photometric": "rgb"},
    "raw-one-strip": {"photometric": "rgb"},
    "raw-strips": {"photometric": "rgb", "rowsperstrip": 31},
    "planes": {"tile": (64, 64), "compression": "zlib", "photometric": "rgb", "planarconfig": "separate"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_boxes_agree_with_tifffile(tmp_path: Path, layout: str, cache_bytes: int) -> None:
    path, image, options = tmp_path / "a.tif", picture(211, 173), dict(LAYOUTS[layout])
    if layout == "planes":
        image = np.ascontiguousarray(image.transpose(2, 0, 1))
    write_pyramid(path, [image], **options, **RESOLUTION)
    whole = tifffile.imread(path)
    whole = whole.transpose(1, 2, 0) if layout == "planes" else whole
    with open_slide(path, cache_bytes=cache_bytes, threads=2) as slide:
        assert isinstance(slide, MapReader)
        assert slide.shape == (3, 211, 173)
        assert slide.mpp == pytest.approx(0.5)
        for box in random_boxes(slide.shape, 40):
            assert np.array_equal(slide.read(box).transpose(1, 2, 0), whole[box.slices()]), box


def test_uncompressed_strips_are_read_in_pieces(tmp_path: Path) -> None:
    path, image = tmp_path / "a.tif", picture(1500, 1000)
    tifffile.imwrite(path, image, photometric="rgb", rowsperstrip=700)
    with open_slide(path, cache_bytes=0) as slide:
        assert slide.cache_bytes < image.nbytes
        for box in random_boxes(slide.shape, 20):
            assert np.array_equal(slide.read(box).transpose(1, 2, 0), image[box.slices()])


@pytest.mark.parametrize("sub", [False, True])
def test_level_is_chosen_by_number_or_nearest_mpp(tmp_path: Path, sub: bool) -> None:
    path, image = tmp_path / "a.tif", picture(257, 401)
    levels = [image, np.ascontiguousarray(image[::2, ::2]), np.ascontiguousarray(image[::8, ::8])]
    write_pyramid(path, levels, sub=sub, tile=(64, 64), photometric="rgb", **RESOLUTION)
    for wanted, level in [(0.1, 0), (0.5, 0), (0.69, 0), (0.73, 1), (1.0, 1), (1.9, 1), (2.1, 2), (50, 2)]:
        with open_slide(path, mpp=wanted, nearest=True) as slide:
            assert slide.level == level, wanted
            assert np.array_equal(slide.read(Box(3, 20, 5, 30)).transpose(1, 2, 0), levels[level][3:20, 5:30])
    with open_slide(path, level=1) as slide:
        assert slide.level_shapes == ((257, 401), (129, 201), (33, 51))
        assert slide.mpp == pytest.approx(1.0, rel=0.01)
        assert slide.size == (257, 401)
    with pytest.raises(SlideError, match="has levels 0 to 2, not 3"):
        open_slide(path, level=3)
    with pytest.raises(ConfigError, match=r"both mpp=1\.0 and level=1"):
        open_slide(path, mpp=1.0, level=1)


def test_grey_is_repeated_and_opacity_laid_over_the_glass(tmp_path: Path) -> None:
    grey = picture(90, 70, channels=1)
    tifffile.imwrite(tmp_path / "grey.tif", grey, tile=(32, 32), photometric="minisblack")
    with open_slide(tmp_path / "grey.tif") as slide:
        assert np.array_equal(slide.read(Box(0, 90, 0, 70)), np.stack([grey] * 3))
    tifffile.imwrite(tmp_path / "inverse.tif", grey, tile=(32, 32), photometric="miniswhite")
    with open_slide(tmp_path / "inverse.tif") as slide:
        assert np.array_equal(slide.read(Box(0, 90, 0, 70))[0], 255 - grey)
    rgba = picture(90, 70, channels=4)
    rgba[:40, :, 3], rgba[40:, :, 3], rgba[60:, :, :3] = 0, 255, (238, 232, 240)
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, tile=(32, 32), photometric="rgb", extrasamples=["unassalpha"])
    with open_slide(tmp_path / "rgba.tif") as slide:
        pixels = slide.read(Box(0, 90, 0, 70)).transpose(1, 2, 0)
    assert (pixels[:40] == (238, 232, 240)).all()
    assert np.array_equal(pixels[40:], rgba[40:, :, :3])


@pytest.mark.parametrize("glass", [(236, 231, 240), None])
def test_tile_that_was_never_written_has_the_colour_of_the_glass(tmp_path: Path, glass: Any) -> None:
    path, image = tmp_path / "a.tif", picture(128, 128) // 2
    if glass is not None:
        image[10:50, 10:60] = glass
        image[5:9, :30] = 255  # a white patch is no glass if there is less of it
    tiles = [image[:64, :64].tobytes(), b"", b"", image[64:, 64:].tobytes()]
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(iter(tiles), shape=image.shape, dtype="uint8", tile=(64, 64), photometric="rgb")
    with open_slide(path) as slide:
        pixels = slide.read(Box(0, 128, 0, 128)).transpose(1, 2, 0)
    assert (pixels[:64, 64:] == (glass or 255)).all()
    assert (pixels[64:, :64] == (glass or 255)).all()
    assert np.array_equal(pixels[64:, 64:], image[64:, 64:])


@pytest.mark.parametrize(("value", "unit", "mpp"), [(72, "INCH", None), (1, "NONE", None), (50800, "INCH", 0.5)])
def test_implausible_resolution_is_ignored(tmp_path: Path, value: int, unit: str, mpp: float | None) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(64, 64), photometric="rgb", resolution=(value, value), resolutionunit=unit)
    with open_slide(path) as slide:
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp))
    if mpp is None:
        with pytest.raises(SlideError, match="does not tell its um a pixel"):
            open_slide(path, mpp=0.5)


def test_ome_and_aperio_tell_their_mpp(tmp_path: Path) -> None:
    image = picture(64, 64)
    meta = {"axes": "YXS", "PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", image, photometric="rgb", tile=(32, 32), metadata=meta)
    text = "Aperio Image Library v1\r\n64x64 (32x32) JPEG Q=70|AppMag = 40|MPP = 0.2457|Left = 3"
    tifffile.imwrite(tmp_path / "a.svs", image, photometric="rgb", tile=(32, 32), description=text, metadata=None)
    assert open_slide(tmp_path / "a.ome.tif").mpp == pytest.approx(0.25)
    assert open_slide(tmp_path / "a.svs").mpp == pytest.approx(0.2457)


def test_threads_and_pickles_read_the_same(tmp_path: Path) -> None:
    path, image = tmp_path / "a.tif", picture(300, 300)
    write_pyramid(path, [image], tile=(32, 32), compression="zlib", photometric="rgb")
    slide = open_slide(path, cache_bytes=5 * 32 * 32 * 3, threads=3)
    wrong: list[Box] = []

    def read(seed: int) -> None:
        for box in random_boxes(slide.shape, 30, seed):
            if not np.array_equal(slide.read(box).transpose(1, 2, 0), image[box.slices()]):
                wrong.append(box)

    workers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    again = pickle.loads(pickle.dumps(slide))
    assert np.array_equal(again.read(Box(5, 99, 7, 60)), slide.read(Box(5, 99, 7, 60)))


def test_box_outside_is_refused_and_closed_slide_says_so(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture(64, 96), photometric="rgb", tile=(32, 32))
    slide = open_slide(tmp_path / "a.tif")
    for box in [Box(0, 65, 0, 1), Box(-1, 2, 0, 1), Box(3, 3, 0, 5), Box(0, 1, 90, 97)]:
        with pytest.raises(ShapeError, match="not within the map of 64 x 96"):
            slide.read(box)
    slide.close()
    with pytest.raises(SlideError, match="is closed"):
        slide.read(Box(0, 1, 0, 1))


def test_faulty_files_are_named_with_cause_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"none\.tif: cannot be opened"):
        open_slide(tmp_path / "none.tif")
    (tmp_path / "text.tif").write_bytes(b"not a slide at all")
    with pytest.raises(SlideError, match=r"is of no format that is known here; .*convert"):
        open_slide(tmp_path / "text.tif")
    (tmp_path / "empty.tif").write_bytes(b"")
    with pytest.raises(SlideError, match="is of no format"):
        open_slide(tmp_path / "empty.tif")
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((64, 64, 3), np.uint16), photometric="rgb", tile=(32, 32))
    with pytest.raises(SlideError, match="16-bit"):
        open_slide(tmp_path / "deep.tif")


def test_truncated_file_is_refused_at_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(256, 256), photometric="rgb", tile=(64, 64))
    data = path.read_bytes()
    path.write_bytes(data[:-5000])
    with pytest.raises(SlideError, match=r"is truncated: .*tile row 3, column 3 of level 0"):
        open_slide(path)
    path.write_bytes(data[:100])
    with pytest.raises(SlideError, match="truncated"):
        open_slide(path)


def test_corrupt_tile_is_named_and_the_others_are_still_read(tmp_path: Path) -> None:
    path, image = tmp_path / "a.tif", picture(256, 256)
    tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[6]  # row 1, column 2
    data = bytearray(path.read_bytes())
    data[offset : offset + 400] = bytes(400)
    path.write_bytes(data)
    with open_slide(path, threads=2) as slide:
        with pytest.raises(SlideError, match=r"tile row 1, column 2 of level 0 is corrupt .* box \(0, 256, 0, 256\)"):
            slide.read(Box(0, 256, 0, 256))
        assert np.array_equal(slide.read(Box(130, 256, 0, 256)).transpose(1, 2, 0), image[130:])


@pytest.mark.parametrize("name", SLIDES)
def test_real_slide_agrees_with_its_table_and_with_tifffile(name: str) -> None:
    path = data_folder() / "slides" / name
    height, width, mpp = SLIDES[name]
    with open_slide(path) as slide:
        assert slide.shape == (3, height, width)
        assert slide.mpp == pytest.approx(mpp, abs=6e-4)
        last = len(slide.level_shapes) - 1
    with tifffile.TiffFile(path) as tiff:
        for level in (0, last):
            with open_slide(path, level=level, cache_bytes=1 << 20) as slide:
                page = next(p for p in tiff.pages if p.shape[:2] == slide.level_shapes[level])
                for box in _small_boxes(slide.shape):
                    assert np.array_equal(slide.read(box).transpose(1, 2, 0), _by_tifffile(page, box)), box


def _small_boxes(shape: tuple[int, int, int]) -> list[Box]:
    """Boxes of up to 600 pixels over the whole map, corners included."""
    rng, boxes = np.random.default_rng(1), []
    for at in [(0.0, 0.0), (1.0, 1.0), *rng.uniform(size=(4, 2))]:
        h, w = (min(int(rng.integers(1, 600)), size) for size in shape[1:])
        y, x = int((shape[1] - h) * at[0]), int((shape[2] - w) * at[1])
        boxes.append(Box(y, y + h, x, x + w))
    return boxes


def _by_tifffile(page: Any, box: Box) -> np.ndarray[Any, Any]:
    """The box pasted together from tifffile's own decoding of single tiles."""
    out = np.zeros((box.height, box.width, 3), np.uint8)
    across = -(-page.imagewidth // page.tilewidth)
    file, decode = page.parent.filehandle, page.decode
    options = {"jpegtables": page.jpegtables} if page.compression == 7 else {}
    for row in range(box.y0 // page.tilelength, (box.y1 - 1) // page.tilelength + 1):
        for col in range(box.x0 // page.tilewidth, (box.x1 - 1) // page.tilewidth + 1):
            index = row * across + col
            file.seek(page.dataoffsets[index])
            tile = decode(file.read(page.databytecounts[index]), index, **options)[0][0]
            y, x = row * page.tilelength - box.y0, col * page.tilewidth - box.x0
            top, left = max(y, 0), max(x, 0)
            part = tile[top - y : box.height - y, left - x : box.width - x]
            out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out

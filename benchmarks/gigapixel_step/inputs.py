"""Where the pixels come from: a painted slide, its uncompressed copy, and maps that repeat another."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from common import area

import wholegrad as wg
from wholegrad.graph.geometry import Box
from wholegrad.run.reader import MapReader
from wholegrad.slide.arrays import Cropped, open_npy
from wholegrad.slide.buffers import ReusedBuffer

BAND = 512  # rows copied at a time


def make_slide(folder: Path, size: str) -> tuple[Path, Path]:
    """The painted slide and its mask, JPEG and deflate; painted if they are not there yet."""
    slide, mask = folder / f"{size}.tif", folder / f"{size}.mask.tif"
    if not (slide.exists() and mask.exists()):
        command = [sys.executable, "-m", "wholegrad", "synth", "--size", size, "--seed", "1"]
        subprocess.run([*command, "--out", str(slide), "--mask", str(mask)], check=True)
    return slide, mask


def raw_paths(folder: Path, size: str) -> tuple[Path, Path]:
    """Where the uncompressed copies of slide and mask are."""
    return folder / f"{size}.image.npy", folder / f"{size}.mask.npy"


def raw_copy(reader: MapReader, path: Path) -> None:
    """The same pixels uncompressed in a ``.npy`` file, once."""
    if path.exists():
        return
    aside = path.with_suffix(".part")
    channels, height, width = reader.shape
    with aside.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": reader.shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for y in range(0, height, BAND):
            band = reader.read(Box(y, min(y + BAND, height), 0, width))
            for channel in range(channels):
                file.seek(start + (channel * height + y) * width)
                file.write(np.ascontiguousarray(band[channel]).tobytes())
    aside.rename(path)


def prepare(folder: Path, size: str) -> None:
    """Make every file that a stage reads."""
    slide, mask = make_slide(folder, size)
    image_raw, mask_raw = raw_paths(folder, size)
    with wg.open_slide(slide) as image:
        raw_copy(image, image_raw)
        raw_copy(wg.open_mask(mask, like=image), mask_raw)


class Repeated:
    """Another reader's map side by side and one below the other, cut to ``height`` x ``width``: nothing is stored."""

    def __init__(self, reader: MapReader, height: int, width: int) -> None:
        self._reader, self._buffer = reader, ReusedBuffer()
        self.shape = (reader.shape[0], height, width)
        self.dtype, self.name, self.cache_bytes = reader.dtype, reader.name, reader.cache_bytes
        self.concurrent = bool(getattr(reader, "concurrent", False))

    def read(self, box: Box) -> np.ndarray:
        """The pixels of ``box``, valid until this thread's next read."""
        out = self._buffer.take((self.shape[0], box.height, box.width), self.dtype)
        self.read_into(box, out)
        return out

    def read_into(self, box: Box, out: np.ndarray) -> None:
        """Fill ``out`` with the pixels of ``box``."""
        rows = list(_pieces(box.y0, box.y1, self._reader.shape[1]))
        cols = list(_pieces(box.x0, box.x1, self._reader.shape[2]))
        straight = getattr(self._reader, "read_into", None)
        if straight and len(rows) == len(cols) == 1:
            return straight(Box(*rows[0], *cols[0]), out)
        y = 0
        for y0, y1 in rows:
            x = 0
            for x0, x1 in cols:
                out[:, y : y + y1 - y0, x : x + x1 - x0] = self._reader.read(Box(y0, y1, x0, x1))
                x += x1 - x0
            y += y1 - y0
        return None


def _pieces(start: int, stop: int, period: int) -> list[tuple[int, int]]:
    """An interval taken apart where the period ends, each part counted from the start of its own."""
    found = []
    while start < stop:
        end = min(stop, start + period - start % period)
        found.append((start % period, start % period + end - start))
        start = end
    return found


def open_inputs(folder: Path, size: str, source: str, scale: float = 1) -> tuple[MapReader, MapReader]:
    """Image and mask, each edge ``scale`` times that of the slide: its top left, or the slide repeated."""
    if source == "jpeg":
        slide, mask = make_slide(folder, size)
        image: MapReader = wg.open_slide(slide)
        target: MapReader = wg.open_mask(mask, like=image)
    else:
        image, target = map(open_npy, raw_paths(folder, size))
    if scale == 1:
        return image, target
    height, width = (round(edge * scale) for edge in area(size))
    return Repeated(image, height, width), Repeated(target, height, width)


def open_real(data: Path, size: str) -> tuple[MapReader, MapReader, str]:
    """The largest real slide with a mask, and how it was made about as large as ``size``, in words.

    It is taken whole where it has as many pixels as ``size`` or up to twice as many; a larger one is cropped around its
    middle, a smaller one repeated.
    """
    image, mask = _largest(data)
    target: MapReader = wg.open_mask(mask, like=image)
    height, width = area(size)
    name = f"{Path(image.name).name}, {image.shape[1]} x {image.shape[2]}"
    found = image.shape[1] * image.shape[2]
    if height * width <= found <= 2 * height * width:
        return image, target, f"{name}, whole"
    if found < height * width:
        return (
            Repeated(image, height, width),
            Repeated(target, height, width),
            f"{name}, repeated to {height} x {width}",
        )
    height, width = min(height, image.shape[1]), min(width, image.shape[2])
    y, x = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    box = Box(y, y + height, x, x + width)
    return Cropped(image, box), Cropped(target, box), f"{name}, its middle {height} x {width}"


def _largest(data: Path) -> tuple[MapReader, Path]:
    """The slide with the most pixels under ``data``/slides that has a mask under ``data``/masks."""
    slides = [path for path in (data / "slides").glob("*") if path.suffix in (".tif", ".svs")]
    pairs = [(wg.open_slide(path), data / "masks" / f"{path.stem}.mask.tif") for path in sorted(slides)]
    pairs = [(image, mask) for image, mask in pairs if mask.exists()]
    if not pairs:
        sys.exit(f"{data} holds no slides/NAME.tif or .svs with a masks/NAME.mask.tif")
    return max(pairs, key=lambda pair: pair[0].shape[1] * pair[0].shape[2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("size")
    given = parser.parse_args()
    prepare(given.folder, given.size)

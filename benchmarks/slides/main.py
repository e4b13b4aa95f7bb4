"""How fast slides are read: as they are, resampled, through OpenSlide, and from a copy of ``wholegrad cache``.

    WHOLEGRAD_DATA=... python benchmarks/slides/main.py              the first table
    WHOLEGRAD_DATA=... python benchmarks/slides/main.py --codecs     what other kinds of copy would cost

Boxes of 1024 x 1024 over a square at the slide's middle, left to right and down, one decoding thread, the median of
three passes, processor time, files in the page cache. Pixels are those of the level that is read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

import wholegrad as wg
from wholegrad.graph.geometry import Box
from wholegrad.slide.openslides import OpenSlidePyramid

SLIDES = ("metaplasia_HE_stomach_0.506mpp.tif", "CMU-1-Small-Region.svs", "TCGA-DU-6399-01A-01-TS1.svs")
SQUARE, BOX, PASSES = 5000, 1024, 3


def square(path: Path) -> tuple[int, int, int, int]:
    """A region at the middle of the slide."""
    with wg.open_slide(path) as slide:
        height, width = (min(SQUARE, size) for size in slide.size)
        return (slide.size[1] - width) // 2, (slide.size[0] - height) // 2, width, height


def seconds(open_reader: Callable[[], Any], region: tuple[int, int, int, int] | None = None) -> float:
    """Of one pass, the median of a few; each opens the reader anew, so that no tile is kept."""
    found = []
    for _ in range(PASSES):
        reader = open_reader()
        x0, y0, width, height = region or (0, 0, reader.shape[2], reader.shape[1])
        start = time.process_time()
        for y in range(y0, y0 + height, BOX):
            for x in range(x0, x0 + width, BOX):
                reader.read(Box(y, min(y + BOX, y0 + height), x, min(x + BOX, x0 + width)))
        found.append(time.process_time() - start)
        reader.close()
    return statistics.median(found)


def speeds(path: Path, folder: Path) -> None:
    region = square(path)
    pixels = region[2] * region[3] / 1e6
    with wg.open_slide(path, region=region, threads=1) as slide:
        mpp = slide.level_mpps[0]
        copy = wg.copy_slide(slide, folder / "copy.tif")
    assert mpp is not None
    rates = {
        "as it is": seconds(lambda: wg.open_slide(path, region=region, threads=1)),
        "through OpenSlide": seconds(lambda: OpenSlidePyramid(str(path)).level(0, 64 << 20, 1), region),
        "resampled 1.7 times": seconds(lambda: wg.open_slide(path, mpp=1.7 * mpp, region=region, threads=1)),
        "copy": seconds(lambda: wg.open_slide(copy, threads=1)),
    }
    told = " | ".join(f"{pixels / rate:.0f}" for rate in rates.values())
    print(f"| {path.name}, {pixels:.0f} Mpixel | {told} | {copy.stat().st_size / pixels / 1e6:.1f} |", flush=True)


CODECS: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "raw": (lambda tile: tile.tobytes(), lambda data: np.frombuffer(data, np.uint8).copy()),
    "LZ4": (imagecodecs.lz4_encode, lambda data: imagecodecs.lz4_decode(data, out=3 * 512 * 512)),
    "Zstandard 1": (
        lambda tile: imagecodecs.zstd_encode(tile, level=1),
        lambda data: imagecodecs.zstd_decode(data, out=3 * 512 * 512),
    ),
    "deflate 1": (
        lambda tile: imagecodecs.deflate_encode(tile, level=1),
        lambda data: imagecodecs.deflate_decode(data, out=3 * 512 * 512),
    ),
}


def codecs(path: Path) -> None:
    x, y, _, _ = square(path)
    with wg.open_slide(path) as slide:
        boxes = [
            Box(y + 512 * i, y + 512 * i + 512, x + 512 * j, x + 512 * j + 512) for i in range(4) for j in range(4)
        ]
        tiles = [np.ascontiguousarray(slide.read(box).transpose(1, 2, 0)) for box in boxes]
    for name, (encode, decode) in CODECS.items():
        stored = [encode(tile) for tile in tiles]
        found = []
        for _ in range(PASSES):
            start = time.process_time()
            for data in stored:
                decode(data)
            found.append(time.process_time() - start)
        rate = 16 * 512 * 512 / 1e6 / statistics.median(found)
        print(f"| {path.name} | {name} | {sum(map(len, stored)) / 16 / 512**2:.2f} | {rate:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", action="store_true", help="bytes a pixel and decoding speed of tiles in memory")
    args = parser.parse_args()
    root = Path(os.environ["WHOLEGRAD_DATA"]) / "slides"
    with tempfile.TemporaryDirectory() as folder:
        for name in SLIDES:
            if args.codecs:
                codecs(root / name)
            else:
                speeds(root / name, Path(folder))


if __name__ == "__main__":
    main()

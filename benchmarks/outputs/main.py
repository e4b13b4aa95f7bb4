"""Writes the mask of a 6.5-gigapixel slide, every kind of file from the same bands, and says time and memory.

    python benchmarks/outputs/main.py [--size 100000x65000] [--folder FOLDER] [--evaluate]

The mask is made up: ragged pieces of tissue with holes, repeated over the slide, band by band. ``--evaluate`` scores
the written mask against itself moved by four pixels, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wholegrad.graph.geometry import Box
from wholegrad.metrics.compare import compare
from wholegrad.metrics.files import Pair, opened
from wholegrad.outputs import Result, open_outputs
from wholegrad.run.process import peak_resident
from wholegrad.slide.arrays import Cropped
from wholegrad.slide.outlines import OutlineOptions
from wholegrad.slide.output import ClassNames

BAND = 1024
MPP = 0.25
KINDS = {"OME-TIFF": "m.ome.tif", "OME-Zarr": "m.zarr", "GeoJSON": "m.geojson", "picture": "m.png"}


def pattern(side: int = 4096, finer: int = 4) -> Any:
    """A tile of mask ``(side, side)`` with pieces, holes and ragged edges; its own neighbour on every side."""
    coarse = side // finer
    waves = np.fft.rfft2(np.random.default_rng(0).standard_normal((coarse, coarse)))
    fy, fx = np.fft.fftfreq(coarse)[:, None], np.fft.rfftfreq(coarse)[None]
    field = np.fft.irfft2(waves / (1 + (fy**2 + fx**2) * 100.0**2) ** 1.25, (coarse, coarse)).astype(np.float32)
    edge = np.quantile(field, 0.7)
    share = np.arange(finer, dtype=np.float32) / finer
    across = field[:, :, None] * (1 - share) + np.roll(field, -1, 1)[:, :, None] * share
    across = across.reshape(coarse, side)
    mask = np.empty((coarse, finer, side), np.uint8)
    for number, part in enumerate(share):
        mask[:, number] = across * (1 - part) + np.roll(across, -1, 0) * part > edge
    return mask.reshape(side, side)


def bands(height: int, width: int) -> Iterator[tuple[int, Any]]:
    tile = pattern()
    band = np.empty((1, BAND, width), np.uint8)
    for top in range(0, height, BAND):
        rows = tile[top % len(tile) : top % len(tile) + BAND]
        for left in range(0, width, len(tile)):
            part = min(len(tile), width - left)
            band[0, :, left : left + part] = rows[:, :part]
        yield top, band[:, : min(BAND, height - top)]


def write(height: int, width: int, folder: Path, names: list[str]) -> dict[str, Any]:
    image = np.broadcast_to(np.uint8(240), (3, height, width))
    shape = (1, height, width)
    options = OutlineOptions(min_area=500, min_hole=1000)
    result = Result(shape, "mask", np.dtype(np.uint8), MPP, image, ClassNames(("Tissue",)), outlines=options)
    started = time.perf_counter()
    outputs = open_outputs([folder / name for name in names], result, lambda path: NotImplemented)
    for top, band in bands(height, width):
        outputs.write(top, band)
    outputs.seal()
    outputs.publish()
    return {"seconds": round(time.perf_counter() - started, 1), "peak_mib": peak_resident() >> 20}


def score(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    path = folder / KINDS["OME-TIFF"]
    with opened(Pair("m", path, path)) as (one, other, mpp):
        _, h, w = one.shape
        found = compare(Cropped(one, Box(0, h - 4, 0, w - 4)), Cropped(other, Box(4, h, 4, w)), mpp=mpp)
    (scored,) = found.classes
    assert scored.distances is not None
    told = {"dice": round(scored.counts.dice, 5), "hd95_um": scored.distances.hausdorff95, "f1": scored.distances.f1}
    return {"seconds": round(time.perf_counter() - started, 1), "peak_mib": peak_resident() >> 20, **told}


def bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="100000x65000", help="HEIGHTxWIDTH")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--only", choices=(*KINDS, "all", "score"))
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    if args.only == "score":
        print(json.dumps(score(args.folder)))
    elif args.only:
        names = list(KINDS.values()) if args.only == "all" else [KINDS[args.only]]
        print(json.dumps(write(height, width, args.folder, names)))
    else:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for kind in (*KINDS, "all", *(("score",) if args.evaluate else ())):
                command = [sys.executable, __file__, "--size", args.size, "--folder", folder, "--only", kind]
                told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                size = bytes_of(Path(folder) / KINDS[kind]) if kind in KINDS else None
                print(json.dumps({"kind": kind, "bytes": size, **told}), flush=True)


if __name__ == "__main__":
    main()

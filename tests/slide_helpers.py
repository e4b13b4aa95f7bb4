"""Images, files and paths that the slide tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from wholegrad.graph.geometry import Box

# name: (level-0 height, width, mpp), as the data's README states them
SLIDES = {
    "TCGA-DU-6399-01A-01-TS1.svs": (13835, 31872, 0.2457),
    "CMU-1-Small-Region.svs": (2967, 2220, 0.499),
    "metaplasia_HE_stomach_0.506mpp.tif": (5843, 6599, 0.506),
    "metaplasia_IHC-trypsin_stomach_0.504mpp.tif": (6285, 6535, 0.504),
    "her2-cish_CISH_breastcore_0.506mpp.tif": (13823, 15246, 0.506),
    "PASAB_PAS-AB_mixed_1.01mpp.tif": (7131, 16727, 1.006),
    "pdac-trucut_HE1_pancreas_1.01mpp.tif": (7442, 8368, 1.01),
    "BS13_HE_cores_2.02mpp.tif": (5047, 15438, 2.019),
    "hacettepe31_HE_cores_1.01mpp.tif": (8509, 14174, 1.011),
    "spleen_HE_4.04mpp.tif": (4660, 4731, 4.035),
    "BS13_HE_cores_0.505mpp_1.25Gpx.tif": (20185, 61752, 0.505),
}


def data_folder() -> Path:
    """The folder of real slides, or a skip that says how to set it."""
    folder = os.environ.get("WHOLEGRAD_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set WHOLEGRAD_DATA to the folder that holds slides/ and masks/")
    return Path(folder)


def mask_of(folder: Path, slide: str) -> Path:
    return folder / "masks" / f"{Path(slide).stem}.mask.tif"


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    """Smooth colours with some noise, ``(h, w, c)`` uint8 (``(h, w)`` for one channel)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40.0
    waves = [128 + 90 * np.sin(y * (1 + 0.3 * c) + c) * np.cos(x + 2 * c) for c in range(channels)]
    noisy = np.stack(waves, axis=-1) + rng.normal(0, 2, (height, width, channels))
    image = np.clip(noisy, 0, 255).astype(np.uint8)
    return image[..., 0] if channels == 1 else image


def random_boxes(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Box]:
    """Random boxes of a map ``(C, H, W)``, and the awkward ones: corners, edges, the whole map."""
    _, height, width = shape
    rng = np.random.default_rng(seed)
    boxes = [Box(0, 1, 0, 1), Box(height - 1, height, width - 1, width), Box(0, height, 0, width)]
    boxes += [Box(height - 1, height, 0, width), Box(0, height, width - 1, width)]
    for _ in range(count):
        y0, x0 = int(rng.integers(height)), int(rng.integers(width))
        boxes.append(Box(y0, int(rng.integers(y0, height)) + 1, x0, int(rng.integers(x0, width)) + 1))
    return boxes


def write_pyramid(path: Path, levels: list[np.ndarray[Any, Any]], sub: bool = False, **options: Any) -> None:
    """A TIFF of several levels, reduced pages in one chain or SubIFDs."""
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as tiff:
        for number, level in enumerate(levels):
            below = len(levels) - 1 if sub and number == 0 else 0
            tiff.write(level, subfiletype=1 if number else 0, subifds=below, metadata=None, **options)

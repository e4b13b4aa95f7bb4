"""Dice of thresholds on real slides at 4 um a pixel, beside which the tissue network's are put.

    WHOLEGRAD_DATA=... python examples/paper/score_thresholds.py

WHOLEGRAD_DATA is a folder with ``slides/NAME.tif`` or ``.svs`` and ``masks/NAME.mask.tif``.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from score import dice
from thresholds import BIOPSY, TCGA, clam, otsu

import wholegrad as wg
from wholegrad.graph.geometry import Box

MPP = 4.0


def main() -> None:
    root = Path(os.environ["WHOLEGRAD_DATA"])
    rows = []
    print(f"{'slide':44s}  Otsu   CLAM (tcga)  CLAM (biopsy)")
    for path in sorted((root / "slides").iterdir()):
        mask = root / "masks" / f"{path.stem}.mask.tif"
        if "Gpx" in path.name or not mask.exists():
            continue
        with wg.open_slide(path, mpp=MPP) as slide, wg.open_mask(mask, like=slide) as labels:
            box = Box(0, slide.shape[1], 0, slide.shape[2])
            picture, truth = np.moveaxis(slide.read(box), 0, 2).copy(), labels.read(box)[0].copy()
        found = (otsu(picture), clam(picture, MPP, TCGA), clam(picture, MPP, BIOPSY))
        rows.append([dice(each.astype(np.uint8), truth) for each in found])
        print(f"{path.stem:44s}  {rows[-1][0]:.3f}  {rows[-1][1]:.3f}        {rows[-1][2]:.3f}")
    mean = np.mean(rows, axis=0)
    print(f"{'mean':44s}  {mean[0]:.3f}  {mean[1]:.3f}        {mean[2]:.3f}")


if __name__ == "__main__":
    main()

"""Runs a network over an image by tiles, as its card says, and nothing but NumPy: what a deployment does.

A tile owns a part of the image that starts at a multiple of the stride. It is read with the halo around, as far as the
image goes; where the image ends, so does what is read, and the network pads there itself. Of the outputs, those are
kept that the tile owns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from wholegrad.export.formats import Array, Run


class Part(NamedTuple):
    """Along one axis: the image pixels ``[read, end)`` to run, and what becomes of the outputs.

    Attributes:
        skip, keep: outputs to leave out in front, and to keep (None: all that follow).
        at: where the first that is kept lies in the whole output.
    """

    read: int
    end: int
    skip: int
    keep: int | None
    at: int


def parts(size: int, tile: int, stride: int, halo: int, scale: Fraction) -> Iterator[Part]:
    """The tiles of one axis of so many pixels.

    Args:
        tile: pixels that each owns, rounded up to a multiple of the stride.
    """
    own = -(-tile // stride) * stride
    last = range(0, size, own)[-1]
    for start in range(0, size, own):
        read, end = max(start - halo, 0), size if start == last else min(start + own + halo, size)
        at = Fraction(start) / scale
        keep = None if start == last else int(Fraction(own) / scale)
        yield Part(read, end, int((start - read) / scale), keep, int(at))


def run_tiled(run: Run, image: Array, card: Mapping[str, Any], tile: tuple[int, int]) -> Array:
    """The output for an image ``(N, C, H, W)``, tile by tile.

    Args:
        card: as its JSON file has it, or the parts ``tiling`` and ``output`` of it.
        tile: rows and columns that a tile owns, without halo; rounded up to multiples of the stride.
    """
    tiling, scale = card["tiling"], card["output"]["scale"]
    axes = [
        list(parts(size, own, stride, halo, Fraction(step).limit_denominator(1 << 12)))
        for size, own, stride, halo, step in zip(
            image.shape[2:], tile, tiling["stride"], tiling["halo"], scale, strict=True
        )
    ]
    bands = []
    for row in axes[0]:
        found = []
        for col in axes[1]:
            out = run(np.ascontiguousarray(image[:, :, row.read : row.end, col.read : col.end]))
            found.append(out[:, :, row.skip :, col.skip :][:, :, : row.keep, : col.keep])
        bands.append(np.concatenate(found, axis=3))
    return np.concatenate(bands, axis=2)

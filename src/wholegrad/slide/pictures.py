"""PNG and JPEG pictures through Pillow: no part of them can be decoded alone, so they are decoded once and kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from wholegrad.errors import ShapeError, SlideError
from wholegrad.slide.arrays import ArrayReader
from wholegrad.slide.background import BLACK_BELOW, WHITE_BELOW, Background, glass_colour
from wholegrad.slide.pyramid import HeldPixels, HeldPyramid
from wholegrad.slide.tiff import plausible_mpp

LARGEST = 512 << 20  # bytes, decoded


def open_picture(path: str) -> HeldPyramid:
    """A PNG or JPEG as a slide of one level.

    Raises:
        SlideError: missing, damaged, too large, or of more than 8 bits a channel.
    """
    picture, told = _decoded(path)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = np.asarray(picture.convert("RGBA"))
        pixels = np.empty((*rgba.shape[:2], 3), np.uint8)
        Background(estimate=lambda: _glass(rgba)).under(rgba, pixels)
    else:
        pixels = np.asarray(picture.convert("RGB"))
    return HeldPyramid(HeldPixels(pixels.transpose(2, 0, 1), path), _mpp(told))


def read_label_picture(path: str) -> npt.NDArray[np.uint8]:
    """The labels ``(1, h, w)`` of a PNG: grey values, or the numbers of palette entries.

    Raises:
        SlideError: as for ``open_picture``.
        ShapeError: it has colours.
    """
    picture, _ = _decoded(path)
    if picture.format == "JPEG":
        raise SlideError(path, "is a JPEG, which blurs labels", "export the mask as PNG or TIFF")
    if picture.mode not in ("L", "P", "1"):
        cause = f"has {len(picture.getbands())} channels, so its values are colours and not labels"
        raise ShapeError(path, cause, "export labels 0 to 254 as one channel of uint8")
    return np.array(picture, np.uint8)[None]


def _decoded(path: str) -> tuple[Image.Image, Mapping[Any, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as picture:
                _check(path, picture)
                picture.load()
                return picture, picture.info
    except Image.DecompressionBombError:
        raise _too_large(path, "more than 170 megapixels") from None
    except UnidentifiedImageError:
        raise SlideError(path, "is not a PNG or JPEG, or damaged at its start", "export or copy it again") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise SlideError(path, f"cannot be decoded ({error})", "it is probably truncated: copy it again") from None


def _check(path: str, picture: Image.Image) -> None:
    if picture.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr"):
        raise SlideError(path, f"has pixels of mode {picture.mode}", "convert it to 8 bits a channel")
    if picture.width * picture.height * len(picture.getbands()) > LARGEST:
        raise _too_large(path, f"{picture.height} x {picture.width} pixels")


def _too_large(path: str, what: str) -> SlideError:
    cause = f"has {what}, and a PNG or JPEG can only be decoded whole"
    return SlideError(path, cause, "convert it to a tiled TIFF (vips tiffsave --tile --pyramid --bigtiff)")


def _glass(rgba: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    over = []
    for below in (BLACK_BELOW, WHITE_BELOW):
        pixels = np.empty((*rgba.shape[:2], 3), np.uint8)
        below.under(rgba, pixels)
        over.append(ArrayReader(pixels.transpose(2, 0, 1)))
    return glass_colour(*over)


def _mpp(told: Mapping[Any, Any]) -> float | None:
    dpi = told.get("dpi")
    if not dpi or not dpi[0] or not math.isfinite(float(dpi[0])):
        return None
    return plausible_mpp(25400.0 / float(dpi[0]))

"""Turns the encoded bytes of one tile into pixels in a buffer of the caller's.

JPEG, JPEG 2000 and uncompressed tiles are decoded in place; every other compression (deflate, LZW, Zstandard,
with or without predictor) goes through tifffile's decoder and one copy. Colour: slides come out as RGB. Grey
is repeated three times (inverted where TIFF says that white is zero); a fourth channel is opacity, and the
pixels are laid over the slide's own background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from tifffile import TiffPage
from tifffile.tifffile import jpeg_decode_colorspace

from wholegrad.slide.background import WHITE_BELOW, Background

Pixels = npt.NDArray[np.uint8]
DecodeSegment = Callable[[bytes, int, Pixels], None]

RAW = 1
JPEG = 7
JPEG2000 = (33003, 33004, 33005, 34712)


def segment_decoder(page: TiffPage) -> DecodeSegment:
    """The function ``(data, index, out)`` that decodes a tile or strip of ``page`` into ``out``
    (rows, cols, samples). Call this while the page's file is open; the function itself needs no file.

    A segment smaller than ``out`` (the last strip, a cropped edge tile) fills its top left corner.
    """
    if page.compression == RAW and page.predictor == 1 and page.fillorder == 1:
        return decode_raw
    slow = _by_tifffile(page)
    if page.compression == JPEG and page.planarconfig == 1 and page.samplesperpixel in (1, 3):
        return _in_place(_jpeg(page), slow)
    if page.compression in JPEG2000 and page.planarconfig == 1:
        return _in_place(_jpeg2000, slow)
    return slow


def decode_raw(data: bytes, index: int, out: Pixels) -> None:
    """Uncompressed values, as they are in the file."""
    rows = np.frombuffer(data, np.uint8).reshape(-1, *out.shape[1:])
    out[: len(rows)] = rows[: len(out)]


def _by_tifffile(page: TiffPage) -> DecodeSegment:
    decode, options = page.decode, dict[str, Any]()
    if page.compression in (6, JPEG, 34892, 33007):
        options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}

    def run(data: bytes, index: int, out: Pixels) -> None:
        pixels = decode(data, index, **options)[0]
        if pixels is None:
            raise ValueError("no pixels in the tile")
        height, width = min(pixels.shape[1], out.shape[0]), min(pixels.shape[2], out.shape[1])
        out[:height, :width] = pixels[0, :height, :width]

    return run


def _jpeg(page: TiffPage) -> Callable[[bytes, Pixels], None]:
    stored, wanted = jpeg_decode_colorspace(page.photometric, page.planarconfig, page.extrasamples, page.is_jfif)
    tables = page.jpegtables

    def run(data: bytes, out: Pixels) -> None:
        imagecodecs.jpeg8_decode(
            data, tables=tables, colorspace=stored, outcolorspace=wanted, shape=out.shape[:2], out=out
        )

    return run


def _jpeg2000(data: bytes, out: Pixels) -> None:
    imagecodecs.jpeg2k_decode(data, out=out)


def _in_place(fast: Callable[[bytes, Pixels], None], slow: DecodeSegment) -> DecodeSegment:
    """``fast`` where the tile has the expected size, else ``slow``, which also says what is wrong."""

    def run(data: bytes, index: int, out: Pixels) -> None:
        try:
            fast(data, out[..., 0] if out.shape[2] == 1 else out)
        except (RuntimeError, ValueError, TypeError):
            slow(data, index, out)

    return run


class TileDecoder:
    """Decodes the tiles of one pyramid level, one segment per plane, into ``channels`` channels of uint8.

    Args:
        segments: decoder of each page (one page, or one for each colour plane).
        planes: how many segments make a tile (1, or 3 where colours are stored apart).
        samples: values a pixel that one segment holds.
        channels: 3 for slides (RGB), 1 for label maps (as stored).
        white_is_zero: grey values are inverted.
        premultiplied: colours are already multiplied by the opacity.
        background: what shows through where opacity is below 255.
        first: which value of a pixel is taken, where ``channels`` is 1.
    """

    def __init__(
        self,
        segments: Sequence[DecodeSegment],
        planes: int,
        samples: int,
        channels: int,
        white_is_zero: bool = False,
        premultiplied: bool = False,
        background: Background = WHITE_BELOW,
        first: int = 0,
    ) -> None:
        self._segments = tuple(segments)
        self._planes, self._samples, self._channels = planes, samples, channels
        self._white_is_zero = white_is_zero and channels == 3
        self._premultiplied, self._background, self._first = premultiplied, background, first
        self.direct = planes == 1 and samples == channels and not self._white_is_zero

    def __call__(self, data: Sequence[bytes], index: Sequence[int], out: Pixels) -> None:
        """Decode the segments ``data``, numbered ``index``, into ``out`` (rows, cols, channels)."""
        if self.direct:
            self._segments[0](data[0], index[0], out)
            return
        stored = np.full((*out.shape[:2], self._planes * self._samples), 255, np.uint8)
        for plane, (encoded, number) in enumerate(zip(data, index, strict=True)):
            part = stored if self._planes == 1 else np.empty((*out.shape[:2], self._samples), np.uint8)
            self._segments[plane % len(self._segments)](encoded, number, part)
            if part is not stored:
                stored[..., plane * self._samples : (plane + 1) * self._samples] = part
        self._colour(stored, out)

    def _colour(self, stored: Pixels, out: Pixels) -> None:
        if self._white_is_zero:
            np.subtract(255, stored[..., :1], out=stored[..., :1])
        if self._channels == 1:
            out[...] = stored[..., self._first : self._first + 1]
        elif stored.shape[2] < 3:
            out[...] = stored[..., :1]
        elif stored.shape[2] == 3:
            out[...] = stored
        else:
            self._background.under(stored, out, self._premultiplied)

"""Draws a label map on its slide as a PNG: translucent classes, outlines, areas and a scale bar.

The map is sampled as its bands pass, three times as finely as the picture in each direction; what is held is the
picture. Averaged, the samples give edges without stairs.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from wholegrad.errors import ConfigError
from wholegrad.slide.bigtiff import PartialFile
from wholegrad.slide.output import Array, ClassNames, Colour, Output
from wholegrad.slide.reader import MapReader
from wholegrad.slide.thumbnail import thumbnail

Bits = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

SIDE = 1600  # pixels: longer side of the slide in the picture
FINER = 3
WASH, LINE = 0.22, 3  # how strongly a class lies over the slide; width of outlines, pixels
INK: Colour = (32, 36, 42)
MUTED: Colour = (110, 117, 126)
GROUND: Colour = (250, 250, 249)
FRAME: Colour = (214, 216, 219)
MARGIN, HEAD, FOOT, LEAST = 28, 44, 40, 520


class OverlayWriter(Output):
    """A PNG of a label map ``(1, H, W)`` on its slide.

    Args:
        path: of the PNG.
        shape: ``(H, W)`` of the map.
        slide: the image, uint8 with one or three channels and the same field of view; its thumbnail is read at once.
        classes: names and colours.
        mpp: um a pixel of the map, for areas and the scale bar; None leaves them out.
        title: above the picture.

    Raises:
        ConfigError: an image that cannot be shown.
        SlideError: the slide cannot be read, or the file not be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: tuple[int, int],
        slide: MapReader,
        classes: ClassNames,
        mpp: float | None = None,
        title: str = "",
    ) -> None:
        if slide.dtype != np.uint8 or slide.shape[0] not in (1, 3):
            cause = f"cannot show {slide.shape[0]} channels of {slide.dtype}"
            raise ConfigError(str(path), cause, "give an image of uint8 with one or three channels")
        self._shape, self._classes, self._mpp, self._title = shape, classes, mpp, title
        self._file = PartialFile(Path(path))
        try:
            self._slide = thumbnail(slide, SIDE)
        except BaseException:
            self._file.discard()
            raise
        self._samples = np.zeros((FINER * self._slide.shape[0], FINER * self._slide.shape[1]), np.uint8)
        self._rows, self._columns = (
            (2 * np.arange(n, dtype=np.int64) + 1) * size // (2 * n)
            for n, size in zip(self._samples.shape, shape, strict=True)
        )
        self.held_bytes = 8 * self._samples.size

    def write(self, y0: int, band: Array) -> None:
        first, last = np.searchsorted(self._rows, (y0, y0 + band.shape[1]))
        for row in range(first, last):
            np.take(band[0, self._rows[row] - y0], self._columns, out=self._samples[row])

    def seal(self) -> None:
        buffer = io.BytesIO()
        self._drawn().save(buffer, "png")
        self._file.append(buffer.getvalue())
        self._file.seal()

    def publish(self) -> None:
        self._file.publish()

    def abort(self) -> None:
        self._file.discard()

    def _drawn(self) -> Image.Image:
        pixels = self._slide.astype(np.float32)
        labels = [int(label) for label in np.unique(self._samples) if label]
        for label in labels:
            inside = self._samples == label
            _blend(pixels, WASH * _averaged(inside), self._classes.colour(label))
        for label in labels:
            inside = self._samples == label
            _blend(pixels, _averaged(_rim(inside, FINER * LINE)), self._classes.colour(label))
        return self._arranged(Image.fromarray(np.rint(pixels).astype(np.uint8)), labels)

    def _arranged(self, picture: Image.Image, labels: list[int]) -> Image.Image:
        """The picture in its frame, with title, legend and scale bar."""
        width = max(picture.width, LEAST)
        page = Image.new("RGB", (width + 2 * MARGIN, picture.height + 2 * MARGIN + HEAD + FOOT), GROUND)
        draw = ImageDraw.Draw(page)
        draw.text((MARGIN, MARGIN - 4), _short(draw, self._title, width), fill=INK, font=_font(22))
        x, y = MARGIN + (width - picture.width) // 2, MARGIN + HEAD
        draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
        page.paste(picture, (x, y))
        self._legend(draw, labels, MARGIN, y + picture.height + 18)
        self._scale_bar(draw, picture.width, MARGIN + width, y + picture.height + 18)
        return page

    def _legend(self, draw: ImageDraw.ImageDraw, labels: list[int], x: float, y: int) -> None:
        """Colour, name and area of each class."""
        for label in labels:
            share = float((self._samples == label).mean())
            draw.rectangle((x, y + 3, x + 12, y + 15), fill=self._classes.colour(label))
            x += 19
            for part, font, raised in self._said(label, share):
                draw.text((x, y - raised), part, fill=MUTED, font=font)
                x += draw.textlength(part, font=font)
            x += 24
        if not labels:
            draw.text((x, y), "no pixel labelled", fill=MUTED, font=_font(15))

    def _said(self, label: int, share: float) -> list[tuple[str, Any, int]]:
        """A class's name, area and share, in pieces with their fonts: Pillow's own font has no raised two."""
        percent = f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"
        name = self._classes.name(label)
        if self._mpp is None:
            return [(f"{name}  {percent}", _font(15), 0)]
        area = share * self._shape[0] * self._shape[1] * self._mpp**2 / 1e6
        said = f"{area:.3g}" if area < 1000 else f"{area:.0f}"
        return [(f"{name}  {said} mm", _font(15), 0), ("2", _font(10), 2), (f", {percent}", _font(15), 0)]

    def _scale_bar(self, draw: ImageDraw.ImageDraw, shown: int, right: int, y: int) -> None:
        if self._mpp is None:
            return
        per_pixel = self._mpp * self._shape[1] / shown
        length = round_length(shown * per_pixel / 6)
        said = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
        left = right - length / per_pixel
        draw.rectangle((left, y + 8, right, y + 11), fill=INK)
        draw.text((left - 10 - draw.textlength(said, font=_font(15)), y), said, fill=MUTED, font=_font(15))


def round_length(most: float) -> float:
    """The longest of 1, 2 or 5 times a power of ten that is not above ``most``."""
    power = 10.0 ** np.floor(np.log10(most))
    return float(max(step * power for step in (1, 2, 5) if step * power <= most))


def _rim(inside: Bits, width: int) -> Bits:
    """The samples of ``inside`` within ``width`` of its outside; the picture's own border is no outside."""
    left = inside
    for _ in range(width):
        padded = np.pad(left, 1, mode="edge")
        left = left & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~left


def _averaged(samples: Bits) -> Floats:
    """The share of each picture pixel's samples."""
    height, width = samples.shape
    blocks = samples.reshape(height // FINER, FINER, width // FINER, FINER)
    share: Floats = blocks.mean(axis=(1, 3), dtype=np.float32)
    return share


def _blend(pixels: Floats, opacity: Floats, colour: Colour) -> None:
    pixels += opacity[..., None] * (np.array(colour, np.float32) - pixels)


def _short(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    while text and draw.textlength(text, font=_font(22)) > width:
        text = text[:-2].rstrip("\u2026") + "\u2026"
    return text


def _font(size: int) -> Any:
    return ImageFont.load_default(size)

"""A picture to judge a mask by: slide, truth and prediction side by side, right and wrong in colour.

Works on small arrays only (thumbnails); reading those from gigapixel files is the callers' business.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from wholegrad.losses import IGNORE
from wholegrad.train.state import write_whole

Pixels = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.bool_]
Colour = tuple[int, int, int]

INK: Colour = (32, 36, 42)
MUTED: Colour = (110, 117, 126)
GROUND: Colour = (250, 250, 249)
FRAME: Colour = (214, 216, 219)
RIGHT: Colour = (22, 140, 96)
EXTRA: Colour = (214, 96, 20)
MISSED: Colour = (122, 60, 190)
IGNORED: Colour = (150, 150, 150)
WASH = 0.24  # how strongly a colour lies over the slide

MARGIN, GAP, LINE = 28, 22, 20


@dataclass(frozen=True)
class View:
    """One picture ``(h, w, 3)`` with its label, and a legend of colours."""

    label: str
    pixels: Pixels
    legend: tuple[tuple[str, Colour], ...] = ()


def draw_panel(
    path: Path, slide: Pixels, truth: Pixels | None, predicted: Pixels, title: str, caption: str = ""
) -> None:
    """Write a PNG with the slide, the truth on it (if known) and the prediction on it.

    Args:
        path: of the PNG; appears complete or not at all.
        slide: thumbnail, uint8 ``(h, w, 3)``.
        truth: labels ``(h, w)``: 0 background, 1 tissue, 255 ignore.
        predicted: ``(h, w)``, tissue where not 0.
        title: first line, large; ``caption``: second line, small.

    Raises:
        WholegradError: the file cannot be written.
    """
    views = [View("slide", slide)]
    if truth is not None:
        views.append(_truth_view(slide, truth))
    views.append(_prediction_view(slide, truth, predicted != 0))
    buffer = io.BytesIO()
    _arrange(views, title, caption).save(buffer, "png", optimize=True)
    write_whole(path, buffer.getvalue())


def outline(mask: Bits, width: int = 2) -> Bits:
    """The pixels of ``mask`` within ``width`` of its outside; the picture's own border is no outside."""
    inside = mask
    for _ in range(width):
        padded = np.pad(inside, 1, mode="edge")
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: Bits = mask & ~inside
    return edge


def _truth_view(ground: Pixels, truth: Pixels) -> View:
    ignored = truth == IGNORE
    pixels = _tint(_tint(ground, truth == 1, RIGHT), ignored, IGNORED)
    legend = (("tissue", RIGHT), *((("not counted", IGNORED),) if ignored.any() else ()))
    return View("truth", pixels, legend)


def _prediction_view(ground: Pixels, truth: Pixels | None, said: Bits) -> View:
    if truth is None:
        return View("prediction", _tint(ground, said, RIGHT), (("tissue", RIGHT),))
    counted = truth != IGNORE
    real = truth == 1
    pixels = _tint(ground, said & (real | ~counted), RIGHT)
    pixels = _tint(_tint(pixels, said & ~real & counted, EXTRA), ~said & real, MISSED)
    return View("prediction", pixels, (("right", RIGHT), ("too much", EXTRA), ("missed", MISSED)))


def _tint(pixels: Pixels, mask: Bits, colour: Colour) -> Pixels:
    """``pixels`` with a wash of ``colour`` over ``mask`` and a solid outline around it."""
    out = pixels.astype(np.float32)
    out[mask] = (1 - WASH) * out[mask] + WASH * np.array(colour, np.float32)
    out[outline(mask)] = colour
    return out.round().astype(np.uint8)


def _arrange(views: list[View], title: str, caption: str) -> Image.Image:
    """Views in a row, or, where the slide is much wider than high, in a column."""
    height, width = views[0].pixels.shape[:2]
    across = 2 * width <= 3 * height
    columns, rows = (len(views), 1) if across else (1, len(views))
    head, block = MARGIN + 2 * LINE + GAP, height + LINE + 8
    size = (
        2 * MARGIN + columns * width + (columns - 1) * GAP,
        head + rows * block + (rows - 1) * GAP + MARGIN,
    )
    page = Image.new("RGB", (max(size[0], 640), size[1]), GROUND)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 6), title, fill=INK, font=ImageFont.load_default(22))
    draw.text((MARGIN, MARGIN + LINE + 4), caption, fill=MUTED, font=ImageFont.load_default(14))
    for number, view in enumerate(views):
        x = MARGIN + (number * (width + GAP) if across else 0)
        y = head + (0 if across else number * (block + GAP))
        _draw_view(page, draw, view, x, y)
    return page


def _draw_view(page: Image.Image, draw: ImageDraw.ImageDraw, view: View, x: int, y: int) -> None:
    font = ImageFont.load_default(15)
    draw.text((x, y), view.label, fill=INK, font=font)
    right = x + view.pixels.shape[1]
    for name, colour in reversed(view.legend):
        right -= int(draw.textlength(name, font=font))
        draw.text((right, y), name, fill=MUTED, font=font)
        right -= 18
        draw.rectangle((right, y + 4, right + 11, y + 15), fill=colour)
        right -= 16
    height, width = view.pixels.shape[:2]
    draw.rectangle((x - 1, y + LINE + 7, x + width, y + LINE + 8 + height), outline=FRAME)
    page.paste(Image.fromarray(view.pixels), (x, y + LINE + 8))

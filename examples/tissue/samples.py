"""Makes training crops of slides held in memory: placed, scaled, stained and lit anew, painted on, evened out.

A crop's density is the slide's own against its glass. What is drawn: scale, flips and quarter turns, the amount of each
stain (in the space of Ruifrok and Johnston, 2001), how faint all of it is, blur, what lies on the glass (``paint``),
uneven light, the colour of glass, noise, and fill where nothing was scanned. Then the crop is evened out as
``wholegrad segment`` does it from a picture of the whole slide; the error of that estimate is drawn too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from paint import Density, Labels, light, paint
from PIL import Image
from scipy.ndimage import gaussian_filter

from wholegrad.slide.balance import FAINTEST, INK, Balance, find_balance

Pixels = npt.NDArray[np.uint8]

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
UNMIX = np.linalg.inv(STAINS)


@dataclass(frozen=True)
class Section:
    """A slide and its labels in memory: RGB ``(H, W, 3)``, labels ``(H, W)``, colour of its glass."""

    name: str
    image: Pixels
    labels: Labels
    glass: npt.NDArray[np.float32]

    @staticmethod
    def of(name: str, image: Pixels, labels: Labels) -> Section:
        return Section(name, image, labels, np.array(find_balance(image[::4, ::4]).glass, np.float32))


def sample(rng: np.random.Generator, section: Section, side: int) -> tuple[Pixels, Labels]:
    """One crop: RGB ``(side, side, 3)`` as the network sees it, and labels ``(side, side)``."""
    gentle = rng.random() < 0.15  # as it is, but for where it is
    image, labels, inside = _place(rng, section, side, 1.0 if gentle else float(np.exp(rng.uniform(-0.5, 0.4))))
    density = -np.log((image.astype(np.float32) + 0.5) / (section.glass + 0.5))
    glass = section.glass.astype(np.float64)
    noise = 0.0
    if not gentle:
        density = _stain(rng, density)
        if rng.random() < 0.3:
            radius = rng.uniform(0.3, 2.2)
            density = gaussian_filter(density, (radius, radius, 0), mode="nearest")
        density, labels = paint(rng, density, labels)
        density = density + light(rng, side)[..., None]
        tint = rng.normal(0, 0.03 if rng.random() < 0.8 else 0.09, 3)
        glass = np.clip(rng.uniform(200, 254) * (1 + tint), 150, 254)
        noise = rng.uniform(0, 3)
    grain = noise * rng.standard_normal((side, side, 1))
    values = glass * np.exp(-density) + grain
    values, labels = _fill(rng, values, labels, inside, strips=not gentle)
    pixels = np.clip(np.round(values), 0, 255).astype(np.uint8)
    return _even_out(rng, pixels, labels, glass), labels


def _place(rng: np.random.Generator, section: Section, side: int, scale: float) -> tuple[Pixels, Labels, Labels]:
    """A region of ``side * scale`` pixels, at times over the slide's edge, brought to ``side``; and what is inside."""
    height, width = section.labels.shape
    edge = round(side * scale)
    over = edge // 4
    for _ in range(8):
        y = int(rng.integers(-over, max(height - edge + over, 1 - over)))
        x = int(rng.integers(-over, max(width - edge + over, 1 - over)))
        rows, cols = slice(max(y, 0), min(y + edge, height)), slice(max(x, 0), min(x + edge, width))
        there = section.labels[rows, cols] == 1
        if there.size and ((there.any() and not there.all()) or rng.random() < 0.15):
            break
    at = slice(rows.start - y, rows.stop - y), slice(cols.start - x, cols.stop - x)
    image, labels, inside = (np.zeros((edge, edge, *more), np.uint8) for more in ((3,), (), ()))
    image[at], labels[at], inside[at] = section.image[rows, cols], section.labels[rows, cols], 1
    if edge != side:
        smooth = Image.Resampling.BILINEAR if edge < side else Image.Resampling.BOX
        image = np.asarray(Image.fromarray(image).resize((side, side), smooth))
        labels, inside = (
            np.asarray(Image.fromarray(part).resize((side, side), Image.Resampling.NEAREST))
            for part in (labels, inside)
        )
    turns, flip = int(rng.integers(4)), rng.random() < 0.5
    image, labels, inside = (np.rot90(part[:, ::-1] if flip else part, turns) for part in (image, labels, inside))
    return image, labels, inside


def _stain(rng: np.random.Generator, density: Density) -> Density:
    """More or less of each stain, at times one stain only, at times very faint."""
    if rng.random() < 0.8:
        amounts = (density @ UNMIX) * (1 + 0.25 * rng.standard_normal(3).astype(np.float32))
        density = amounts @ STAINS
    if rng.random() < 0.15:
        colour, share = np.abs(1 + 0.5 * rng.standard_normal(3)).astype(np.float32), np.float32(rng.uniform(0.4, 1))
        density = density * (1 - share) + density.mean(axis=-1, keepdims=True) * colour * share
    faint = rng.uniform(np.log(0.15), np.log(1.5)) if rng.random() < 0.5 else rng.normal(0, 0.3)
    return density * np.float32(np.exp(faint))


def _fill(
    rng: np.random.Generator, values: npt.NDArray[np.float64], labels: Labels, inside: Labels, strips: bool
) -> tuple[npt.NDArray[np.float64], Labels]:
    """White or black where the crop leaves the slide; at times beside a straight edge within it, too."""
    outside = inside == 0
    values = np.where(outside[..., None], 255.0 if rng.random() < 0.8 else 0.0, values)
    labels = np.where(outside, np.uint8(0), labels)
    if strips and rng.random() < 0.12:
        at = int(rng.integers(len(labels)))
        rows, cols = [(slice(at), ...), (slice(at, None), ...), (..., slice(at)), (..., slice(at, None))][
            rng.integers(4)
        ]
        where = (rows, slice(None)) if cols is ... else (slice(None), cols)
        values[where] = 255.0 if rng.random() < 0.7 else 0.0
        labels[where] = 0
    return values, labels


def _even_out(rng: np.random.Generator, pixels: Pixels, labels: Labels, glass: npt.NDArray[np.float64]) -> Pixels:
    """What :class:`wholegrad.slide.balance.Balance` makes of it, had glass and ink been found with some error."""
    found = glass * (1 + rng.normal(0, 0.008) + rng.normal(0, 0.004, 3))
    tissue = pixels[labels == 1][::7].astype(np.float64)
    density = -np.log(np.clip((tissue + 0.5) / (glass + 0.5), 1 / 255, 1)).mean(axis=-1)
    ink = density[density > FAINTEST]
    gain = INK / np.percentile(ink, 75) if len(ink) > 50 else np.exp(rng.uniform(np.log(0.6), np.log(5)))
    gain = np.clip(np.clip(gain, 0.6, 5) * np.exp(rng.normal(0, 0.35)), 0.4, 6)
    table = Balance((float(found[0]), float(found[1]), float(found[2])), float(gain)).table()
    return np.stack([table[channel][pixels[..., channel]] for channel in range(3)], axis=-1)

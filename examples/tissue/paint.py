"""Paints on a crop of a slide what lies on glass and is not tissue: pen, bubbles, edges, hair, dust, spots.

All of it is optical density that adds to the section's (Beer-Lambert), drawn from the generator that is handed in. Each
painter takes and gives ``(density (S, S, 3) float32, labels (S, S) uint8)``: 0 background, 1 tissue, 255 ignore.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Density = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Painted = tuple[Density, Labels]

IGNORE = 255
PENS = np.array(
    [
        [1.5, 0.85, 0.15],  # blue
        [1.5, 0.5, 1.0],  # green
        [1.2, 1.2, 1.15],  # black
        [0.2, 1.3, 1.2],  # red
        [0.25, 0.5, 1.3],  # orange
        [1.6, 1.0, 0.5],
        [0.9, 0.2, 0.6],
    ],
    np.float32,
)


def paint(rng: np.random.Generator, density: Density, labels: Labels) -> Painted:
    """Some of everything, each with a chance of its own."""
    for chance, painter in (
        (0.22, pen),
        (0.15, bubble),
        (0.18, border),
        (0.15, hairs),
        (0.35, dust),
        (0.12, spots),
    ):
        if rng.random() < chance:
            density, labels = painter(rng, density, labels)
    return density, labels


def pen(rng: np.random.Generator, density: Density, labels: Labels) -> Painted:
    """Strokes of a marker, translucent. Tissue beneath is not to be judged."""
    side = len(labels)
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(1, 4)):
        width, strength = int(rng.integers(6, 60)), int(rng.integers(120, 255))
        draw.line(curve(rng, side), fill=strength, width=width, joint="curve")
    if rng.random() < 0.2:
        corners = [*(rng.uniform(0, 0.8, 2) * side), *(rng.uniform(0.85, 1.1, 2) * side)]
        draw.ellipse(corners, fill=int(rng.integers(120, 255)))
    ink = _soft(canvas, rng.uniform(0.5, 3))
    colour = PENS[rng.integers(len(PENS))] * rng.uniform(0.3, 1.4) * (1 + 0.15 * rng.standard_normal(3))
    grain = 1 + 0.1 * rng.standard_normal((side, side, 1)).astype(np.float32) * ink[..., None]
    density = density + ink[..., None] * colour.clip(0).astype(np.float32) * grain
    return density, np.where((ink > 0.15) & (labels == 1), np.uint8(IGNORE), labels)


def bubble(rng: np.random.Generator, density: Density, labels: Labels) -> Painted:
    """The rim of an air bubble: a dark ring, a bright line inside, sometimes a second ring and another light."""
    side = len(labels)
    radius, centre = rng.uniform(0.1, 0.7) * side, rng.uniform(-0.2, 1.2, 2) * side
    y, x = np.mgrid[:side, :side] - centre[:, None, None]
    angle = np.arctan2(y, x)
    bumps = 0.06 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.04 * np.sin(5 * angle + rng.uniform(0, 6))
    depth = np.sqrt(y**2 + rng.uniform(0.7, 1.3) * x**2) - radius * (1 + bumps)
    width = rng.uniform(1, 8)
    ring = np.exp(-((depth / width) ** 2)) * rng.uniform(0.1, 1.0)
    ring -= 0.05 * np.exp(-((depth / width + 2) ** 2))
    ring += 0.3 * np.exp(-((depth / width + 5) ** 2)) * rng.random()
    if rng.random() < 0.4:
        ring += np.where(depth < 0, rng.uniform(-0.05, 0.08), 0)
    return density + ring.astype(np.float32)[..., None], labels


def border(rng: np.random.Generator, density: Density, labels: Labels) -> Painted:
    """The straight edge of coverslip or slide; beyond it, sometimes, the dark of the stage."""
    side = len(labels)
    angle = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.03)
    y, x = np.mgrid[:side, :side] - side / 2
    depth = np.cos(angle) * x + np.sin(angle) * y + side / 2 - rng.uniform(-0.05, 0.35) * side
    line = np.exp(-((depth / rng.uniform(0.7, 6)) ** 2)) * rng.uniform(0.1, 1.6)
    tint = 1 + 0.1 * rng.standard_normal(3)
    density = density + (line[..., None] * tint).astype(np.float32)
    if rng.random() < 0.35:
        stage = (rng.uniform(0.05, 0.6) + rng.normal(0, 0.03, 3)).clip(0)
        fall = np.clip(1 + 0.3 * rng.standard_normal() * depth / side, 0.2, 2)[..., None]
        noise = 0.02 * rng.standard_normal((side, side, 1))
        beyond = depth < 0
        density = np.where(beyond[..., None], (stage * fall + noise).astype(np.float32), density)
        labels = np.where(beyond, np.uint8(0), labels)
    return density, labels


def hairs(rng: np.random.Generator, density: Density, labels: Labels) -> Painted:
    """Hairs and fibres."""
    side = len(labels)
    canvas = Image.new("L", (side, side))
    for _ in range(rng.integers(1, 4)):
        ImageDraw.Draw(canvas).line(curve(rng, side), fill=255, width=int(rng.integers(1, 5)))
    grey = np.asarray(canvas, np.float32) / 255 * np.float32(rng.uniform(0.1, 0.9))
    return density + grey[..., None], labels


def dust(rng: np.random.Generator, density: Density, labels: Labels) -> Painted:
    """Specks of up to nine pixels' radius, of one colour."""
    side = len(labels)
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 40))):
        y, x = rng.uniform(0, side, 2)
        rx = float(np.exp(rng.uniform(np.log(0.6), np.log(9))))
        ry = rx * rng.uniform(0.5, 1.5)
        draw.ellipse([x - rx, y - ry, x + rx, y + ry], fill=int(rng.integers(40, 255)))
    colour = (1 + 0.3 * rng.standard_normal(3)).clip(0.2, 2).astype(np.float32)
    grey = _soft(canvas, rng.uniform(0.2, 3)) * np.float32(rng.uniform(0.1, 1.2))
    return density + grey[..., None] * colour, labels


def spots(rng: np.random.Generator, density: Density, labels: Labels) -> Painted:
    """Large pale spots out of focus."""
    side = len(labels)
    canvas = Image.new("L", (side, side))
    for _ in range(int(rng.integers(1, 4))):
        y, x = rng.uniform(0, side, 2)
        r = rng.uniform(10, 90)
        ImageDraw.Draw(canvas).ellipse([x - r, y - r, x + r, y + r], fill=255)
    grey = _soft(canvas, rng.uniform(6, 25)) * np.float32(rng.uniform(0.02, 0.10))
    return density + grey[..., None], labels


def light(rng: np.random.Generator, side: int) -> Density:
    """Uneven light ``(S, S)``, as density: a slope, a vignette, sometimes a scanner's stripes."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    uneven = rng.normal(0, 0.012) * x + rng.normal(0, 0.012) * y + rng.normal(0, 0.02) * (x**2 + y**2)
    if rng.random() < 0.3:
        stripe = np.arange(side) % int(rng.integers(60, 300)) / 150 - 0.5
        uneven = uneven + rng.uniform(0, 0.02) * stripe[None]
    return uneven.astype(np.float32)


def curve(rng: np.random.Generator, side: int) -> list[tuple[float, float]]:
    """Sixty points of a random Bezier curve that may leave the crop."""
    points = np.repeat(rng.uniform(-0.2, 1.2, (1, rng.integers(3, 7), 2)) * side, 60, axis=0)
    t = np.linspace(0, 1, 60)[:, None, None]
    while points.shape[1] > 1:
        points = points[:, :-1] * (1 - t) + points[:, 1:] * t
    return [(float(x), float(y)) for x, y in points[:, 0]]


def _soft(canvas: Image.Image, radius: float) -> Density:
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(radius)), np.float32) / np.float32(255)

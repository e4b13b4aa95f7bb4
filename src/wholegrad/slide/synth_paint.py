"""Paints rows of a synthetic slide: one fused pass that turns fields and textures into RGB and a mask.

Colour follows Beer-Lambert: stains absorb, so densities add up, and light is ``glass * exp(-density)``.
The stain vectors are near those of Ruifrok and Johnston (2001), turned a little from slide to slide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from wholegrad.slide.synth_textures import COARSE, SIDE, Textures

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

HAEMATOXYLIN = (0.70, 0.86, 0.38)
EOSIN = (0.13, 0.88, 0.42)
TABLE = 4096  # steps of exp(-density) for densities 0 to 4


@dataclass(frozen=True)
class Look:
    """What differs from slide to slide in colour.

    Attributes:
        stains: ``(2, 3)`` optical densities of haematoxylin and eosin in red, green and blue.
        glass: RGB of bare glass, 0 to 255; ``beyond``: of glass without coverslip.
        pen: optical densities of the pen in red, green and blue.
        noise: deviation of the sensor's noise, grey values.
        fray: roughness of outlines, um.
        lane: width in pixels of the scanner's stripes.
    """

    stains: Floats
    glass: Floats
    beyond: Floats
    pen: Floats
    noise: float
    fray: float
    lane: int


def make_look(rng: np.random.Generator, mpp: float) -> Look:
    """Stains, glass and scanner of one slide."""
    stains = np.array([HAEMATOXYLIN, EOSIN]) + rng.normal(0, 0.035, (2, 3))
    stains *= rng.uniform((0.95, 0.85), (1.3, 1.3))[:, None]
    level = rng.uniform(238, 246)
    glass = level + rng.normal(0, 1.2, 3)
    pens = np.array([[1.5, 0.85, 0.15], [1.5, 0.5, 1.0], [1.2, 1.2, 1.15]])
    return Look(
        stains=stains.astype(np.float32),
        glass=glass.astype(np.float32),
        beyond=(glass - rng.uniform(2, 6)).astype(np.float32),
        pen=(pens[rng.integers(3)] * rng.uniform(0.7, 1.1)).astype(np.float32),
        noise=float(rng.uniform(0.7, 1.3)),
        fray=float(rng.uniform(5.0, 10.0)),
        lane=int(1000 / mpp),
    )


class Painter:
    """Paints bands of rows into buffers of the caller's; deterministic, whatever the bands and threads."""

    def __init__(self, fields: Floats, textures: Textures, look: Look, pitch: int, mpp: float) -> None:
        self._fields, self._textures, self._look, self._pitch, self._mpp = fields, textures, look, pitch, mpp
        self._fade = np.exp(-np.arange(TABLE + 1) * (4.0 / TABLE)).astype(np.float32)

    def paint(self, top: int, image: Pixels, mask: Pixels) -> None:
        """Fill ``image`` (h, W, 3) and ``mask`` (h, W) with the slide's rows from ``top`` on."""
        t, look = self._textures, self._look
        banks = (
            t.spindle,
            t.round,
            t.lymphoid,
            t.fibres,
            t.fibres_across,
            t.fray,
            t.grain,
            t.glands,
            t.fat,
            t.granules,
        )
        colours = (look.stains, look.glass, look.beyond, look.pen)
        numbers = (look.noise, look.fray, look.lane, self._pitch, self._mpp)
        _paint(top, image, mask, self._fields, banks, colours, numbers, self._fade)


@njit(inline="always")
def _ramp(value, low, high):  # type: ignore[no-untyped-def]
    """0 below ``low``, 1 above ``high``, smooth between."""
    t = min(max((value - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


@njit(inline="always")
def _periodic(bank, y, x):  # type: ignore[no-untyped-def]
    """``bank`` (a power of two a side, COARSE pixels a sample) interpolated at a pixel."""
    wrap = bank.shape[0] - 1
    y, x = y / COARSE, x / COARSE
    i, j = int(np.floor(y)), int(np.floor(x))
    v, u = y - i, x - j
    above = bank[i & wrap, j & wrap] * (1 - u) + bank[i & wrap, (j + 1) & wrap] * u
    below = bank[(i + 1) & wrap, j & wrap] * (1 - u) + bank[(i + 1) & wrap, (j + 1) & wrap] * u
    return above * (1 - v) + below * v


@njit(inline="always")
def _tissue(y, x, depth, glands, fat, lymphoid, loose, along, banks, mpp):  # type: ignore[no-untyped-def]
    """Absorption (haematoxylin, eosin) of tissue at texture position ``(y, x)``."""
    spindle, round_, lymph, fibres, across, fray, _, gland_bank, fat_bank, granules = banks
    wrap = SIDE - 1
    i, j = int(np.floor(y)), int(np.floor(x))
    way = min(max(along, 0.0), 1.0)
    fibre = fibres[i & wrap, j & wrap] * way + across[(i + 611) & wrap, (j + 977) & wrap] * (1.0 - way)
    # stroma: strands of collagen, pale gaps where it is loose, spindle nuclei along them
    pale = _ramp(loose, -0.3, 1.3)
    gap = _ramp(fibre, 0.24 + 0.14 * pale, 0.42 + 0.2 * pale)
    fine = granules[(i + 333) & wrap, (j + 71) & wrap]
    mucosa = _ramp(glands, -0.2, 0.5)
    open_ = (0.25 + 0.65 * pale) * (1.0 - 0.6 * mucosa)
    e = (0.42 + 0.50 * fibre + 0.05 * fine) * (1.0 - open_ * (1.0 - gap)) * (1.0 - 0.3 * pale)
    h = 0.08 + 0.06 * fibre + 1.15 * spindle[i & wrap, j & wrap] * (0.4 + 0.6 * gap)
    # plasma cells and lymphocytes between glands
    few = _ramp(fray[(i + 1201) & wrap, (j + 87) & wrap], -1.0, 0.8) * (0.25 + 0.75 * mucosa)
    h += 1.1 * few * lymph[(i + 51) & wrap, (j + 640) & wrap] + 0.06 * mucosa
    # lymphoid infiltrate
    crowd = _ramp(lymphoid + 0.10 * fray[(i + 37) & wrap, (j + 411) & wrap], -0.25, 0.35)
    if crowd > 0.0:
        dots = lymph[(i + 97) & wrap, (j + 1300) & wrap]
        h += crowd * (1.15 * dots + 0.20)
        e *= 1.0 - 0.25 * crowd
    # glands: a ring of epithelium with basal nuclei around a pale lumen
    if glands > -0.6:
        deep = _periodic(gland_bank, y, x) + 16.0 * min(glands - 0.25, 0.0) + 1.2 * fray[(i + 5) & wrap, j & wrap]
        if deep > -4.0:
            inside = _ramp(deep, -1.2, 0.8)
            lumen = _ramp(deep + 2.5 * fray[(i + 640) & wrap, (j + 5) & wrap], 23.0, 27.0)
            basal = _ramp(deep, 0.0, 2.0) * (1.0 - _ramp(deep, 7.0, 10.5))
            dots = round_[(i + 700) & wrap, (j + 200) & wrap]
            foam = _ramp(deep, 7.0, 11.0) * (0.35 + 0.65 * _ramp(lymphoid + 3 * loose, -1.5, 1.5))
            net = abs(granules[(i >> 1) & wrap, (j >> 1) & wrap])  # walls of mucus vacuoles
            cell_h = 0.24 + 1.25 * dots * (0.06 + 0.94 * basal) + 0.18 * basal + 0.05 * fine
            cell_e = 0.50 - 0.10 * basal + 0.10 * (fibre - 0.5) + 0.05 * fine
            foam *= _ramp(net, 0.1, 0.9)
            cell_h, cell_e = cell_h * (1 - 0.55 * foam), cell_e * (1 - 0.7 * foam)
            cell_h, cell_e = cell_h * (1 - lumen) + 0.01 * lumen, cell_e * (1 - lumen) + 0.025 * lumen
            space = _ramp(deep, -4.0, -1.2) * (1.0 - inside) * 0.55  # a thin cleft around each gland
            space *= _ramp(fray[(i + 9) & wrap, (j + 1011) & wrap], -0.6, 0.8)
            h, e = h * (1 - space), e * (1 - space)
            h, e = h * (1 - inside) + cell_h * inside, e * (1 - inside) + cell_e * inside
    # fat: large empty cells with thin walls
    if fat > -0.25:
        amount = _ramp(fat + 0.06 * fray[(i + 900) & wrap, (j + 1700) & wrap], -0.1, 0.12)
        bent = 2.2 * fray[(i + 77) & wrap, (j + 7) & wrap]
        wall = 1.0 - _ramp(_periodic(fat_bank, y + 400.0, x + 900.0) + 0.3 * bent, 0.7, 2.0)
        full = amount * (1.0 - wall)
        h, e = h * (1 - full) + 0.012 * full, e * (1 - full) + 0.03 * full
        e = e * (1 - amount * wall) + 0.50 * amount * wall
    rim = 1.0 + 0.22 * np.exp(-max(depth, 0.0) / 22.0)
    return h * rim, e * rim


@njit(inline="always")
def _on_glass(hair, bubble, pen, grain):  # type: ignore[no-untyped-def]
    """Grey absorption of a hair and an air bubble's rim, and the amount of pen."""
    grey = 0.0
    if hair > -4.0:
        body = _ramp(hair, -1.2, 1.0)
        halo = _ramp(hair, -4.0, -1.2) * (1.0 - body)
        grey += body * (0.30 + 0.35 * (1.0 - _ramp(hair, 1.0, 5.0))) - 0.03 * halo
    if bubble > -14.0:
        dark = _ramp(bubble, -9.0, -1.0) * (1.0 - _ramp(bubble, 0.0, 26.0))
        second = _ramp(bubble, 30.0, 36.0) * (1.0 - _ramp(bubble, 36.0, 46.0))
        grey += 0.75 * dark + 0.10 * second - 0.02 * _ramp(bubble, 0.0, 30.0)
    ink = 0.0
    if pen > -6.0:
        ink = _ramp(pen, -6.0, 6.0) * (0.82 + 0.25 * (1.0 - _ramp(pen, 0.0, 60.0)) + 0.04 * grain)
    return grey, ink


@njit(parallel=True, cache=True)
def _paint(top, image, mask, fields, banks, colours, numbers, fade):  # type: ignore[no-untyped-def]
    stains, glass, beyond, pen_colour = colours
    noise, fray_um, lane, pitch, mpp = numbers
    fray, grain = banks[5], banks[6]
    wrap = SIDE - 1
    shift, per_pitch = int(np.round(np.log2(pitch))), 1.0 / pitch  # a power of two: no division a pixel
    lanes = 1.0 + 0.0025 * ((np.arange(image.shape[1]) % lane) / lane - 0.5)
    for row in prange(image.shape[0]):
        y = top + row
        above, v = y // pitch, np.float32((y % pitch) / pitch)
        line = fields[:, above] * (np.float32(1) - v) + fields[:, above + 1] * v
        for x in range(image.shape[1]):
            k, u = x >> shift, np.float32((x & (pitch - 1)) * per_pitch)
            w = np.float32(1) - u
            rough = fray[y & wrap, x & wrap]
            depth = line[0, k] * w + line[0, k + 1] * u + fray_um * rough
            mask[row, x] = depth > 0.0
            speck = grain[(y * 5 + 17) & wrap, (x + 37 * y + (x >> 11) * 331) & wrap]
            # glass, its illumination and what lies on it
            light = (line[10, k] * w + line[10, k + 1] * u) * lanes[x]
            cover = line[14, k] * w + line[14, k + 1] * u
            past = _ramp(cover, -2.0, 2.0)
            grey, ink = _on_glass(
                line[11, k] * w + line[11, k + 1] * u,
                line[12, k] * w + line[12, k + 1] * u,
                line[13, k] * w + line[13, k + 1] * u,
                rough,
            )
            if abs(cover) < 40.0:
                grey += 0.30 * np.exp(-((cover / 7.0) ** 2)) - 0.03 * np.exp(-(((cover - 16.0) / 8.0) ** 2))
            h, e = 0.0, 0.0
            if depth > -3.0:
                ty = y + line[8, k] * w + line[8, k + 1] * u
                tx = x + line[9, k] * w + line[9, k + 1] * u
                h, e = _tissue(
                    ty,
                    tx,
                    depth,
                    line[1, k] * w + line[1, k + 1] * u,
                    line[2, k] * w + line[2, k + 1] * u,
                    line[3, k] * w + line[3, k + 1] * u,
                    line[4, k] * w + line[4, k + 1] * u,
                    line[7, k] * w + line[7, k + 1] * u,
                    banks,
                    mpp,
                )
                edge = _ramp(depth, -0.8, 1.0)
                h *= edge * (line[5, k] * w + line[5, k + 1] * u)
                e *= edge * (line[6, k] * w + line[6, k + 1] * u)
            for c in range(3):
                density = h * stains[0, c] + e * stains[1, c] + grey + ink * pen_colour[c]
                step = min(max(density, 0.0), 4.0) * (TABLE / 4.0)
                shine = fade[int(step)] * (1.0 - min(density, 0.0))
                value = (glass[c] * (1.0 - past) + beyond[c] * past) * light * shine + noise * speck
                image[row, x, c] = np.uint8(min(max(value + 0.5, 0.0), 255.0))

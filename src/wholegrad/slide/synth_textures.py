"""Small periodic textures from which a synthetic slide is painted: nuclei, fibres, glands, fat, noise.

All are laid on a torus, so that they repeat without a seam, and are drawn at the slide's own um a pixel, so
that a nucleus is 5-9 um wide and a gland 50-200 um on every slide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.floating[Any]]
Response = Callable[[Doubles, Doubles], Doubles]

SIDE = 2048  # pixels, of textures sampled at full resolution; a power of two
COARSE = 4  # pixels a sample of textures that are interpolated


@dataclass(frozen=True)
class Nuclei:
    """How one kind of nucleus looks: spacing, half axes (um) and their spread, darkness."""

    spacing: float
    long: float
    short: float
    darkness: float
    aligned: bool


SPINDLE = Nuclei(spacing=15.0, long=6.5, short=1.6, darkness=1.0, aligned=True)
ROUND = Nuclei(spacing=7.6, long=3.6, short=2.8, darkness=0.8, aligned=False)
LYMPHOID = Nuclei(spacing=6.3, long=2.9, short=2.6, darkness=1.0, aligned=False)


@dataclass(frozen=True)
class Textures:
    """Periodic banks, float32: SIDE x SIDE are per pixel, ``glands`` and ``fat`` per COARSE pixels, in um.

    ``glands`` is the depth inside a gland's outline (negative outside); ``fat`` the distance to a cell wall.
    """

    spindle: Floats
    round: Floats
    lymphoid: Floats
    fibres: Floats
    fibres_across: Floats
    fray: Floats
    grain: Floats
    granules: Floats
    glands: Floats
    fat: Floats


def make_textures(rng: np.random.Generator, mpp: float) -> Textures:
    """All banks for a slide of ``mpp`` um a pixel."""
    return Textures(
        spindle=draw_nuclei(rng, SPINDLE, mpp),
        round=draw_nuclei(rng, ROUND, mpp),
        lymphoid=draw_nuclei(rng, LYMPHOID, mpp),
        fibres=_fibres(rng, mpp, 0.35),
        fibres_across=_fibres(rng, mpp, 1.9),
        fray=_fray(rng, mpp),
        grain=rng.standard_normal((SIDE, SIDE), np.float32),
        granules=_filtered(rng, lambda fy, fx: np.exp(-0.5 * (fy**2 + fx**2) * (0.8 / mpp) ** 2)),
        glands=_cells(rng, mpp * COARSE, pitch=88.0, glands=True),
        fat=_cells(rng, mpp * COARSE, pitch=62.0, glands=False),
    )


def draw_nuclei(rng: np.random.Generator, kind: Nuclei, mpp: float) -> Floats:
    """Absorption of nuclei on a jittered grid, 0 to about 1.2."""
    across = max(4, int(SIDE * mpp / kind.spacing))
    count, step = across * across, SIDE / across
    grid = np.stack(np.divmod(np.arange(count), across), axis=1).astype(np.float32)
    centres = (grid + rng.uniform(0.0, 1.0, (count, 2))) * step
    size = rng.lognormal(0.0, 0.18, (count, 2)) * np.array([kind.long, kind.short]) / mpp
    angle = rng.normal(0.35, 0.35, count) if kind.aligned else rng.uniform(0, np.pi, count)
    dark = kind.darkness * rng.uniform(0.55, 1.15, count) * (rng.uniform(size=count) < 0.88)
    out = np.zeros((SIDE, SIDE), np.float32)
    chromatin = _filtered(rng, lambda fy, fx: np.exp(-0.5 * np.hypot(fy, fx) ** 2 * (0.9 / mpp * 2.2) ** 2))
    _stamp(out, chromatin, centres.astype(np.float32), size.astype(np.float32), angle, dark)
    return out


@njit(cache=True)
def _stamp(out, chromatin, centres, size, angle, dark):  # type: ignore[no-untyped-def]
    """Ellipses with soft edges, a darker rim and uneven chromatin; the darkest of overlapping ones wins."""
    side = out.shape[0]
    for n in range(centres.shape[0]):
        cy, cx, a, b = centres[n, 0], centres[n, 1], max(size[n, 0], 0.7), max(size[n, 1], 0.7)
        sin, cos = np.sin(angle[n]), np.cos(angle[n])
        reach = int(a) + 3
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                y, x = int(cy) + dy, int(cx) + dx
                v, u = y - cy, x - cx
                along, over = (u * cos + v * sin) / a, (v * cos - u * sin) / b
                r = np.sqrt(along * along + over * over)
                inside = (1.0 - r) * b * 0.8 + 0.5
                if inside <= 0.0:
                    continue
                value = min(inside, 1.0) * dark[n]
                value *= 0.8 + 0.25 * r * r + 0.16 * chromatin[y % side, x % side]
                if value > out[y % side, x % side]:
                    out[y % side, x % side] = value


def _filtered(rng: np.random.Generator, response: Response, side: int = SIDE) -> Floats:
    """White noise through ``response(fy, fx)`` (cycles a pixel), of mean 0 and deviation 1."""
    fy, fx = np.fft.fftfreq(side)[:, None] * 2 * np.pi, np.fft.rfftfreq(side)[None] * 2 * np.pi
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) * response(fy, fx)
    noise = np.fft.irfft2(spectrum, (side, side))
    return np.asarray((noise - noise.mean()) / noise.std(), np.float32)


def _fibres(rng: np.random.Generator, mpp: float, angle: float) -> Floats:
    """Wavy strands along ``angle``, 0 (gap) to 1 (strand)."""
    thick, thin = 34.0 / mpp, 1.7 / mpp

    def response(fy: Doubles, fx: Doubles) -> Doubles:
        total = np.zeros(np.broadcast_shapes(fy.shape, fx.shape))
        for turn in (-0.35, 0.0, 0.35):
            along = fx * np.cos(angle + turn) + fy * np.sin(angle + turn)
            over = fy * np.cos(angle + turn) - fx * np.sin(angle + turn)
            total += np.exp(-0.5 * ((along * thick) ** 2 + (over * thin) ** 2))
        return total

    field = _filtered(rng, response)
    # strands wander: displace along a smooth periodic field
    shift = _filtered(rng, lambda fy, fx: np.exp(-0.5 * (fy**2 + fx**2) * (40.0 / mpp) ** 2)) * (14.0 / mpp)
    moved = _moved(_moved(field, shift, axis=0), shift.T, axis=1)
    return np.asarray(np.clip(0.5 + 0.28 * moved, 0, 1), np.float32)


def _moved(field: Floats, shift: Floats, axis: int) -> Floats:
    """``field`` on the torus, displaced along one axis by ``shift`` pixels, interpolated."""
    base = np.floor(shift)
    at = np.arange(SIDE)[:, None], np.arange(SIDE)[None]
    here = (at[axis] + base.astype(np.int64)) % SIDE
    there = (here + 1) % SIDE
    low, high = ((field[p, at[1]] if axis == 0 else field[at[0], p]) for p in (here, there))
    moved: Floats = low + (high - low) * (shift - base)
    return np.asarray(moved, np.float32)


def _fray(rng: np.random.Generator, mpp: float) -> Floats:
    """Roughness of an outline, from 4 to 200 um, deviation 1."""

    def response(fy: Doubles, fx: Doubles) -> Doubles:
        f = np.hypot(fy, fx) / mpp  # radians a um
        power: Doubles = np.exp(-0.5 * (f * 2.5) ** 2) / (f + 1 / 60.0) ** 1.35
        return power

    return _filtered(rng, response)


def _cells(rng: np.random.Generator, pitch_um: float, *, pitch: float, glands: bool) -> Floats:
    """Depth in um inside round glands, or distance to the walls between packed cells, ``pitch`` um apart."""
    side = 1024
    across = max(3, round(side * pitch_um / pitch))
    step = side / across
    grid = np.stack(np.divmod(np.arange(across * across), across), axis=1)
    centres = (grid + 0.5 + rng.uniform(-0.36, 0.36, grid.shape)) * step
    radius = rng.uniform(0.36, 0.66, len(centres)) * step
    angle = rng.uniform(0, np.pi, len(centres))
    squeeze = rng.uniform(0.6, 1.0, len(centres))
    wobble = rng.uniform(0, 2 * np.pi, (len(centres), 2))
    out = np.empty((side, side), np.float32)
    _worley(out, centres, radius, angle, squeeze, wobble, across, glands)
    return np.asarray(out * pitch_um, np.float32)


@njit(parallel=True, cache=True)
def _worley(out, centres, radius, angle, squeeze, wobble, across, glands):  # type: ignore[no-untyped-def]
    """Signed depth below the nearest outline, or half the difference of the two nearest distances."""
    side = out.shape[0]
    step = side / across
    sin, cos = np.sin(angle), np.cos(angle)
    for y in prange(side):
        for x in range(side):
            first, second = 1e9, 1e9
            row, col = int(y / step), int(x / step)
            for i in range(row - 2, row + 3):
                for j in range(col - 2, col + 3):
                    n = (i % across) * across + j % across
                    v = y - centres[n, 0] - side * ((i - i % across) // across)
                    u = x - centres[n, 1] - side * ((j - j % across) // across)
                    if not glands:
                        d = np.sqrt(u * u + v * v) - 0.25 * radius[n]
                    elif (np.sqrt(u * u + v * v) - 1.2 * radius[n]) * 0.8 > second:
                        continue  # too far to matter, and the outline costs more
                    else:
                        p, q = u * cos[n] + v * sin[n], (v * cos[n] - u * sin[n]) / squeeze[n]
                        turn = np.arctan2(q, p)
                        bumps = 1.0 + 0.10 * np.cos(3 * turn + wobble[n, 0])
                        bumps += 0.06 * np.cos(5 * turn + wobble[n, 1])
                        d = (np.sqrt(p * p + q * q) - radius[n] * bumps) * (0.5 + 0.5 * squeeze[n])
                    if d < first:
                        first, second = d, first
                    elif d < second:
                        second = d
            between = (second - first) * 0.5
            out[y, x] = between if not glands else (min(-first, between) if first < 0 else -first)

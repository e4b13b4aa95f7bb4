"""The plan of a synthetic slide at low resolution: where tissue lies, of what kind, how it is stained, and
what is on the glass. One sample stands for ``pitch`` pixels; distances in um keep outlines crisp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float32]

# Order of the fields in the stack that the painter interpolates.
FIELDS = (
    "depth",  # um inside the tissue outline; negative on glass
    "glands",  # how much glandular tissue, about -1 to 1
    "fat",
    "lymphoid",
    "loose",  # how loose and pale the stroma is
    "haematoxylin",  # stain strengths, about 1
    "eosin",
    "along",  # which way fibres run, 0 to 1
    "warp_y",  # displacement of the textures, pixels
    "warp_x",
    "light",  # illumination, about 1
    "hair",  # um inside hairs and fibres on the glass
    "bubble",  # um inside the rim of an air bubble
    "pen",  # um inside a pen stroke
    "cover",  # um beyond the edge of the coverslip
)
FAR = np.float32(-1e6)

# kinds of tissue: how common (mean of the field), and over which share of the slide they vary
KINDS = (("glands", 0.15, 0.3), ("fat", -1.5, 0.16), ("lymphoid", -1.25, 0.1), ("loose", 0.0, 0.2))


@dataclass(frozen=True)
class Grid:
    """The low-resolution grid: ``rows x cols`` samples, ``pitch`` pixels apart, ``step`` um apart."""

    rows: int
    cols: int
    pitch: int
    step: float

    @property
    def height(self) -> float:
        return self.rows * self.step

    @property
    def width(self) -> float:
        return self.cols * self.step


def grid_for(height: int, width: int, mpp: float) -> Grid:
    """Samples 8 pixels apart, or 16 on slides of more than 64 megapixels, with one to spare at the end."""
    pitch = 16 if height * width > 64 << 20 else 8
    return Grid(-(-height // pitch) + 2, -(-width // pitch) + 2, pitch, pitch * mpp)


def smooth_noise(rng: np.random.Generator, grid: Grid, scale: float) -> Floats:
    """Noise of deviation 1 that varies over about ``scale`` um (cubic B-splines on a random lattice)."""
    sizes = [max(1, int(np.ceil(extent / scale))) + 4 for extent in (grid.height, grid.width)]
    lattice = rng.standard_normal(sizes).astype(np.float32)
    rows = _spline(grid.rows, grid.step / scale, sizes[0])
    cols = _spline(grid.cols, grid.step / scale, sizes[1])
    return np.asarray((rows @ lattice @ cols.T) * np.float32(2.09), np.float32)


def _spline(count: int, step: float, knots: int) -> Floats:
    """Weights ``(count, knots)`` of cubic B-splines at samples ``step`` knots apart."""
    at = np.minimum(np.arange(count) * step, knots - 4.001)
    base, t = np.floor(at).astype(np.int64), at - np.floor(at)
    parts = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    weights = np.zeros((count, knots), np.float32)
    for number, part in enumerate(parts):
        weights[np.arange(count), base + number] = part / 6
    return weights


def make_fields(rng: np.random.Generator, grid: Grid) -> Floats:
    """The stack ``(len(FIELDS), rows, cols)``."""
    short = min(grid.height, grid.width)
    out = np.zeros((len(FIELDS), grid.rows, grid.cols), np.float32)
    put = dict(zip(FIELDS, out, strict=True))
    put["depth"][...] = _tissue(rng, grid, short)
    size = min(short, 6000.0)
    for name, bias, scale in KINDS:
        put[name][...] = smooth_noise(rng, grid, size * scale) * 0.75 + rng.normal(bias, 0.22)
        put[name] += 0.35 * smooth_noise(rng, grid, size * scale / 4)
    put["glands"] *= 1.35
    # glands keep to a layer below the surface, as a mucosa does
    put["glands"] += 0.9 * np.exp(-(((put["depth"] - 0.09 * short) / (0.08 * short)) ** 2)) - 0.45
    for name, spread in (("haematoxylin", 0.10), ("eosin", 0.12)):
        put[name][...] = 1 + spread * smooth_noise(rng, grid, size * 0.5) + 0.06 * smooth_noise(rng, grid, 180.0)
    put["along"][...] = 0.5 + 0.8 * smooth_noise(rng, grid, size * 0.12)
    for name in ("warp_y", "warp_x"):
        put[name][...] = (90.0 * smooth_noise(rng, grid, 700.0) + 14.0 * smooth_noise(rng, grid, 130.0)) * (
            grid.pitch / grid.step
        )
    put["light"][...] = 1 + 0.006 * smooth_noise(rng, grid, max(short, 4000.0) * 0.6)
    _glass(rng, grid, short, put)
    return out


def _tissue(rng: np.random.Generator, grid: Grid, short: float) -> Floats:
    """Depth of the tissue: several pieces, their outline wandering, less holes and tears."""
    y = (np.arange(grid.rows, dtype=np.float32) * grid.step)[:, None]
    x = (np.arange(grid.cols, dtype=np.float32) * grid.step)[None]
    bend = [sum(a * short * smooth_noise(rng, grid, s * short) for a, s in _BENDS) for _ in "yx"]
    y, x = y + bend[0], x + bend[1]
    depth = np.full((grid.rows, grid.cols), FAR)
    for cy, cx, radius in _places(rng, grid, short):
        near = _window(y, x, cy, cx, 2.6 * radius)
        core = rng.uniform() < 0.3
        piece = (_core if core else _blob)(rng, y[near], x[near], cy, cx, radius)
        if not core:
            _holes(rng, y[near], x[near], cy, cx, radius, piece)
        np.maximum(depth[near], piece, out=depth[near])
    tear = np.abs(smooth_noise(rng, grid, 0.11 * short)) * (0.07 * short)
    wide = np.minimum(0.011 * short, 90.0) * (smooth_noise(rng, grid, 0.22 * short) - 0.75)
    return np.asarray(np.where(wide > 0, np.minimum(depth, tear - wide), depth), np.float32)


_BENDS = ((0.035, 0.16), (0.012, 0.05), (0.004, 0.018))


def _places(rng: np.random.Generator, grid: Grid, short: float) -> list[tuple[float, float, float]]:
    """Centres and radii in um of pieces that keep clear of each other and mostly of the border."""
    wanted = int(np.clip(round(grid.height * grid.width / short**2 * rng.uniform(1.0, 1.8)), 1, 9))
    placed: list[tuple[float, float, float]] = []
    for trial in range(400):
        radius = short * rng.uniform(0.22, 0.44) * (1 - trial / 600)
        cy = rng.uniform(0.9 * radius, max(grid.height - 0.9 * radius, 0.91 * radius))
        cx = rng.uniform(1.15 * radius, max(grid.width - 1.15 * radius, 1.16 * radius))
        if all(np.hypot(cy - py, cx - px) > 1.12 * (radius + r) for py, px, r in placed):
            placed.append((cy, cx, radius))
        if len(placed) == wanted:
            break
    return placed


def _blob(rng: np.random.Generator, y: Floats, x: Floats, cy: float, cx: float, radius: float) -> Floats:
    """Depth in um inside a lobed, stretched disc."""
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.45)
    u, v = x - cx, y - cy
    p = (u * np.cos(turn) + v * np.sin(turn)) / np.float32(stretch)
    q = (v * np.cos(turn) - u * np.sin(turn)) * np.float32(stretch**0.5)
    angle = np.arctan2(q, p)
    edge = np.ones_like(angle)
    for k in range(1, 8):
        edge += np.float32(rng.normal(0, 0.16 / k**0.9)) * np.cos(k * angle + np.float32(rng.uniform(0, 7)))
    return np.asarray(np.float32(radius * 0.85) * np.maximum(edge, 0.35) - np.hypot(p, q), np.float32)


def _core(rng: np.random.Generator, y: Floats, x: Floats, cy: float, cx: float, radius: float) -> Floats:
    """Depth in um inside a needle core: a thin bent strip, cut across in places."""
    turn = rng.uniform(-0.7, 0.7)
    u, v = x - cx, y - cy
    p, q = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    q = q + np.float32(rng.uniform(-0.3, 0.3) * radius) * ((p / np.float32(radius)) ** 2 - 0.5)
    half = np.float32(radius * rng.uniform(0.14, 0.24))
    ends = np.float32(1.1 * radius) - np.abs(p)
    depth = np.minimum(half * (1 + 0.2 * np.sin(p * np.float32(5 / radius))) - np.abs(q), ends)
    for at in rng.uniform(-0.9, 0.9, rng.integers(0, 3)) * radius:
        depth = np.minimum(depth, np.abs(p - np.float32(at) + 0.5 * q) - np.float32(0.02 * radius))
    return np.asarray(depth, np.float32)


def _window(y: Floats, x: Floats, cy: float, cx: float, reach: float) -> tuple[slice, slice]:
    """Rows and columns of the samples within ``reach`` um of a point: where to draw a piece around it."""
    close = (np.abs(y - np.float32(cy)) < reach) & (np.abs(x - np.float32(cx)) < reach)
    rows, cols = np.flatnonzero(close.any(axis=1)), np.flatnonzero(close.any(axis=0))
    if not len(rows):
        return slice(0), slice(0)
    return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)


def _holes(rng: np.random.Generator, y: Floats, x: Floats, cy: float, cx: float, radius: float, depth: Floats) -> None:
    """Cut some holes of bare glass out of ``depth``, of over 0.05 mm2 where the piece is large enough."""
    for _ in range(rng.integers(1, 4)):
        size = 1.25 * max(min(135.0, 0.16 * radius), rng.uniform(0.03, 0.09) * radius)
        away, angle = radius * rng.uniform(0.1, 0.55), rng.uniform(0, 2 * np.pi)
        hy, hx = cy + away * np.sin(angle), cx + away * np.cos(angle)
        near = _window(y, x, hy, hx, 3.0 * size)
        hole = _blob(rng, y[near], x[near], hy, hx, size)
        np.minimum(depth[near], -hole, out=depth[near])


def _glass(rng: np.random.Generator, grid: Grid, short: float, put: dict[str, Floats]) -> None:
    """What lies on the glass: hairs, an air bubble, a pen stroke, the edge of the coverslip."""
    for name in ("hair", "bubble", "pen"):
        put[name][...] = FAR
    for _ in range(rng.integers(1, 5)):
        curve = _curve(rng, grid, rng.uniform(0.1, 0.4) * short, rng.uniform(0.3, 1.5), put["depth"])
        _thicken(put["hair"], curve, grid.step, np.float32(rng.uniform(2.5, 9.0) * min(1.0, 0.3 + short / 6000)))
    if rng.uniform() < 0.8:
        cy, cx = _bare_place(rng, grid, put["depth"])
        radius = max(rng.uniform(0.02, 0.075) * short, 60.0)
        y = (np.arange(grid.rows, dtype=np.float32) * grid.step)[:, None] - np.float32(cy)
        x = (np.arange(grid.cols, dtype=np.float32) * grid.step)[None] - np.float32(cx)
        put["bubble"][...] = np.float32(radius) - np.hypot(y, x * np.float32(rng.uniform(0.85, 1.1)))
        put["bubble"] += 0.02 * radius * smooth_noise(rng, grid, radius)
    if rng.uniform() < 0.75:
        for _ in range(rng.integers(1, 3)):
            curve = _curve(rng, grid, rng.uniform(0.3, 0.7) * short, 0.25, put["depth"], border=True)
            _thicken(put["pen"], curve, grid.step, np.float32(rng.uniform(0.022, 0.04) * short))
        put["pen"] += 0.004 * short * smooth_noise(rng, grid, 0.02 * short)
    y = (np.arange(grid.rows, dtype=np.float32) * grid.step)[:, None]
    x = (np.arange(grid.cols, dtype=np.float32) * grid.step)[None]
    tilt, at = rng.normal(0, 0.006), grid.width * rng.uniform(0.955, 0.985)
    put["cover"][...] = x + np.float32(tilt) * y - np.float32(at)


def _bare_place(rng: np.random.Generator, grid: Grid, depth: Floats) -> tuple[float, float]:
    """A point in um on the glass, well away from tissue: the barest of some."""
    points = [(rng.uniform(0.05, 0.95) * grid.rows, rng.uniform(0.05, 0.93) * grid.cols) for _ in range(30)]
    y, x = min(points, key=lambda point: float(depth[int(point[0]), int(point[1])]))
    return y * grid.step, x * grid.step


def _curve(
    rng: np.random.Generator, grid: Grid, length: float, curl: float, depth: Floats, border: bool = False
) -> Floats:
    """Points ``(n, 2)`` in um of a bent line: of some tries, the one that touches the least tissue."""
    curves = [_any_curve(rng, grid, length, curl, border) for _ in range(10)]
    return min(curves, key=lambda curve: _on_tissue(curve, grid, depth))


def _on_tissue(curve: Floats, grid: Grid, depth: Floats) -> float:
    """Mean depth in tissue of the points of a curve, in um."""
    rows, cols = (np.clip(curve / grid.step, 0, np.array(depth.shape) - 1)).astype(np.int64).T
    return float(np.maximum(depth[rows, cols], -100.0).mean())


def _any_curve(rng: np.random.Generator, grid: Grid, length: float, curl: float, border: bool) -> Floats:
    """A bent line anywhere, or (``border``) from near the upper or lower border of the slide."""
    count = 160
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(np.cumsum(rng.normal(0, curl * 0.0025, count)))
    heading += np.cumsum(rng.normal(0, curl * 0.05, count))
    steps = np.stack([np.sin(heading), np.cos(heading)], axis=1) * (length / count)
    start = np.array([rng.uniform(0, grid.height), rng.uniform(0, grid.width)])
    if border:
        start[0] = grid.height * rng.choice([0.03, 0.97])
    return (start + np.cumsum(steps, axis=0)).astype(np.float32)


@njit(cache=True)
def _thicken(field, curve, step, half):  # type: ignore[no-untyped-def]
    """Raise ``field`` to the depth inside a line of ``half`` um half width along ``curve``."""
    reach = half * 2 + 6 * step
    y0 = max(0, int((curve[:, 0].min() - reach) / step))
    y1 = min(field.shape[0], int((curve[:, 0].max() + reach) / step) + 1)
    x0 = max(0, int((curve[:, 1].min() - reach) / step))
    x1 = min(field.shape[1], int((curve[:, 1].max() + reach) / step) + 1)
    for i in range(y0, y1):
        for j in range(x0, x1):
            best = 1e12
            for n in range(curve.shape[0] - 1):
                ay, ax = curve[n, 0], curve[n, 1]
                by, bx = curve[n + 1, 0] - ay, curve[n + 1, 1] - ax
                py, px = i * step - ay, j * step - ax
                t = min(1.0, max(0.0, (py * by + px * bx) / (by * by + bx * bx + 1e-9)))
                d = (py - t * by) ** 2 + (px - t * bx) ** 2
                best = min(best, d)
            depth = half - np.sqrt(best)
            if depth > field[i, j]:
                field[i, j] = depth

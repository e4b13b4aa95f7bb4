"""Charts with logarithmic axes as one SVG file that stands alone: drawn here, so that no plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

PANEL, HEIGHT = 460, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 74, 46  # margins of a panel
COLOURS = (
    "#2563b8", "#c2571a", "#16805c", "#7a3cbe", "#8a6d1d", "#b02a5b", "#0e7c86", "#5f6b2d", "#8c564b", "#4b5563",
)  # fmt: skip
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #39424c; }
.title { font-size: 14px; font-weight: 600; fill: #1f242b; } .tick { fill: #66707b; font-size: 11px; }
.halo { stroke: #ffffff; stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: #e6e8eb; } .frame { stroke: #b9c0c7; fill: none; }
"""


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        points: ``(x, y)``, drawn with dots and joined.
        hollow: further points that were computed and not measured: joined by a dashed line to the last dot.
        colour: index among ``COLOURS``.
    """

    label: str
    points: Sequence[tuple[float, float]]
    hollow: Sequence[tuple[float, float]] = ()
    colour: int = 0


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        levels: horizontal dashed lines, ``(y, label)``.
        stars: single points of others, ``(x, y, label)``.
    """

    title: str
    across: str
    series: Sequence[Series]
    levels: Sequence[tuple[float, str]] = ()
    stars: Sequence[tuple[float, float, str]] = field(default_factory=tuple)


class _Axis:
    """A logarithmic scale from values to pixels."""

    def __init__(self, values: Sequence[float], lo: float, hi: float) -> None:
        good = [math.log10(value) for value in values if value > 0]
        low, high = (min(good), max(good)) if good else (0.0, 1.0)
        margin = max(0.08 * (high - low), 0.08)
        self.low, self.high, self.lo, self.hi = low - margin, high + margin, lo, hi

    def __call__(self, value: float) -> float:
        return self.lo + (math.log10(value) - self.low) / (self.high - self.low) * (self.hi - self.lo)

    @property
    def ticks(self) -> list[float]:
        """Powers of ten; on a short axis also twice and five times each."""
        span = self.high - self.low
        steps = (1.0,) if span > 2.5 else (1.0, 2.0, 5.0)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        return [s * 10.0**p for p in powers for s in steps if self.low <= p + math.log10(s) <= self.high]


def figure(panels: Sequence[Panel]) -> str:
    """Panels side by side, with one legend, as the text of an SVG file."""
    width = PANEL * len(panels)
    labels = {each.label: each for panel in panels for each in panel.series}
    parts = [_legend(list(labels.values()))]
    for i, panel in enumerate(panels):
        parts.append(f'<g transform="translate({i * PANEL} 0)">{_panel(panel)}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'role="img"><style>{STYLE}</style><rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _legend(series: Sequence[Series]) -> str:
    parts, x = [], float(LEFT)
    for each in series:
        colour = COLOURS[each.colour % len(COLOURS)]
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="20" y2="20" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x + 9}" cy="20" r="3.5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 24}" y="24">{escape(each.label)}</text>')
        x += 24 + 7.2 * len(each.label) + 22
    return "".join(parts)


def _panel(panel: Panel) -> str:
    every = [point for each in panel.series for point in (*each.points, *each.hollow)]
    every += [(x, y) for x, y, _ in panel.stars]
    heights = [y for _, y in every] + [y for y, _ in panel.levels]
    x = _Axis([point[0] for point in every], LEFT, PANEL - RIGHT)
    y = _Axis(heights, HEIGHT - BOTTOM, TOP)
    parts = [f'<text class="title" x="{LEFT}" y="{TOP - 16}">{escape(panel.title)}</text>', _grid(x, y, panel.across)]
    for level, label in panel.levels:
        at = y(level)
        parts.append(f'<line x1="{LEFT}" x2="{PANEL - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#39424c" '
                     f'stroke-dasharray="2 3"/>')  # fmt: skip
        parts.append(_over(LEFT + 5, at - 4, label, "start"))
    parts += [_series(each, x, y) for each in panel.series]
    parts += [_star(x(a), y(b), label) for a, b, label in panel.stars]
    return "".join(parts)


def _grid(x: _Axis, y: _Axis, across: str) -> str:
    parts = []
    for tick in y.ticks:
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{PANEL - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks:
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{PANEL - LEFT - RIGHT}" '
                 f'height="{HEIGHT - TOP - BOTTOM}"/>')  # fmt: skip
    middle = (LEFT + PANEL - RIGHT) / 2
    return "".join(parts) + f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(across)}</text>'


def _series(each: Series, x: _Axis, y: _Axis) -> str:
    colour = COLOURS[each.colour % len(COLOURS)]
    solid = [(x(a), y(b)) for a, b in each.points]
    hollow = [(x(a), y(b)) for a, b in each.hollow]
    parts = []
    if len(solid) > 1:
        parts.append(f'<polyline points="{_path(solid)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    if hollow:
        path = _path([*solid[-1:], *hollow])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="4 4" opacity="0.7"/>')
    parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in solid]
    parts += [
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="#ffffff" stroke="{colour}" stroke-width="1.5"/>'
        for a, b in hollow
    ]
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _star(x: float, y: float, label: str) -> str:
    corners = []
    for k in range(10):
        radius, turn = (7.0 if k % 2 == 0 else 3.0), math.pi * k / 5
        corners.append((x + radius * math.sin(turn), y - radius * math.cos(turn)))
    anchor, shift = ("end", -11) if x > PANEL / 2 else ("start", 11)
    return f'<polygon points="{_path(corners)}" fill="#1f242b"/>{_over(x + shift, y - 6, label, anchor)}'


def _over(x: float, y: float, text: str, anchor: str) -> str:
    """Text over lines: once in white around it, once by itself."""
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="tick halo" {at}>{escape(text)}</text><text class="tick" {at}>{escape(text)}</text>'

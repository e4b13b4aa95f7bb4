"""Line charts as inline SVG: a few hundred lines of text in place of a plotting library and its fonts.

Colours are CSS variables of the page, so that a chart is right on light and on dark ground.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34  # margins
DECADES = 20  # the ratio of values from which a logarithmic axis says more
POINTS = 400  # that a line has at most; more are averaged


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: in the legend.
        style: CSS class that gives the colour, ``c1`` to ``c4``; with ``faint`` in it drawn thin.
        x, y: as many of each; not finite ones are left out.
        dots: whether each value has a dot of its own.
    """

    label: str
    style: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


def chart(title: str, lines: Sequence[Line], unit: str = "", across: str = "step", log: bool = False) -> str:
    """A figure with one or more lines, or nothing if none has a value."""
    drawn = [line for line in map(_finite, lines) if line.x]
    if not drawn:
        return ""
    low, high = min(min(line.y) for line in drawn), max(max(line.y) for line in drawn)
    log = log and low > 0 and high > DECADES * low
    scale_x = _Scale([x for line in drawn for x in line.x], LEFT, WIDTH - RIGHT)
    scale_y = _Scale([y for line in drawn for y in line.y], HEIGHT - BOTTOM, TOP, log=log)
    parts = [_grid(scale_x, scale_y, across)] + [_line(line, scale_x, scale_y) for line in drawn]
    legend = "".join(f'<span class="key {line.style}">{escape(line.label)}</span>' for line in drawn if line.label)
    head = f"{escape(title)}{f' <small>{escape(unit)}</small>' if unit else ''}"
    return (
        f'<figure class="chart"><figcaption><b>{head}</b><span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def smoothed(values: Sequence[float], over: int) -> list[float]:
    """The mean of each value and of up to ``over - 1`` before it."""
    sums = np.cumsum(np.insert(np.asarray(values, np.float64), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - over, 0)
    return [float(v) for v in (sums[ends] - sums[starts]) / (ends - starts)]


class _Scale:
    """From values to pixels, with round numbers at the ends."""

    def __init__(self, values: Sequence[float], lo: float, hi: float, log: bool = False) -> None:
        self.lo, self.hi, self.log = lo, hi, log
        low, high = min(values), max(values)
        if log:
            self.low, self.high = math.log10(low), math.log10(high)
            if self.high - self.low < 1e-9:
                self.low, self.high = self.low - 0.5, self.high + 0.5
            self.ticks = _log_ticks(self.low, self.high)
            return
        if high - low < 1e-12:
            low, high = (low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9)
        step = _round_step((high - low) / 4)
        self.low, self.high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        self.ticks = [self.low + i * step for i in range(round((self.high - self.low) / step) + 1)]

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.lo + (at - self.low) / (self.high - self.low) * (self.hi - self.lo)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1.0,) if high - low > 3 else (1.0, 2.0, 5.0)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [each * 10.0**power for power in powers for each in steps if low <= math.log10(each) + power <= high]
    return found or [10**low, 10**high]


def _finite(line: Line) -> Line:
    good = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if len(good) > POINTS and not line.dots:
        bins = np.array_split(np.array(good, np.float64), POINTS)
        good = [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in bins]
    return Line(line.label, line.style, [x for x, _ in good], [y for _, y in good], line.dots)


def _grid(x: _Scale, y: _Scale, across: str) -> str:
    parts = []
    for tick in y.ticks:
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_show(tick)}</text>')
    for tick in x.ticks:
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_show(tick)}</text>'
        )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(across)}</text>')
    return "".join(parts)


def _line(line: Line, x: _Scale, y: _Scale) -> str:
    points = [(x(a), y(b)) for a, b in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    out = f'<polyline class="line {line.style}" points="{path}"/>'
    if line.dots or len(points) == 1:
        out += "".join(f'<circle class="dot {line.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points)
    return out


def _show(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")

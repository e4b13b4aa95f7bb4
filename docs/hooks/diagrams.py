"""Draws the diagrams of docs/exactness.md: ``python docs/hooks/diagrams.py`` writes docs/pictures/exact-*.svg.

Every box and interval is worked out here from the windows of the drawn ops, not placed by eye; a test draws them again.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

OWN, HALO, PAD, LINE, INK, MUTED, GROUND, PAPER = (
    "#2b6fd6", "#e07b00", "#a8320a", "#c3c9d0", "#1c2128", "#5b6670", "#f6f7f8", "#ffffff"
)  # fmt: skip
WIDTH = 760
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


class Drawing:
    """An SVG of ``WIDTH`` units and some height, put together from rectangles, lines and text."""

    def __init__(self, height: int, title: str) -> None:
        self.height, self.title, self.parts = height, title, [""]

    def box(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = LINE, **more: str | float) -> None:
        self._add("rect", x=x, y=y, width=w, height=h, fill=fill, stroke=stroke, **more)

    def line(self, *points: tuple[float, float], stroke: str = MUTED, arrow: bool = False, **more: str | float) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        extra: dict[str, str | float] = {"marker-end": f"url(#{'own' if stroke == OWN else 'end'})"} if arrow else {}
        self._add("path", d=path, fill="none", stroke=stroke, **extra, **more)

    def text(self, x: float, y: float, words: str, fill: str = INK, size: float = 13, **more: str | float) -> None:
        self._add("text", words, x=x, y=y, fill=fill, font_size=size, **more)

    def _add(self, tag: str, words: str | None = None, **attributes: str | float) -> None:
        def shown(value: str | float) -> str:
            return value if isinstance(value, str) else f"{value:g}"

        said = " ".join(f'{name.replace("_", "-")}="{shown(value)}"' for name, value in attributes.items())
        self.parts.append(f"<{tag} {said}/>" if words is None else f"<{tag} {said}>{escape(words)}</{tag}>")

    def __str__(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" font-family="{FONT}">'
        ends = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0.8L8 4L0 7.2z" fill="{colour}"/></marker>'
            for name, colour in (("end", MUTED), ("own", OWN))
        )
        ground = f'<rect width="{WIDTH}" height="{self.height}" rx="8" fill="{GROUND}"/>'
        return (
            f"{head}<title>{escape(self.title)}</title><defs>{ends}</defs>{ground}" + "\n".join(self.parts) + "</svg>\n"
        )


def ownership() -> Drawing:
    """The output map, partitioned, beside the input map, of which two tiles' boxes overlap."""
    drawing = Drawing(300, "Tiles partition the output; what they read overlaps")
    side, tiles, reach = 66, 3, 14
    left, right, top = 40, 430, 62
    drawing.text(left, 34, "Output: every element has one owner", font_weight="600")
    drawing.text(right, 34, "Input: boxes overlap, and are only read", font_weight="600")
    chosen = {(1, 0): OWN, (1, 1): HALO}
    for row in range(tiles):
        for column in range(tiles):
            colour = chosen.get((row, column))
            fill, x, y = colour or PAPER, left + column * side, top + row * side
            drawing.box(x, y, side, side, fill, fill_opacity=0.82 if colour else 1)
            name = {OWN: "tile A", HALO: "tile B"}.get(colour or "", "")
            drawing.text(x + side / 2, y + side / 2 + 5, name, "#fff", text_anchor="middle", font_weight="600")
    drawing.box(right, top, tiles * side, tiles * side, PAPER)
    for row in range(tiles):
        for column in range(tiles):
            drawing.box(right + column * side, top + row * side, side, side, "none", LINE, stroke_dasharray="2 3")
    for (row, column), colour in chosen.items():
        x0, x1 = max(0, column * side - reach), min(tiles * side, (column + 1) * side + reach)
        y0, y1 = row * side - reach, (row + 1) * side + reach
        drawing.box(right + x0, top + y0, x1 - x0, y1 - y0, colour, colour, fill_opacity=0.16, stroke_width=2)
        name, y = ("A reads", y0 - 9) if colour == OWN else ("B reads", y1 + 19)
        drawing.text(right + (x0 + x1) / 2, top + y, name, colour, text_anchor="middle", font_weight="600")
    middle = top + 1.5 * side
    drawing.line((left + tiles * side + 24, middle), (right - 26, middle), arrow=True, stroke_width=1.6)
    drawing.text((left + tiles * side + right) / 2, middle - 12, "windows, backwards", MUTED, 12, text_anchor="middle")
    drawing.text((left + tiles * side + right) / 2, middle + 22, "whole numbers only", MUTED, 12, text_anchor="middle")
    return drawing


Interval = tuple[int, int]


def back(out: Interval, size: int, kernel: int, stride: int, padding: int) -> tuple[Interval, Interval]:
    """What an interval of a convolution's output reads of its input: inside the map, and before it is cut there."""
    lo, hi = out[0] * stride - padding, (out[1] - 1) * stride - padding + kernel
    return (max(lo, 0), min(hi, size)), (lo, hi)


def halo() -> Drawing:
    """Two convolutions along one row: how far a tile in the middle reads, and one at the border."""
    drawing = Drawing(360, "What a tile reads, worked back op by op")
    cell, left = 33, 150
    sizes, tops = (16, 16, 8), (302, 192, 82)
    names = ("image, 16 wide", "after 3 wide, padding 1", "after 3 wide, stride 2, padding 1")
    drawing.text(
        24, 34, "Read it downwards: from what the tile owns back to the pixels that it needs", font_weight="600"
    )
    tiles: tuple[tuple[Interval, str], ...] = (((0, 2), OWN), ((4, 6), HALO))
    for size, top, name in zip(sizes, tops, names, strict=True):
        step = cell * 16 / size
        first, _, rest = name.partition(", ")
        drawing.text(24, top + 14, first, MUTED, 12)
        drawing.text(24, top + 30, rest, MUTED, 12)
        for i in range(size):
            drawing.box(left + i * step, top, step, 34, PAPER)
            drawing.text(left + (i + 0.5) * step, top + 22, str(i), MUTED, 11, text_anchor="middle")
    for owned, colour in tiles:
        middle, middle_whole = back(owned, 16, 3, 2, 1)
        pixels, pixels_whole = back(middle, 16, 3, 1, 1)
        rows = ((owned, owned, 8), (middle, middle_whole, 16), (pixels, pixels_whole, 16))
        places = []
        for (inside, whole, size), top in zip(rows, reversed(tops), strict=True):
            step = cell * 16 / size
            drawing.box(left + inside[0] * step, top, (inside[1] - inside[0]) * step, 34, colour, colour,
                        fill_opacity=0.22, stroke_width=2)  # fmt: skip
            if whole[0] < 0:
                drawing.box(left - step, top + 3, step - 3, 28, "none", PAD, stroke_dasharray="3 2")
                drawing.text(left - step / 2 - 1, top + 22, "0", PAD, 12, text_anchor="middle")
            places.append((left + inside[0] * step, left + inside[1] * step, top))
        for (x0, x1, y), (u0, u1, v) in pairwise(places):
            drawing.line((x0, y + 34), (u0, v), stroke=colour, stroke_dasharray="4 3")
            drawing.line((x1, y + 34), (u1, v), stroke=colour, stroke_dasharray="4 3")
    return drawing


def padding() -> Drawing:
    """A tile inside the image: neighbours' pixels around it, and, wrongly, zeros."""
    drawing = Drawing(284, "Padding belongs to the image's border")
    cell, top = 22, 76
    for left, head, wrong in (
        (40, "Right: zeros only where the map ends", False),
        (420, "Wrong: zeros where the tile ends", True),
    ):
        drawing.text(left, 34, head, font_weight="600", fill=PAD if wrong else INK)
        for row in range(8):
            for column in range(12):
                inside = 2 <= row < 6 and column < 5
                around = 1 <= row < 7 and column < 6 and not inside
                zero = around and wrong
                fill = OWN if inside else HALO if around and not zero else PAPER
                drawing.box(
                    left + column * cell,
                    top + row * cell,
                    cell,
                    cell,
                    fill,
                    fill_opacity=0.85 if inside else 0.4 if around else 1,
                )
                if zero:
                    drawing.box(
                        left + column * cell + 2,
                        top + row * cell + 2,
                        cell - 4,
                        cell - 4,
                        "#fdeee7",
                        PAD,
                        stroke_dasharray="3 2",
                    )
                    drawing.text(
                        left + (column + 0.5) * cell, top + (row + 0.5) * cell + 4, "0", PAD, 11, text_anchor="middle"
                    )
        for row in range(1, 7):
            x, y = left - cell, top + row * cell
            drawing.box(x + 2, y + 2, cell - 4, cell - 4, "#fdeee7", PAD, stroke_dasharray="3 2")
            drawing.text(x + cell / 2, y + cell / 2 + 4, "0", PAD, 11, text_anchor="middle")
        drawing.box(left, top, 12 * cell, 8 * cell, "none", INK, stroke_width=1.6)
        words = ("neighbours'", "pixels, read", "again") if not wrong else ("a seam:", "these pixels", "exist")
        drawing.box(left + 6.4 * cell, top + 2.6 * cell, 4.6 * cell, 2.8 * cell, PAPER, "none")
        for number, said in enumerate(words):
            y = top + (3.4 + 0.8 * number) * cell
            drawing.text(left + 6.7 * cell, y, said, PAD if wrong else "#a35800", 13, font_weight="600")
    return drawing


def reductions() -> Drawing:
    """Partial results of tiles, merged in order; the small graph; its gradient handed back to the tiles."""
    drawing = Drawing(302, "A reduction cuts the graph")
    drawing.text(
        30,
        34,
        "A mean, a norm's statistics, a pooled feature or a loss is small, whatever the map's size",
        font_weight="600",
    )
    left, top, side = 40, 66, 52
    for row in range(3):
        for column in range(2):
            x, y = left + column * side, top + row * side
            drawing.box(x, y, side, side, OWN, fill_opacity=0.16 + 0.12 * ((row * 2 + column) % 3))
            drawing.text(
                x + side / 2, y + side / 2 + 5, str(row * 2 + column + 1), text_anchor="middle", font_weight="600"
            )
    drawing.text(left, top + 3 * side + 22, "tiles of a map", MUTED, 12)
    for number in range(6):
        y = top + 4 + number * 25
        drawing.box(200, y, 118, 19, PAPER)
        drawing.text(259, y + 14, f"partial result {number + 1}", INK, 11.5, text_anchor="middle")
        drawing.line((left + 2 * side + 6, top + 26 + (number // 2) * side), (196, y + 10), arrow=True)
    drawing.text(200, top + 3 * side + 22, "count, mean, squares; sums", MUTED, 12)
    drawing.line((322, top + 4), (334, top + 4), (334, top + 148), (322, top + 148))
    drawing.line((334, top + 76), (372, top + 76), arrow=True)
    drawing.box(376, top + 44, 130, 64, PAPER, OWN, stroke_width=1.6)
    drawing.text(441, top + 72, "merged in order,", text_anchor="middle", size=12.5)
    drawing.text(441, top + 90, "in float64", text_anchor="middle", size=12.5)
    drawing.line((508, top + 76), (546, top + 76), arrow=True)
    drawing.box(550, top + 30, 172, 92, PAPER, OWN, stroke_width=1.6)
    for line, words in enumerate(("small graph, held whole:", "divide, square root,", "linear layers, loss")):
        drawing.text(636, top + 60 + line * 20, words, text_anchor="middle", size=12.5)
    drawing.line(
        (636, top + 124),
        (636, top + 212),
        (92, top + 212),
        (92, top + 3 * side + 30),
        arrow=True,
        stroke=OWN,
        stroke_width=1.8,
    )
    drawing.text(
        364,
        top + 204,
        "gradient of these few numbers, handed to every tile",
        OWN,
        12.5,
        text_anchor="middle",
        font_weight="600",
    )
    return drawing


def sweeps() -> Drawing:
    """Segments and boundaries, forward and backward."""
    drawing = Drawing(200, "A step: forward by segment, backward in reverse")
    drawing.text(30, 34, "Forward, segment by segment (grey); backward, in reverse (blue)", font_weight="600")
    maps = (
        (40, "image", 46, "on disk, as bytes"),
        (236, "boundary", 36, "kept: memory or disk"),
        (432, "boundary", 36, "kept"),
        (628, "sums", 14, "few numbers"),
    )
    for x, name, half, where in maps:
        drawing.box(x, 108 - half, 74, 2 * half, OWN, OWN, fill_opacity=0.14, stroke_width=1.5)
        for part in range(1, 4):
            if half > 20:
                drawing.line(
                    (x, 108 - half + part * half / 2),
                    (x + 74, 108 - half + part * half / 2),
                    stroke=OWN,
                    stroke_opacity=0.35,
                )
        drawing.text(x + 37, 112, name, text_anchor="middle", font_weight="600", size=12.5)
        drawing.text(x + 37, 176, where, MUTED, 11.5, text_anchor="middle")
    for (x, *_), name in zip(maps, ("segment 1", "segment 2", "segment 3"), strict=False):
        drawing.line((x + 82, 94), (x + 188, 94), arrow=True, stroke_width=1.6)
        drawing.text(x + 135, 84, name, text_anchor="middle", size=12.5)
        drawing.line((x + 188, 124), (x + 82, 124), arrow=True, stroke=OWN, stroke_width=1.6)
        drawing.text(x + 135, 142, "again, with autograd", OWN, 11, text_anchor="middle")
    return drawing


DRAWINGS = {"ownership": ownership, "halo": halo, "padding": padding, "reductions": reductions, "sweeps": sweeps}


def main() -> None:
    folder = Path(__file__).parent.parent / "pictures"
    for name, draw in DRAWINGS.items():
        (folder / f"exact-{name}.svg").write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()

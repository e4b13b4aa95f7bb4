"""Draws seconds a gigapixel and peak memory against area, from the results in a folder, as SVG.

Runs in an environment of its own (``requirements-plot.txt``), started by ``main.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
from common import GIB
from matplotlib.figure import Figure
from tables import PEERS, Results, best_peer, load, megapixels, per_pixel

OURS, WHOLE = "#0b5cad", "#b3541e"
MARKERS = dict(zip(PEERS, "s^", strict=True))


def gigapixels(results: list[dict[str, Any]]) -> list[float]:
    return [megapixels(result) / 1000 for result in results]


def draw_memory(axes: Any, found: list[dict[str, Any]], peers: Results) -> None:
    """Peaks; the dashed line is computed, not measured."""
    area = gigapixels(found)
    axes.loglog(area, [r["peak_bytes"] / GIB for r in found], "o-", color=OURS, label="wholegrad, measured")
    whole = [r["whole_image_bytes"] / GIB for r in found]
    axes.loglog(area, whole, "--", color=WHOLE, label="whole image, PyTorch, computed")
    for kind, result in peers.items():
        peak = [result["peak_bytes"] / GIB]
        axes.loglog(gigapixels([result]), peak, MARKERS[kind], color=WHOLE, label=f"{PEERS[kind]}, measured")
    axes.set_title("peak memory, GiB")
    axes.yaxis.set_major_formatter("{x:g}")


def draw_pace(axes: Any, found: list[dict[str, Any]], peers: Results) -> None:
    axes.semilogx(gigapixels(found), [per_pixel(result) for result in found], "o-", color=OURS, label="wholegrad")
    for kind, result in peers.items():
        axes.semilogx(gigapixels([result]), [per_pixel(result)], MARKERS[kind], color=WHOLE, label=PEERS[kind])
    axes.set_title("seconds a gigapixel, one training step")
    axes.set_ylim(0, None)


def draw(results: Results, out: Path) -> None:
    found = sorted((result for name, result in results.items() if name.startswith("area-")), key=megapixels)
    peers = {kind: result for kind in PEERS if (result := best_peer(results, kind)) is not None}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_memory(left, found, peers)
    draw_pace(right, found, peers)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("gigapixels")
        axes.set_xticks(gigapixels(found), [f"{value:.2g}" for value in gigapixels(found)])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "wholegrad"  # the same results, the same file
    draw(load(Path(sys.argv[1])), Path(sys.argv[2]))

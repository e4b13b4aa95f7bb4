"""Draws seconds a gigapixel and peak memory against area, from the results in a folder, as SVG.

Runs in an environment of its own (``requirements-plot.txt``), started by ``main.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from common import GIB
from matplotlib.figure import Figure
from tables import Results, load, megapixels, per_pixel

OURS, WHOLE = "#0b5cad", "#b3541e"


def draw(results: Results, out: Path) -> None:
    """Memory left, pace right; the dashed line is what whole-image autograd would need, computed, not measured."""
    found = sorted((result for name, result in results.items() if name.startswith("area-")), key=megapixels)
    area = [megapixels(result) / 1000 for result in found]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    memory, pace = figure.subplots(1, 2)
    memory.loglog(area, [r["peak_bytes"] / GIB for r in found], "o-", color=OURS, label="wholegrad, measured peak")
    whole = [r["whole_image_bytes"] / GIB for r in found]
    memory.loglog(area, whole, "--", color=WHOLE, label="whole-image autograd, computed from the graph")
    memory.axhline(found[0]["budget_bytes"] / GIB, color="grey", linewidth=0.8, linestyle=":", label="budget")
    memory.set(title="memory, GiB", xlabel="gigapixels")
    memory.legend(frameon=False, fontsize=8)
    pace.semilogx(area, [per_pixel(result) for result in found], "o-", color=OURS)
    pace.set(title="seconds a gigapixel, one training step", xlabel="gigapixels", ylim=(0, None))
    for axes in (memory, pace):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(area, [f"{value:.2g}" for value in area])
        axes.minorticks_off()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "wholegrad"  # the same results, the same file
    draw(load(Path(sys.argv[1])), Path(sys.argv[2]))

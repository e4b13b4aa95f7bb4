"""From results to tables: pure text, and the check that the two tilings agree."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from common import GIB

START, END = "<!-- results: written by main.py --write -->", "<!-- end of results -->"
LOSS_TOLERANCE = 1e-9  # relative
GRADIENT_TOLERANCE = 1e-5  # of the tensor's largest element

Result = dict[str, Any]
Results = dict[str, Result]

OURS = {
    "step": "training step, uncompressed files",
    "budget": "the same within less",
    "jpeg": "the same from JPEG tiles",
    "predict": "forward only, mask to an array file",
    "predict-tiff": "forward only, mask to a compressed pyramidal TIFF",
}
PEERS = {"keras": "TensorFlow/Keras", "pytorch": "PyTorch, channels last"}


def load(folder: Path) -> Results:
    """All results kept in a folder, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def median(result: Result) -> float:
    return statistics.median(result["seconds"])


def megapixels(result: Result) -> float:
    _, height, width = result["shape"]
    return float(height * width / 1e6)


def extent(result: Result) -> str:
    """Height and width."""
    return " x ".join(str(edge) for edge in result["shape"][1:])


def per_pixel(result: Result) -> float:
    """Nanoseconds a pixel, which is seconds a gigapixel."""
    return median(result) * 1000 / megapixels(result)


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(result: Result) -> str:
    """Every timed step, in order."""
    return ", ".join(f"{seconds:.3g}" for seconds in result["seconds"])


def common_cells(result: Result) -> list[str]:
    """Seconds, pace and memory of a result, and what other work the machine did."""
    return [
        f"{median(result):.2f} ({spread(result)})",
        f"{per_pixel(result):.1f}",
        gib(result["peak_bytes"]),
        f"{result['others_cores']:.2f}; {result['load_before']:.1f}",
    ]


COMMON = ["seconds, median (each)", "ns a pixel", "peak, GiB", "other work (cores; load before)"]


def ours(results: Results) -> str:
    """wholegrad's rows, each against the first."""
    found = {name: results[name] for name in OURS if name in results}
    if not found:
        return ""
    rows = []
    base = found.get("step")
    for name, words in OURS.items():
        if name in found:
            ratio = f"{median(results[name]) / median(base):.2f}" if base else ""
            label = f"{words}, budget of {results[name]['budget_bytes'] / GIB:.3g} GiB"
            rows.append([label, *common_cells(results[name]), ratio])
    return table([f"wholegrad, {extent(next(iter(found.values())))}", *COMMON, "seconds, times the first"], rows)


def of_peer(results: Results, kind: str) -> Results:
    """One peer's results, the fastest a pixel first."""
    found = [(name, result) for name, result in results.items() if name.startswith(f"peer-{kind}-")]
    return dict(sorted(found, key=lambda pair: per_pixel(pair[1])))


def best_peer(results: Results, kind: str) -> Result | None:
    """The setting under which a peer is fastest."""
    return next(iter(of_peer(results, kind).values()), None)


def peers(results: Results) -> str:
    """Whole-image peers, the better of each kind in bold, and how much slower a pixel is there than in our step."""
    rows = []
    for kind, words in PEERS.items():
        for i, (name, result) in enumerate(of_peer(results, kind).items()):
            label = f"{words}, {variant(name)}, {extent(result)}"
            ratio = f"{per_pixel(result) / per_pixel(results['step']):.1f}" if "step" in results else ""
            rows.append([label if i else f"**{label}**", *common_cells(result), ratio])
    if not rows:
        return ""
    head = ["whole image", *COMMON, "ns a pixel, times wholegrad's step"]
    return f"{table(head, rows)}\n\n{agreement(results)}".strip()


def variant(name: str) -> str:
    """``peer-keras-kept-without-onednn`` as words."""
    words = "memory kept" if "-kept" in name else "default allocator"
    return words + (", without oneDNN" if name.endswith("without-onednn") else "")


def agreement(results: Results) -> str:
    """How far the Keras network is from PyTorch's."""
    checked = [result for result in results.values() if "check_loss_difference" in result]
    if not checked:
        return ""
    loss = max(result["check_loss_difference"] for result in checked)
    worst = max(result["check_gradient_difference"] for result in checked)
    return (
        f"With the same weights on a small image the Keras network's loss is {loss:.1e} (relative) from the PyTorch "
        f"network's in float64, its worst gradient {worst:.1e} (of the tensor's largest element)."
    )


def areas(results: Results) -> str:
    """Seconds and memory against area."""
    found = [result for name, result in results.items() if name.startswith("area-")]
    rows = [
        [
            extent(result),
            f"{megapixels(result) / 1000:.3g}",
            *common_cells(result),
            gib(result["projected_bytes"]),
            gib(result["whole_image_bytes"]),
        ]
        for result in sorted(found, key=megapixels)
    ]
    head = ["area", "gigapixels", *COMMON, "projected, GiB", "whole image would need, GiB"]
    return f"{table(head, rows)}\n\n![seconds and memory against area](area.svg)" if rows else ""


def plan_words(result: Result) -> str:
    """What a plan does, in a few words."""
    tiles = ", ".join(f"{high} x {wide}" for high, wide in result["tiles"])
    kept = ", ".join(f"{result['boundaries'].count(place)} on {place}" for place in sorted({*result["boundaries"]}))
    return f"tiles of {tiles}; {f'boundaries: {kept}' if kept else 'no boundaries'}"


def budgets(results: Results) -> str:
    """The step within several budgets: what was planned, projected and measured."""
    found = [result for name, result in results.items() if name.startswith("within-")]
    rows = [
        [
            f"{result['budget_bytes'] / GIB:.3g} GiB",
            plan_words(result),
            f"{result['recompute']:.2f}",
            f"{gib(result['projected_bytes'])}, {gib(result['peak_bytes'])}",
            f"{result['predicted_seconds']:.1f}, {median(result):.1f} ({spread(result)})",
            f"{result['others_cores']:.2f}; {result['load_before']:.1f}",
        ]
        for result in sorted(found, key=lambda each: each["budget_bytes"])
    ]
    head = ["budget", "plan", "forward work, times", "GiB projected, measured", "seconds predicted, measured (each)"]
    return table([*head, COMMON[-1]], rows) if rows else ""


def tilings(results: Results) -> str:
    """Two plans of a real slide, in a sentence."""
    if "tilings" not in results:
        return ""
    result = results["tilings"]
    (one, two), (first, second) = result["tiles"], result["losses"]
    grads = result["gradient_differences"]
    worst = max(grads, key=grads.__getitem__)
    return (
        f"Two tilings of a real slide ({result['slide']}), tiles of {one[0]} x {one[1]} and of {two[0]} x {two[1]} "
        f"with another boundary: losses {first:.12f} and {second:.12f}, {result['loss_difference']:.1e} apart "
        f"(relative); worst of {len(grads)} gradients {grads[worst]:.1e} of its tensor's largest element ({worst})."
    )


def disagreements(results: Results) -> list[str]:
    """What the two tilings do not agree in, a line each; a difference that is not a number is one."""
    result = results.get("tilings")
    if result is None:
        return ["the two tilings were not compared"]
    found = []
    if not result["loss_difference"] <= LOSS_TOLERANCE:
        found.append(f"the two tilings' losses are {result['loss_difference']:.1e} apart (at most {LOSS_TOLERANCE})")
    for name, error in result["gradient_differences"].items():
        if not error <= GRADIENT_TOLERANCE:
            found.append(f"the two tilings' gradients of {name} are {error:.1e} apart (at most {GRADIENT_TOLERANCE})")
    return found


def footer(results: Results) -> str:
    """When, where and with what; several of each where results come from several runs."""

    def every(key: str) -> str:
        return "; ".join(sorted({str(result[key]) for result in results.values()}))

    dates = sorted(result["date"] for result in results.values())
    versions = {f"{key} {number}" for result in results.values() for key, number in result.get("versions", {}).items()}
    software = ", ".join([every("software"), *sorted(versions)])
    threads = sorted({result["threads"] for result in results.values() if "threads" in result})
    return (
        f"Measured from {dates[0]} to {dates[-1]}, revision {every('revision')}: {every('machine')}, {software}, "
        f"{'/'.join(map(str, threads))} threads. "
        f"Command: `python benchmarks/gigapixel_step/main.py --size {every('size')}`."
    )


def render(results: Results) -> str:
    """All tables that the results allow."""
    if not results:
        return "no results yet"
    parts = [make(results) for make in (ours, peers, areas, budgets, tilings, footer)]
    return "\n\n".join(part for part in parts if part)


def write(page: Path, text: str) -> None:
    """Replace what stands between the markers of a page."""
    before, _, rest = page.read_text().partition(START)
    _, found, after = rest.partition(END)
    assert found, f"{page} has no markers"
    page.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")

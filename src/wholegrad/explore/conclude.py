"""What an exploration shows, in sentences that follow from its figures and say nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wholegrad.explore.cells import DONE, FULL, IMPOSSIBLE, KILLED, REFUSED, UNTIMELY, Result
from wholegrad.plan.plan import show_bytes

PAPER = "Remedios et al., MIDL 2023"
PAPER_AREA = FULL[0] * FULL[1]  # pixels
PAPER_BYTES = 100e9  # "over 100 GB"
PAPER_SECONDS = 81.0
TELLING = 256 << 20  # bytes of growth from which on a rate is said
OVER = (REFUSED, KILLED, IMPOSSIBLE)  # outcomes for want of memory


@dataclass(frozen=True)
class Machine:
    """Where it was measured: in words, and bytes of memory."""

    words: str
    memory: int


def label(result: Result) -> str:
    """``stream``, or ``in-core on cuda``."""
    cell = result.cell
    return cell.strategy if cell.device == "cpu" else f"{cell.strategy} on {cell.device}"


def by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each strategy and device, small areas first."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda each: each.cell.pixels):
        found.setdefault(label(result), []).append(result)
    return found


def size(result: Result) -> str:
    """``16000 x 64000``"""
    return f"{result.cell.height} x {result.cell.width}"


def conclusions(results: Sequence[Result], limit: int, machine: Machine) -> str:
    """One paragraph."""
    groups = by_label(results)
    done = {name: [each for each in found if each.outcome == DONE] for name, found in groups.items()}
    said = [_reach(name, done[name], groups[name], limit) for name in groups]
    said += _against(done)
    said += _growth(done)
    said += _answer(done, machine)
    return " ".join(said)


def _reach(name: str, done: Sequence[Result], every: Sequence[Result], limit: int) -> str:
    """Up to which size, at what speed, and what stopped it."""
    if not done:
        first = every[0]
        return f"{name.capitalize()} ran at no size ({first.outcome} at {size(first)})."
    top = done[-1]
    assert top.seconds is not None and top.peak is not None
    text = (
        f"{name.capitalize()} ran up to {size(top)} ({_area(top)}), {top.seconds:.3g} s a step "
        f"({1e9 * top.seconds / top.cell.pixels:.3g} ns a pixel) and {show_bytes(top.peak)}"
    )
    beyond = next((each for each in every if each.cell.pixels > top.cell.pixels), None)
    if beyond is None:
        return f"{text}, the largest size tried."
    if beyond.said == UNTIMELY:
        return f"{text}; for {size(beyond)} no time was left."
    if beyond.outcome in OVER and beyond.projected:
        return (
            f"{text}; {size(beyond)} would need {show_bytes(beyond.projected)}, and {show_bytes(limit)} were allowed."
        )
    if beyond.outcome in OVER:
        return f"{text}; {size(beyond)} ended as: {beyond.outcome}."
    return f"{text}; {size(beyond)} was {beyond.outcome}."


def _area(result: Result) -> str:
    return f"{result.megapixels / 1000:.3g} gigapixels" if result.megapixels >= 1000 else f"{result.megapixels:.3g} MP"


def _against(done: dict[str, list[Result]]) -> list[str]:
    """Each other strategy beside tiles, at the largest size that both ran."""
    said = []
    ours = {each.cell.pixels: each for each in done.get("stream", [])}
    for name, found in done.items():
        both = [each for each in found if name != "stream" and each.cell.pixels in ours]
        if not both:
            continue
        other, mine = both[-1], ours[both[-1].cell.pixels]
        assert other.seconds and mine.seconds and other.peak and mine.peak
        time, memory = other.seconds / mine.seconds, other.peak / mine.peak
        said.append(
            f"At {size(other)}, {name} took {time:.2g} times as long as stream and {memory:.2g} times its memory."
        )
    return said


def _growth(done: dict[str, list[Result]]) -> list[str]:
    """Bytes a pixel of whole maps, from the two largest sizes, and what the full area would need at that rate."""
    said = []
    for name, found in done.items():
        if name == "stream" or len(found) < 2:
            continue
        a, b = found[-2], found[-1]
        assert a.peak and b.peak
        rate = (b.peak - a.peak) / (b.cell.pixels - a.cell.pixels)
        if b.peak - a.peak >= TELLING and b.cell.pixels < PAPER_AREA:
            whole = show_bytes(b.peak + rate * (PAPER_AREA - b.cell.pixels))
            at = f"at that rate {FULL[0]} x {FULL[1]} would need {whole}"
            said.append(f"Between its two largest sizes {name} took {rate:.3g} bytes a pixel: {at}.")
    return said


def _answer(done: dict[str, list[Result]], machine: Machine) -> list[str]:
    """Whether the paper's step ran here, and in what."""
    full = [each[-1] for each in done.values() if each and each[-1].cell.pixels >= PAPER_AREA]
    if not full:
        return [f"No strategy was run at the full {FULL[0]} x {FULL[1]} here."]
    best = min(full, key=lambda each: each.seconds or 0.0)
    assert best.seconds and best.peak
    share, times = best.peak / PAPER_BYTES, PAPER_SECONDS / best.seconds
    faster = f"{times:.2g} times faster" if times >= 1 else f"{1 / times:.2g} times slower"
    whole = any(label(each) != "stream" for each in full)
    end = "" if whole else " No strategy that holds maps whole reached that size."
    here = f"{show_bytes(best.peak)}, {100 * share:.2g} % of that, and {best.seconds:.3g} s, {faster}"
    return [
        f"The step that took the paper ({PAPER}) over 100 GB of shared memory and {PAPER_SECONDS:.0f} s ran here by "
        f"{label(best)} in {here}, on a machine of {show_bytes(machine.memory)}.{end}"
    ]

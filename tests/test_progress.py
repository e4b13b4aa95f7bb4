"""What a run shows in the terminal, and where there is none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import wholegrad as wg
from wholegrad.train import progress


def shown(terminal: bool, monkeypatch: pytest.MonkeyPatch, step: float, steps: int = 0) -> str:
    """What ten events print, ``step`` seconds apart; with ``steps``, of a run that counts them."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with progress.display(console, "slide") as display:
        if steps:
            display.start(0, steps)
        for done in range(1, 11):
            clock[0] += step
            display.tile(wg.Progress("painting", done, 10))
            if terminal:
                display.bars.refresh()
    return console.file.getvalue()


def test_a_long_job_without_a_terminal_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(False, monkeypatch, 6.0).split("\n") == [f"painting: {n}0%" for n in (2, 4, 6, 8, 10)] + [""]
    assert shown(False, monkeypatch, 0.9) == "", "nine seconds are not long"
    assert shown(False, monkeypatch, 6.0, steps=3) == "", "a line a step is enough"


def test_what_is_not_counted_has_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    said = shown(True, monkeypatch, 1.0)
    assert "slide" in said and "painting" in said and "9/10" in said and "0/?" not in said
    assert "0/3" in shown(True, monkeypatch, 1.0, steps=3)

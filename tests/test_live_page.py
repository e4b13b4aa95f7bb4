"""The page of a run in headless Chromium: curves that grow, a prediction that appears, an end that is said."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("the browser is driven over inherited pipes, which Windows lacks", allow_module_level=True)

from browser import Browser
from test_live import address, running, slides

__all__ = ["slides"]  # the fixture

POINTS = "document.querySelector('#charts polyline')?.getAttribute('points').split(' ').length ?? 0"
STATE = "document.getElementById('run-state')?.textContent ?? ''"


def layers(page: Browser) -> list[str]:
    found: list[str] = page.run("[...document.querySelectorAll('.layer')].map((row) => row.dataset.layer)")
    return found


def facts(page: Browser) -> dict[str, str]:
    found: dict[str, str] = page.run(
        "Object.fromEntries([...document.querySelectorAll('#run-facts div')]"
        ".map((row) => [row.children[0].textContent, row.children[1].textContent]))"
    )
    return found


def test_curves_grow_and_predictions_come_until_the_end(browser: Browser, slides: Path) -> None:
    with running(slides, "out", "--live-keep", steps=200) as process:
        follow_to_the_end(browser, process)


def follow_to_the_end(browser: Browser, process: subprocess.Popen[str]) -> None:
    url = address(process)
    browser.problems.clear()
    browser.requests.clear()
    browser.open(url)
    browser.until("window.page && page.ready && page.run?.steps.length > 2", 120)
    first = browser.run(POINTS)
    assert browser.until(STATE) not in ("Finished.", "")
    browser.until("document.getElementById('run-facts').textContent.includes('MP/s')", 30)  # known after two steps
    told = facts(browser)
    assert told["Steps"].endswith(" of 200") and "Left" in told and "of 4.00" in told["Memory"]
    assert " s a step, " in told["Speed"] and told["Speed"].endswith(" MP/s") and told["Learning rate"] == "0.01"
    titles = browser.run("[...document.querySelectorAll('.chart b')].map((title) => title.textContent)")
    assert titles == ["Loss", "Dice", "Learning rate", "Memory, GiB", "Seconds a step"]
    browser.until(f"{POINTS} > {first}", 60)
    browser.until("page.run.prediction?.step >= 40", 120)
    version = browser.until("page.scene.version", 60)  # the page looks for new layers once it has heard of one
    browser.until("document.querySelectorAll('.layer').length > 1", 30)
    assert layers(browser) == ["error", "prediction", "truth"]
    browser.until(f"page.scene.version > {version} && page.run.over()", 120)
    assert browser.run(STATE) == "Finished."
    browser.until("page.scene.score && !!document.getElementById('dice')", 60)  # scored once the processor is free
    browser.until("page.slide.images.get('error').image?.getFullyLoaded()", 30)
    shown = browser.run("page.slide.images.get('error').query")
    assert f"v={browser.run('page.scene.version')}" in shown, "tiles of the prediction before are not kept"
    assert browser.run(POINTS) == 200 and "Left" not in facts(browser)
    assert browser.problems == [] and all(each.startswith((url, "blob:")) for each in browser.requests)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    browser.until("!document.getElementById('banner').hidden", 30)
    said = browser.run("document.getElementById('banner-text').textContent")
    assert "The run is over, and its page was closed" in said


def test_a_resumed_run_draws_each_step_once(browser: Browser, slides: Path) -> None:
    """What was cut from its log is not in the curves, and the page of the folder goes on through kill and resume."""
    with running(slides, "out", steps=100000) as process:
        browser.open(address(process))
        browser.until("window.page && page.run?.steps.length > 5", 120)
    with running(slides, "out", "--resume", steps=100000) as again:
        browser.open(address(again))
        browser.until("window.page && page.run?.status?.state === 'running' && page.run.steps.length > 5", 120)
        steps = browser.run("page.run.steps.map((step) => step[0])")
        assert steps == list(range(len(steps)))

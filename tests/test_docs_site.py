"""The site builds without a warning, loads nothing from elsewhere, and leaves nothing of the code out."""

from __future__ import annotations

import argparse
import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import wholegrad as wg
from doc_pages import ROOT, once
from wholegrad import cli, errors, losses

pytest.importorskip("material", reason="the extra 'docs' is not installed")
sys.path.insert(0, str(ROOT / "docs/hooks"))
import diagrams
import links

PICTURES = sorted((ROOT / "docs/pictures").iterdir())


def build(folder: Path) -> None:
    """Every warning is an error."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "NO_MKDOCS_2_WARNING": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    return once(tmp_path_factory, "site", build)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert links.loaded_from_elsewhere(site) == []


def test_no_link_leads_nowhere(site: Path) -> None:
    assert links.dead_ends(site) == []


def test_what_would_be_loaded_or_lost_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<script src="https://x.org/a.js"></script><link href="//fonts.org/f.css" rel="stylesheet">'
        '<a href="b.html">b</a><p style="background: url(http://x.org/p.png)"></p><a href="#there">c</a>'
        '<p id="here"></p><a href="#here">d</a>'
        '<a href="https://x.org">e</a><img src="data:image/png;base64,aa">'
    )
    (tmp_path / "a.css").write_text('@import "https://fonts.org/g.css"; p { background: url(q.png) }')
    assert links.loaded_from_elsewhere(tmp_path) == [
        "a.html: https://x.org/a.js",
        "a.html: //fonts.org/f.css",
        "a.html: http://x.org/p.png",
        "a.css: https://fonts.org/g.css",
    ]
    assert links.dead_ends(tmp_path) == ["a.html: b.html", "a.html: #there"]
    assert links.elsewhere(tmp_path) == {"https://x.org": {"a.html"}}


def test_every_command_and_flag_is_in_the_reference(site: Path) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "commands.html").read_text()))
    parser = cli.build_parser()
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    for name, each in commands.choices.items():
        section = text.partition(f"wholegrad {name}¶")[2].partition("¶")[0]
        assert section, name
        for action in each._actions:
            if isinstance(action, argparse._HelpAction) or action.help is argparse.SUPPRESS:
                continue
            named = (
                [action.metavar] if isinstance(action.metavar, str) else [str(each) for each in action.choices or ()]
            )
            for word in action.option_strings or named or [action.dest]:
                assert word in section, f"{name} {word}"
            said = " ".join((each._get_formatter()._expand_help(action) if action.help else "").split())
            assert said in section, f"{name} {action.dest}: {said}"


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    anchors = links.read(site / "api.html").anchors
    defined = {name: getattr(wg, name) for name in wg.__all__}
    for name, kind in defined.items():
        there = {f"{kind.__module__}.{kind.__qualname__}", f"wholegrad.{name}"} - set(sys.modules)
        assert there & anchors, name
    named = {f"wholegrad.errors.{name}" for name, kind in vars(errors).items() if inspect.isclass(kind)}
    named |= {f"wholegrad.losses.{name}" for name in losses.__dict__ if name.endswith("_loss")}
    assert named - anchors == set()


def test_docstrings_lose_no_markup(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text())
    assert not re.search(r":(?:func|class|meth|mod):|``", text)


def test_figures_of_other_pages_are_those_of_their_pages() -> None:
    """The few rows that comparison.md repeats are in the report that they come from."""
    table = (ROOT / "docs/comparison.md").read_text().partition("| 5657 x 22628 pixels")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    report = (ROOT / "docs/explore.md").read_text()
    assert len(rows) == 4
    for (_, seconds, peak), strategy in zip(rows, ("in-core", "recompute", "offload", "stream"), strict=True):
        found: Any = re.search(rf"\| 5657 x 22628 \| 128 \| {strategy} \| done \| (\S+) \| \S+ \| ([^|]+) \|", report)
        assert (seconds, peak) == (found[1], found[2].strip())


@pytest.mark.parametrize("name", diagrams.DRAWINGS)
def test_each_diagram_is_as_drawn(name: str) -> None:
    assert (ROOT / f"docs/pictures/exact-{name}.svg").read_text() == str(diagrams.DRAWINGS[name]())


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_each_picture_is_small_and_shown(picture: Path) -> None:
    assert picture.stat().st_size < 300_000
    assert any(f"pictures/{picture.name}" in page.read_text() for page in (ROOT / "docs").glob("*.md"))

"""The pages of docs/ do what they say: their code runs, and prints what they show."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(?P<kind>python|text)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]+)")
MARK = "=== block {} ==="


def blocks(page: str) -> list[tuple[str, str | None]]:
    """Each block of Python with the output that is shown right after it, if any."""
    found: list[tuple[str, str | None]] = []
    for match in BLOCK.finditer(page):
        if match["kind"] == "python":
            found.append((match["body"], None))
        else:
            code, before = found.pop()
            assert before is None, "an output without code before it"
            found.append((code, match["body"]))
    return found


def program(code: list[str]) -> str:
    """All blocks in one namespace, a mark printed before each."""
    return "".join(f"print({MARK.format(i)!r}, flush=True)\n{body}\n" for i, body in enumerate(code))


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda page: page.name)
def test_every_block_runs_and_prints_what_is_shown(page: Path, tmp_path: Path) -> None:
    """In a process of its own: rules that a page registers must not reach other tests."""
    found = blocks(page.read_text())
    script = tmp_path / "page.py"
    script.write_text(program([code for code, _ in found]))
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert run.returncode == 0, run.stderr
    printed = run.stdout
    same = doctest.OutputChecker().check_output
    for i, (code, shown) in enumerate(found):
        printed = printed.partition(MARK.format(i) + "\n")[2]
        got = printed.partition(MARK.format(i + 1) + "\n")[0]
        if shown is not None:
            assert same(shown, got, doctest.ELLIPSIS), f"{code}\nshows\n{shown}\nbut prints\n{got}"
        else:
            assert not got, f"{code}\nprints\n{got}\nwhich the page does not show"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "ARCHITECTURE.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(page.read_text()):
        assert (page.parent / match["path"]).exists(), match["path"]

"""The pages of docs/ and README do what they say: their code runs and prints what they show, their commands exist."""

from __future__ import annotations

import argparse
import doctest
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from doc_pages import PAGES, ROOT, SHOWN, Block, blocks, escaped, every_command, once, program, unknown_words
from wholegrad import cli
from wholegrad.train.config import check_config

LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]+)")
MARK = "=== block {} ==="
RECORDS = {"explore.md": "the command that wrote the page; it ran for an hour"}
STAGE = """
import json, shutil
from pathlib import Path
import numpy as np, tifffile
from wholegrad import cli

height, width, rng = 320, 448, np.random.default_rng(0)
y, x = np.mgrid[:height, :width]
tissue = (y - 150) ** 2 + (x - 170) ** 2 < 100**2
pixels = np.where(tissue[..., None], (180, 90, 150), (242, 242, 240)) + rng.normal(0, 6, (height, width, 3))
stored = {"tile": (64, 64), "resolution": (20000.0, 20000.0), "resolutionunit": "CENTIMETER"}  # 0.5 um a pixel
tifffile.imwrite("case.svs", np.clip(pixels, 0, 255).astype(np.uint8), photometric="rgb", **stored)
tifffile.imwrite("case.mask.tif", tissue.astype(np.uint8), **stored)
for folder in ("slides", "masks", "predictions"):
    Path(folder).mkdir()
for name in ("case", "other"):
    shutil.copy("case.svs", f"slides/{name}.svs"), shutil.copy("case.mask.tif", f"masks/{name}.mask.tif")
ring = [[50, 40], [300, 40], [300, 250], [50, 250], [50, 40]]
area = {"type": "Polygon", "coordinates": [ring]}
properties = {"objectType": "annotation", "classification": {"name": "Tissue"}}
outline = {"type": "Feature", "geometry": area, "properties": properties}
Path("case.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [outline]}))
Path("run.toml").write_text('''
[data]
train = ["other"]
test = ["case"]
[train]
steps = 1
panels = false
''')
assert cli.main(["train", "run.toml"]) == 0
assert cli.main(["predict", "case.svs", "--weights", "out/train", "--out", "mask.ome.tif"]) == 0
shutil.copy("mask.ome.tif", "predictions/case.ome.tif")
Path("pairs.csv").write_text("prediction,mask\\nmask.ome.tif,case.mask.tif\\n")
"""


def run_script(text: str, folder: Path) -> str:
    """Runs a program in a process of its own, in a folder; what it printed."""
    script = folder / "page_of_docs.py"
    script.write_text(text)
    paths = [str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "120"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages take for granted, small: ``case.svs``, its labels, a trained run, predictions."""
    return once(tmp_path_factory, "stage", lambda folder: run_script(STAGE, folder))


@pytest.mark.parametrize("page", [p for p in SHOWN if any(b.runs for b in blocks(p.read_text()))], ids=lambda p: p.name)
def test_every_block_runs_and_prints_what_is_shown(page: Path, stage: Path, tmp_path: Path) -> None:
    """In a process of its own: rules that a page registers must not reach other tests."""
    shutil.copytree(stage, tmp_path, dirs_exist_ok=True)
    text, found = program(page, MARK)
    printed = run_script(text, tmp_path)
    same = doctest.OutputChecker().check_output
    for i, (block, shown) in enumerate(found):
        printed = printed.partition(MARK.format(i) + "\n")[2]
        got = printed.partition(MARK.format(i + 1) + "\n")[0]
        if shown is not None:
            said = f"{page.name}:{block.line}\n{block.body}\nshows\n{shown}\nbut prints\n{got}"
            assert same(shown, got, doctest.ELLIPSIS), said
        elif block.kind == "python" and page.name != "README.md":
            assert not got, f"{page.name}:{block.line}\n{block.body}\nprints\n{got}\nwhich the page does not show"


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_no_block_escapes(page: Path) -> None:
    assert escaped(page) == [] or page.name in RECORDS


def test_a_block_that_would_escape_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nls\n```\n\n```\nwholegrad train x\n```\n\n    python x.py\n\n```text\nimport os\n```\n"
        "```\nmake demo\nmake nothing\n```\n```python\n1\n```\n```text\nimport this\n```\n"
    )
    assert [problem.partition(": ")[2] for problem in escaped(page)] == [
        "a block of 'bash': use one of python, sh, toml, text",
        "looks like a program: wholegrad train x",
        "looks like a program: import os",
        "looks like a program: make nothing",
        "indented, so nobody runs it: python x.py",
    ]


def test_what_is_not_run_says_why() -> None:
    """And no such line stands where it marks nothing."""
    reasons = [block.reason for page in SHOWN for block in blocks(page.read_text()) if block.reason]
    assert reasons and len(reasons) == sum(len(_marks(page)) for page in SHOWN)


def _marks(page: Path) -> list[str]:
    return [part for part in page.read_text().split("\n\n") if part.lstrip().startswith("*Not run by the tests")]


@pytest.fixture(scope="session")
def commands_of() -> dict[str, argparse.ArgumentParser]:
    parser = cli.build_parser()
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(commands.choices)


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_commands_and_flags_exist(page: Path, commands_of: dict[str, argparse.ArgumentParser]) -> None:
    for shown in every_command(page):
        assert not unknown_words(shown, commands_of), shown


def test_a_flag_that_is_gone_is_seen(commands_of: dict[str, argparse.ArgumentParser]) -> None:
    assert unknown_words("wholegrad train run.toml --resume --fast=1", commands_of) == ["--fast=1"]
    assert unknown_words("wholegrad train run.toml --out '--odd' --steps --fast", commands_of) == []
    assert unknown_words("wholegrad fly", commands_of) == ["fly"]


def configurations() -> list[tuple[str, Block]]:
    found = [(page.name, block) for page in SHOWN for block in blocks(page.read_text()) if block.kind == "toml"]
    assert found
    return found


@pytest.mark.parametrize(("page", "block"), configurations(), ids=lambda each: each if isinstance(each, str) else "")
def test_each_configuration_is_one(page: str, block: Block) -> None:
    check_config(tomllib.loads(block.body), f"docs/{page}:{block.line}")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "ARCHITECTURE.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(page.read_text()):
        path = page.parent / match["path"]
        assert path.exists() or (page.parent.name == "docs" and match["path"] in SITE_ONLY), match["path"]


SITE_ONLY = {"changelog.md": "CHANGELOG.md", "architecture.md": "ARCHITECTURE.md"}

"""GitHub's workflow files: valid by GitHub's own schema, and what they run exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import wholegrad

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return found


def test_they_follow_githubs_schema() -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *map(str, FILES),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_must_be_there_is() -> None:
    assert {path.stem for path in FILES} == {"tests", "docs", "release"}
    systems = [
        each["os"] for each in jobs(ROOT / ".github/workflows/tests.yml")["test"]["strategy"]["matrix"]["include"]
    ]
    assert any(each.startswith("ubuntu") for each in systems) and any(each.startswith("macos") for each in systems)
    release = jobs(ROOT / ".github/workflows/release.yml")
    assert release["pypi"]["permissions"] == {"id-token": "write"} and "build" in release["pypi"]["needs"]


@pytest.mark.parametrize(("tag", "said"), [(f"v{wholegrad.__version__}", None), ("v9.9.9", "says nothing of 9.9.9")])
def test_a_release_is_listed_with_its_part_of_the_changelog(tag: str, said: str | None, tmp_path: Path) -> None:
    """The step's own lines, run by the shell."""
    (step,) = (
        each["run"]
        for each in jobs(ROOT / ".github/workflows/release.yml")["build"]["steps"]
        if "changelog" in each.get("name", "")
    )
    text = (ROOT / "CHANGELOG.md").read_text()
    (tmp_path / "CHANGELOG.md").write_text(text + "\n## 0.0.1\n\nOlder.\n")
    (tmp_path / "python").symlink_to(sys.executable)
    given = {**os.environ, "TAG": tag, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", step], cwd=tmp_path, env=given, capture_output=True, text=True)
    if said is not None:
        assert done.returncode and said in done.stderr
        return
    assert done.returncode == 0, done.stderr
    notes = (tmp_path / "notes.md").read_text()
    assert notes.startswith("First light") and "Older" not in notes and notes.strip() in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_make_target_exists(path: Path) -> None:
    commands = [step.get("run", "") for job in jobs(path).values() for step in job["steps"]]
    wanted = {target for command in commands for target in re.findall(r"\bmake ([\w-]+)", command)}
    assert wanted <= TARGETS, wanted - TARGETS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_they_may_do_no_more_than_they_need(path: Path) -> None:
    told = yaml.safe_load(path.read_text())
    assert told["permissions"] == {"contents": "read"}
    for name, job in told["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False, name
            assert "${{" not in step.get("run", ""), f"{name}: what others write must not become a command"

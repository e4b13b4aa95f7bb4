"""The house rules that a machine can check: imports point one way, and every error is one line."""

from __future__ import annotations

import ast
import inspect
import pickle
from pathlib import Path

import wholegrad
from wholegrad import errors

ROOM = [
    "errors", "aside", "clock", "kernels", "graph", "plan", "run", "slide", "metrics", "nets", "losses", "looks",
    "given", "cache", "outputs", "signature", "asked", "whole_step", "ranked", "api", "predict", "segment", "proof",
    "diagnose", "verify", "train", "fleet", "export", "doctor", "explore", "view", "commands",
]  # fmt: skip
SOURCE = Path(wholegrad.__file__).parent


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wholegrad."):
            found.add((node.module or "").split(".")[1])
    return found


def test_imports_point_upward_only() -> None:
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).with_suffix("").parts[0]
        if room in ROOM:
            later = {other for other in imported_rooms(path) if ROOM.index(other) > ROOM.index(room)}
            assert not later, f"{path.relative_to(SOURCE)} imports from {later}"


def test_networks_know_nothing_of_wholegrad() -> None:
    for path in (SOURCE / "nets").glob("*.py"):
        assert imported_rooms(path) <= {"nets"}


def test_planning_handles_no_tensors() -> None:
    for path in (SOURCE / "plan").glob("*.py"):
        text = path.read_text()
        assert "torch.Tensor" not in text and "torch.empty" not in text, path.name


def test_every_error_is_one_line_and_survives_a_process_boundary() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.WholegradError)]
    assert len(kinds) >= 9
    for kind in kinds:
        error = kind("slide.tif", "is truncated", "copy it again")
        assert str(error) == "slide.tif: is truncated; copy it again"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_files_stay_readable() -> None:
    long = {path.name: n for path in SOURCE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 450}
    assert not long, f"more than one mechanism? {long}"


def test_public_names_have_docstrings() -> None:
    for name in wholegrad.__all__:
        assert inspect.getdoc(getattr(wholegrad, name)), name

"""The tables of the GPU's benchmark, made of results as its stages say them: no GPU is asked for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "gpu" / "main.py"


@pytest.fixture(scope="module")
def main() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RATES = [
    {"stage": "machine", "name": "float32 product, tf32 False", "flops_per_second": 50e12},
    {"stage": "machine", "name": "copy on the device", "bytes_per_second": 4e12},
    {"stage": "machine", "name": "pinned memory to device", "bytes_per_second": 50e9},
]
STEP = {"stage": "step", "name": "image on the host", "size": "1000x1000", "seconds": [0.002, 0.001, 0.001]}


def test_a_roofline_names_the_nearest_limit(main: Any) -> None:
    text = main.roofline([*RATES, STEP, {**STEP, "name": "image on the device"}])
    # 1e6 pixels: 2 x 577e6 operations at 50e12, and 4e6 bytes at 50e9, which is the most: 0.08 ms of 1 ms
    rows = [line.split("|")[1:-1] for line in text.splitlines()[2:]]
    assert [cell.strip() for cell in rows[0]] == ["image on the host", "1 ms", "0 ms", "0 ms", "0 ms", "8%"]
    assert rows[1][-1].strip() == "2%" and rows[1][-2].strip() == "0 ms"
    assert "did not finish" in main.roofline([STEP])


def test_what_ended_well_is_not_run_again(main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(main, "about", lambda: {"stage": "about", "name": "about"})

    def run(name: str, *rest: Any) -> list[dict[str, Any]]:
        ran.append(name)
        exit = "0" if name != "whole" or len(ran) > 2 else "stopped after 5 s"
        return [{"stage": name, "name": "end", "exit": exit, "took": 1.0, "last": ""}]

    monkeypatch.setattr(main, "run", run)
    given = ["main.py", "--out", str(tmp_path), "--only", "step,whole"]
    monkeypatch.setattr(sys, "argv", given)
    main.main()
    monkeypatch.setattr(sys, "argv", [*given, "--rest"])
    main.main()
    assert ran == ["step", "whole", "whole"]
    assert (tmp_path / "results.jsonl").read_text().count('"end"') == 2


def test_every_stage_is_a_command_that_can_start(main: Any, tmp_path: Path) -> None:
    for _, words, limit in main.STAGES:
        command = main.command(list(words), "100x400", tmp_path)
        assert command[0] == sys.executable and limit > 0 and "{" not in " ".join(command)
        for word in command[1:]:
            assert not word.endswith(".py") or (PATH.parent.parent.parent / word).exists()

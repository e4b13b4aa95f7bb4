"""Measured peak <= projected (rule 7) while slides are changed as they are read: the whole process, by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tifffile

CONFIG = """
[data]
train = ["a"]
[augment]
flip = true
turn = true
stain = 0.1
contrast = 0.1
blur = 2.0
[train]
steps = 3
budget = "0.75GiB"
out = "out"
"""


def test_changes_of_a_large_slide_stay_within_the_plan(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("slides", "masks"):
        (tmp_path / folder).mkdir()
    tifffile.imwrite(
        tmp_path / "slides/a.tif",
        rng.integers(0, 256, (1200, 2000, 3), dtype=np.uint8),
        tile=(256, 256),
        photometric="rgb",
    )
    tifffile.imwrite(tmp_path / "masks/a.mask.tif", rng.integers(0, 2, (1200, 2000), dtype=np.uint8), tile=(256, 256))
    (tmp_path / "run.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "wholegrad", "train", str(tmp_path / "run.toml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    projected = 0
    for line in log:
        projected = max(projected, line["projected"])
        assert line["peak"] <= projected <= 0.75 * 2**30, line

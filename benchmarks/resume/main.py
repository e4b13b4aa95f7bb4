"""Kill a training run at random moments (SIGKILL), resume it each time, and compare its files with an unbroken run's.

    python benchmarks/resume/main.py --kills 20

The run has whatever makes resuming hard: batch norm, dropout, augmentation, several slides to an update, averaged
weights, a schedule of torch's, clipping, validation with patience, and a checkpoint after every step. Each kill comes a
random moment after a random number of new lines in the log, none included. Exits with 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
CONFIG = """
[data]
train = ["a", "b", "c"]
val = ["d"]
test = ["e"]
crop = [150, 130]
pad = true
[augment]
flip = true
turn = true
brightness = 0.1
contrast = 0.1
stain = 0.1
blur = 1.0
[network]
name = "nets:forgetful"
mean = [0.7, 0.6, 0.7]
std = [0.2, 0.25, 0.2]
[train]
steps = {steps}
lr = 0.01
optimizer = {{ name = "AdamW", args = {{ weight_decay = 0.01 }} }}
schedule = {{ name = "OneCycleLR", args = {{ max_lr = 0.02, total_steps = "total" }} }}
accumulate = 2
clip = 1.0
ema = 0.9
checkpoint_minutes = 0
budget = "2GiB"
[validation]
steps = 5
patience = 50
"""
FILES = ("weights.safetensors", "best.safetensors", "checkpoint.safetensors")
APART = ("seconds", "rss", "peak", "projected")  # of a line of the log: what a process measures of itself


def make_slides(folder: Path) -> None:
    """Five small slides with dark discs of tissue, and their masks."""
    for seed, name in enumerate("abcde"):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:160, :144]
        tissue = sum(
            (y - rng.uniform(0, 160)) ** 2 + (x - rng.uniform(0, 144)) ** 2 < rng.uniform(20, 45) ** 2 for _ in range(3)
        ).astype(bool)
        colour = np.where(tissue[..., None], (180, 90, 150), (242, 242, 240))
        pixels = np.clip(colour + rng.normal(0, 6, (160, 144, 3)), 0, 255).astype(np.uint8)
        for kind, array in (("slides", pixels), ("masks", tissue.astype(np.uint8))):
            (folder / kind).mkdir(exist_ok=True)
            ending = ".tif" if kind == "slides" else ".mask.tif"
            tifffile.imwrite(folder / kind / f"{name}{ending}", array, tile=(64, 64))


def start(folder: Path, out: str, resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "wholegrad", "train", str(folder / "run.toml"), "--out", str(folder / out)]
    environment = {**os.environ, "COLUMNS": "200"}
    with (folder / f"{out}.txt").open("ab") as said:
        return subprocess.Popen(
            command + ["--resume"] * resume, cwd=HERE, stdout=said, stderr=subprocess.STDOUT, env=environment
        )


def unbroken(folder: Path) -> float:
    """Run to the end; returns seconds."""
    begun = time.monotonic()
    if start(folder, "whole", resume=False).wait():
        raise SystemExit((folder / "whole.txt").read_text())
    return time.monotonic() - begun


def broken(folder: Path, kills: int, steps: int, rng: random.Random) -> list[str]:
    """Run, kill and resume; returns how far the run had come at each kill."""
    moments: list[str] = []
    while True:
        process = start(folder, "broken", resume=bool(moments))
        if len(moments) == kills:
            if process.wait():
                raise SystemExit((folder / "broken.txt").read_text())
            return moments
        if not await_moment(process, folder / "broken", max(1, steps // kills), rng):
            raise SystemExit(f"ended before it was killed, take more steps:\n{(folder / 'broken.txt').read_text()}")
        process.kill()
        process.wait()
        moments.append(progress(folder / "broken"))
        print(f"kill {len(moments):2}: {moments[-1]}", flush=True)


def await_moment(process: subprocess.Popen[bytes], out: Path, most: int, rng: random.Random) -> bool:
    """Wait for a random number of new lines, of which there may be none, and for a random moment after; if it lives."""
    wanted = lines(out) + rng.randint(0, most)
    while lines(out) < wanted and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.2))
    return process.poll() is None


def lines(out: Path) -> int:
    """Lines of a run's log."""
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def progress(out: Path) -> str:
    left = [path.name for path in out.glob(".wholegrad-*")]
    return f"{lines(out)} lines" + (f", amid {left[0].partition('.partial-')[2]}" if left else "")


def differences(folder: Path) -> list[str]:
    """What is not the same in both runs, bit by bit."""
    found = []
    for name in FILES:
        first, second = (load_file(folder / out / name) for out in ("whole", "broken"))
        if first.keys() != second.keys():
            found.append(f"{name}: other tensors")
        found += [f"{name}: {key}" for key in first if not torch.equal(first[key], second[key])]
    first_log, second_log = (
        [
            {key: value for key, value in json.loads(line).items() if key not in APART}
            for line in (folder / out / "log.jsonl").read_text().splitlines()
        ]
        for out in ("whole", "broken")
    )
    if first_log != second_log:
        found.append(f"log.jsonl: {len(first_log)} lines and {len(second_log)}")
    if (folder / "whole/test.json").read_text() != (folder / "broken/test.json").read_text():
        found.append("test.json")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_slides(folder)
        (folder / "run.toml").write_text(CONFIG.format(steps=args.steps))
        seconds = unbroken(folder)
        print(f"unbroken: {args.steps} steps, {seconds:.1f} s", flush=True)
        moments = broken(folder, args.kills, args.steps, random.Random(args.seed))
        found = differences(folder)
    print("\n".join(found) or f"after {len(moments)} kills: every file has the same bits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

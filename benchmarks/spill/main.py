"""What it costs to keep boundaries on disk: the same step with all of them in memory and with all of them spilled.

    python -W ignore benchmarks/spill/main.py --folder /path/on/the/disk

Writes ``README.md`` beside this file. Every row is the median of processes of their own, in alternating order, each of
one step; boundaries and tiles are the same throughout. *Through the page cache* is the way of a file system without
direct input and output. Processor seconds count all threads of the process, not the system's own that bring cached
pages to disk; peaks are ``VmHWM`` of the whole process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import BasicUNet
from torch import nn

import wholegrad as wg
from wholegrad.run import spill_file
from wholegrad.run.process import peak_resident
from wholegrad.run.profile import Profile
from wholegrad.run.roofline import Roofline

MIB = 1 << 20
WAYS = {"in memory": "host", "on disk": "disk", "on disk, through the page cache": "disk"}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MONAI BasicUNet, 8 to 64 channels": lambda: BasicUNet(2, 3, 1, features=(8, 8, 16, 32, 64, 8), norm="batch"),
    "MONAI BasicUNet, 16 to 128 channels": lambda: BasicUNet(2, 3, 1, features=(16, 16, 32, 64, 128, 16), norm="batch"),
}
BOUNDARIES = ["conv_0.conv_0.conv", "conv_0.conv_1.conv", "down_1.convs.conv_1.conv", "upcat_2.convs.conv_1.conv",
              "upcat_1.convs.conv_0.conv", "upcat_1.convs.conv_1.conv"]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=768, help="height and width (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="processes a row (default %(default)s)")
    parser.add_argument("--folder", default=".", help="where boundaries go (default %(default)s)")
    parser.add_argument("--note", default="", help="said beside the date, such as what else ran")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def step(name: str, way: str, size: int, folder: str) -> dict[str, Any]:
    """One step."""
    if way.endswith("cache"):
        spill_file._DIRECT = 0
    torch.manual_seed(0)
    model, image = NETWORKS[name](), torch.rand(3, size, size)
    target, loss = (image[:1] > 0.5).float(), nn.functional.binary_cross_entropy_with_logits
    fixed: dict[str, Any] = {"tile": (256, 384), "boundaries": BOUNDARIES, "spill_dir": folder}
    plan = wg.plan(model, loss, image, target, placement=WAYS[way], **fixed)
    profile, processor = Profile(Roofline(1.0, 1.0)), time.process_time()  # its roofline is not asked for
    with profile.step():
        value = wg.backward(model, loss, image, target, plan=plan)
    return {
        "seconds": profile.seconds,
        "processor": time.process_time() - processor,
        "peak": peak_resident() / MIB,
        "projected": plan.projected / MIB,
        "kept": sum(plan.stored_bytes(ref) + plan.graph.spec(ref).nbytes for ref in plan.placements) / MIB,
        "disk": " ".join(profile.disk()),
        "bits": [value.item(), *(p.grad.double().sum().item() for p in model.parameters() if p.grad is not None)],
    }


def row(found: list[dict[str, Any]], way: str) -> str:
    numbers = [statistics.median(each[key] for each in found) for key in ("seconds", "processor", "peak", "projected")]
    return f"| {way} | {numbers[0]:.1f} | {numbers[1]:.1f} | {numbers[2]:.0f} | {numbers[3]:.0f} |"


def main() -> None:
    args = arguments()
    if args.child:
        print(json.dumps(step(*args.child, args.size, args.folder)))
        return
    lines = ["# Boundaries on disk", "", *(__doc__ or "").strip().splitlines(), ""]
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    what = f"float32, {args.size} x {args.size} pixels, median of {args.rounds}. {args.note}".strip()
    lines += [f"Measured {datetime.date.today()} on {machine}; {what}", ""]
    for name in NETWORKS:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                command = [sys.executable, "-W", "ignore", __file__, "--size", str(args.size), "--folder", args.folder]
                done = subprocess.run([*command, "--child", name, way], capture_output=True, text=True, check=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
        first = found["in memory"][0]
        assert all(each["bits"] == first["bits"] for ways in found.values() for each in ways), "bits differ"
        lines += [
            f"## {name}",
            "",
            f"{first['kept']:.0f} MiB of boundaries and their gradients; the same bits each way.",
            "",
        ]
        lines += [
            "| boundaries | seconds | processor seconds | measured peak, MiB | projected, MiB |",
            "|---|---|---|---|---|",
        ]
        lines += [row(found[way], way) for way in WAYS]
        lines += ["", *(f"{way}: {found[way][-1]['disk'].partition(': ')[2]}.\n" for way in list(WAYS)[1:])]
    Path(__file__).with_name("README.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()

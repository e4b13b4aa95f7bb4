"""What it costs and saves to store boundaries in bfloat16 or float16: gradient errors, memory, seconds.

    python -W ignore benchmarks/boundary_dtype/main.py            errors, memory and seconds of single steps
    python -W ignore benchmarks/boundary_dtype/main.py --plans    where boundaries go at gigapixel size; nothing is run

Errors are against whole-image autograd in float64. Every row of the first table is a process of its own; those of a
network use the same boundaries and tiles, so that only the stored dtype differs. Bytes of boundaries are without their
gradients, which are kept in the graph's dtype. Peaks are ``VmHWM`` of the whole process; processor seconds count all
threads.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import wholegrad as wg
from wholegrad.losses import bce_loss
from wholegrad.nets import unet4492
from wholegrad.plan.plan import Placement
from wholegrad.plan.storage import NARROW
from wholegrad.proof import Case, errors

MIB, GIB = 1 << 20, 1 << 30
STORED = ["float32", *NARROW]


class Network(NamedTuple):
    """A network, its loss, whether its target is a label map, and the boundaries (None: the planner's)."""

    make: Callable[[], nn.Module]
    loss: Any
    mapped: bool
    boundaries: list[str] | None = None


def logits_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.logits, target)


def resnet() -> nn.Module:
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic")
    return ResNetForImageClassification(config)


NETWORKS = {
    "published U-Net": Network(lambda: unet4492(seed=0), bce_loss, True, ["down1", "middle", "fuse1"]),
    "MONAI BasicUNet": Network(
        lambda: BasicUNet(2, 3, 1, features=(8, 8, 16, 16, 32, 8), norm="batch"), bce_loss, True
    ),
    "residual network": Network(resnet, logits_loss, False),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1024x1024", help="height x width (default %(default)s)")
    parser.add_argument("--tile", default="256x512", help="of every segment (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one that is not (default %(default)s)")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--plans", action="store_true", help="plan at gigapixel size instead")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)  # network, placement, stored dtype, folder
    return parser.parse_args()


def pair(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def data(network: Network, size: tuple[int, int]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The seeded network, an image ``(3, H, W)`` of noisy blobs, and its target: where they are dark, or class 1."""
    torch.manual_seed(0)
    model = network.make()
    coarse = torch.rand(1, 3, size[0] // 16, size[1] // 16)
    blobs = nn.functional.interpolate(coarse, size, mode="bilinear")[0]
    mask = (blobs.mean(0, keepdim=True) < 0.45).to(torch.uint8)
    return model, 0.7 * blobs + 0.3 * torch.rand(3, *size), mask if network.mapped else torch.tensor([1])


def planned(network: Network, case: tuple[Any, ...], args: argparse.Namespace, place: str, stored: str) -> wg.Plan:
    """A plan with this network's boundaries, or with those that the planner has chosen for float32."""
    model, image, target = case
    fixed = {"tile": pair(args.tile), "budget": "64GiB"}
    names = network.boundaries
    if names is None:
        first = wg.plan(model, network.loss, image, target, placement="host", **fixed)
        names = [first.graph.nodes[ref.node].name for ref in first.boundaries]
    chosen = {"boundaries": names, "placement": place, "boundary_dtype": NARROW.get(stored)}
    return wg.plan(model, network.loss, image, target, **chosen, **fixed)


def step(args: argparse.Namespace, name: str, place: str, stored: str, folder: Path) -> dict[str, float]:
    """Some steps: seconds, memory; the gradients go to a file."""
    network = NETWORKS[name]
    model, image, target = case = data(network, pair(args.size))
    plan = planned(network, case, args, place, stored)
    seconds, computed = [], []
    for _ in range(args.steps + 1):
        model.zero_grad()
        started, before = time.perf_counter(), time.process_time()
        loss = wg.backward(model, network.loss, image, target, plan=plan, seed=0)
        seconds.append(time.perf_counter() - started)
        computed.append(time.process_time() - before)
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    torch.save({"loss": loss, **grads}, folder / f"{name}.{place}.{stored}.pt")
    return {
        "bytes": sum(plan.stored_bytes(ref) for ref in plan.boundaries),
        "count": len(plan.boundaries),
        "projected": plan.projected,
        "peak": peak(),
        "seconds": statistics.median(seconds[1:]),
        "cpu": statistics.median(computed[1:]),
    }


def peak() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "the kernel reports no VmHWM"
    return int(found[1]) * 1024


def whole(args: argparse.Namespace, name: str, dtype: str, folder: Path) -> dict[str, float]:
    """Loss and gradients of whole-image autograd, into a file."""
    network = NETWORKS[name]
    model, image, target = data(network, pair(args.size))
    found = Case(model, network.loss, image, target, getattr(torch, dtype), 0).reference()
    torch.save({"loss": found.loss, **found.grads}, folder / f"{name}.whole.{dtype}.pt")
    return {}


def child(args: argparse.Namespace) -> None:
    name, place, stored, folder = args.child
    found = (
        whole(args, name, stored, Path(folder)) if place == "whole" else step(args, name, place, stored, Path(folder))
    )
    print(json.dumps(found))


def ask(args: argparse.Namespace, *what: str) -> dict[str, float]:
    """What a fresh process finds."""
    command = [sys.executable, "-W", "ignore", __file__, "--size", args.size, "--tile", args.tile]
    command += ["--steps", str(args.steps), "--child", *what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def error_columns(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Worst and median over the gradients, and the loss's, each relative to its tensor's largest element.

    ``together`` is the length of the difference of all gradients, as one vector, over the vector's length.
    """
    each = errors(found, wanted)
    loss = each.pop("loss")
    vectors = [torch.cat([side[name].double().flatten() for name in each]) for side in (found, wanted)]
    together = ((vectors[0] - vectors[1]).norm() / vectors[1].norm()).item()
    return {"worst": max(each.values()), "median": statistics.median(each.values()), "together": together, "loss": loss}


def show_errors(row: dict[str, float]) -> str:
    return " | ".join(f"{row[key]:.1e}" for key in ("worst", "median", "together", "loss"))


def steps_table(args: argparse.Namespace) -> dict[str, Any]:
    columns = ["network, boundaries in", "stored as", "boundaries (MiB)", "projected (MiB)", "peak (MiB)"]
    columns += ["seconds (of CPU)", "worst gradient's error", "median", "together", "loss"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in NETWORKS if args.only in name):
            for dtype in ("float64", "float32"):
                ask(args, name, "whole", dtype, folder)
            wanted = torch.load(f"{folder}/{name}.whole.float64.pt")
            row = error_columns(torch.load(f"{folder}/{name}.whole.float32.pt"), wanted)
            rows[f"{name}, whole image"] = row
            print(f"| {name}, whole image | | | | | | {show_errors(row)} |", flush=True)
            for place in ("host", "disk"):
                for stored in STORED:
                    row = ask(args, name, place, stored, folder)
                    row |= error_columns(torch.load(f"{folder}/{name}.{place}.{stored}.pt"), wanted)
                    rows[f"{name}, {place}, {stored}"] = row
                    sizes = " | ".join(f"{row[key] / MIB:.0f}" for key in ("bytes", "projected", "peak"))
                    times = f"{row['seconds']:.2f} ({row['cpu']:.2f})"
                    label = f"{name}, {place} ({row['count']})"
                    print(f"| {label} | {stored} | {sizes} | {times} | {show_errors(row)} |", flush=True)
    return rows


def plans_table() -> dict[str, Any]:
    """The planner's own choice at 16000 x 64000, for full-width networks in training mode."""
    shape, rows = (16000, 64000), {}
    image, mask = np.broadcast_to(np.uint8(0), (3, *shape)), np.broadcast_to(np.uint8(0), (1, *shape))
    print("| network, budget | stored as | boundaries in memory (GiB) | on disk (GiB) | projected (GiB) |")
    print("|---" * 5 + "|")
    cases = [("MONAI BasicUNet", BasicUNet(2, 3, 1, norm="batch"), bce_loss, mask, ("8GiB", "64GiB", "512GiB"))]
    cases += [("ResNet-50", ResNetForImageClassification(ResNetConfig()), logits_loss, torch.tensor([1]), ("64GiB",))]
    for name, model, loss, target, budgets in cases:
        for budget in budgets:
            for stored in STORED[:2]:
                plan = wg.plan(model, loss, image, target, budget=budget, boundary_dtype=NARROW.get(stored))
                held = dict.fromkeys(Placement, 0)
                for ref, place in plan.placements.items():
                    held[place] += plan.stored_bytes(ref)
                sizes = [held[Placement.HOST] / GIB, held[Placement.DISK] / GIB, plan.projected / GIB]
                rows[f"{name}, {budget}, {stored}"] = sizes
                print(f"| {name}, {budget} | {stored} | {' | '.join(f'{size:.1f}' for size in sizes)} |", flush=True)
    return rows


def main() -> int:
    args = arguments()
    if args.child:
        child(args)
        return 0
    print(json.dumps(plans_table() if args.plans else steps_table(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

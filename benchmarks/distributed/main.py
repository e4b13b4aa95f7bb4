"""One image over ranks: how much faster two are than one, and whether they send what plans say.

    python -W ignore benchmarks/distributed/main.py

Writes ``README.md`` beside this file. Two ranks of a Gloo group on this machine, one thread each, take steps together
and, in turn with them, one of the two takes the same step alone, on one thread too. Seconds are the least and the
median of some steps of each; other processes slow both down alike. ``--only measured`` or ``--only paper`` does half of
the work; the page is written once both halves are there.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import multiprocessing
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import wholegrad as wg
from wholegrad.given import given
from wholegrad.graph.capture import capture
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan import devices
from wholegrad.plan.bands import bands
from wholegrad.plan.devices import Apart
from wholegrad.plan.plan import show_bytes
from wholegrad.plan.planner import Request, make_plan
from wholegrad.plan.traffic import Link, traffic
from wholegrad.ranked import layout_of
from wholegrad.run.distributed.ranks import wire_of
from wholegrad.run.process import machine, peak_resident
from wholegrad.run.sources import raw_images

HERE = Path(__file__).parent
KEPT = HERE.parents[1] / "out" / "distributed"  # halves of the page
EVERY = ["down1", "down2", "middle", "up2", "fuse2", "up1", "head"]
FABRIC = Link(byte=1 / 20e9, message=2e-5)  # assumed: 200 Gbit/s at four fifths, and a round of NCCL's
MODEL = {"halos": "halos", "sums": "sums", "parameters": "gradients", "control": "control"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="steps of each kind, after one (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the images' edges (default %(default)s)")
    parser.add_argument("--projected", default="", help="networks of the projection whose name contains this")
    parser.add_argument("--only", choices=("measured", "paper"), help="half of the work")
    return parser.parse_args()


def pixels(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Random bytes and labels in blocks, made row by row from a few rows."""
    rng = np.random.default_rng(0)
    some = rng.integers(0, 256, (3, 64, width), np.uint8)
    image = np.ascontiguousarray(np.tile(some, (1, -(-height // 64), 1))[:, :height])
    coarse = rng.integers(0, 2, (-(-height // 16), -(-width // 16)), np.uint8)
    return image, np.ascontiguousarray(coarse.repeat(16, 0).repeat(16, 1)[None, :height, :width])


def basic_unet() -> nn.Module:
    from monai.networks.nets import BasicUNet

    return BasicUNet(2, 3, 2, features=(16, 16, 32, 64, 128, 16), norm=("batch", {})).train()


def published() -> nn.Module:
    return unet4492(seed=0)


Case = tuple[str, Callable[[], nn.Module], Any, tuple[int, int], dict[str, Any]]
CASES: list[Case] = [
    ("published network, one pass", published, LOSSES["bce"], (4000, 8000), {}),
    ("the same, every module's output kept", published, LOSSES["bce"], (4000, 8000), {"boundaries": EVERY}),
    ("BasicUNet with batch norm", basic_unet, nn.CrossEntropyLoss(), (512, 1024), {}),
]


def measured(case: Case, rank: int, times: int, scale: float) -> dict[str, Any]:
    """One case on this rank."""
    name, make, loss, size, fixed = case
    torch.manual_seed(0)
    height, width = (round(edge * scale) for edge in size)
    image, labels = pixels(height, width)
    target: Any = labels
    if isinstance(loss, nn.CrossEntropyLoss):
        image, target = image[None], torch.from_numpy(labels).long()
    model, group = make(), wg.open_ranks(dist.group.WORLD).measured()
    start = copy.deepcopy(model.state_dict())
    options = {"budget": "3GiB", "strategy": "stream", **fixed}
    plans = {1: wg.plan(model, loss, image, target, **options)}
    plans[2] = wg.plan(model, loss, image, target, ranks=group, **{k: v for k, v in options.items() if k != "strategy"})
    wire, walls, busy = wire_of(dist.group.WORLD, 600.0), {1: [], 2: []}, {1: [], 2: []}
    sent = waited = 0.0
    for time_ in range(times + 1):
        for count in (2, 1):
            dist.barrier()
            if count == 1 and rank == 1:
                continue
            before, waits = wire.traffic.sent, wire.traffic.seconds
            started, used = time.perf_counter(), time.process_time()
            wg.backward(model, loss, image, target, plan=plans[count], group=group if count == 2 else None)
            model.zero_grad()
            model.load_state_dict(start)  # statistics of norms, which the step alone moves on one rank only
            if time_:
                walls[count].append(time.perf_counter() - started)
                busy[count].append(time.process_time() - used)
            if count == 2:
                sent, waited = wire.traffic.sent - before, wire.traffic.seconds - waits
    model_of = traffic(plans[2], rank)
    return {
        "name": name, "size": [height, width], "walls": walls, "busy": busy, "sent": sent, "waited": waited,
        "model": vars(model_of) | {"total": model_of.total}, "link": vars(group.link),
        "seconds": [plans[1].seconds, plans[2].seconds], "peak": peak_resident(), "projected": plans[2].projected,
        "bands": str(plans[2].bands),
    }  # fmt: skip


def ranked(rank: int, port: int, folder: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=900))
    found = [measured(case, rank, args.times, args.scale) for case in CASES]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def on_two_ranks(args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """For each case what both ranks measured."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        runs = [fork.Process(target=ranked, args=(rank, port, Path(folder), args)) for rank in range(2)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        both = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
    return [list(each) for each in zip(*both, strict=True)]


def scaling(cases: list[list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| case | image | one rank (s) | two ranks (s) | cores that these got | processor of each over one's |",
        "|---|---|---|---|---|---|",
    ]
    for mine, other in cases:
        walls = {count: mine["walls"][str(count)] for count in (1, 2)}
        figures = [f"{min(walls[k]):.2f} / {statistics.median(walls[k]):.2f}" for k in (1, 2)]
        used = sum(mine["busy"]["1"]), sum(mine["busy"]["2"]) + sum(other["busy"]["2"])
        cores = " / ".join(f"{busy / sum(walls[count]):.2f}" for count, busy in zip((1, 2), used, strict=True))
        busiest = max(min(each["busy"]["2"]) for each in (mine, other)) / min(mine["busy"]["1"])
        size = " x ".join(map(str, mine["size"]))
        lines.append(f"| {mine['name']} | {size} | {figures[0]} | {figures[1]} | {cores} | {busiest:.2f} |")
    return lines


def volume(cases: list[list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| case | sent a step by rank 0 | the model says | of which halos | rounds | projected peak | measured peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for mine, other in cases:
        model = mine["model"]
        lines.append(
            f"| {mine['name']} | {show_bytes(mine['sent'])} | {show_bytes(model['total'])} "
            f"({mine['sent'] / model['total'] - 1:+.1%}) | {show_bytes(model['halos'])} | {model['rounds']} "
            f"| {show_bytes(mine['projected'])} | {show_bytes(other['peak'])} |"
        )
    return lines


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=2)).train()


def logits_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.logits, target)


def projection(only: str) -> list[str]:
    """Plans on paper for GPUs whose rates nobody measured here."""
    lines = [
        "| network | image | GPUs | blocks | compute (s) | each sends | talk (s) | step (s) | efficiency | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases: list[tuple[str, Callable[[], nn.Module], Any, int, int]] = [
        ("published U-Net", published, LOSSES["bce"], 16000, 64000),
        ("ResNet-50, batch norm", resnet50, logits_loss, 16384, 16384),
    ]
    for name, make, loss, height, width in (case for case in cases if only in case[0]):
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        target: Any = np.broadcast_to(np.uint8(0), (1, height, width)) if make is published else torch.tensor(1)
        inputs = given(image, target, torch.float32)
        graph = capture(make(), loss, inputs.inputs)
        alone = 0.0
        for count in (1, 8, 64, 512):
            shared = bands((height, width), layout_of((height, width), count))
            request = Request(
                60 << 30, 1 << 30, True, 2, raw=raw_images(graph, inputs.sources), rates=devices.ASSUMED,
                apart=Apart("cuda:0", 2), bands=shared, link=FABRIC,
            )  # fmt: skip
            made = make_plan(graph, request)
            sent = max((traffic(made, rank) for rank in shared.busiest), key=lambda each: each.total)
            alone = alone or made.seconds
            down, across = shared.shape
            figures = (
                f"{made.seconds - made.talk:.3f} | {show_bytes(sent.total) if count > 1 else '-'} | {made.talk:.4f}"
            )
            whole = f"{made.seconds:.3f} | {alone / made.seconds / count:.0%} | {show_bytes(made.projected)}"
            lines.append(f"| {name} | {height} x {width} | {count} | {down} x {across} | {figures} | {whole} |")
            print(lines[-1], flush=True)
    return lines


def page(cases: list[list[dict[str, Any]]], paper: list[str]) -> str:
    link, times = cases[0][0]["link"], len(cases[0][0]["walls"]["1"])
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    parts = [
        "# One image over ranks",
        "",
        *(__doc__ or "").strip().splitlines(),
        "",
        f"Measured on {datetime.date.today()}: {machine()}; {versions}; float32; {times} steps each after one.",
        "",
        "## Two ranks against one, one thread each",
        "",
        *scaling(cases),
        "",
        "Seconds are the least and the median. Where two ranks got fewer than two cores (processor time of all over",
        "the seconds that it took), other work had the rest, and seconds say little of scaling. The last column does:",
        "the processor time of the busier of two ranks over that of one rank alone, where 0.5 would be a fair half.",
        "What is above it is halos that are computed twice, messages, and work that every rank does alike.",
        "",
        "## What is sent, and what it is sent with",
        "",
        *volume(cases),
        "",
        "The measured peak is that of rank 1, which takes no step alone: of its process so far, case after case.",
        f"Between the two ranks a byte took {link['byte'] * 1e9:.2f} ns and a round {link['message'] * 1e6:.0f} us "
        "(first case).",
        "",
        *(HERE / "projection.md").read_text().splitlines(),
        "",
        *paper,
    ]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    args = arguments()
    KEPT.mkdir(parents=True, exist_ok=True)
    if args.only != "paper":
        import monai.networks.nets  # noqa: F401  (once, before there are ranks)

        (KEPT / "measured.json").write_text(json.dumps(on_two_ranks(args)))
    if args.only != "measured":
        (KEPT / "paper.json").write_text(json.dumps(projection(args.projected)))
    if all((KEPT / f"{name}.json").exists() for name in ("measured", "paper")):
        cases, paper = (json.loads((KEPT / f"{name}.json").read_text()) for name in ("measured", "paper"))
        (HERE / "README.md").write_text(page(cases, paper))


if __name__ == "__main__":
    main()

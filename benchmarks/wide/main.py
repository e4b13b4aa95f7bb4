"""One exact step of MONAI's wide networks: wholegrad in a fifth of the memory against whole-image PyTorch.

    python benchmarks/wide/main.py --size 2048x2048 --steps 3 [--write]

Needs MONAI. Networks are in training mode, in float32, with a mean binary cross-entropy over every pixel. Whole-image
PyTorch runs in both memory layouts, with the allocator told to keep what it has. Every contender is a process of its
own; times are medians of the steps after one that is not timed. *Activation memory* is the peak of the steps less what
was resident before the first. wholegrad's budget is what was resident and reserved, and ``--share`` of the activation
memory that whole-image PyTorch took. ``--from HxW`` takes whole-image PyTorch's time and memory from the kept result of
that size, multiplied by pixels, where it cannot run at ``--size``. Gradients are compared tensor by tensor.

Every row is kept as JSON under ``out/wide``; the table is made from all, and ``--write`` puts it into this
folder's README.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import BasicUNet, UNet
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

MIB = 1 << 20
LOAD = os.getloadavg()[0]  # before this process did anything
HERE = Path(__file__).resolve().parent
MARKS = ("<!-- results: written by main.py --write -->", "<!-- end of results -->")
WAYS = ("planar", "channels_last")  # memory layouts of whole-image PyTorch
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 30),
}  # the best of those tried for whole-image PyTorch
NETWORKS = {
    "BasicUNet": lambda: BasicUNet(spatial_dims=2, in_channels=3, out_channels=1),
    "UNet": lambda: UNet(
        spatial_dims=2, in_channels=3, out_channels=1,
        channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2,
    ),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2048x2048", help="height x width in pixels (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default %(default)s)")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="which (default %(default)s)")
    parser.add_argument("--share", type=float, default=0.195, help="of the activation memory (default %(default)s)")
    parser.add_argument("--from", dest="scaled", help="size whose kept whole-image result is scaled by pixels")
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / "out" / "wide", help="of results kept")
    parser.add_argument("--write", action="store_true", help="write the table into this folder's README")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # from here on: what a child is told
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def status(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM``."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"the kernel reports no {field}"
    return int(found[1]) * 1024


def problem(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Network, image ``(3, H, W)`` and target ``(1, 1, H, W)``, the same in every process."""
    height, width = (int(side) for side in args.size.split("x"))
    torch.manual_seed(0)
    net = NETWORKS[args.networks]().train()
    return net, torch.rand(3, height, width), (torch.rand(1, 1, height, width) > 0.5).float()


def measure(net: nn.Module, step: Any, steps: int) -> dict[str, Any]:
    """Median seconds of a step, and memory before and at the peak."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds, cpu = [], []
    for _ in range(steps + 1):
        net.zero_grad(set_to_none=True)
        started, used = time.perf_counter(), time.process_time()
        loss = step().item()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return {
        "seconds": statistics.median(seconds[1:]),
        "cpu": statistics.median(cpu[1:]),
        "every": [round(each, 2) for each in seconds],
        "load": round(LOAD, 1),
        "activations": status("VmHWM") - before,
        "peak": status("VmHWM"),
        "loss": loss,
    }


def whole(args: argparse.Namespace, channels_last: bool) -> dict[str, Any]:
    """Whole-image autograd. A small step first loads libraries."""
    net, image, target = problem(args)
    batch = image.unsqueeze(0)
    if channels_last:
        net, batch = net.to(memory_format=torch.channels_last), batch.contiguous(memory_format=torch.channels_last)
    binary_cross_entropy_with_logits(net(batch[..., :64, :64]), target[..., :64, :64]).backward()

    def step() -> torch.Tensor:
        loss = binary_cross_entropy_with_logits(net(batch), target)
        loss.backward()
        return loss.detach()

    found = measure(net, step, args.steps)
    save(net, args)
    return found


def wholegrad(args: argparse.Namespace, allowed: int) -> dict[str, Any]:
    """Model and loss as they are, with ``allowed`` bytes beyond what this process has and libraries take."""
    import wholegrad as wg
    from wholegrad.plan.memory import LIBRARIES

    net, image, target = problem(args)
    wg.backward(net, binary_cross_entropy_with_logits, image[:, :64, :64], target[..., :64, :64])  # loads libraries
    budget = status("VmRSS") + LIBRARIES // 4 + allowed
    plan = wg.plan(net, binary_cross_entropy_with_logits, image, target, budget=budget)
    print(plan, file=sys.stderr)
    found = measure(
        net, lambda: wg.backward(net, binary_cross_entropy_with_logits, image, target, plan=plan), args.steps
    )
    save(net, args)
    return {**found, "budget": budget, "projected": plan.projected, "predicted": plan.seconds}


def save(net: nn.Module, args: argparse.Namespace) -> None:
    if args.gradients:
        torch.save({name: p.grad for name, p in net.named_parameters()}, args.gradients)


def run(args: argparse.Namespace, name: str, child: str, gradients: Path) -> dict[str, Any]:
    """What one contender measured, in a fresh process."""
    command = [sys.executable, __file__, "--child", child, "--networks", name, "--gradients", str(gradients)]
    command += ["--size", args.size, "--steps", str(args.steps)]
    environment = {**os.environ, **({} if child.startswith("wholegrad") else KEEP_MEMORY)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        return {"error": f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {child}: {found['every']} s, {found['activations'] / MIB:.0f} MiB", file=sys.stderr, flush=True)
    return found


def largest(grads: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: grad.abs().max().item() for name, grad in grads.items()}


def worst(row: dict[str, Any], folder: Path, mine: Path) -> None:
    """Add the worst tensor's largest difference over its largest element, of wholegrad and of PyTorch's other layout.

    A bias before a norm has no gradient but rounding: tensors below 1e-5 of the largest are left out.
    """
    planar, last, here = (torch.load(path) for path in (*(folder / f"{row['network']}-{way}.pt" for way in WAYS), mine))
    sizes = largest(planar)
    kept = [name for name, size in sizes.items() if size > 1e-5 * max(sizes.values())]

    def furthest(found: dict[str, torch.Tensor]) -> float:
        return max((found[name] - planar[name]).abs().max().item() / sizes[name] for name in kept)

    row["difference"], row["between_layouts"] = furthest(here), furthest(last)
    row["left_out"] = sorted(set(sizes) - set(kept))


def pixels(size: str) -> int:
    height, width = (int(side) for side in size.split("x"))
    return height * width


def whole_image(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Both layouts of whole-image PyTorch: measured, or scaled from another size."""
    if not args.scaled:
        return {layout: run(args, name, layout, folder / f"{name}-{layout}.pt") for layout in WAYS}
    kept = json.loads((args.folder / f"{name}-{args.scaled}.json").read_text())
    by = pixels(args.size) / pixels(args.scaled)
    numbers = ("seconds", "cpu", "activations")
    return {
        layout: kept[layout] | {number: kept[layout][number] * by for number in numbers}
        for layout in WAYS
        if "error" not in kept[layout]
    }


def compare(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """One network: whole-image PyTorch in both layouts, then wholegrad with a share of the better one's memory."""
    layouts = whole_image(args, name, folder)
    fit = {layout: found for layout, found in layouts.items() if "error" not in found}
    best = min(fit, key=lambda layout: fit[layout]["seconds"])
    activations = min(found["activations"] for found in fit.values())
    mine = folder / f"{name}-wholegrad.pt"
    row = {"network": name, "size": args.size, "scaled": args.scaled, **layouts, "best": best}
    row["wholegrad"] = run(args, name, f"wholegrad:{int(activations * args.share)}", mine)
    row["activations"] = activations
    if "error" not in row["wholegrad"]:
        row["ratio"] = row["wholegrad"]["seconds"] / fit[best]["seconds"]
        row["cpu_ratio"] = row["wholegrad"]["cpu"] / fit[best]["cpu"]
        if not args.scaled and len(fit) == len(WAYS):
            worst(row, folder, mine)
    return row


HEAD = (
    "network, size", "PyTorch s/step (planar, channels_last)", "activations (MiB)", "wholegrad s/step",
    "its memory (MiB)", "share", "time ratio", "ratio of processor time", "worst difference", "load before",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    layouts = [row[layout] for layout in WAYS if layout in row]
    mine, about = row["wholegrad"], "about " if row["scaled"] else ""
    first = [
        f"{row['network']}, {row['size'].replace('x', ' x ')}",
        about + ", ".join(f"{each['seconds']:.1f}" if "seconds" in each else each["error"] for each in layouts),
        f"{about}{row['activations'] / MIB:.0f}",
    ]
    if "error" in mine:
        return [*first, mine["error"], *[""] * (len(HEAD) - 4)]
    loads = [each["load"] for each in (*layouts, mine) if "load" in each]
    return [
        *first,
        f"{mine['seconds']:.1f} ({', '.join(f'{each:.1f}' for each in mine['every'][1:])})",
        f"{mine['activations'] / MIB:.0f}",
        f"{mine['activations'] / row['activations']:.2f}",
        f"{about}{row['ratio']:.2f}",
        f"{about}{row['cpu_ratio']:.2f}",
        f"{row['difference']:.1e} (between layouts {row['between_layouts']:.1e})" if "difference" in row else "",
        ", ".join(f"{each:.1f}" for each in loads),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    ordered = sorted(rows, key=lambda row: (row["network"], pixels(row["size"])))
    lines = [HEAD, ["---"] * len(HEAD), *(cells(row) for row in ordered)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(page: Path, text: str) -> None:
    """Put the table between its marks."""
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main() -> int:
    args = arguments()
    if args.child:
        kind, _, allowed = args.child.partition(":")
        found = wholegrad(args, int(allowed)) if kind == "wholegrad" else whole(args, kind == "channels_last")
        print(json.dumps(found))
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name in (each for each in args.networks.split(",") if each):
            row = compare(args, name, Path(scratch))
            failed |= "error" in row["wholegrad"]
            (args.folder / f"{name}-{args.size}.json").write_text(json.dumps(row, indent=1))
    text = table([json.loads(each.read_text()) for each in sorted(args.folder.glob("*.json"))])
    print(text)
    if args.write:
        write(HERE / "README.md", text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

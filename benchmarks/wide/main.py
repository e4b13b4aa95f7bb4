"""One exact step of MONAI's wide networks: wholegrad in a fifth of the memory against whole-image PyTorch.

    python benchmarks/wide/main.py --size 2048x2048 --steps 3

Needs MONAI. Networks are in training mode, in float32, with a mean binary cross-entropy over every pixel. Whole-image
PyTorch runs in both memory layouts, with the allocator told to keep what it has. Every contender is a process of its
own; times are medians of the steps after one that is not timed. *Activation memory* is the peak of the steps less what
was resident before the first. wholegrad's budget is what was resident and reserved, and ``--share`` of the activation
memory that whole-image PyTorch took (or, where ``--activations`` names bytes a pixel, of those). Gradients are compared
tensor by tensor.

Prints a table; the last line is one JSON object.
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
    parser.add_argument("--share", type=float, default=0.2, help="of the activation memory (default %(default)s)")
    parser.add_argument("--activations", type=float, help="bytes a pixel, where whole-image PyTorch is not to be run")
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
    seconds = []
    for _ in range(steps + 1):
        net.zero_grad(set_to_none=True)
        started = time.perf_counter()
        loss = step().item()
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds[1:]),
        "every": [round(each, 2) for each in seconds],
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


def compare(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """One network: whole-image PyTorch in both layouts, then wholegrad with a share of the better one's memory."""
    pixels = int(args.size.split("x")[0]) * int(args.size.split("x")[1])
    layouts = {} if args.activations else {
        layout: run(args, name, layout, folder / f"{name}-{layout}.pt") for layout in WAYS
    }  # fmt: skip
    fit = {layout: found for layout, found in layouts.items() if "error" not in found}
    best = min(fit, key=lambda layout: fit[layout]["seconds"], default=None)
    activations = args.activations * pixels if args.activations else min(f["activations"] for f in fit.values())
    mine = folder / f"{name}-wholegrad.pt"
    row = {"network": name, "size": args.size, **layouts, "best": best}
    row["wholegrad"] = run(args, name, f"wholegrad:{int(activations * args.share)}", mine)
    row["bytes_per_pixel"] = activations / pixels
    if best and "error" not in row["wholegrad"]:
        row["ratio"] = row["wholegrad"]["seconds"] / fit[best]["seconds"]
        if len(fit) == len(layouts) == 2:
            worst(row, folder, mine)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | PyTorch s/step (planar, channels_last) | activations (MiB) | wholegrad s/step | its memory (MiB) "
        "| share | time ratio | worst difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mine = row["wholegrad"]
        layouts = [row[layout] for layout in WAYS if layout in row]
        cells = [row["network"], ", ".join(f"{f['seconds']:.1f}" if "seconds" in f else f["error"] for f in layouts)]
        pixels = int(row["size"].split("x")[0]) * int(row["size"].split("x")[1])
        whole_bytes = row["bytes_per_pixel"] * pixels
        cells.append(f"{whole_bytes / MIB:.0f}")
        if "error" in mine:
            cells.append(mine["error"])
        else:
            cells += [f"{mine['seconds']:.1f}", f"{mine['activations'] / MIB:.0f}"]
            cells.append(f"{mine['activations'] / whole_bytes:.2f}")
            cells += (
                [f"{row['ratio']:.2f}", f"{row.get('difference', float('nan')):.1e}"] if "ratio" in row else ["", ""]
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    args = arguments()
    if args.child:
        kind, _, allowed = args.child.partition(":")
        found = wholegrad(args, int(allowed)) if kind == "wholegrad" else whole(args, kind == "channels_last")
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        rows = [compare(args, name, Path(scratch)) for name in args.networks.split(",")]
    print(table(rows))
    print(json.dumps({"size": args.size, "steps": args.steps, "share": args.share, "rows": rows}))
    return 1 if any("error" in row["wholegrad"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""One exact step of ResNet-18 with a slide label: wholegrad, lightstream and whole-image PyTorch in one run.

    python benchmarks/peers/main.py --size 4096x4096 --steps 3

Every contender runs in a process of its own with the same weights and the same 8-bit image. After one step each that is
not timed they take turns, so that what else the machine does falls on all alike. Peaks are ``VmHWM``: of the whole
process, and of its steps alone. Gradients are compared, tensor by tensor, with whole-image autograd in float64.

Prints a table; the last line is one JSON object.
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
from pathlib import Path
from typing import Any

import numpy as np
import steps
import torch
from network import classifier, smooth_image

MIB = 1 << 20
Gradients = dict[str, torch.Tensor]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4096x4096", help="height x width in pixels (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default %(default)s)")
    parser.add_argument("--peers", default="pytorch,lightstream,wholegrad", help="which to run (default %(default)s)")
    parser.add_argument("--tiles", default="2048,2560", help="lightstream's tiles (default %(default)s)")
    parser.add_argument("--budgets", default="", help="wholegrad's, with commas (default: each of lightstream's peaks)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--train-norms", action="store_true", help="train the norms' scales and shifts too")
    parser.add_argument("--keep", type=Path, help="folder for image and gradients, used again (default: temporary)")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # from here on: what a child is told
    parser.add_argument("--option", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def peak() -> int:
    """The most bytes that this process had in memory, since its start or since :func:`reset_peak`."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "the kernel reports no VmHWM"
    return int(found[1]) * 1024


def reset_peak() -> None:
    """Let ``VmHWM`` start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def make_step(args: argparse.Namespace, model: Any, image: np.ndarray, dtype: torch.dtype) -> steps.Step:
    if args.peer == "lightstream":
        return steps.lightstream(model, image, dtype, int(args.option))
    if args.peer == "wholegrad":
        return steps.wholegrad(model, image, args.option)
    return (steps.checkpointed if args.peer == "reference" else steps.pytorch)(model, image, dtype)


def timed(step: steps.Step, model: Any) -> dict[str, float]:
    """One step: seconds on the clock and of all threads, the loss, and the peak since :func:`reset_peak`."""
    model.zero_grad(set_to_none=True)
    started, computed = time.perf_counter(), time.process_time()
    loss = step().item()
    seconds, cpu = time.perf_counter() - started, time.process_time() - computed
    return {"seconds": seconds, "cpu": cpu, "loss": loss, "peak": peak()}


def child(args: argparse.Namespace) -> None:
    """One contender: a step for each line that comes in, answered by a line; gradients go to a file."""
    dtype = getattr(torch, args.dtype)
    image = np.load(args.keep / "image.npy")
    model = classifier(args.train_norms).to(dtype)
    step = make_step(args, model, image, dtype)
    print(json.dumps({"peak": peak(), "threads": torch.get_num_threads()}), flush=True)
    reset_peak()
    for _ in sys.stdin:
        found = timed(step, model)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save(grads, gradient_file(args.keep, args.peer, args.option))
        print(json.dumps(found), flush=True)


def gradient_file(folder: Path, peer: str, option: str) -> Path:
    return folder / f"{peer}{option}.pt"


class Contender:
    """A fresh process that takes steps on demand, and what it measured; ``error`` once it has failed."""

    def __init__(self, args: argparse.Namespace, peer: str, option: str = "") -> None:
        self.peer, self.option = peer, option
        self.error: str | None = None
        self.steps: list[dict[str, float]] = []
        dtype = "float64" if peer == "reference" else args.dtype
        command = [sys.executable, __file__, "--peer", peer, "--option", option, "--keep", str(args.keep)]
        command += ["--dtype", dtype, *(["--train-norms"] if args.train_norms else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.setup = self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.error = f"exit status {self.process.wait()}"
            return {}
        found: dict[str, float] = json.loads(line)
        return found

    def step(self) -> None:
        """Take one step, and wait for it."""
        if self.error is not None:
            return
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        if found := self.answer():
            self.steps.append(found)
            print(f"{self.name}: {found['seconds']:.1f} s, {found['cpu']:.1f} s of CPU, ", end="", file=sys.stderr)
            print(f"{found['peak'] / MIB:.0f} MiB", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if (status := self.process.wait()) and self.error is None:
            self.error = f"exit status {status}"

    @property
    def name(self) -> str:
        return f"{self.peer} {self.option}".strip()

    @property
    def step_peak(self) -> int:
        """The most bytes during steps; setting up does not count."""
        return int(self.steps[-1]["peak"])

    def row(self) -> dict[str, Any]:
        """What it measured; the first step is not among those timed, unless it is the only one."""
        if self.error is not None:
            return {"peer": self.peer, "option": self.option, "error": self.error}
        kept = self.steps[1:] or self.steps
        return {
            "peer": self.peer,
            "option": self.option,
            "seconds": statistics.median(step["seconds"] for step in kept),
            "cpu_seconds": statistics.median(step["cpu"] for step in kept),
            "every_second": [round(step["seconds"], 1) for step in self.steps],
            "every_cpu_second": [round(step["cpu"], 1) for step in self.steps],
            "step_peak_bytes": self.step_peak,
            "peak_bytes": max(int(self.setup["peak"]), self.step_peak),
            "loss": self.steps[-1]["loss"],
            "threads": self.setup["threads"],
        }


def kind(name: str, grad: torch.Tensor) -> str:
    """What a parameter is: errors are told apart by it."""
    return "head" if name.startswith("head") else ("conv" if grad.dim() == 4 else "norm")


def errors(found: Gradients, wanted: Gradients) -> dict[str, float]:
    """Of each tensor: largest absolute difference over the largest absolute element wanted."""
    return {
        name: ((found[name].double() - grad).abs().max() / grad.abs().max()).item() if name in found else float("inf")
        for name, grad in wanted.items()
    }


def judge(folder: Path, row: dict[str, Any]) -> None:
    """Add the worst relative error of each kind of tensor, and which tensor it is."""
    wanted: Gradients = torch.load(gradient_file(folder, "reference", ""))
    found: Gradients = torch.load(gradient_file(folder, row["peer"], row["option"]))
    each = errors(found, wanted)
    worst: dict[str, tuple[float, str]] = {}
    for name, error in each.items():
        of = kind(name, wanted[name])
        worst[of] = max(worst.get(of, (0.0, "")), (error, name))
    row["errors"] = {of: error for of, (error, _) in worst.items()}
    row["worst_tensors"] = {of: name for of, (_, name) in worst.items()}


def reference(args: argparse.Namespace) -> None:
    """Gradients in float64 by whole-image autograd, in a file."""
    if gradient_file(args.keep, "reference", "").exists():
        return
    found = Contender(args, "reference")
    found.step()
    found.finish()
    if found.error is not None:
        sys.exit("the float64 reference failed; see above")


def budgets(args: argparse.Namespace, streamed: list[Contender]) -> list[str]:
    """Those asked for, or what lightstream's steps took at most with each of its tiles."""
    asked = [budget for budget in args.budgets.split(",") if budget]
    return asked or [f"{one.step_peak // MIB}MiB" for one in streamed if one.error is None]


def start(args: argparse.Namespace, peer: str, option: str = "") -> Contender:
    """A contender that has taken its first step."""
    found = Contender(args, peer, option)
    found.step()
    return found


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The reference; a first step of each contender; then rounds of timed steps, one of each contender in each."""
    reference(args)
    peers = args.peers.split(",")
    streamed = [start(args, "lightstream", tile) for tile in args.tiles.split(",") if "lightstream" in peers]
    mine = [start(args, "wholegrad", budget) for budget in budgets(args, streamed) if "wholegrad" in peers]
    contenders = streamed + mine + ([start(args, "pytorch")] if "pytorch" in peers else [])
    for _ in range(args.steps):
        for contender in contenders:
            contender.step()
    for contender in contenders:
        contender.finish()
    rows = [contender.row() for contender in contenders]
    for row in rows:
        if "error" not in row:
            judge(args.keep, row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | seconds a step | of CPU | peak, steps (MiB) | peak, process (MiB) | worst gradient error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row['peer']} {row['option']}".strip()
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | |")
            continue
        worst = f"{max(row['errors'].values()):.1e}"
        memory = f"{row['step_peak_bytes'] / MIB:.0f} | {row['peak_bytes'] / MIB:.0f}"
        lines.append(f"| {name} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {memory} | {worst} |")
    return "\n".join(lines)


def main() -> int:
    args = arguments()
    if args.peer:
        child(args)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        args.keep = args.keep or Path(scratch)
        args.keep.mkdir(parents=True, exist_ok=True)
        height, width = (int(side) for side in args.size.split("x"))
        if not (args.keep / "image.npy").exists():
            np.save(args.keep / "image.npy", smooth_image(height, width))
        rows = run_all(args)
    print(table(rows))
    print(json.dumps({"size": args.size, "dtype": args.dtype, "train_norms": args.train_norms, "rows": rows}))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

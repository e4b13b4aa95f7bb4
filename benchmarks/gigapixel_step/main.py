"""One exact training step of the 4492-parameter U-Net on a gigapixel slide: seconds, peak memory, and a second plan.

    python benchmarks/gigapixel_step/main.py --size 16000x64000 --budget 1.5GiB --steps 3

Slide and mask are made once (``wholegrad synth``, in a process of its own) and read from disk in every step. Steps are
real: gradients, then Adam. Before the first, the gradients of the same weights under another plan (other tiles, another
boundary) are compared with it, tensor by tensor. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import wholegrad as wg
from wholegrad.graph.geometry import Box
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan.plan import show_bytes
from wholegrad.run.process import peak_resident
from wholegrad.run.reader import MapReader
from wholegrad.slide.arrays import open_npy

TOLERANCE = 1e-4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="16000x64000", help="height x width in pixels (default %(default)s)")
    parser.add_argument("--budget", default="1.5GiB", help="whole process (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default %(default)s)")
    parser.add_argument("--loss", default="bce", choices=sorted(LOSSES))
    parser.add_argument("--source", default="jpeg", choices=["jpeg", "raw"], help="slide as JPEG TIFF, or raw bytes")
    parser.add_argument("--data", type=Path, default=Path("out/gigapixel_step"), help="where slides are kept")
    parser.add_argument("--skip-check", action="store_true", help="leave out the second plan")
    return parser.parse_args()


def make_slide(folder: Path, size: str) -> tuple[Path, Path]:
    """The synthetic slide and its mask; painted if they are not there yet."""
    slide, mask = folder / f"{size}.tif", folder / f"{size}.mask.tif"
    if not (slide.exists() and mask.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "wholegrad", "synth", "--size", size, "--seed", "1"]
        subprocess.run([*command, "--out", str(slide), "--mask", str(mask)], check=True)
    return slide, mask


def raw_copy(reader: MapReader, path: Path) -> Path:
    """The same pixels uncompressed in a ``.npy`` file, made once."""
    if not path.exists():
        aside = path.with_suffix(".part")
        c, h, w = reader.shape
        with aside.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (c, h, w)}
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            for y in range(0, h, 512):
                band = np.ascontiguousarray(reader.read(Box(y, min(y + 512, h), 0, w)))
                for i in range(c):
                    file.seek(start + (i * h + y) * w)
                    file.write(band[i].tobytes())
        aside.rename(path)
    return path


def open_inputs(args: argparse.Namespace) -> tuple[MapReader, MapReader]:
    slide_path, mask_path = make_slide(args.data, args.size)
    if args.source == "raw":
        raw = [args.data / f"{args.size}.{name}.npy" for name in ("image", "mask")]
        if not all(path.exists() for path in raw):  # in a process of its own, so that its memory is not counted
            code = "import sys; sys.path.insert(0, sys.argv[1]); import main; main.make_raw(*sys.argv[2:])"
            here = str(Path(__file__).parent)
            subprocess.run(
                [sys.executable, "-c", code, here, str(slide_path), str(mask_path), *map(str, raw)], check=True
            )
        return open_npy(raw[0]), open_npy(raw[1])
    slide = wg.open_slide(slide_path)
    return slide, wg.open_mask(mask_path, like=slide)


def make_raw(slide_path: str, mask_path: str, image: str, mask: str) -> None:
    with wg.open_slide(slide_path) as slide:
        raw_copy(slide, Path(image))
        raw_copy(wg.open_mask(mask_path, like=slide), Path(mask))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The worst relative difference of any gradient; every one must be there and finite."""
    assert found.keys() == other.keys() and len(found) == 16, "a gradient is missing"
    assert all(torch.isfinite(grad).all() for grad in (*found.values(), *other.values())), "a gradient is not finite"
    return max(((found[name] - other[name]).abs().max() / other[name].abs().max()).item() for name in found)


def main() -> int:
    args = arguments()
    image, target = open_inputs(args)
    loss_fn = LOSSES[args.loss]
    model = unet4492(seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    started = time.perf_counter()
    plan = wg.plan(model, loss_fn, image, target, budget=args.budget)
    print(plan)
    print(f"\nplanned in {time.perf_counter() - started:.1f} s; {torch.get_num_threads()} threads; {args.source} input")
    other = None
    if not args.skip_check:
        tile = (plan.segments[-1].tile[0] // 2 + 24, plan.segments[-1].tile[1] // 2 + 40)
        second = wg.plan(model, loss_fn, image, target, budget=args.budget, tile=tile, boundaries=["middle"])
        started = time.perf_counter()
        wg.backward(model, loss_fn, image, target, plan=second)
        print(
            f"second plan, tiles of {tile[0]} x {tile[1]}, one boundary: {time.perf_counter() - started:.1f} s",
            flush=True,
        )
        other = gradients(model)
    seconds, losses = [], []
    difference = None
    for step in range(args.steps):
        optimizer.zero_grad()
        started = time.perf_counter()
        loss = wg.backward(model, loss_fn, image, target, plan=plan)
        if step == 0 and other is not None:
            difference = compare(gradients(model), other)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
        print(
            f"step {step + 1}: loss {losses[-1]:.6f}, {seconds[-1]:.1f} s, peak {show_bytes(peak_resident())}",
            flush=True,
        )
    rows = [
        ("seconds a step (median)", f"{statistics.median(seconds):.1f}"),
        ("peak of the whole process", show_bytes(peak_resident())),
        ("projected peak", show_bytes(plan.projected)),
        ("whole-image autograd would need", show_bytes(plan.whole_image)),
        ("forward work (recompute factor)", f"{plan.recompute:.3f}"),
        ("worst gradient against the second plan", "not compared" if difference is None else f"{difference:.1e}"),
    ]
    print()
    for name, value in rows:
        print(f"{name:40} {value}")
    ok = difference is None or difference <= TOLERANCE
    if not ok:
        print(f"the two plans differ by more than {TOLERANCE}", file=sys.stderr)
    result = {
        "seconds_per_step": round(statistics.median(seconds), 3),
        "peak_rss_bytes": peak_resident(),
        "projected_bytes": plan.projected,
        "loss": losses[0],
        "worst_gradient_difference": difference,
        "recompute_factor": plan.recompute,
        "size": args.size,
        "source": args.source,
    }
    print(json.dumps(result), flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

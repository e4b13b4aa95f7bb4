"""wholegrad's own measurements, one a process: a training step, a prediction, or two plans compared.

Started by ``main.py``; the last line of output is the result as JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from common import report, timed
from inputs import open_inputs, open_real

import wholegrad as wg
from wholegrad.losses import bce_loss
from wholegrad.nets import unet4492
from wholegrad.plan.plan import Plan, parse_bytes
from wholegrad.run.profile import recording
from wholegrad.run.reader import MapReader


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["step", "predict", "tilings"])
    parser.add_argument("--folder", type=Path, required=True, help="of the painted slide")
    parser.add_argument("--size", required=True)
    parser.add_argument("--budget", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--source", default="raw", choices=["raw", "jpeg"])
    parser.add_argument("--scale", type=float, default=1, help="each edge of the image, times the slide's")
    parser.add_argument("--data", type=Path, help="real slides, for tilings")
    parser.add_argument("--profile", action="store_true", help="one more step, whose ops and stages are printed")
    parser.add_argument("--suffix", default=".npy", choices=[".npy", ".ome.tif"], help="of the predicted mask")
    return parser.parse_args()


def describe(plan: Plan, image: MapReader) -> dict[str, object]:
    """What of a plan belongs to a result."""
    print(plan, file=sys.stderr, flush=True)
    return {
        "shape": list(image.shape),
        "budget_bytes": plan.budget,
        "projected_bytes": plan.projected,
        "whole_image_bytes": plan.whole_image,
        "recompute": plan.recompute,
        "predicted_seconds": plan.seconds,
        "tiles": [[*part.tile] for part in plan.segments],
        "boundaries": sorted(str(place) for place in plan.placements.values()),
        "threads": torch.get_num_threads(),
    }


def step(args: argparse.Namespace) -> None:
    """Training steps: gradients, then Adam. The plan is made once, before."""
    image, target = open_inputs(args.folder, args.size, args.source, args.scale)
    model = unet4492(seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    plan = wg.plan(model, bce_loss, image, target, budget=args.budget)

    def one() -> float:
        optimizer.zero_grad()
        loss = wg.backward(model, bce_loss, image, target, plan=plan)
        optimizer.step()
        return loss.item()

    about = describe(plan, image)
    found = timed(one, args.steps)
    if args.profile:
        with recording() as profile:
            wg.backward(model, bce_loss, image, target, plan=plan)
        print(profile.table(), file=sys.stderr)
    report(**about, **found)


def predict(args: argparse.Namespace) -> None:
    """Forward only: the mask of the whole slide as a file on disk, each time a new one; planning included."""
    image, _ = open_inputs(args.folder, args.size, args.source, args.scale)
    model = unet4492(seed=0)
    outs: list[Path] = []  # to replace a file takes the time that its removal takes (0.2 s a GB), which is not measured

    def one() -> float:
        outs.append(args.folder / f"predicted{len(outs)}{args.suffix}")
        wg.predict(model, image, out=outs[-1], budget=args.budget)
        return float("nan")

    found = timed(one, args.steps)
    del found["losses"]
    size = outs[-1].stat().st_size
    for out in outs:
        out.unlink()
    about = {"shape": list(image.shape), "budget_bytes": parse_bytes(args.budget), "threads": torch.get_num_threads()}
    report(**about, file_bytes=size, **found)


def tilings(args: argparse.Namespace) -> None:
    """Loss and every gradient of a real slide under two plans: the planner's, and one of other tiles and boundaries."""
    image, target, name = open_real(args.data, args.size)
    model = unet4492(seed=0)
    first = wg.plan(model, bce_loss, image, target, budget=args.budget)
    tile = (first.segments[-1].tile[0] // 2 + 24, first.segments[-1].tile[1] // 2 + 40)
    second = wg.plan(model, bce_loss, image, target, budget=args.budget, tile=tile, boundaries=["middle"])
    losses, grads = [], []
    for plan in (first, second):
        print(plan, file=sys.stderr, flush=True)
        model.zero_grad(set_to_none=True)
        losses.append(wg.backward(model, bce_loss, image, target, plan=plan).item())
        grads.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(grads[1]) == len(list(model.parameters())), "a gradient is missing"
    errors = {key: ((grads[0][key] - g).abs().max() / g.abs().max()).item() for key, g in grads[1].items()}
    report(
        slide=name,
        shape=list(image.shape),
        threads=torch.get_num_threads(),
        tiles=[list(first.segments[-1].tile), list(tile)],
        losses=losses,
        loss_difference=abs(losses[0] - losses[1]) / abs(losses[1]),
        gradient_differences=errors,
    )


if __name__ == "__main__":
    given = arguments()
    {"step": step, "predict": predict, "tilings": tilings}[given.what](given)

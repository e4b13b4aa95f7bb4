"""Trains the tissue network that ships with wholegrad, or cross-validates it by slide.

    WHOLEGRAD_DATA=... python examples/tissue/train.py --out out/tissue             # on every slide
    WHOLEGRAD_DATA=... python examples/tissue/train.py --out out/tissue --fold 0    # holds two slides back

WHOLEGRAD_DATA is a folder with ``slides/NAME.tif`` or ``.svs`` and ``masks/NAME.mask.tif``; synthetic slides are
painted first. Writes ``tissue4492.safetensors``; with ``--fold``, ``fold-K.safetensors`` and, as ``fold-K.json``, the
Dice of the slides held back: of the network's mask, and of that mask tidied as ``wholegrad segment`` does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from paint import IGNORE, Labels
from safetensors.torch import save_file
from samples import Section, sample
from torch import nn

import wholegrad as wg
from wholegrad.graph.geometry import Box
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.segment import MIN_AREA, MIN_HOLE
from wholegrad.slide.synth import synthesize
from wholegrad.slide.thumbnail import balanced
from wholegrad.slide.tidy import tidied

MPP = 4.0
FOLDS = 5


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    paths = slides(Path(os.environ["WHOLEGRAD_DATA"]))
    held = [] if args.fold is None else [paths[i] for i in fold_of(len(paths), args.fold)]
    real = [section(slide, mask) for slide, mask in paths if (slide, mask) not in held]
    painted = synthetic(args.out, args.synthetic)
    model = learn(args, real, painted)
    if held:
        scores = {slide.stem: dice(model, slide, mask) for slide, mask in held}
        (args.out / f"fold-{args.fold}.json").write_text(json.dumps(scores, indent=2) + "\n")
        print(scores)
    name = "tissue4492" if args.fold is None else f"fold-{args.fold}"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, args.out / f"{name}.safetensors")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fold", type=int, choices=range(FOLDS))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--side", type=int, default=384, help="of a crop, pixels")
    parser.add_argument("--batch", type=int, default=6, help="crops a step")
    parser.add_argument("--synthetic", type=int, default=16, help="synthetic slides")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def slides(root: Path) -> list[tuple[Path, Path]]:
    """Each slide and its mask; of two files of one slide, the smaller."""
    found = [(path, root / "masks" / f"{path.stem}.mask.tif") for path in sorted((root / "slides").iterdir())]
    return [pair for pair in found if pair[1].exists() and "Gpx" not in pair[0].name]


def fold_of(count: int, fold: int) -> list[int]:
    """Which of so many slides a fold holds back: shuffled once, dealt out."""
    order = np.random.default_rng(0).permutation(count)
    return [int(i) for i in order[fold::FOLDS]]


def section(slide: Path, mask: Path) -> Section:
    """A slide at ``MPP`` and its labels, whole."""
    with wg.open_slide(slide, mpp=MPP) as image, wg.open_mask(mask, like=image) as labels:
        box = Box(0, image.shape[1], 0, image.shape[2])
        return Section.of(slide.stem, np.moveaxis(image.read(box), 0, 2).copy(), labels.read(box)[0].copy())


def synthetic(out: Path, count: int) -> list[Section]:
    """Synthetic slides with their exact masks."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        height, width = (int(edge) for edge in rng.integers(1200, 2800, 2))
        mpp = float(rng.choice([3.0, 4.0, 5.0]))
        slide, mask = out / f"synthetic-{number}.tif", out / f"synthetic-{number}.mask.tif"
        if not mask.exists():
            synthesize(height, width, number + 100, slide, mask, mpp=mpp)
        with wg.open_slide(slide) as image, wg.open_mask(mask, like=image) as labels:
            box = Box(0, height, 0, width)
            found.append(Section.of(slide.stem, np.moveaxis(image.read(box), 0, 2).copy(), labels.read(box)[0].copy()))
    return found


def learn(args: argparse.Namespace, real: list[Section], painted: list[Section]) -> nn.Module:
    """Train on crops, three of four from real slides; Adam, a cosine down to nothing."""
    rng = np.random.default_rng((args.seed, 0 if args.fold is None else args.fold + 1))
    model, loss_fn = unet4492(seed=args.seed), LOSSES["bce+dice"]
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    plan, started, shown = None, time.monotonic(), 0.0
    for step in range(args.steps):
        crops = []
        for _ in range(args.batch):
            pool = real if not painted or rng.random() < 0.75 else painted
            crops.append(sample(rng, pool[rng.integers(len(pool))], args.side))
        images = np.ascontiguousarray(np.stack([image for image, _ in crops]).transpose(0, 3, 1, 2))
        labels = np.stack([labels for _, labels in crops])[:, None]
        plan = plan or wg.plan(model, loss_fn, images, labels, budget="6GiB")
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.zero_grad()
        loss = float(wg.backward(model, loss_fn, images, labels, plan=plan))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shown = loss if step == 0 else 0.98 * shown + 0.02 * loss
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {shown:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


def dice(model: nn.Module, slide: Path, mask: Path) -> dict[str, float]:
    """Dice of one whole slide at ``MPP``, evened out: as the network has it, and tidied."""
    with wg.open_slide(slide, mpp=MPP) as image, wg.open_mask(mask, like=image) as labels:
        found = wg.predict(model, balanced(image))
        truth = labels.read(Box(0, image.shape[1], 0, image.shape[2]))[0]
        area, hole = MIN_AREA / MPP**2, MIN_HOLE / MPP**2
        neat = tidied([found[0]], image.shape[2], area, hole).rows(0, image.shape[1])
        return {"network": overlap(found[0], truth), "tidied": overlap(neat, truth)}


def overlap(found: Labels, truth: Labels) -> float:
    """Dice over pixels that count."""
    tissue, found = truth == 1, (found == 1) & (truth != IGNORE)
    return float(2 * (tissue & found).sum() / max(1, tissue.sum() + found.sum()))


if __name__ == "__main__":
    main()

"""Does the 4492-parameter network learn whatever its seed? Trains each choice of activation and weights anew.

Whole-image autograd on random crops of real slides, Dice on slides that were not trained on. A seed counts as
having learned if that Dice is above 0.9. Needs the slides of ``WHOLEGRAD_DATA``.

    python benchmarks/ten_seeds/main.py --seeds 10 --steps 150
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wholegrad.graph.geometry import Box
from wholegrad.losses import bce_dice_loss, dice_counts, dice_from_counts
from wholegrad.nets import GigapixelUNet
from wholegrad.slide.mask import open_mask
from wholegrad.slide.slide import open_slide

Pair = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]  # image (3, H, W), labels (1, H, W)

MPP = 4.0
CROP = 512
LEARNED = 0.9
TEST = ("CMU-1-Small-Region", "PASAB_PAS-AB_mixed_1.01mpp", "metaplasia_HE_stomach_0.506mpp",
        "hacettepe31_HE_cores_1.01mpp")  # fmt: skip
TRAIN = ("TCGA-DU-6399-01A-01-TS1", "her2-cish_CISH_breastcore_0.506mpp", "pdac-trucut_HE1_pancreas_1.01mpp",
         "metaplasia_IHC-trypsin_stomach_0.504mpp", "spleen_HE_4.04mpp", "BS13_HE_cores_2.02mpp")  # fmt: skip

Weights = Callable[[nn.Module], None]


def torch_default(net: nn.Module) -> None:
    for layer in net.children():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.reset_parameters()


def keras_default(net: nn.Module) -> None:
    for layer in net.children():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


def shipped(net: nn.Module) -> None:
    """As the network makes them itself."""


CHOICES: dict[str, tuple[nn.Module, Weights]] = {
    "ReLU, torch's default weights": (nn.ReLU(), torch_default),
    "ReLU, Keras' default weights": (nn.ReLU(), keras_default),
    "ReLU, He weights": (nn.ReLU(), shipped),
    "leaky ReLU 0.1, He weights (shipped)": (nn.LeakyReLU(0.1), shipped),
}


def load(name: str, data: Path, largest: tuple[int, int]) -> Pair:
    """The middle of a slide and of its mask, at most ``largest`` (height, width) pixels."""
    path = next((data / "slides").glob(f"{name}.*"))
    with open_slide(path, mpp=MPP) as slide:
        mask = open_mask(data / "masks" / f"{name}.mask.tif", like=slide)
        (_, height, width), (most_h, most_w) = slide.shape, largest
        y, x = max(0, height - most_h) // 2, max(0, width - most_w) // 2
        box = Box(y, min(height, y + most_h), x, min(width, x + most_w))
        return slide.read(box).copy(), np.array(mask.read(box), np.uint8)


def crop(pair: Pair, rng: np.random.Generator) -> Pair:
    """A random crop, with tissue in it if four tries find some."""
    image, labels = pair
    for _ in range(4):
        y, x = (int(rng.integers(max(1, size - CROP))) for size in labels.shape[1:])
        part = labels[:, y : y + CROP, x : x + CROP]
        if (part == 1).any():
            break
    return image[:, y : y + CROP, x : x + CROP], part


def tensors(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    image, labels = (torch.from_numpy(np.ascontiguousarray(array))[None] for array in pair)
    return image.float() / 255, labels


def train(choice: str, seed: int, steps: int, lr: float, pairs: list[Pair]) -> nn.Module:
    activation, weights = CHOICES[choice]
    torch.manual_seed(seed)
    net = GigapixelUNet(slope=getattr(activation, "negative_slope", 0.0), seed=seed)
    net.act = activation
    weights(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 2 * (steps - i) / steps))
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        image, target = tensors(crop(pairs[rng.integers(len(pairs))], rng))
        optimizer.zero_grad()
        bce_dice_loss(net(image), target).backward()
        optimizer.step()
        schedule.step()
    return net


def dice(net: nn.Module, pairs: list[Pair]) -> float:
    with torch.no_grad():
        parts = [tensors(pair) for pair in pairs]
        return float(np.mean([dice_from_counts(dice_counts(net(image), target)) for image, target in parts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--only", default="", help="choices whose name holds this")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = Path(os.environ["WHOLEGRAD_DATA"])
    pairs = [load(name, data, (4096, 4096)) for name in TRAIN]
    unseen = [load(name, data, (1536, 2048)) for name in TEST]
    results = {}
    print("| activation and weights | learned | mean Dice | worst | best | s a run |\n|---|---|---|---|---|---|")
    for choice in (name for name in CHOICES if args.only in name):
        start = time.perf_counter()
        found = [dice(train(choice, seed, args.steps, args.lr, pairs), unseen) for seed in range(args.seeds)]
        seconds = (time.perf_counter() - start) / args.seeds
        learned = sum(value > LEARNED for value in found)
        print(
            f"| {choice} | {learned} of {args.seeds} | {np.mean(found):.3f} | {min(found):.3f} "
            f"| {max(found):.3f} | {seconds:.1f} |",
            flush=True,
        )
        results[choice] = [round(value, 4) for value in found]
    print(json.dumps(results))


if __name__ == "__main__":
    main()

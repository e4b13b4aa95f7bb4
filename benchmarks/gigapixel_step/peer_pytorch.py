"""Whole-image PyTorch, channels last: the step that wholegrad's must equal, on as large an image as fits.

``--write-check`` writes instead what other peers must reproduce: weights, a small image, its loss and gradients.
Started by ``main.py``; the last line of output is the result as JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import area, peer_inputs, report, timed
from torch.nn.functional import binary_cross_entropy_with_logits

from wholegrad.nets import unet4492


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--size")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--write-check", type=Path)
    return parser.parse_args()


def write_check(path: Path) -> None:
    """Weights as trained from, and in float64 the loss and gradients of a random image of 192 x 320 pixels."""
    model = unet4492(seed=0)
    weights = {f"weight:{name}": p.detach().numpy() for name, p in model.named_parameters()}
    random = np.random.default_rng(0)
    image = random.random((1, 192, 320, 3), dtype=np.float32)
    labels = (random.random((1, 192, 320, 1)) < 0.5).astype(np.float32)
    model.double()
    logits = model(torch.from_numpy(image).double().permute(0, 3, 1, 2))
    loss = binary_cross_entropy_with_logits(logits, torch.from_numpy(labels).double().permute(0, 3, 1, 2))
    loss.backward()
    grads = {f"grad:{name}": p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    np.savez(path, image=image, labels=labels, loss=loss.item(), **weights, **grads)


def main() -> None:
    args = arguments()
    if args.write_check:
        write_check(args.write_check)
        return
    height, width = area(args.size)
    pixels, labels = peer_inputs(args.image, args.mask, height, width)
    image, target = (torch.from_numpy(array).permute(0, 3, 1, 2) for array in (pixels, labels))
    model = unet4492(seed=0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(image), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    report(shape=[3, height, width], threads=torch.get_num_threads(), **timed(step, args.steps))


if __name__ == "__main__":
    main()

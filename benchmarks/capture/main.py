"""Seconds to capture and to plan a training step on a gigapixel image, for networks as their libraries have them.

    python benchmarks/capture/main.py --shape 3x16000x64000 --budget 8GiB

Nothing is run and no pixel exists. Each network is captured several times and the median is given; then it is planned
twice at one shape, the second time with the graph that was kept.

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import AttentionUnet, BasicUNet, DynUNet, SegResNet, UNet
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import wholegrad as wg
from wholegrad.given import given
from wholegrad.graph.capture import capture

SLIDE_LABEL = torch.tensor([1])


def logits_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output.logits, target)


def deep_supervision(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """nnU-Net's: Dice and cross-entropy of every supervised level, each worth half of the one before."""
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    return sum(0.5**i * loss(level, target) for i, level in enumerate(output.unbind(1)))


def dynunet() -> nn.Module:
    strides = [1, 2, 2, 2, 2, 2]
    return DynUNet(2, 3, 2, [3] * 6, strides, strides[1:], deep_supervision=True, deep_supr_num=3)


RESNET18 = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
CE = nn.CrossEntropyLoss()

# name, network, loss, dtype of a label map with a channel axis or None for a slide's label
NETWORKS: list[tuple[str, Callable[[], nn.Module], Any, tuple[type, bool] | None]] = [
    ("MONAI UNet", lambda: UNet(2, 3, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2), CE, (np.int64, False)),
    ("MONAI BasicUNet, batch norm", lambda: BasicUNet(2, 3, 2, norm="batch"), CE, (np.int64, False)),
    ("MONAI SegResNet", lambda: SegResNet(2, 8, 3, 2, dropout_prob=0.2), CE, (np.int64, False)),
    ("MONAI DynUNet, deep supervision", dynunet, deep_supervision, (np.int64, True)),
    ("MONAI AttentionUnet", lambda: AttentionUnet(2, 3, 2, (16, 32, 64, 128), (2, 2, 2)), CE, (np.int64, False)),
    ("ResNet-18", lambda: ResNetForImageClassification(ResNetConfig(**RESNET18)), logits_loss, None),
    ("ResNet-50", lambda: ResNetForImageClassification(ResNetConfig()), logits_loss, None),
    ("ConvNeXt-T", lambda: ConvNextForImageClassification(ConvNextConfig()), logits_loss, None),
]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3x16000x64000", help="channels x height x width (default %(default)s)")
    parser.add_argument("--budget", default="8GiB", help="of the plan (default %(default)s)")
    parser.add_argument("--times", type=int, default=3, help="captures of each network (default %(default)s)")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    return parser.parse_args()


def blank(dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An image of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measured(make: Callable[[], nn.Module], loss: Any, labels: tuple[type, bool] | None, args: Any) -> dict[str, Any]:
    shape = tuple(int(edge) for edge in args.shape.split("x"))
    model, image = make(), blank(np.uint8, shape)
    target: Any = SLIDE_LABEL
    if labels is not None:
        target = blank(labels[0], (1, *shape[1:]) if labels[1] else shape[1:])
    inputs = given(image, target, torch.float32).inputs
    captures = [seconds(lambda: capture(model, loss, inputs))[0] for _ in range(args.times)]
    first, plan = seconds(lambda: wg.plan(model, loss, image, target, budget=args.budget))
    again, other = seconds(lambda: wg.plan(model, loss, image, target, budget=args.budget))
    assert other.graph is plan.graph, "the graph was not kept"
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": len(plan.graph.nodes),
        "capture": statistics.median(captures),
        "plan": first,
        "again": again,
        "segments": len(plan.segments),
        "projected": plan.projected,
        "whole_image": plan.whole_image,
    }


def main() -> int:
    args = arguments()
    torch.set_num_threads(2)
    columns = ["network", "parameters", "nodes", "capture (s)", "plan (s)", "plan again (s)", "segments", "projected"]
    print("| " + " | ".join([*columns, "whole image"]) + " |")
    print("|---" * (len(columns) + 1) + "|")
    rows = {}
    for name, make, loss, labels in NETWORKS:
        if args.only not in name:
            continue
        rows[name] = row = measured(make, loss, labels, args)
        projected, whole = (f"{row[key] / 2**30:.1f} GiB" for key in ("projected", "whole_image"))
        counts = f"{row['parameters'] / 1e6:.1f} M | {row['nodes']}"
        times = f"{row['capture']:.2f} | {row['plan']:.2f} | {row['again']:.2f}"
        print(f"| {name} | {counts} | {times} | {row['segments']} | {projected} | {whole} |", flush=True)
    print(json.dumps({"shape": args.shape, "budget": args.budget, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Before anything runs: do all ranks mean the same step? If not, say which rank differs, and in what.

A step whose ranks hold other weights, another plan or another slide would end without an error and with wrong
gradients. So each tells the others a short digest of all that must be equal, weights included, at every step.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping

import torch

from wholegrad.errors import RankError
from wholegrad.graph.geometry import Box
from wholegrad.plan.describe import as_dict
from wholegrad.plan.plan import Plan
from wholegrad.run.distributed.wire import Wire
from wholegrad.run.sources import Source

PROBE = 8  # pixels of the edge of what is compared of an image
CHUNK = 1 << 20  # bytes that are summed at once
OWN = ("budget", "projected", "reserved", "host")  # what of a plan may differ from rank to rank
REMEDIES = {
    "version": "install the same versions everywhere",
    "plan": "give every rank the same model, loss and shapes, and plan with wg.plan(..., ranks=group) on all of them",
    "weights": "load the same checkpoint everywhere, or broadcast rank 0's weights before the first step",
    "buffers": "load the same checkpoint everywhere, or broadcast rank 0's buffers before the first step",
    "values": "give every rank the same labels",
    "pixels": "give every rank of the group the same slide, labels and augmentation",
    "order of norms": "give slides one size and plan alike (tile=, boundaries=), or use statistics='slide'",
    "seed": "give every rank the same seed",
}


def agree(wire: Wire, digests: Mapping[str, str]) -> None:
    """Compare these digests between ranks.

    Raises:
        RankError: one rank's differs from rank 0's; names the rank and what differs.
    """
    text = json.dumps(dict(digests)).encode()
    found = [
        json.loads(bytes(each.tolist())) for each in wire.meet(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    ]
    for rank, theirs in enumerate(found):
        for name in dict.fromkeys([*found[0], *theirs]):
            if theirs.get(name) != found[0].get(name):
                apart = f"{theirs.get(name)}, not {found[0].get(name)}"
                raise RankError(wire.name(rank), f"has other {name} than {wire.name(0)} ({apart})",
                                REMEDIES.get(name, "start all ranks alike"))  # fmt: skip


def _digest(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part)
    return found.hexdigest()


_plans: weakref.WeakKeyDictionary[Plan, str] = weakref.WeakKeyDictionary()


def plan_digest(plan: Plan) -> str:
    """Of every decision of a plan, not of what its process holds already; and of all that its graph computes."""
    if plan not in _plans:
        told = {name: value for name, value in as_dict(plan).items() if name not in OWN}
        ops = [f"{node.op}{node.args}{node.kwargs}{node.outputs}{node.needs_grad}" for node in plan.graph.nodes]
        parts = [json.dumps(told, sort_keys=True, default=str), *ops, tensors_digest(plan.graph.constants)]
        _plans[plan] = _digest(*(part.encode() for part in parts))
    return _plans[plan]


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes and bits."""
    parts = []
    for name, tensor in tensors.items():
        parts += [f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), checksum(tensor)]
    return _digest(*parts)


def checksum(tensor: torch.Tensor) -> bytes:
    """Of a tensor's bits, at about the speed of memory: sums of its words, plain and by place, modulo 2**64."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        words = torch.cat((part, part.new_zeros(-part.numel() % 8))).view(torch.int64)
        place = torch.arange(start + 1, start + 2 * words.numel(), 2, device=words.device)  # odd, and apart by chunk
        total += torch.stack((words.sum(), (words * place).sum()))
    return bytes(total.cpu().view(torch.uint8).tolist())


def pixels_digest(sources: Mapping[str, Source]) -> str:
    """Of a few pixels of every image and target: of its corner, of its middle, and in between."""
    parts = []
    for name, source in sorted(sources.items()):
        rows, cols = source.readers[0].shape[-2:]
        for share in (0.0, 0.3, 0.5, 0.7):
            y, x = int(rows * share), int(cols * share)
            box = Box(y, min(y + PROBE, rows), x, min(x + PROBE, cols))
            parts += [name.encode(), checksum(source.read(box))]
    return _digest(*parts)


def versions() -> str:
    """Of what decides how rounding falls."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("wholegrad")
    except PackageNotFoundError:  # run from its source folder
        own = "0"
    return f"wholegrad {own}, torch {torch.__version__}"

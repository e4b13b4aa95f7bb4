"""Tensors as bytes with a short heading, so that ranks can bring each other what the other does not expect."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
HEAD = 8  # bytes of the heading's length


def packed(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Named tensors as one of type uint8, on their device."""
    heading = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()]
    text = json.dumps(heading).encode()
    text += b" " * (-len(text) % HEAD)  # so that all lie where their dtype may
    front = torch.frombuffer(bytearray(len(text).to_bytes(HEAD, "little") + text), dtype=torch.uint8)
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    flat = [torch.cat((each, each.new_zeros(-each.numel() % HEAD))) for each in flat]
    return torch.cat((front.to(flat[0].device) if flat else front, *flat))


def unpacked(found: torch.Tensor) -> dict[str, torch.Tensor]:
    """What :func:`packed` was given."""
    size = int.from_bytes(bytes(found[:HEAD].tolist()), "little")
    at, tensors = HEAD + size, {}
    for name, dtype, shape in json.loads(bytes(found[HEAD:at].tolist())):
        count = DTYPES[dtype].itemsize
        for edge in shape:
            count *= edge
        tensors[name] = found[at : at + count].clone().view(DTYPES[dtype]).reshape(shape)
        at += count + -count % HEAD
    return tensors

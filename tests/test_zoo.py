"""Networks and losses as people have them, from their own libraries, against the oracle."""

from __future__ import annotations

import copy
from functools import cache
from statistics import median
from typing import Any

import pytest
import torch

import wholegrad as wg
from oracle import SEED, assert_exact, reference
from wholegrad.given import given
from wholegrad.plan.boundaries import candidates
from wholegrad.run.reference import Reference, whole_image
from wholegrad.verify import Case, Row, by_chance, errors
from zoo import Entry
from zoo_losses import LOSSES
from zoo_networks import NETWORKS

Data = tuple[torch.nn.Module, Any, Any]


@cache
def made(entry: Entry) -> tuple[Data, Reference]:
    """Network, image and target, and what whole-image autograd gives."""
    data = (entry.build(), entry.image(*entry.size), entry.target(*entry.size))
    return data, reference(data[0], entry.loss, *data[1:])


def plans(entry: Entry) -> list[dict[str, Any]]:
    """Tiles that do not divide the image, slim ones, and every map that can be one a boundary on disk."""
    (model, image, target), _ = made(entry)
    height, width = entry.size
    graph = wg.plan(model, entry.loss, image, target).graph
    names = [graph.nodes[ref.node].name for ref in candidates(graph)]
    return [
        {"tile": (height // 3 + 2, width // 4 + 3)},
        {"tile": (height // 5 + 1, width)},
        {"tile": (height // 2 + 1, width // 3 + 2), "placement": "disk", "boundaries": names},
    ]


@pytest.mark.parametrize("entry", [*NETWORKS, *LOSSES], ids=str)
def test_the_zoo_is_exact(entry: Entry) -> None:
    (model, image, target), wanted = made(entry)
    for fixed in plans(entry):
        assert_exact(model, entry.loss, image, target, wanted=wanted, **fixed)


def whole_float32(case: Case) -> list[Reference]:
    """Whole-image float32 as PyTorch's own kernels give it: planar and channels last, with and without oneDNN."""
    args, kwargs, target = given(case.image, case.target, torch.float32).whole()
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = copy.deepcopy(case.model).to(memory_format=layout)
        for onednn in (True, False):
            with torch.backends.mkldnn.flags(enabled=onednn):
                found.append(whole_image(model, case.loss_fn, args, kwargs, target, torch.float32, SEED))
    return found


DRAWS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,))  # dimensions along which images are flipped


def float32_rows(entry: Entry, flipped: tuple[int, ...]) -> list[Row]:
    """Each tensor's float32 errors, ours under one plan and the worst of PyTorch's own, with images flipped so."""
    (model, image, target), wanted = made(entry)
    if flipped:
        image = tuple(x.flip(flipped) for x in image) if isinstance(image, tuple) else image.flip(flipped)
        wanted = reference(model, entry.loss, image, target)
    case = Case(model, entry.loss, image, target, torch.float32, SEED)
    tile = (entry.size[0] // 2 + 3, entry.size[1] // 2 + 3)
    found = errors(case.run(case.made(tile, "host"), tile), wanted.tensors)
    wholes = [errors(whole.tensors, wanted.tensors) for whole in whole_float32(case)]
    return [Row(name, 0.0, found[name], max(whole[name] for whole in wholes)) for name in found]


def medians(draws: list[list[Row]]) -> list[Row]:
    """Each tensor's median errors over several draws: one in which a ReLU at zero went the other way does not count."""
    return [
        Row(rows[0].name, 0.0, median(row.single for row in rows), median(row.whole_single for row in rows))
        for rows in zip(*draws, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("entry", NETWORKS, ids=str)
def test_float32_is_as_good_as_whole_image_float32(entry: Entry) -> None:
    """No tensor is off by more than twice what PyTorch's own kernels are off by, or else no more than chance allows."""
    rows = float32_rows(entry, ())
    if any(not row.ok for row in rows):
        rows = medians([rows, *(float32_rows(entry, flipped) for flipped in DRAWS[1:])])
    over = [row for row in rows if not row.ok]
    assert not over or by_chance(rows), over

"""Every network at gigapixel sizes, planned and not run: no tensor of 2**31 elements (rule 8), one capture a shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

import wholegrad as wg
from wholegrad.errors import BudgetError, UnsupportedOpError
from wholegrad.plan.plan import Plan
from zoo import Entry
from zoo_networks import NETWORKS, logits_loss

LIMIT = 2**31
HUGE = (65536, 65536)
WHOLE = ("attention", "flatten and linear")  # no locality, or made for one size


def blanks(value: Any, size: tuple[int, int]) -> Any:
    """Images or targets of the same kind at another size, that take no memory; small tensors as they are."""
    if isinstance(value, tuple | list):
        return type(value)(blanks(item, size) for item in value)
    if isinstance(value, torch.Tensor) and value.dim() >= 3:
        return torch.zeros((), dtype=value.dtype).expand(*value.shape[:-2], *size)
    return value


def planned(entry: Entry, size: tuple[int, int]) -> Plan:
    model = entry.build().float()
    image, target = blanks(entry.image(*entry.size), size), blanks(entry.target(*entry.size), size)
    return wg.plan(model, entry.loss, image, target, budget="12GiB")


def assert_below_the_limit(plan: Plan) -> None:
    """Every map's largest box in every segment, and every small tensor."""
    for i, part in enumerate(plan.segments):
        grid = plan.grid(i)
        for index in (*part.segment.nodes, *(ref.node for ref in part.segment.maps)):
            area = grid.rows.largest[index] * grid.cols.largest[index]
            assert area > 0
            for spec in plan.graph.nodes[index].outputs:
                assert area * (spec.pixel_bytes // spec.dtype.itemsize) < LIMIT
    smalls = [spec for node in plan.graph.nodes for spec in node.outputs if not spec.is_map]
    assert all(spec.numel < LIMIT for spec in smalls)


@pytest.mark.parametrize("entry", [e for e in NETWORKS if not e.name.startswith(WHOLE)], ids=str)
def test_no_tensor_of_any_plan_reaches_the_limit(entry: Entry) -> None:
    assert_below_the_limit(planned(entry, HUGE))


@pytest.mark.parametrize("entry", [e for e in NETWORKS if e.name.startswith("attention ")], ids=str)
def test_what_compares_all_pixels_is_refused_at_that_size(entry: Entry) -> None:
    with pytest.raises(UnsupportedOpError, match=r"2\*\*31"):
        planned(entry, HUGE)


def test_a_graph_is_captured_once_for_each_shape() -> None:
    entry = next(e for e in NETWORKS if "ResNet-18" in e.name)
    model = entry.build().float()
    target = entry.target(*entry.size)
    image = blanks(entry.image(*entry.size), (1024, 1024))
    first = wg.plan(model, entry.loss, image, target, budget="2GiB").graph
    again = wg.plan(model, entry.loss, image, target, budget="2GiB", tile=(256, 256)).graph
    assert again is first
    assert wg.plan(model, entry.loss, blanks(image, (1024, 2048)), target, budget="2GiB").graph is not first
    model.eval()
    assert wg.plan(model, entry.loss, image, target, budget="2GiB").graph is not first


SLIDE = (16000, 64000)
FULL_WIDTH = {
    "monai UNet": (lambda: UNet(2, 3, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2), True),
    "transformers ResNet-50": (lambda: ResNetForImageClassification(ResNetConfig()), False),
}


def full_width(name: str, size: tuple[int, int]) -> tuple[Any, ...]:
    """Model, loss, image and target."""
    make, dense = FULL_WIDTH[name]
    image = np.broadcast_to(np.uint8(0), (3, *size))
    target = np.broadcast_to(np.int64(0), size) if dense else torch.tensor([1])
    return make(), F.cross_entropy if dense else logits_loss, image, target


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_full_width_networks_fit_wherever_a_refusal_says_they_do(name: str) -> None:
    case = full_width(name, SLIDE)
    with pytest.raises(BudgetError) as refused:
        wg.plan(*case, budget="0.7GiB")
    smallest = refused.value.smallest
    assert smallest > 0.7 * 2**30
    for budget in (smallest, 4 * smallest):
        assert wg.plan(*case, budget=budget).projected <= budget


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_no_tensor_of_full_width_networks_reaches_the_limit(name: str) -> None:
    assert_below_the_limit(wg.plan(*full_width(name, HUGE), budget="24GiB"))

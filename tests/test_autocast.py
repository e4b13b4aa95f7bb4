"""Autocast to bfloat16 on the CPU: its casts are part of the graph, and the error is that of whole-image autocast."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import wholegrad as wg
from wholegrad.errors import ShapeError
from wholegrad.graph.graph import Kind
from wholegrad.losses import LOSSES
from wholegrad.verify import random_labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8), nn.Softmax(1), nn.ConvTranspose2d(8, 1, 2, 2),
    )  # fmt: skip


def whole(model: nn.Module, image: torch.Tensor, labels: torch.Tensor, autocast: bool) -> dict[str, torch.Tensor]:
    dtype = torch.float32 if autocast else torch.float64
    model = copy.deepcopy(model).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = LOSSES["bce"](model(image.to(dtype)[None]), labels[None])
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def test_bfloat16_is_as_good_as_whole_image_bfloat16() -> None:
    model, labels = network(), random_labels((64, 72), 0)
    image = torch.rand(3, 64, 72, generator=torch.Generator().manual_seed(1))
    wanted, theirs = whole(model, image, labels, False), whole(model, image, labels, True)
    for fixed in ({}, {"boundaries": ["0", "4"], "placement": "disk"}):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            plan = wg.plan(model, LOSSES["bce"], image, labels, tile=(20, 24), **fixed)
            wg.backward(model, LOSSES["bce"], image, labels, plan=plan)
        assert any(node.outputs[0].dtype == torch.bfloat16 for node in plan.graph.of_kind(Kind.MAP))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            scale = wanted[name].abs().max()
            ours = (parameter.grad.double() - wanted[name]).abs().max() / scale
            assert ours <= 2 * max((theirs[name] - wanted[name]).abs().max() / scale, 2.0**-8), name


def test_a_plan_for_autocast_is_another_graph() -> None:
    model, labels, image = network(), random_labels((32, 32), 0), torch.rand(3, 32, 32)
    plain = wg.plan(model, LOSSES["bce"], image, labels).graph
    with torch.autocast("cpu", torch.bfloat16):
        assert wg.plan(model, LOSSES["bce"], image, labels).graph is not plain
    assert wg.plan(model, LOSSES["bce"], image, labels).graph is plain


class Weighted(nn.Module):
    """Channels weighed by constants that forward makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x) * torch.tensor([0.5, 4.0, -1.0, 2.0]).view(1, -1, 1, 1)
        result: torch.Tensor = self.last(y[:, [2, 0, 3, 1]] + torch.linspace(0, 1, 4).view(1, -1, 1, 1))
        return result


def test_constants_keep_their_values_under_autocast() -> None:
    model, labels = Weighted(), random_labels((32, 40), 0)
    image = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(1))
    wanted, theirs = whole(model, image, labels, False), whole(model, image, labels, True)
    with torch.autocast("cpu", torch.bfloat16):
        plan = wg.plan(model, LOSSES["bce"], image, labels, tile=(13, 17))
        wg.backward(model, LOSSES["bce"], image, labels, plan=plan)
    assert all(type(constant) is torch.Tensor for constant in plan.graph.constants.values())
    for name in ("conv.weight", "last.weight"):  # a bias's gradient nearly cancels here, and is mostly rounding
        grad = model.get_parameter(name).grad
        assert grad is not None
        ours, own = ((found - wanted[name]).abs().max() for found in (grad.double(), theirs[name]))
        assert ours <= 2 * max(own, 2.0**-8 * wanted[name].abs().max()), name


def halved(norm: str, dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = {"instance": nn.InstanceNorm2d(8, affine=True), "group": nn.GroupNorm(2, 8)}.get(norm, nn.BatchNorm2d(8))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), made, nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    return model.to(dtype).train(norm != "batch, evaluated")


def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target.to(output.dtype)) ** 2).mean() * 1024  # or float16 would end within the gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["batch", "batch, evaluated", "instance", "group"])
def test_a_model_in_half_precision_is_as_good_as_whole(dtype: torch.dtype, norm: str) -> None:
    """Over several networks, for in one of them which error is larger is chance."""
    ours, own, seeds = Counter[str](), Counter[str](), range(4)
    for seed in seeds:
        model = halved(norm, dtype, seed)
        image, target = torch.rand(2, 3, 40, 44).to(dtype).float(), torch.randint(0, 2, (2, 1, 40, 44)).byte()
        found: dict[torch.dtype, dict[str, torch.Tensor]] = {}
        for each in (torch.float64, dtype):
            whole = copy.deepcopy(model).to(each)
            squares(whole(image.to(each)), target).backward()
            found[each] = {name: p.grad.double() for name, p in whole.named_parameters() if p.grad is not None}
        plan = wg.plan(model, squares, image, target, tile=(17, 19))
        wg.backward(model, squares, image, target, plan=plan)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype == dtype
            wanted = found[torch.float64][name]
            ours[name] += float((parameter.grad.double() - wanted).abs().max() / wanted.abs().max())
            own[name] += float((found[dtype][name] - wanted).abs().max() / wanted.abs().max())
    for name, error in ours.items():
        assert error <= 2 * max(own[name], len(seeds) * torch.finfo(dtype).eps), name


def test_a_tensor_that_numpy_has_no_type_for_is_refused() -> None:
    image = torch.rand(3, 32, 32).bfloat16()
    with pytest.raises(ShapeError, match=r"is a tensor of torch\.bfloat16, which NumPy does not have; .*\.float\(\)"):
        wg.backward(network().bfloat16(), LOSSES["bce"], image, random_labels((32, 32), 0))

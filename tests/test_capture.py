"""Capture: in-place ops, views, flattened losses, shared and frozen weights, and plain refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wholegrad as wg
from oracle import assert_exact
from wholegrad.commands.common import blank
from wholegrad.errors import CaptureError, NumericsError, PlanError, ShapeError
from wholegrad.given import given
from wholegrad.graph.capture import capture
from wholegrad.graph.graph import Kind
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.verify import random_labels

TILE = {"tile": (13, 17)}


def image(channels: int = 3, height: int = 40, width: int = 50) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(channels, height, width, dtype=torch.float64)


def square(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output**2).mean()


class InPlace(nn.Module):
    """In-place activations, sums and writes into views."""

    def __init__(self, into_view: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.into_view = into_view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y += 1
        y *= 2
        if self.into_view:
            y[:, :2] += x[:, :2]
        y = F.leaky_relu_(y, 0.1)
        return self.b(y).sigmoid_()


@pytest.mark.parametrize("into_view", [False, True])
def test_in_place_ops_are_exact(into_view: bool) -> None:
    torch.manual_seed(0)
    assert_exact(InPlace(into_view).double(), square, image(), None, **TILE)


def test_a_gigapixel_capture_takes_no_memory_and_keeps_module_paths() -> None:
    inputs = given(blank(3, 16000, 64000), blank(1, 16000, 64000), torch.float32).inputs
    graph = capture(unet4492(), LOSSES["bce"], inputs)
    paths = {node.path for node in graph.of_kind(Kind.MAP)}
    assert {"down1", "middle", "fuse1", "head", "loss"} <= paths
    assert graph.nodes[graph.outputs[0].node].outputs[0].shape == (1, 1, 16000, 64000)


LOSS_FORMS = {
    "mean reduction": lambda o, t: F.binary_cross_entropy_with_logits(o, (t == 1).to(o.dtype)),
    "sum reduction": lambda o, t: F.mse_loss(o, (t == 1).to(o.dtype), reduction="sum") / 100,
    "flattened dice": lambda o, t: _flat_dice(o, t),
    "focal by logsigmoid": lambda o, t: -((1 - torch.sigmoid(o)) ** 2 * F.logsigmoid(o) * (t == 1)).mean(),
    "weighted by a small tensor": lambda o, t: F.binary_cross_entropy_with_logits(
        o, (t == 1).to(o.dtype), pos_weight=torch.tensor([2.5], dtype=o.dtype)
    ),
    "per image sums": lambda o, t: ((o.sigmoid().sum((2, 3)) - 100.0) ** 2).mean().sqrt(),
    "weights without gradient": lambda o, t: _hard_pixels(o, t),
    "where and clamp": lambda o, t: torch.where(t == 1, o.clamp(-1, 1), o.clamp_min(0)).mean(),
}  # fmt: skip


def _flat_dice(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p, y = torch.sigmoid(o).view(-1), (t == 1).view(-1).to(o.dtype)
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def _hard_pixels(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        weight = (torch.sigmoid(o) - (t == 1).to(o.dtype)).abs()
    term = F.binary_cross_entropy_with_logits(o, (t == 1).to(o.dtype), reduction="none")
    return (term * weight).sum() / weight.sum() + (term * weight.detach()).mean()


@pytest.mark.parametrize("form", LOSS_FORMS)
def test_losses_as_people_write_them(form: str) -> None:
    model = unet4492(seed=2).double()
    assert_exact(model, LOSS_FORMS[form], image(), random_labels((40, 50), 0), **TILE)


class Shared(nn.Module):
    """One convolution used twice, one frozen, a parameter that scales, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor([0.5, 1.5, 2.0]).view(1, 3, 1, 1))
        self.register_buffer("mean", torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.twice(x - self.mean).tanh()
        return self.twice(self.frozen(y)) * F.softplus(self.gain)


def test_shared_frozen_and_free_parameters() -> None:
    torch.manual_seed(0)
    assert_exact(Shared().double(), square, image(), None, **TILE)


class Weighted(nn.Module):
    """A loss with a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("positive", torch.tensor([3.0]))

    def forward(self, o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale**2 * F.binary_cross_entropy_with_logits(o, (t == 1).to(o.dtype), pos_weight=self.positive)


def test_one_module_under_two_names_and_one_tensor_in_two_modules() -> None:
    torch.manual_seed(0)
    twice, a, b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
    a.weight = b.weight
    model = nn.Sequential(twice, nn.Tanh(), twice, a, nn.Tanh(), b).double()
    wg.plan(model, square, image())
    assert not any(p.is_meta for p in model.parameters()) and model[3].weight is model[5].weight
    assert_exact(model, square, image(), None, **TILE)


def test_constants_made_on_the_images_device_keep_their_values() -> None:
    def loss(o: torch.Tensor, t: Any) -> torch.Tensor:
        gain = o.new_tensor([2.0]).view(1, 1, 1, 1) * torch.tensor(0.25, device=o.device)
        return (o * gain).pow(2).mean() + torch.zeros(o.shape, dtype=o.dtype, device=o.device).add_(o).abs().mean()

    assert_exact(unet4492(seed=2).double(), loss, image(), None, **TILE)


def test_a_loss_may_be_a_module_with_parameters() -> None:
    model, loss, labels = unet4492(seed=0).double(), Weighted().double(), random_labels((40, 50), 0)
    assert_exact(model, loss, image(), labels, **TILE)
    loss.scale.grad = None
    wg.backward(model, loss, image(), labels)
    value = loss(model(image()[None]), labels[None])
    (wanted,) = torch.autograd.grad(value, loss.scale)
    assert loss.scale.grad is not None
    torch.testing.assert_close(loss.scale.grad, wanted, rtol=1e-12, atol=0)


def test_batches_and_metrics() -> None:
    torch.manual_seed(1)
    model, batch = unet4492(seed=0).double(), torch.rand(2, 3, 33, 47, dtype=torch.float64)
    labels = torch.stack([random_labels((33, 47), seed) for seed in (0, 1)])
    assert_exact(model, LOSSES["dice"], batch, labels, **TILE)
    metrics = {"positive": lambda o, t: (o > 0).sum(), "mean": lambda o, t: o.mean()}
    loss, values = wg.backward(model, LOSSES["dice"], batch, labels, metrics=metrics)
    output = model(batch)
    assert values["positive"].item() == (output > 0).sum().item()
    torch.testing.assert_close(values["mean"], output.mean().detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, LOSSES["dice"](output, labels).detach(), rtol=1e-12, atol=0)
    measured = wg.measure(model, batch, labels, metrics=metrics)
    assert measured["positive"].item() == values["positive"].item()


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.count(";") >= 1, text
    return text


def test_wrong_shapes_are_refused_in_one_line() -> None:
    model, loss = unet4492(seed=0), LOSSES["bce"]
    labels = torch.ones(1, 40, 50, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="target: is 40 x 50 but the image is 40 x 40 pixels") as caught:
        wg.plan(model, loss, torch.rand(3, 40, 40), labels)
    one_line(caught)
    with pytest.raises(ShapeError, match=r"image: has shape \(40, 50\)"):
        wg.plan(model, loss, torch.rand(40, 50), labels)
    with pytest.raises(CaptureError, match="cannot be traced on") as other:
        wg.plan(model, loss, torch.rand(4, 40, 50), labels)
    one_line(other)
    with pytest.raises(CaptureError, match="returns shape"):
        wg.plan(model, lambda o, t: o.sum((2, 3)).expand(3, 1), torch.rand(3, 40, 50), labels)


def test_a_loss_that_is_not_finite_touches_no_gradient() -> None:
    model, labels = unet4492(seed=0), torch.ones(1, 40, 50, dtype=torch.uint8)
    wg.backward(model, LOSSES["bce"], torch.rand(3, 40, 50), labels)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    poisoned = torch.rand(3, 40, 50)
    poisoned[1, 20, 30] = float("nan")
    with pytest.raises(NumericsError, match="is not finite on rows") as caught:
        wg.backward(model, LOSSES["bce"], poisoned, labels)
    one_line(caught)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    from wholegrad.errors import PlanError

    model = unet4492(seed=0).requires_grad_(False)
    with pytest.raises(PlanError, match="no parameter"):
        wg.plan(model, LOSSES["bce"], torch.rand(3, 40, 50), torch.ones(1, 40, 50, dtype=torch.uint8))


class Chained(nn.Module):
    """An output that another output is made from."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x)
        return y, self.b(y)


def test_an_output_may_feed_another() -> None:
    torch.manual_seed(0)
    assert_exact(Chained().double(), lambda o, t: (o[0] ** 2).mean() + (o[1] ** 2).mean(), image(), None, **TILE)


class Does(nn.Module):
    """A convolution, something in between, and another convolution."""

    def __init__(self, between: Any, channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(channels, 2, 3, padding=1), between
        self.register_buffer("weights", torch.tensor([0.5, 2.0, 1.0, 0.25]))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.b(self.between(self, self.a(x)))
        return result


def zeroed(module: Does, y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[:, [0, 2]] = 0
    return y


def checked(module: Does, y: torch.Tensor) -> torch.Tensor:
    if min(module.weights) < 0 or float(module.weights.sum()) > 100:
        raise ValueError("bad weights")
    return y * module.weights.view(1, -1, 1, 1) / module.weights.max().item()


def alike(module: Does, y: torch.Tensor) -> torch.Tensor:
    return torch.cat([y, F.cosine_similarity(y, y.flip(1).tanh(), 1).unsqueeze(1)], 1)


def likely(module: Does, y: torch.Tensor) -> torch.Tensor:
    return y + F.gaussian_nll_loss(y[:, :1], y[:, 1:2], y[:, 2:3], full=True, eps=0.1)


@pytest.mark.parametrize(
    ("between", "channels"),
    [
        (lambda module, y: y[:, [3, 1, 0, 2]], 4),
        (lambda module, y: y[:, [True, False, True, True]], 3),
        (lambda module, y: y.index_select(1, torch.tensor([2, 0])), 2),
        (zeroed, 4),
        (checked, 4),
        (lambda module, y: y * y.new([2.0, 1.0, 0.5, 3.0]).view(1, -1, 1, 1), 4),
        (alike, 5),
    ],
    ids=["list", "list of flags", "tensor", "list written to", "buffer looked at", "new", "cosine"],
)
def test_code_that_hides_what_it_does(between: Any, channels: int) -> None:
    assert_exact(Does(between, channels), square, image(), None, **TILE)


def test_a_loss_that_looks_at_its_variance() -> None:
    model, eager = Does(likely), Does(likely)
    x = image()
    wg.backward(model, square, x)
    positive = eager.a(x[None])[:, 2:3].detach().clamp(min=0.1)
    assert (positive == 0.1).any() and (positive > 0.1).any()  # both sides of the clamp
    y = eager.a(x[None])
    variance = y[:, 2:3].clone()
    with torch.no_grad():
        variance.clamp_(min=0.1)
    each = 0.5 * (variance.log() + (y[:, :1] - y[:, 1:2]) ** 2 / variance) + 0.5 * math.log(2 * math.pi)
    square(eager.b(y + each.mean()), None).backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-14)


def test_a_graph_holds_for_the_buffers_that_code_looked_at() -> None:
    model = Does(checked)
    plan = wg.plan(model, square, image())
    assert list(plan.graph.looked_at) == ["model.weights"]
    model.weights[0] = 4.0
    with pytest.raises(PlanError, match=r"other values of model\.weights, at which the code looks"):
        wg.backward(model, square, image(), plan=plan)
    assert_exact(model, square, image(), None, **TILE)
    model.weights[0] = -1.0
    with pytest.raises(CaptureError, match="bad weights"):
        wg.plan(model, square, image())


def test_a_norm_that_averages_over_all_steps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2, momentum=None), nn.Conv2d(2, 1, 1)).double()
    eager = copy.deepcopy(model)
    for i in range(3):
        x = image() * (i + 1)
        wg.backward(model, square, x)
        square(eager(x[None]), None).backward()
    for mine, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


class Lazy(nn.Module):
    """Sets itself up on its first run, as some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.ready, self.kept = nn.Conv2d(3, 2, 3), False, {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.conv.register_forward_hook(lambda module, given, output: output * 2)
            self.ready = True
        self.kept["x"] = self.features = self.conv(x)
        result: torch.Tensor = self.features
        return result


def test_what_a_first_run_sets_up_stays_and_what_it_computed_does_not() -> None:
    model, eager = Lazy().double(), Lazy().double()
    for _ in range(2):
        wg.backward(model, square, image())
        square(eager(image()[None]), None).backward()
    assert model.kept == {} and not hasattr(model, "features")
    torch.testing.assert_close(model(image()[None]), eager(image()[None]))
    torch.testing.assert_close(model.conv.weight.grad, eager.conv.weight.grad)


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_module_is_captured_as_it_is_written_and_a_scripted_one_is_refused() -> None:
    model = Does(lambda module, y: y.tanh())
    with pytest.raises(CaptureError, match="0: is a TorchScript module"):
        wg.plan(nn.Sequential(torch.jit.trace(copy.deepcopy(model), image()[None])), square, image())
    wg.backward(model, square, image())
    compiled = torch.compile(copy.deepcopy(model))
    compiled.zero_grad()
    wg.backward(compiled, square, image())
    for mine, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)

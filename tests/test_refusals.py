"""What wholegrad would get wrong in silence, it refuses in one line; what it is given, it leaves as it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wholegrad as wg
from oracle import assert_exact
from wholegrad.errors import CaptureError, PlanError, ShapeError
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.verify import random_labels


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 1, 3)).double()


def image() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(3, 20, 26, dtype=torch.float64)


def square(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output**2).mean()


def test_a_plan_runs_only_what_it_was_made_for() -> None:
    model = small()
    plan = wg.plan(model, square, image())
    model[0].requires_grad_(False)
    with pytest.raises(PlanError, match="made for other parameters"):
        wg.backward(model, square, image(), plan=plan)
    model[0].requires_grad_(True)
    with pytest.raises(PlanError, match="made for another loss"):
        wg.backward(model, lambda o, t: o.abs().mean(), image(), plan=plan)
    with pytest.raises(PlanError, match=r"made for an image of .*float64"):
        wg.backward(small().float(), square, image(), plan=plan)
    model[1].eval()
    with pytest.raises(PlanError, match="training or evaluation mode"):
        wg.backward(model, square, image(), plan=plan)


def test_trained_tensors_that_belong_to_nobody_are_refused() -> None:
    weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    with pytest.raises(CaptureError, match="is no parameter of either"):
        wg.plan(small(), lambda o, t: (o**2).mean() * torch.exp(-weight) + weight, image())


def test_losses_and_metrics_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(CaptureError, match="loss: returns tuple"):
        wg.plan(small(), lambda o, t: ((o**2).mean(), o.mean()), image())  # type: ignore[arg-type, return-value]
    with pytest.raises(CaptureError, match="metric m: returns float"):
        wg.plan(small(), square, image(), metrics={"m": lambda o, t: 1.0})  # type: ignore[dict-item, return-value]


class Hidden(nn.Module):
    """In-place writes that autograd does not see."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 2, 1), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.how == "no_grad":
            with torch.no_grad():
                y.clamp_(-0.1, 0.1)
        else:
            y.data.clamp_(-0.1, 0.1)
        return y


@pytest.mark.parametrize("how", ["no_grad", "data"])
def test_writes_that_autograd_does_not_see_are_refused(how: str) -> None:
    with pytest.raises(CaptureError, match="where autograd does not look"):
        wg.plan(Hidden(how).double(), square, image())


@pytest.mark.parametrize(
    ("argument", "value"),
    [("tile", 32), ("tile", (3.5, 4)), ("tile", (3,)), ("boundaries", "0"), ("budget", 1.5), ("budget", "lots")],
)
def test_arguments_that_make_no_sense_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(PlanError, match=argument):
        wg.plan(small(), square, image(), **{argument: value})


def test_targets_without_pixels_are_refused() -> None:
    with pytest.raises(ShapeError, match="target"):
        wg.plan(small(), square, image(), np.zeros((0, 1, 20, 26), np.uint8))


def test_parameter_hooks_run_and_gradients_are_added_in_place() -> None:
    model = small()
    seen: list[torch.Tensor] = []
    model[0].weight.register_hook(lambda grad: grad * 2)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))  # type: ignore[union-attr]
    loss = square(model(image()[None]), None)
    (plain,) = torch.autograd.grad(loss, model[2].weight)
    model[2].weight.grad = kept = torch.zeros_like(model[2].weight)
    wg.backward(model, square, image())
    assert model[2].weight.grad is kept
    torch.testing.assert_close(kept, plain, rtol=1e-12, atol=0)
    doubled = model[0].weight.grad
    assert doubled is not None and torch.equal(seen[0], doubled)
    model.zero_grad()
    square(model(image()[None]), None).backward()
    torch.testing.assert_close(doubled, model[0].weight.grad, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("error")
def test_flipped_read_only_and_foreign_arrays_are_read() -> None:
    model, labels = unet4492(seed=0).double(), random_labels((20, 26), 0)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 26), dtype=np.uint8)
    flipped = pixels[:, ::-1, ::-1]
    frozen = flipped.copy()
    frozen.setflags(write=False)
    big = (frozen / 255).astype(">f8")
    losses = [wg.backward(model, LOSSES["bce"], each, labels).item() for each in (flipped, frozen, big)]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-14)


def test_padding_far_beyond_the_map_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=7), nn.Tanh(), nn.Conv2d(2, 1, 1, padding=3)).double()
    assert_exact(model, square, torch.rand(1, 6, 3000, dtype=torch.float64), None, tile=(50, 4000))


def test_a_reader_with_one_buffer_is_read_by_one_thread_at_a_time() -> None:
    class OneBuffer:
        shape, dtype, cache_bytes, name = (3, 64, 64), np.dtype(np.uint8), 0, "one buffer"

        def __init__(self) -> None:
            self.pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
            self.buffer = np.empty(3 * 64 * 64, np.uint8)
            self.inside, self.most = 0, 0

        def read(self, box: Any) -> np.ndarray:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.001)  # long enough for another thread to come in
            self.inside -= 1
            rows, cols = box.slices()
            out = self.buffer[: 3 * box.area].reshape(3, box.height, box.width)
            out[...] = self.pixels[:, rows, cols]
            return out

    model, labels, reader = unet4492(seed=0).double(), random_labels((64, 64), 0), OneBuffer()
    wanted = wg.backward(model, LOSSES["bce"], reader.pixels, labels).item()
    plan = wg.plan(model, LOSSES["bce"], reader, labels, tile=(8, 8))
    for _ in range(3):
        assert wg.backward(model, LOSSES["bce"], reader, labels, plan=plan).item() == pytest.approx(wanted, rel=1e-13)
    assert plan.workers > 1 and reader.most == 1


class Reversed(torch.autograd.Function):
    """The identity, with the gradient's sign turned."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -grad


class Adversary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = Reversed.apply(self.conv(x))  # type: ignore[no-untyped-call]
        return result


def test_gradients_that_no_trace_shows_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"^model \(test_refusals\.Reversed\): is an autograd\.Function"):
        wg.plan(Adversary().double(), square, image())
    assert torch.autograd.Function.__dict__["apply"].__qualname__.startswith("Function")


@torch.library.custom_op("wholegradtests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@cube.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _cube_backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    (x,) = ctx.saved_tensors
    result: torch.Tensor = 3 * grad * x**2
    return result


cube.register_autograd(_cube_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def test_a_library_op_without_a_rule_runs_on_whole_maps_with_its_own_gradient() -> None:
    class Cubed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.b(cube(self.a(x)))
            return result

    assert_exact(Cubed().double(), square, image(), None, tile=(7, 9))


class Inner(nn.Module):
    """A convolution, and something that no captured graph can do."""

    def __init__(self, does: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.does, self.steps = nn.Conv2d(3, 2, 3), does, 0
        self.child = nn.Conv2d(2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.child(self.does(self, self.conv(x)))
        return result


def hooked(module: Inner, y: torch.Tensor) -> torch.Tensor:
    y.register_hook(lambda grad: 0.1 * grad)
    return y


def detached_in_place(module: Inner, y: torch.Tensor) -> torch.Tensor:
    return (y * 2).detach_() + y


def penalised(module: Inner, y: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(y.sum(), module.conv.weight, create_graph=True)
    return y * grad.norm()


def counted(module: Inner, y: torch.Tensor) -> torch.Tensor:
    module.steps += 1
    return y / module.steps


def masked(module: Inner, y: torch.Tensor) -> torch.Tensor:
    return y - y[y > 0].mean()


def branching(module: Inner, y: torch.Tensor) -> torch.Tensor:
    return y if y.mean() > 0 else -y


def too_many_channels(module: Inner, y: torch.Tensor) -> torch.Tensor:
    return torch.cat([y, y], 1)


@pytest.mark.parametrize(
    ("does", "match"),
    [
        (hooked, r"^1 \(Tensor\.register_hook\): changes a gradient where no trace shows it; make it a torch\.library"),
        (detached_in_place, r"^1 \(Tensor\.detach_\): detaches in place.*write y = y\.detach\(\)"),
        (penalised, r"^1 \(torch\.autograd\.grad\): takes gradients inside"),
        (counted, r"^1\.steps: is a number that changes while the model runs, from 0 to 1.*buffer"),
        (masked, r"^1 \(aten\.index\.Tensor\): picks elements by a mask.*\(x \* mask\)\.sum\(\) / mask\.sum\(\)"),
        (branching, r"^1 \(Inner\): cannot be traced.*must not look at pixel values"),
        (too_many_channels, r"^1\.child \(Conv2d\): cannot be traced.*hannel.*accept these shapes"),
    ],
)
def test_what_no_trace_shows_is_refused_by_module_path_and_call(does: Callable[..., Any], match: str) -> None:
    model = nn.Sequential(nn.Identity(), Inner(does)).double()
    with pytest.raises(CaptureError, match=match) as caught:
        wg.plan(model, square, image())
    assert "\n" not in str(caught.value) and model[1].steps == 0


def test_a_module_with_a_backward_hook_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 1, 1)).double()
    model[1].register_full_backward_hook(lambda module, given, grads: None)
    with pytest.raises(CaptureError, match=r"^1: has a backward hook"):
        wg.plan(model, square, image())

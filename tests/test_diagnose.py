"""What a mismatch comes from is named: the op whose rule was broken, the module that the capture missed, the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wholegrad as wg
from wholegrad.diagnose import diagnose
from wholegrad.given import given
from wholegrad.graph.geometry import Box, Interval
from wholegrad.graph.layout import Axis, Layout
from wholegrad.graph.rules import LayoutRequest, MapRule, base
from wholegrad.graph.rules.normalize import _Normalize
from wholegrad.graph.rules.reduction import SumOrMean
from wholegrad.graph.rules.variance import Variance
from wholegrad.graph.rules.window import Convolution
from wholegrad.kernels import pointwise
from wholegrad.kernels.expression import EACH
from wholegrad.kernels.thin import Mixed
from wholegrad.run.executor import Executor
from wholegrad.verify import Report


def square(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output**2).mean()


class Net(nn.Module):
    """A pointwise convolution, one with a halo, a norm, and something in between."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)
        self.between = between if isinstance(between, nn.Module) else Called(between)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(torch.relu(self.norm(self.between(self.wide(self.first(x))))))
        return result


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def verified(between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh, **options: Any) -> Report:
    torch.manual_seed(0)
    return wg.verify(Net(between), square, **{"shape": (3, 26, 35), "single": False, "tiles": [(9, 12)], **options})


def blamed(between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh, **options: Any) -> str:
    report = verified(between, **options)
    assert not report.ok and report.responsible is not None
    assert f"responsible: {report.responsible}" in str(report)
    assert "\n" not in report.responsible
    return report.responsible


def test_a_correct_model_has_nothing_to_blame() -> None:
    torch.manual_seed(0)
    report = verified()
    assert report.ok and report.responsible is None and "responsible" not in str(report)
    model, image = Net().double(), torch.rand(3, 26, 35, dtype=torch.float64)
    plan = wg.plan(model, square, image, tile=(9, 12))
    assert diagnose(model, square, given(image, None, torch.float64), plan) is None


def test_ops_of_every_kind_agree_by_themselves() -> None:
    """Sums that feed back, dropout, softmax over all pixels, dense regions, views, constants and float32 inside."""

    def much(x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(nn.functional.pad(x, (1, 2, 1, 2), mode="reflect"), 3, 1)
        x = x + torch.zeros_like(x) * x.amax((2, 3), keepdim=True) + nn.functional.dropout(x, 0.3)
        x = x + x.flatten(2).softmax(-1).view(x.shape) + x.std((2, 3), keepdim=True)
        return x + torch.fft.fft2(x).real + nn.functional.interpolate(x[..., ::2, ::2], x.shape[2:], mode="bilinear")

    model, image = Net(much).double(), torch.rand(3, 26, 35, dtype=torch.float64)
    plan = wg.plan(model, square, image, tile=(9, 12))
    assert diagnose(model, square, given(image, None, torch.float64), plan, seed=3) is None


def test_a_short_halo_is_the_first_convolution_that_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Convolution.needs

    def short(self: Any, node: Any, specs: Any, operand: int, role: Any, out: Interval) -> Interval:
        lo, hi = true(self, node, specs, operand, role, out)
        return Interval(lo, hi - 1) if hi > out.hi else Interval(lo, hi)

    monkeypatch.setattr(Convolution, "needs", short)
    assert blamed().startswith("wide (aten.convolution.default): forward is wrong by ")


def middle(x: torch.Tensor) -> torch.Tensor:
    """The median of the channels times each: an op that has no rule of its own."""
    return x * (1 + x.nanmedian(1, keepdim=True).values)


class Median(MapRule):
    """Its rule, as a user would register it, wrong where ``run`` is."""

    def __init__(self, run: Callable[..., tuple[torch.Tensor, ...]] = torch.ops.aten.nanmedian.dim) -> None:
        self.op = run

    def layouts(self, request: LayoutRequest) -> tuple[Layout, ...]:
        layout = request.layout(request.args[0])
        return ((layout[0], (Axis(1),), *layout[2:]),) * 2

    def run(self, node: Any, tensors: Sequence[torch.Tensor], tile: Any) -> tuple[torch.Tensor, ...]:
        return tuple(self.op(tensors[0], *node.args[1:]))


def mutant(change: Callable[[torch.Tensor], torch.Tensor]) -> Median:
    def run(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
        values, places = torch.ops.aten.nanmedian.dim(x, *args)
        return change(values), places

    return Median(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values * (1 + 1e-7), "forward is wrong by "),
        (
            lambda values: values[..., 1:],
            "forward is wrong by inf on rows 0 to 9, columns 0 to 12: shape (1, 1, 9, 11)",
        ),
        (lambda values: values.detach() + 0 * values, "backward is wrong by 1 for convolution"),
        (lambda values: values @ values, "forward raises RuntimeError on rows 0 to 9, columns 0 to 12: "),
    ],
)
def test_a_users_op_whose_rule_runs_wrongly(change: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = torch.ops.aten.nanmedian.dim
    monkeypatch.setitem(base._RULES, op, Median())
    assert verified(middle).ok
    monkeypatch.setitem(base._RULES, op, mutant(change))
    assert blamed(middle).startswith(f"between (aten.nanmedian.dim): {said}")


def test_statistics_that_are_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Variance, "merge", lambda self, node, spec, total, part, box: part)
    assert blamed().startswith("norm (aten.var_mean.correction): forward is wrong by ")


def test_a_reduction_whose_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    true = SumOrMean.pull
    monkeypatch.setattr(SumOrMean, "pull", lambda self, *args: true(self, *args) * 1.001)
    assert blamed().startswith("loss (aten.mean.default): backward is wrong by 0.001 for ")


def test_a_norm_whose_backward_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    true, plain = pointwise.pull, _Normalize.backward

    def pull(x: Mixed, grad: torch.Tensor) -> dict[int, torch.Tensor]:
        found = true(x, grad)
        return {i: each * 1.01 if x.parts[0].program.leaves[i].kind == EACH else each for i, each in found.items()}

    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # where there are no kernels
        of_x, of_mean, of_scale, of_shift = plain(ctx, grad)
        return of_x, of_mean, of_scale * 1.01, of_shift

    monkeypatch.setattr(pointwise, "pull", pull)
    monkeypatch.setattr(_Normalize, "backward", staticmethod(backward))
    assert blamed().startswith("norm (wholegrad.normalize.default): backward is wrong by 0.0")


def test_a_model_that_draws_numbers_of_its_own_is_not_deterministic() -> None:
    said = blamed(lambda x: x + float(np.random.rand()))
    assert said.startswith("between: its output is the first to differ; the model gives two results for one input")


def test_a_model_that_counts_its_calls_is_not_deterministic() -> None:
    calls = [0]

    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            return x * calls[0]

    assert "gives two results for one input" in blamed(Counts())


def test_a_module_that_behaves_otherwise_when_it_is_captured() -> None:
    said = blamed(lambda x: x * 2 if x.is_meta else x * 3)
    assert said == "between (capture): its output is not what the captured graph computes there"


def test_code_between_modules_that_behaves_otherwise_when_it_is_captured() -> None:
    class Otherwise(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            result: torch.Tensor = self.last(self.wide(y * 2 if y.is_meta else y * 3))
            return result

    report = wg.verify(Otherwise(), square, shape=(3, 26, 35), single=False, tiles=[(9, 12)])
    assert report.responsible == ("model (capture): the input of wide is not what the captured graph computes there")


def test_a_plan_that_skips_what_it_should_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Executor._keep

    def keep(self: Any, ref: Any, box: Box, value: torch.Tensor) -> None:
        true(self, ref, box, value * 1.5 if box.y0 else value)

    monkeypatch.setattr(Executor, "_keep", keep)
    said = blamed()
    assert said.startswith("the plan (tiles of 9 x 12, planner's boundaries): every op agrees by itself")


def test_an_op_that_leaves_float64_is_said_to_round() -> None:
    report = verified(lambda x: nn.functional.conv2d(x.float(), torch.ones(4, 4, 3, 3), padding=1).to(x.dtype))
    assert report.ok and report.responsible is None, str(report)
    assert "exact up to the model's own float32: between (aten._to_copy.default)" in str(report)

"""Every op that kernels compute while they read, against PyTorch: values where ops bend, jump, overflow or are NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wholegrad as wg
from wholegrad.graph.inline import OPS, inline
from wholegrad.graph.rules.normalize import NORMALIZE
from wholegrad.kernels import expression, pointwise
from wholegrad.kernels.emit import Code
from wholegrad.kernels.expression import EACH, MAP, ONE, Leaf, Program, Step
from wholegrad.kernels.host import Host, host
from wholegrad.kernels.stage import Part
from wholegrad.kernels.thin import Mixed
from wholegrad.run.small import SmallValues
from wholegrad.signature import joint_tensors

pytestmark = pytest.mark.skipif(host() is None, reason="no kernels for this processor")
aten = torch.ops.aten
INF, NAN = math.inf, math.nan
TAME = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 6.0, 3.0, -3.0, 1e-3, 20.0, -20.0, 1 / 3, 0.1]
EDGES = [1e-40, -1e-40, 1e30, -1e30, 40.0, 88.5, -88.5, 89.5, -95.0, -103.9, -110.0, 710.0, -746.0, INF, -INF, NAN]
Call = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def one(op: Any, a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = op(a)
    return result


def two(op: Any, a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = op(a, b)
    return result


def comparing(op: Any, a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.where(op(a, b), a, b)


def comparing_bytes(op: Any, a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.where(op(t, a), a, b)


def with_number(number: float) -> Call:
    return lambda op, a, b, t: torch.where(op(a, number), a, b)


def bytes_with_number(number: float) -> Call:
    return lambda op, a, b, t: torch.where(op(t, number), a, b)


def each_channel(x: torch.Tensor, number: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), number, dtype=x.dtype)


CASES: dict[Any, list[Call]] = {
    aten.add.Tensor: [two, lambda op, a, b, t: op(a, b, alpha=-2), lambda op, a, b, t: op(a, t)],
    aten.add.Scalar: [lambda op, a, b, t: op(a, 0.1, 3)],
    aten.sub.Tensor: [two, lambda op, a, b, t: op(a, b, alpha=4)],
    aten.sub.Scalar: [lambda op, a, b, t: op(a, 0.1), lambda op, a, b, t: op(a, 0.1, 3)],
    aten.rsub.Tensor: [two, lambda op, a, b, t: op(a, b, alpha=0.5)],
    aten.rsub.Scalar: [lambda op, a, b, t: op(a, 1), lambda op, a, b, t: op(a, 2, 0.5)],
    aten.mul.Tensor: [two, lambda op, a, b, t: op(t, a)],
    aten.mul.Scalar: [lambda op, a, b, t: op(a, 1e39), lambda op, a, b, t: op(a, 1e-46)],
    aten.div.Tensor: [two, lambda op, a, b, t: op(op(a, 3), b)],
    aten.div.Scalar: [lambda op, a, b, t: op(a, 3)],
    aten.neg.default: [one],
    aten.leaky_relu.default: [one, lambda op, a, b, t: op(a, 0.1), lambda op, a, b, t: op(a, -0.5)],
    aten.relu.default: [one],
    aten._prelu_kernel.default: [
        lambda op, a, b, t: op(a, each_channel(a, 0.1)),
        lambda op, a, b, t: op(a, each_channel(a, -0.5)),
    ],
    NORMALIZE: [lambda op, a, b, t: op(a, *(each_channel(a, number) for number in (0.1, 3.0, -1.0)))],
    aten.hardtanh.default: [one, lambda op, a, b, t: op(a, 0, 6)],
    aten.clamp.default: [
        lambda op, a, b, t: op(a, -1, 0.5),
        lambda op, a, b, t: op(a, 0.5),
        lambda op, a, b, t: op(a, None, 2),
        lambda op, a, b, t: op(a, 2, -1),
        lambda op, a, b, t: op(a, 1, 1),
    ],
    aten.abs.default: [one],
    aten.square.default: [one],
    aten.pow.Tensor_Scalar: [lambda op, a, b, t: op(a, 2), lambda op, a, b, t: op(a, 2.0)],
    aten.exp.default: [one],
    aten.sigmoid.default: [one],
    aten.silu.default: [one],
    aten.binary_cross_entropy_with_logits.default: [
        lambda op, a, b, t: op(a, t.to(a.dtype), None, None, 0),
        lambda op, a, b, t: op(a, (t == 1).to(a.dtype) * 0.3, None, None, 0),
    ],
    aten.where.self: [
        lambda op, a, b, t: op(t != 0, a, b),
        lambda op, a, b, t: op(a > b, op(a > 0, 2 * a, b), b),
        lambda op, a, b, t: torch.mul(op(a > 0, a > 1, b > 1), a),  # of masks
    ],
    aten.where.ScalarOther: [lambda op, a, b, t: op(a <= 0.1, b, 2.5)],
    aten.where.ScalarSelf: [lambda op, a, b, t: op(a != 0.1, -1, b)],
    aten._to_copy.default: [
        lambda op, a, b, t: op(t, dtype=a.dtype) - a,
        lambda op, a, b, t: op(a > b, dtype=a.dtype) * a,
        lambda op, a, b, t: op(t, dtype=torch.bool) * a,
        lambda op, a, b, t: op(a, dtype=torch.bool) * b,
    ],
    aten.clone.default: [lambda op, a, b, t: op(a) * b, lambda op, a, b, t: op(a > b) * a],
    aten.alias.default: [lambda op, a, b, t: op(a) * b],
    aten.logical_and.default: [comparing, comparing_bytes],
    aten.logical_or.default: [comparing],
    aten.logical_not.default: [
        lambda op, a, b, t: torch.where(op(a), a, b),
        lambda op, a, b, t: torch.where(op(t), a, b),
    ],
    aten.bitwise_and.Tensor: [lambda op, a, b, t: torch.where(op(a > 0, b > 0), a, b)],
    aten.bitwise_or.Tensor: [lambda op, a, b, t: torch.where(op(a > 0, b > 0), a, b)],
    aten.bitwise_not.default: [lambda op, a, b, t: torch.where(op(a > b), a, b)],
    **{
        getattr(aten, name).Tensor: [comparing, comparing_bytes, lambda op, a, b, t: op(a > 0, b > 0) * a]
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
    },
    **{
        getattr(aten, name).Scalar: [with_number(0.1), with_number(1e300), bytes_with_number(1), bytes_with_number(0.5)]
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
    },
}
# Where a gradient is multiplied by a branch's infinity that was not taken, PyTorch says NaN.
TAKEN_APART = {aten.square.default, aten.where.ScalarOther, aten.where.ScalarSelf, aten.alias.default}  # by tracing
FINITE = {aten.where.self, aten.binary_cross_entropy_with_logits.default}


def constant(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.sigmoid(x)


MORE: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "true plus true is true": lambda a, b, t: ((a > 0) + (b > 0)) * a,
    "and as a number": lambda a, b, t: ((a > 0) + (b > 0)).to(a.dtype) + a,
    "and turned round": lambda a, b, t: torch.where(~((a > 0) + (b > 0)), a, b),
    "times": lambda a, b, t: ((a > 0) * (b > 0)) * a,
    "with and without gradient": lambda a, b, t: a * constant(a) + constant(b) * b,
    "twice": lambda a, b, t: a * a * b + a / (a * a + 1),
}


class Maps(nn.Module):
    """Two maps that a parameter's gradient flows through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


Fn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Compiled:
    """The sum of ``fn(a, b, target)`` over two boundaries and a target, as a segment would compute it."""

    def __init__(self, fn: Fn, dtype: torch.dtype) -> None:
        model = Maps().to(dtype)
        image, target = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)

        def loss(output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
            return fn(*output, target).sum()

        plan = wg.plan(model, loss, image, target, tile=(64, 64), boundaries=["a", "b"])
        self.graph, self.dtype = plan.graph, dtype
        self.segment = plan.segments[-1].segment
        self.how = inline(plan.graph, self.segment)
        self.small = SmallValues(plan.graph, joint_tensors(model, loss, None))
        self.small.settle()

    @property
    def ops(self) -> set[Any]:
        """Those that the kernel computes; none runs by itself."""
        assert len(self.how.sums) == 1 and not self.how.nodes, [self.graph.nodes[i].place for i in self.how.nodes]
        return {self.graph.nodes[i].op for i in self.segment.nodes}

    def run(self, a: torch.Tensor, b: torch.Tensor, t: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """The terms, and the gradients of ``a`` and ``b``."""
        (reading,) = self.how.sums.values()
        paths = [self.graph.nodes[ref.node].path or "target" for ref in reading.leaves]
        named = {"a": a, "b": b, "target": t}
        leaves = tuple(
            named[path] if self.graph.spec(ref).is_map else self.small.leaf(ref)
            for path, ref in zip(paths, reading.leaves, strict=True)
        )
        x = Mixed(reading.parts, leaves)
        found = {"value": pointwise.values(x, self.dtype), "a": torch.zeros_like(a), "b": torch.zeros_like(b)}
        for number, given in pointwise.pull(x, grad).items():
            found[paths[number]] += given
        return found


def by_torch(fn: Fn, a: torch.Tensor, b: torch.Tensor, t: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = fn(a, b, t)
    grads = torch.autograd.grad(value, (a, b), grad, allow_unused=True)
    zeros = torch.zeros_like(a)
    return {"value": value.detach()} | {
        name: zeros if found is None else found for name, found in zip("ab", grads, strict=True)
    }


def pairs(values: list[float], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Every value against every other, with labels 0, 1, 255, 7 and a gradient."""
    n = len(values)
    row = torch.tensor(values, dtype=dtype)
    a, b = row.view(1, 1, 1, n).repeat(1, 1, n, 1), row.view(1, 1, n, 1).repeat(1, 1, 1, n)
    t = torch.tensor([0, 1, 255, 7, 1], dtype=torch.uint8).repeat(n * n)[: n * n].view(1, 1, n, n)
    grad = torch.rand(1, 1, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    return a, b, t, grad.to(dtype)


def wrong(fn: Fn, dtype: torch.dtype, values: list[float], size: float = 0.0) -> list[str]:
    """What differs from PyTorch's by more than some roundings, or than ``size`` times one."""
    given = pairs(values, dtype)
    found, wanted = Compiled(fn, dtype).run(*given), by_torch(fn, *given)
    rtol, eps, least = (1e-13, 2e-16, 1e-300) if dtype == torch.float64 else (2e-6, 1.2e-7, 1e-37)
    return [
        f"{name} at {given[0][bad][:3].tolist()}, {given[1][bad][:3].tolist()}: {found[name][bad][:3].tolist()}"
        for name in wanted
        if (bad := ~found[name].isclose(wanted[name], rtol, max(least, eps * size), equal_nan=True)).any()
    ]


ALL = [(op, number) for op, calls in CASES.items() for number in range(len(calls))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("op", "number"), ALL, ids=[f"{op}-{number}" for op, number in ALL])
def test_every_op_is_pytorchs(op: Any, number: int, dtype: torch.dtype) -> None:
    call = CASES[op][number]

    def fn(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return call(op, a, b, t)

    assert op in Compiled(fn, dtype).ops | TAKEN_APART
    values = TAME if op in FINITE else [*TAME, *EDGES]
    assert not wrong(fn, dtype, values, 20 if op is aten.binary_cross_entropy_with_logits.default else 0)


def test_every_op_has_a_case() -> None:
    assert set(CASES) == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", sorted(MORE))
def test_ops_together(name: str, dtype: torch.dtype) -> None:
    assert Compiled(MORE[name], dtype).ops
    assert not wrong(MORE[name], dtype, TAME)


LEFT: dict[str, Fn] = {
    "wraps around": lambda a, b, t: (t + t) * a,
    "compared in 8 bits": lambda a, b, t: (t != -1) * a + (t < 300) * a,
    "an end that is NaN": lambda a, b, t: a.clamp(NAN, 1),
    "integers": lambda a, b, t: t.long() * a,
    "another precision": lambda a, b, t: (a.to(torch.float16) * 2).to(a.dtype) * b,
    "a cube": lambda a, b, t: a**3,
    "two truths with slopes": lambda a, b, t: F.binary_cross_entropy_with_logits(a, torch.sigmoid(b), reduction="none"),
    "weighted": lambda a, b, t: F.binary_cross_entropy_with_logits(
        a, t.to(a.dtype), weight=t.to(a.dtype), reduction="none"
    ),
}


@pytest.mark.parametrize("name", sorted(LEFT))
def test_what_kernels_cannot_compute_is_left_to_pytorch(name: str) -> None:
    found = Compiled(LEFT[name], torch.float64)
    assert found.how.nodes


def applied(op: str, x: torch.Tensor, *numbers: float, size: int = 0) -> torch.Tensor:
    part = Part(Program((Leaf(MAP, size),), (Step(op, (0,), numbers),)), 1)
    return pointwise.values(Mixed((part,), (x.view(1, 1, 1, -1),)), torch.float32).flatten()


@pytest.mark.parametrize(("op", "exact"), [("exp", torch.exp), ("sigmoid", torch.sigmoid), ("silu", F.silu)])
def test_float32_functions_are_off_by_few_roundings(op: str, exact: Any) -> None:
    x = torch.linspace(-87, 88, 200_001)
    truth = exact(x.double())
    off = ((applied(op, x).double() - truth) / truth).abs().max() / 2**-24
    theirs = ((exact(x).double() - truth) / truth).abs().max() / 2**-24
    assert off <= max(2 * theirs, 4)


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_float32_cross_entropy_is_off_by_few_roundings(y: float) -> None:
    x = torch.linspace(-30, 30, 100_001)
    program = Program((Leaf(), Leaf()), (Step("bce", (0, 1)),))
    truth = torch.logaddexp(x.double() * (1 - 2 * y), torch.zeros(()))  # PyTorch's own loses small ones
    maps = tuple(each.view(1, 1, 1, -1) for each in (x, torch.full_like(x, y)))
    found = pointwise.values(Mixed((Part(program, 1),), maps), torch.float32).flatten()
    assert ((found.double() - truth) / truth).abs().max() <= 8 * 2**-24


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_bytes_become_the_fractions_that_a_division_gives(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8)
    part = Part(Program((Leaf(MAP, 1),), (Step("u8", (0,)),)), 1)
    found = pointwise.values(Mixed((part,), (x.view(1, 1, 1, -1),)), dtype).flatten()
    assert found.equal(x.to(dtype) / 255)


# One pass: every width, batches, channels, views, small values with gradients, and narrower vectors.

PASS = Program(
    (Leaf(grad=True), Leaf(EACH, grad=True), Leaf(ONE, grad=True), Leaf(MAP, 1), Leaf(grad=True)),
    (
        Step("ne", (3,), (0.0,)),
        Step("div", (2, 0)),  # beyond a row's end this is infinite
        Step("mul", (6, 1)),
        Step("leaky", (4,), (0.25,)),
        Step("where", (5, 7, 8)),
        Step("add", (9, 7)),
    ),
)


def formula(leaves: list[torch.Tensor]) -> torch.Tensor:
    x, each, one_, mask, y = leaves
    ratio = one_ / x * each
    return torch.where(mask != 0, ratio, F.leaky_relu(y, 0.25)) + ratio


def pass_leaves(width: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(width)

    def map_(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64) + 0.5

    whole = map_(2, 4, 7, width + 3)[:, 1:, 2:6, 3:]  # a crop
    mask = torch.randint(0, 3, (2, 3, 4, width), generator=draw, dtype=torch.uint8)
    across = (map_(2, 3, width, 4) - 1).transpose(2, 3)  # columns lie apart
    return [whole, map_(3, 1, 1), map_(1, 1, 1, 1)[0], mask, across]


def pass_errors(width: int) -> dict[str, float]:
    leaves = pass_leaves(width)
    x = Mixed((Part(PASS, 3),), tuple(leaves))
    real = [each.clone().requires_grad_(each.is_floating_point()) for each in leaves]
    value = formula(real)
    grad = torch.rand(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(value, [real[i] for i in PASS.wanted], grad, retain_graph=True)
    share = torch.tensor(0.3, dtype=torch.float64)
    summed = torch.autograd.grad(value.sum(), [real[i] for i in PASS.wanted], share)
    found = {"value": (pointwise.values(x, torch.float64), value)}
    for name, got, right in (
        ("pull", pointwise.pull(x, grad), wanted),
        ("total", (walked := pointwise.total(x, torch.float64, share)).grads, summed),
    ):
        assert sorted(got) == list(PASS.wanted)
        found |= {f"{name} {i}": (got[i].reshape(each.shape), each) for i, each in zip(PASS.wanted, right, strict=True)}
    assert walked.total is not None
    found["total"] = (walked.total, value.sum((2, 3)))
    return {name: float(((a - b).abs().max() / b.abs().max()).detach()) for name, (a, b) in found.items()}


def test_a_pass_is_exact_whatever_the_width() -> None:
    for width in (1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 33, 64, 65):
        found = pass_errors(width)
        assert max(found.values()) <= 1e-13, (width, found)


@pytest.mark.parametrize("machine", [Host(16, 32, ""), Host(32, 16, "")])
def test_a_pass_with_narrower_vectors(machine: Host, narrow: Callable[[Host], None]) -> None:
    narrow(machine)
    for width in (1, 2, 3, 5, 18):
        assert max(pass_errors(width).values()) <= 1e-13


def test_equal_terms_are_summed_as_exactly_as_pytorch_does() -> None:
    """Blank glass: rounding errors of equal terms do not cancel."""
    x = torch.full((1, 1, 2, 10_000), 0.1)
    found = pointwise.total(Mixed((Part(Program((Leaf(),)), 1),), (x,)), torch.float32, None).total
    truth = x.double().sum()
    assert found is not None
    assert abs(found.item() - truth) <= 2 * abs(x.sum() - truth)


def test_nothing_is_written_beyond_a_row() -> None:
    """A pass over a crop's neighbours: outputs are its own, so what it reads must stay as it was."""
    x = Mixed((Part(PASS, 3),), tuple(pass_leaves(9)))
    before = [each.clone() for each in x.leaves]
    pointwise.pull(x, torch.ones(2, 3, 4, 9, dtype=torch.float64))
    assert all(a.equal(b) for a, b in zip(before, x.leaves, strict=True))


def test_an_empty_map_sums_to_nothing() -> None:
    part = Part(Program((Leaf(grad=True),), (Step("exp", (0,)),)), 2)
    found = pointwise.total(Mixed((part,), (torch.empty(1, 2, 0, 5),)), torch.float32, torch.ones(()))
    assert found.total is not None and found.total.tolist() == [[0.0, 0.0]] and found.grads[0].shape == (1, 2, 0, 5)


# Mutants.


def test_a_wrong_derivative_is_noticed(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    def relu(code: Code, given: list[expression.Dual], numbers: tuple[float, ...]) -> expression.Dual:
        return expression._leaky(code, given, (0.0, *numbers))._replace(slope=given[0].slope)

    monkeypatch.setitem(expression._OPS, "relu", relu)
    found = wrong(lambda a, b, t: F.relu(a), torch.float64, TAME)
    assert [each.split()[0] for each in found] == ["a"]


def test_a_kink_on_the_wrong_side_is_noticed(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    monkeypatch.setitem(expression._OPS, "hardtanh", expression._OPS["clamp"])
    found = wrong(lambda a, b, t: F.hardtanh(a), torch.float64, TAME)
    assert [each.split()[0] for each in found] == ["a"]


def test_a_mask_one_lane_short_is_noticed(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    whole = Code.lanes_within
    monkeypatch.setattr(Code, "lanes_within", lambda self, low, high: whole(self, low, self.sub(high, 1)))
    # Memory that nobody wrote must not hold what an earlier pass left there.
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, **_: torch.full(shape, 7.0, dtype=dtype))
    assert max(pass_errors(16).values()) <= 1e-13  # of whole vectors alone
    assert max(pass_errors(17).values()) > 1e-3


def test_what_lies_beyond_a_row_is_not_summed(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    monkeypatch.setattr(
        Code, "select", lambda self, mask, a, b: a if b == "zeroinitializer" else KEPT(self, mask, a, b)
    )
    found = pass_errors(17)
    assert found["value"] <= 1e-13 and not found["total"] <= 1e-3 and not found["pull 1"] <= 1e-3


KEPT = Code.select

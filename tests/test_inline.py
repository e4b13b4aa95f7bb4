"""Maps that never are: what stands between convolutions, images and sums, against whole-image autograd.

First that it is exact for every way in which ops, concatenations, images and losses meet; then that it happens at all,
and that where there are no kernels nothing of it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wholegrad as wg
from oracle import assert_exact, errors
from wholegrad.errors import PlanError
from wholegrad.graph import inline as inlining
from wholegrad.graph.graph import Graph, Kind, Ref
from wholegrad.graph.inline import Inlined, _Inliner, inline
from wholegrad.kernels import choice, expression, pointwise, stage, thin
from wholegrad.kernels.emit import Code, Value
from wholegrad.kernels.expression import evaluate
from wholegrad.kernels.host import host
from wholegrad.kernels.stage import Line
from wholegrad.kernels.tail import _Scheduling
from wholegrad.losses import LOSSES, dice_counts
from wholegrad.nets import unet4492
from wholegrad.run import tile as tiling
from wholegrad.run.sources import Form, Source
from wholegrad.slide.arrays import as_reader

pytestmark = pytest.mark.skipif(host() is None, reason="no kernels for this processor")
aten = torch.ops.aten
CONV = aten.convolution.default
SIZE = (21, 47)
TILE = (9, 20)
bce = F.binary_cross_entropy_with_logits
Forward = Callable[..., Any]


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Net(nn.Module):
    """Some convolutions and small parameters, put together by a function of them and the image."""

    def __init__(self, forward: Forward, inputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = forward
        self.first, self.same, self.wide, self.last = conv(inputs, 2), conv(2, 2), conv(4, 2), conv(2, 1)
        self.each = nn.Parameter(torch.randn(2, 1, 1))
        self.each4 = nn.Parameter(torch.randn(1, 2, 1, 1))
        self.one = nn.Parameter(torch.randn(()))
        self.map = nn.Parameter(torch.randn(1, 2, *SIZE))

    def forward(self, *images: torch.Tensor) -> Any:
        return self.how(self, *images)


def pixels(channels: int = 3, size: tuple[int, int] = SIZE, batch: int = 0) -> np.ndarray:
    shape = (batch, channels, *size) if batch else (channels, *size)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def fractions(*shape: int) -> torch.Tensor:
    return torch.rand(*(shape or (1, *SIZE)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def labels(*shape: int, ignored: bool = False) -> torch.Tensor:
    drawn = fractions(*shape)
    found = (drawn > 0.5).to(torch.uint8)
    return torch.where(drawn > 0.9, 255, found).to(torch.uint8) if ignored else found


def squares(output: Any, target: Any) -> torch.Tensor:
    maps = output if isinstance(output, tuple) else [output]
    return torch.stack([x.square().mean() + 0.1 * x.sum() for x in maps]).sum()


def constant_part(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return F.leaky_relu(net.first(x))


def many(x: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        x = F.leaky_relu(x * 1.01 + 0.01, 0.5)
    return x


def on_first(fn: Callable[[Net, torch.Tensor], Any]) -> Forward:
    return lambda net, x: fn(net, net.first(x))


NETS: dict[str, Forward] = {
    # Concatenations.
    "a map beside itself": on_first(lambda net, y: net.wide(torch.cat([F.relu(y), F.relu(y)], 1))),
    "within a concatenation": on_first(lambda net, y: net.wide(torch.cat([torch.cat([F.relu(y)], 1), 1 - y], -3))),
    "along rows": on_first(lambda net, y: net.same(torch.cat([F.relu(y), y.abs()], 2))),
    "masks": on_first(lambda net, y: net.wide(torch.cat([y, y > 0], 1))),
    "a parameter": on_first(lambda net, y: net.wide(torch.cat([F.relu(y), net.map], 1))),
    "zeros": on_first(lambda net, y: net.wide(torch.cat([F.relu(y), torch.zeros_like(y)], 1))),
    "one value for each channel": on_first(
        lambda net, y: net.wide(torch.cat([F.relu(y), net.each.expand(1, 2, *SIZE)], 1))
    ),
    "boundaries": lambda net, x: net.wide(torch.cat([net.first(x), F.relu(net.same(net.first(x)))], 1)),
    # Small operands.
    "scaled": on_first(lambda net, y: net.same(F.silu(y * net.each + net.one) * net.each4)),
    "scaled by constants": on_first(
        lambda net, y: net.same(F.relu(y * net.each.detach() + net.each4.detach()) * net.one.detach())
    ),
    "infinite beyond a row": on_first(lambda net, y: net.one / (y + 9)),
    "infinite in the padding": on_first(lambda net, y: net.same(net.one.detach() / (y + 9))),
    "a map of parameters": on_first(lambda net, y: net.same(y * net.map)),
    # Maps with and without gradient.
    "two maps": lambda net, x: net.same(net.first(x) * torch.sigmoid(net.same(net.first(x)))),
    "twice": on_first(lambda net, y: net.same(y + y) + y * y),
    "detached": on_first(lambda net, y: net.same(y * torch.sigmoid(y).detach())),
    "without gradient": lambda net, x: net.same(constant_part(net, x) * net.first(x) + constant_part(net, x)),
    # Activations that others read too.
    "an output": on_first(lambda net, y: (net.same(F.relu(y)), F.relu(y))),
    "an output that is read": on_first(lambda net, y: (lambda z: (net.same(z), z))(F.relu(y))),
    "read by pooling": on_first(lambda net, y: (lambda z: net.same(z) + F.max_pool2d(z, 3, 1, 1))(F.relu(y))),
    "of pooling": on_first(lambda net, y: net.same(1 - F.max_pool2d(F.leaky_relu(y), 3, 1, 1))),
    "in place": on_first(lambda net, y: net.same(y.mul_(2).add_(1).relu_())),
    "residual": on_first(lambda net, y: net.same(F.relu(y + net.same(F.relu(y))))),
    "masks added": on_first(lambda net, y: net.same(((y > 0) + (y < -1)).to(y.dtype) * y)),
    "more ops than Python calls": on_first(lambda net, y: net.same(many(y, 100))),
    # Windows.
    "padded after one minus": lambda net, x: net.same(1 - net.first(1 - x)),
    "padded far after one minus": on_first(lambda net, y: F.conv2d(1 - y, net.same.weight, None, 2, 4, 2)),
    "transposed": on_first(
        lambda net, y: F.conv_transpose2d(
            torch.cat([1 - y, F.relu(y)], 1), net.wide.weight.transpose(0, 1), None, (1, 2), (0, 1)
        )
    ),
    # Images.
    "an image read twice": lambda net, x: net.first(1 - x) + F.avg_pool2d(x, 3, 1, 1)[:, :2],
    "an image that is summed": lambda net, x: net.first((x - 0.5) / 0.2) * x.mean() + x[:, :1],
    "an image less its means": lambda net, x: net.first(x - x.mean((2, 3), keepdim=True)),
    "an image that is an output": lambda net, x: (net.first(x), x),
    # Other layouts.
    "flattened": lambda net, x: F.relu(net.first(x) * 2).view(-1) * 3,
    "three dimensions": lambda net, x: F.relu(net.first(x)[:, 0]) * 2,
    "turned": on_first(lambda net, y: net.same(F.relu(y.transpose(2, 3)).transpose(2, 3))),
}


@pytest.mark.parametrize("name", list(NETS))
def test_networks(name: str) -> None:
    fixed = {"boundaries": ["first", "same"]} if name == "boundaries" else {}
    assert_exact(Net(NETS[name]).double(), squares, pixels(), None, tile=TILE, **fixed)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 2), conv(2, 2), conv(2, 1)
        self.batch, self.instance = nn.BatchNorm2d(2), nn.InstanceNorm2d(2, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.c(F.silu(self.instance(self.b(F.relu(self.batch(self.a(1 - x)))))))
        return result


@pytest.mark.parametrize("batch", [1, 2])
def test_norms_whose_scales_need_gradients(batch: int) -> None:
    assert_exact(Norms().double(), squares, pixels(batch=batch), None, tile=TILE)


# Losses: what a sum computes while it reads.


def logits(net: Net, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = net.last(F.leaky_relu(net.first(1 - x)))
    return result


def overlap(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    chance = torch.sigmoid(output)
    return 1 - 2 * (chance * target).sum() / (chance.sum() + target.sum() + 1)


def counted(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    term = bce(output, (target == 1).to(output.dtype), reduction="none")
    return (term * (target != 255) * (target != -1)).sum() / (target != 255).sum()


SUMS: dict[str, tuple[Any, Callable[[torch.Tensor, Any], torch.Tensor]]] = {
    "mean": (fractions(), bce),
    "sum": (labels(), lambda o, t: bce(o, t.to(o.dtype), reduction="sum")),
    "weights": ((fractions(), fractions()), lambda o, t: bce(o, t[0], weight=t[1])),
    "weight of positives": (fractions(), lambda o, t: bce(o, t, pos_weight=torch.tensor([3.0], dtype=o.dtype))),
    "squares": (labels(), lambda o, t: F.mse_loss(o, t.to(o.dtype), reduction="sum")),
    "distances": (fractions(), F.l1_loss),
    "overlap with bytes": (labels(), overlap),
    "overlap with masks": (labels().bool(), overlap),
    "overlap with integers": (labels().long(), overlap),
    "float32 beside float64": (fractions().float().numpy(), lambda o, t: (o * t).mean() + t.mean()),
    "signed bytes": (labels().to(torch.int8), lambda o, t: (o * (t == 1)).mean()),
    "ignored labels": (labels(ignored=True), counted),
    "several sums": (fractions(), lambda o, t: (o.sum() + o.square().sum() + (o * t).sum() + t.sum()) / 1e3),
    "weighed losses": (
        fractions(),
        lambda o, t: 0.3 * bce(o, t) + 0.7 * F.mse_loss(o.sigmoid(), t) + o.abs().sum() / 1e4,
    ),
    "a product of means": (fractions(), lambda o, t: o.mean() * o.square().mean()),
    "a mean of what is computed": (fractions(), lambda o, t: ((o * o.mean()).relu() * t).mean()),
    "rows and columns alone": (fractions(), lambda o, t: bce(o, t, reduction="none").mean((2, 3)).sum()),
    "in float64": (fractions(), lambda o, t: (o * t).sum(dtype=torch.float64)),
    "flattened": (fractions(), lambda o, t: bce(o.view(-1), t.view(-1))),
    "three dimensions": (fractions(*SIZE), lambda o, t: bce(o[:, 0], t)),
    "extremes beside sums": (fractions(), lambda o, t: o.max() + o.clamp(0, 0.1).mean()),
    "no gradient in a factor": (fractions(), lambda o, t: (bce(o, t, reduction="none") * (o - t).detach()).mean()),
    **{f"own {name}": (labels(ignored=True), loss) for name, loss in LOSSES.items()},
}


@pytest.mark.parametrize("name", list(SUMS))
def test_losses(name: str) -> None:
    target, loss = SUMS[name]
    assert_exact(Net(logits).double(), loss, pixels(), target, tile=TILE)


@pytest.mark.parametrize(
    "name", ["mean", "overlap with bytes", "several sums", "flattened", "a mean of what is computed"]
)
def test_losses_of_a_batch(name: str) -> None:
    size = (2, 1, 13, 30)
    target = labels(*size) if "bytes" in name else fractions(*size)
    assert_exact(Net(logits).double(), SUMS[name][1], pixels(size=size[2:], batch=2), target, tile=TILE)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), (5, 3), (16, 33)])
def test_sizes(size: tuple[int, int]) -> None:
    loss = SUMS["weighed losses"][1]
    assert_exact(Net(logits).double(), loss, pixels(size=size), fractions(1, *size), tile=(4, 17))


@pytest.mark.parametrize("tile", [(1, 1), (1, 17), (3, 1), (9, 7), (500, 500)])
def test_tiles(tile: tuple[int, int]) -> None:
    loss = SUMS["weighed losses"][1]
    assert_exact(Net(logits).double(), loss, pixels(size=(9, 17)), fractions(1, 9, 17), tile=tile)


def test_an_activation_that_is_output_boundary_and_summed() -> None:
    net = Net(lambda net, x: F.relu(net.last(net.first(x)))).double()
    for loss in (lambda o, t: (o * t).mean(), lambda o, t: F.mse_loss(o.sigmoid(), t)):
        assert_exact(net, loss, pixels(), fractions(), tile=TILE)
        assert_exact(net, loss, pixels(), fractions(), tile=TILE, boundaries=["first", "last"])


IMAGES: dict[str, tuple[Any, int]] = {
    "bytes": (pixels(), 3),
    "floats": (pixels() / 255, 3),
    "float32": ((pixels() / 255).astype(np.float32), 3),
    "one channel": (pixels(1), 1),
    "bytes as they are": (Source([as_reader(pixels())], torch.float64, scale=False), 3),
    "more channels than kernels take": (pixels(16), 16),
}


@pytest.mark.parametrize("name", list(IMAGES))
def test_images(name: str) -> None:
    image, channels = IMAGES[name]
    target = fractions(1, 1, *SIZE) if isinstance(image, Source) else fractions()
    assert_exact(Net(logits, channels).double(), bce, image, target, tile=TILE)


def test_two_images_of_unlike_dtypes() -> None:
    net = Net(lambda net, x, y: logits(net, torch.cat([x, 1 - y], 1)) + y.mean(), 4).double()
    assert_exact(net, bce, (pixels(), fractions().numpy()), fractions(), tile=TILE)
    assert_exact(net, bce, (pixels(), pixels(1)), fractions(), tile=TILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_taken_where_their_maps_are_read(dtype: torch.dtype) -> None:
    net, image = unet4492(seed=0).to(dtype), pixels(size=(64, 80))
    target = labels(1, 64, 80, ignored=True)
    metrics = {
        "kinds": dice_counts,
        "hits": lambda o, t: ((o > 0) == (t == 1)).sum(),
        "labels": lambda o, t: (t == 1).sum(),
        "whole": lambda o, t: (o * 4).sum(dtype=torch.int64),
    }
    plan = wg.plan(net, LOSSES["bce"], image, target, tile=(27, 40), metrics=metrics)
    last = plan.segments[-1].segment
    summed = inline(plan.graph, last, frozenset({Ref(plan.graph.image.index)})).sums
    cut = {i for i in last.reductions if plan.graph.nodes[i].outputs[0].dtype == torch.int64} - set(summed)
    assert set(last.reductions) - set(summed) == cut and len(cut) == 1, "all but the terms cut to whole numbers"
    _, found = wg.backward(net, LOSSES["bce"], image, target, plan=plan, metrics=metrics)
    output = net(torch.from_numpy(image)[None].to(dtype) / 255).detach()
    for name, metric in metrics.items():
        assert torch.equal(found[name], metric(output, target[None])), name


def test_metrics_beside_the_loss() -> None:
    net, target = Net(logits).double(), labels(ignored=True)
    metrics = {"hits": lambda o, t: ((o > 0) == (t == 1)).to(o.dtype).mean(), "mean": lambda o, t: o.mean()}
    _, found = wg.backward(net, LOSSES["bce"], pixels(), target, metrics=metrics)
    output = net(torch.from_numpy(pixels())[None].double() / 255)
    for name, metric in metrics.items():
        assert found[name].item() == pytest.approx(metric(output, target[None]).item(), rel=1e-12), name


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_float32_is_as_good_as_whole_image_float32(loss: str) -> None:
    report = wg.verify(Net(logits), LOSSES[loss], shape=(3, 60, 170))
    assert report.ok, str(report)


# That it happens.


def how(model: nn.Module, loss: Any, size: tuple[int, int] = SIZE) -> tuple[Graph, list[Inlined]]:
    """How each segment runs on 8-bit pixels with 8-bit labels."""
    plan = wg.plan(model, loss, pixels(size=size), labels(1, *size), tile=(64, 64))
    raw = frozenset(Ref(node.index) for node in plan.graph.of_kind(Kind.IMAGE))
    return plan.graph, [inline(plan.graph, part.segment, raw) for part in plan.segments]


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_of_the_published_network_only_convolutions_run(loss: str) -> None:
    graph, segments = how(unet4492(seed=0), LOSSES[loss], (96, 112))
    ran = [graph.nodes[i] for each in segments for i in each.nodes]
    assert [node.op for node in ran] == [CONV] * 8
    assert all(each.convolutions.keys() == set(each.nodes) and not each.floats for each in segments)
    assert {i for each in segments for i in each.sums} == {node.index for node in graph.of_kind(Kind.REDUCTION)}


def test_a_step_of_the_published_network_makes_no_map_for_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only convolutions' rules are asked to run; no pass is made for values; the image is never floats."""
    rule_for = tiling.rule_for

    def asked(op: Any) -> Any:
        assert op is CONV, f"{op} runs"
        return rule_for(op)

    monkeypatch.setattr(tiling, "rule_for", asked)
    monkeypatch.setattr(pointwise, "values", lambda *args: pytest.fail("a chain made a map"))
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda source, box, form: read(source, box, Form.BYTES))
    size = (96, 112)
    model = unet4492(seed=0)
    loss = wg.backward(model, LOSSES["bce"], pixels(size=size), labels(1, *size))
    output = model(torch.from_numpy(pixels(size=size))[None] / 255)
    assert loss.item() == pytest.approx(LOSSES["bce"](output, labels(1, 1, *size)).item(), rel=1e-5)


RUNS: dict[str, list[Any]] = {
    "within a concatenation": [CONV] * 2,
    "boundaries": [CONV] * 4,
    "padded after one minus": [CONV] * 2,
    "residual": [CONV, CONV, aten.relu.default, CONV],  # of two maps with gradients
    "two maps": [CONV, CONV, CONV, aten.mul.Tensor, CONV],
    "masks": [CONV, aten.gt.Scalar, aten.cat.default, CONV],  # not all of one dtype
    "an image read twice": [
        CONV,
        aten.avg_pool2d.default,
        aten.slice.Tensor,
        aten.add.Tensor,
        aten.pow.Tensor_Scalar,
    ],
}


@pytest.mark.parametrize("name", list(RUNS))
def test_only_what_must_exist_runs(name: str) -> None:
    graph, segments = how(Net(NETS[name]), squares)
    assert [graph.nodes[i].op for each in segments for i in each.nodes] == RUNS[name]


def test_a_chain_runs_once_and_not_op_by_op() -> None:
    graph, (found,) = how(Net(NETS["scaled"]), squares)
    (index,) = found.chains
    assert graph.nodes[index].op is aten.mul.Tensor and len(found.chains[index].parts[0].program.steps) == 4
    assert [graph.nodes[i].op for i in found.nodes].count(CONV) == len(found.nodes) - 1 == 2


@pytest.mark.parametrize("name", ["within a concatenation", "scaled", "read by pooling", "an image that is an output"])
def test_nothing_is_inlined_without_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inlining, "host", lambda: None)
    monkeypatch.setattr(choice, "host", lambda: None)
    _, segments = how(Net(NETS[name]), squares)
    assert not any(each.convolutions or each.chains or each.sums for each in segments)
    assert_exact(Net(NETS[name]).double(), squares, pixels(), None, tile=TILE)


# Mutants: break one thing, and the oracle must say so.


def misplaced(
    code: Code,
    parts: Any,
    name: str,
    leaves: str,
    area: Any,
    scratch: tuple[str, Value],
    sums: Any = None,
    direct: Any = (),
) -> None:
    """The first part staged where the second belongs too."""
    FILL(code, parts, name, leaves, area, scratch, sums, direct)
    if len(parts) > 1 and not any(direct):
        second = code.at(scratch[0], code.mul(scratch[1], parts[0].channels))
        FILL(code, parts[:1], name, leaves, area, (second, scratch[1]), sums)


def unmasked(self: Line, place: Value, mask: str = "") -> str:
    """A program's value of what lies beyond the map, which is not zero."""
    return evaluate(self.leaves.code, self.leaves.program, self.vectors(place, mask)).value


FILL, SLIDE, PIECES, SHORT = stage.fill, thin._slide, _Inliner._pieces, Code.lanes_within
BLOCK_SLIDE = _Scheduling._slide
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "a part out of its place": (stage, "fill", misplaced),
    "padding is computed too": (Line, "read", unmasked),
    "no derivative of what is read": (thin, "_slide", lambda *args: SLIDE(*args[:-1], None)),
    "no derivative of what a block reads": (
        _Scheduling, "_slide", lambda self, shape, *args, **label: BLOCK_SLIDE(
            self, shape._replace(factor=None), *args[:5], **label
        ),
    ),
    "parts in another order": (_Inliner, "_pieces", lambda self, ref: PIECES(self, ref)[::-1]),
    "a lane too few": (Code, "lanes_within", lambda self, low, high: SHORT(self, low, self.sub(high, 1))),
    "a leaky ReLU that leaks double": (
        expression, "_OPS", {**expression._OPS, "leaky": lambda code, given, by: LEAKY(code, given, (2 * by[0],))}
    ),
}  # fmt: skip
LEAKY = expression._OPS["leaky"]


@pytest.mark.parametrize("name", list(MUTANTS))
def test_the_oracle_notices(name: str, monkeypatch: pytest.MonkeyPatch, fresh_kernels: Callable[[], None]) -> None:
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        y = net.first(1 - x)
        result: torch.Tensor = net.wide(torch.cat([F.leaky_relu(y), 1 - y], 1))
        return result

    assert_exact(Net(forward).double(), squares, pixels(), None, tile=TILE)
    fresh_kernels()
    where, attribute, mutant = MUTANTS[name]
    if where is thin:
        monkeypatch.setattr("wholegrad.graph.inline.find_tail", lambda *args: None)
    monkeypatch.setattr(where, attribute, mutant)
    found = errors(Net(forward).double(), squares, pixels(), None, tile=TILE)
    assert max(found.values()) > 1e-3


def test_a_plan_for_bytes_is_not_one_for_floats() -> None:
    """Floats take more memory than the bytes that the plan counted on."""
    net = Net(lambda net, x: net.last(F.relu(net.first(x))))
    plan = wg.plan(net, bce, pixels(), fractions(1, *SIZE).float())
    with pytest.raises(PlanError, match="8-bit"):
        wg.backward(net, bce, pixels().astype(np.float32), fractions(1, *SIZE).float(), plan=plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_map_of_one_channel_is_read_from_its_file_in_any_dtype(dtype: torch.dtype, tmp_path: Any) -> None:
    np.save(tmp_path / "i.npy", fractions(1, *SIZE).float().numpy())
    image = np.load(tmp_path / "i.npy", mmap_mode="r")
    net = nn.Conv2d(1, 1, 3, padding=1).to(dtype)
    target = torch.zeros(1, *SIZE)

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.float() - target).square().mean()

    found = wg.backward(net, loss_fn, image, target)
    wanted = loss_fn(net(torch.from_numpy(np.array(image))[None].to(dtype)), target[None])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)

"""One small case for every way of using an op: the rows of docs/support.md.

A case is a network of a convolution, the op and another convolution, so that gradients pass through the op to
parameters on both sides. Where the op makes a vector of the map, a linear layer follows; a loss stands at the end of a
plain network.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

aten = torch.ops.aten
Op = Callable[[torch.Tensor], torch.Tensor]
Loss = Callable[..., torch.Tensor]
SIZE = (20, 26)
CHANNELS = 4
LABELS = 3  # classes


@dataclass(frozen=True)
class SupportCase:
    """One row: a network, a loss and what they are fed."""

    group: str
    name: str
    build: Callable[[], nn.Module]
    loss: Loss
    image: Callable[[], Any]
    target: Callable[[], Any]


def pixels(batch: int = 1, channels: int = 3, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, *size, generator=generator, dtype=torch.float64)


def labels(batch: int = 1, classes: int = LABELS) -> torch.Tensor:
    return torch.randint(0, classes, (batch, *SIZE), generator=torch.Generator().manual_seed(5))


def square(output: Any, target: Any) -> torch.Tensor:
    """Smooth, not symmetric, and with a slope at zero."""
    outputs = output if isinstance(output, tuple | list) else [output]
    return sum(((o**2).mean() + (o**3).mean() * 0.3 + o.mean() * 0.1 for o in outputs), torch.zeros(()).to(outputs[0]))


class Between(nn.Module):
    """A convolution, the op, and a convolution, or a linear layer where the op leaves no map."""

    def __init__(self, op: Op | nn.Module) -> None:
        super().__init__()
        self.op = op
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        if isinstance(op, nn.Module):
            self.randomise(op)
        with torch.no_grad():
            found = op(torch.rand(1, CHANNELS, *SIZE))
        self.last = nn.Conv2d(found.shape[1], 2, 3, padding=1) if found.dim() == 4 else nn.Linear(found.shape[-1], 2)

    @staticmethod
    def randomise(op: nn.Module) -> None:
        """Parameters and running statistics that are not those of a fresh layer."""
        with torch.no_grad():
            for parameter in op.parameters():
                parameter.add_(torch.rand_like(parameter) * 0.2)
            for buffer in op.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand_like(buffer) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.op(self.first(x)))
        return result


class Plain(nn.Module):
    """Two convolutions: what a loss is put behind."""

    def __init__(self, channels: int = 1, last: Op = torch.Tensor.contiguous) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, channels, 3, padding=1)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).tanh()))


CASES: list[SupportCase] = []


def add(
    group: str,
    name: str,
    build: Callable[[], nn.Module],
    loss: Loss = square,
    image: Callable[[], Any] = pixels,
    target: Callable[[], Any] = lambda: None,
    training: bool = True,
) -> None:
    """One case, with the same parameters in every run."""

    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(name.encode()))
            return build().double().train(training)

    CASES.append(SupportCase(group, name, made, loss, image, target))


def ops(group: str, table: dict[str, Callable[[], Op | nn.Module]], **more: Any) -> None:
    """Cases of the form convolution, op, convolution."""
    for name, make in table.items():
        add(group, name, lambda make=make: Between(make()), **more)  # type: ignore[misc]


def functions(group: str, table: dict[str, Op], **more: Any) -> None:
    """Likewise, for ops that are functions."""
    ops(group, {name: (lambda function=function: function) for name, function in table.items()}, **more)


def conv(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(CHANNELS, 4, *args, **kwargs)


def transposed(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.ConvTranspose2d(CHANNELS, 4, *args, **kwargs)


ops(
    "Convolution",
    {
        "3 x 3": conv(3),
        "3 x 3, padding 1": conv(3, padding=1),
        "3 x 3, padding same": conv(3, padding="same"),
        "3 x 3, padding 4": conv(3, padding=4),
        "1 x 1": conv(1),
        "2 x 2": conv(2),
        "4 x 4, padding same": conv(4, padding="same"),
        "5 x 2, padding (2, 1)": conv((5, 2), padding=(2, 1)),
        "7 x 7, stride 2, padding 3": conv(7, stride=2, padding=3),
        "3 x 3, stride (2, 3)": conv(3, stride=(2, 3)),
        "2 x 2, stride 3 (gaps)": conv(2, stride=3),
        "3 x 3, dilation 3, padding 3": conv(3, dilation=3, padding=3),
        "3 x 3, dilation (1, 2), stride 2": conv(3, dilation=(1, 2), stride=2),
        "3 x 3, groups 2": conv(3, groups=2, padding=1),
        "depthwise 5 x 5": conv(5, groups=4, padding=2),
        "depthwise 3 x 3 and 1 x 1": lambda: nn.Sequential(conv(3, groups=4, padding=1)(), conv(1)()),
        "without bias": conv(3, bias=False),
        "padding reflect": conv(5, padding=2, padding_mode="reflect"),
        "padding replicate": conv(5, padding=2, padding_mode="replicate"),
        "padding circular": conv(3, padding=1, padding_mode="circular"),
        "as large as the map": conv(SIZE),
        "weight normalised": lambda: nn.utils.parametrizations.weight_norm(conv(3)()),
        "spectrally normalised": lambda: nn.utils.parametrizations.spectral_norm(conv(3)()),
    },
)
ops(
    "Transposed convolution",
    {
        "transposed 2 x 2, stride 2": transposed(2, stride=2),
        "transposed 3 x 3, stride 2, padding 1, output padding 1": transposed(3, stride=2, padding=1, output_padding=1),
        "transposed 4 x 4, stride 2, padding 1": transposed(4, stride=2, padding=1),
        "transposed 8 x 8, stride 4, padding 2": transposed(8, stride=4, padding=2),
        "transposed 3 x 3": transposed(3),
        "transposed (2, 3), stride (1, 3)": transposed((2, 3), stride=(1, 3)),
        "transposed 3 x 3, dilation 2": transposed(3, dilation=2),
        "transposed 2 x 2, groups 2": transposed(2, stride=2, groups=2),
        "transposed 2 x 2, stride 3 (gaps)": transposed(2, stride=3),
    },
)


def coarse(x: torch.Tensor) -> torch.Tensor:
    """Steps of a quarter, so that there are ties, through which gradients pass."""
    return x + ((x * 4).round() / 4 - x).detach()


def unpooled(kernel: int, stride: int, pad: int) -> Op:
    def function(x: torch.Tensor) -> torch.Tensor:
        value, index = F.max_pool2d(x, kernel, stride, pad, return_indices=True)
        return F.max_unpool2d(value, index, kernel, stride, pad, output_size=list(x.shape[-2:]))

    return function


def with_indices(x: torch.Tensor) -> torch.Tensor:
    value, index = F.max_pool2d(coarse(x), 3, 2, 1, return_indices=True)
    return value * (index % 7 + 1)


functions(
    "Pooling",
    {
        "max 2": lambda x: F.max_pool2d(x, 2),
        "max 3, stride 2, padding 1": lambda x: F.max_pool2d(x, 3, 2, 1),
        "max 3 with ties": lambda x: F.max_pool2d(coarse(x), 3, 1, 1),
        "max (3, 2), dilation (2, 3), ceil": lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 1), (2, 3), ceil_mode=True),
        "max, with indices": with_indices,
        "max unpool 2": unpooled(2, 2, 0),
        "max unpool 3, padding 1": unpooled(3, 3, 1),
        "average 2": lambda x: F.avg_pool2d(x, 2),
        "average 3, stride 2, padding 1": lambda x: F.avg_pool2d(x, 3, 2, 1),
        "average, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        "average (3, 4), ceil": lambda x: F.avg_pool2d(x, (3, 4), (2, 3), (1, 2), ceil_mode=True),
        "average, ceil, not counted": lambda x: F.avg_pool2d(x, 4, 3, 1, ceil_mode=True, count_include_pad=False),
        "average, own divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
        "power-average 2": lambda x: F.lp_pool2d(x * x + 0.1, 2, 3),
        "adaptive average (5, 13)": lambda x: F.adaptive_avg_pool2d(x, (5, 13)),
        "adaptive average (3, 5)": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
        "adaptive average, larger": lambda x: F.adaptive_avg_pool2d(x, (25, 31)),
        "adaptive average 1": lambda x: F.adaptive_avg_pool2d(x, 1),
        "adaptive max (3, 5)": lambda x: F.adaptive_max_pool2d(x, (3, 5)),
        "adaptive max 1": lambda x: F.adaptive_max_pool2d(x, 1),
        "global average": lambda x: x.mean((2, 3)),
        "global max": lambda x: x.amax((2, 3)),
    },
)


def resize(mode: str, **how: Any) -> Op:
    return lambda x: F.interpolate(x, mode=mode, **how)


functions(
    "Interpolation",
    {
        "nearest 2": resize("nearest", scale_factor=2),
        "nearest (3, 1)": resize("nearest", scale_factor=(3, 1)),
        "nearest 1.5": resize("nearest", scale_factor=1.5),
        "nearest to a size": resize("nearest", size=(37, 13)),
        "nearest-exact 2": resize("nearest-exact", scale_factor=2),
        "nearest-exact to a size": resize("nearest-exact", size=(13, 41)),
        "bilinear 2": resize("bilinear", scale_factor=2),
        "bilinear 2, corners aligned": resize("bilinear", scale_factor=2, align_corners=True),
        "bilinear 1.7": resize("bilinear", scale_factor=1.7),
        "bilinear 0.4": resize("bilinear", scale_factor=0.4),
        "bilinear to a size": resize("bilinear", size=(37, 13)),
        "bilinear to a size, corners aligned": resize("bilinear", size=(8, 47), align_corners=True),
        "bicubic 2": resize("bicubic", scale_factor=2),
        "bicubic 2, corners aligned": resize("bicubic", scale_factor=2, align_corners=True),
        "bicubic 1.3": resize("bicubic", scale_factor=1.3),
        "bicubic to a size, corners aligned": resize("bicubic", size=(11, 40), align_corners=True),
        "area": resize("area", size=(7, 30)),
    },
)


def ramp(x: torch.Tensor) -> torch.Tensor:
    """A row of the map's width."""
    return torch.linspace(0, 1, SIZE[1]).to(x)


def with_part_replaced(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 1] = x[:, 0].tanh()
    y[:, 2:] = x[:, :2] * 2
    return y


functions(
    "Padding, cropping and joining",
    {
        "pad with zeros": lambda x: F.pad(x, (3, 2, 1, 4)),
        "pad with a constant, and crop": lambda x: F.pad(x, (-3, 2, 1, -4), value=0.7),
        "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
        "pad reflect": lambda x: F.pad(x, (3, 2, 1, 4), mode="reflect"),
        "pad replicate": lambda x: F.pad(x, (3, 2, 1, 30), mode="replicate"),
        "pad circular": lambda x: F.pad(x, (3, 2, 1, 4), mode="circular"),
        "crop": lambda x: x[:, :, 3:-2, 1:17],
        "every second pixel": lambda x: x[:, :, ::2, 1::3],
        "some channels": lambda x: x[:, 1:3],
        "one channel": lambda x: x[:, 2].unsqueeze(1),
        "concatenate channels": lambda x: torch.cat([x, x.tanh()], 1),
        "concatenate rows": lambda x: torch.cat([x, x[:, :, :7] * 2], 2),
        "stack": lambda x: torch.stack([x, x.tanh()], 1).flatten(1, 2),
        "stack, then squeeze": lambda x: aten.squeeze.dims(torch.stack([x], 2), [2]),
        "squeeze": lambda x: aten.squeeze.default(x).unsqueeze(0),
        "repeat channels": lambda x: x.repeat(1, 2, 1, 1),
        "repeat-interleave channels": lambda x: x.repeat_interleave(2, 1),
        "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1) * x[:, :3],
        "write into channels": with_part_replaced,
        "select-scatter": lambda x: torch.select_scatter(x, x[:, 0].tanh(), 1, 2),
        "slice-scatter": lambda x: torch.slice_scatter(x, x[:, :2].tanh(), 1, 2, 4),
        "views and permutations": lambda x: x.permute(0, 2, 3, 1).reshape(1, -1, 4).tanh().mT.reshape(1, 4, *SIZE),
        "transpose of the flattened map": lambda x: (x.flatten(2)[0].t().tanh().t() * 1.5).view(1, 4, *SIZE),
        "select-scatter of a row": lambda x: torch.select_scatter(x, ramp(x).expand(1, *SIZE).clone(), 1, 2),
        "slice-scatter of a row": lambda x: torch.slice_scatter(x, ramp(x).expand(1, 2, *SIZE).clone(), 1, 1, 3),
        "flip channels": lambda x: x.flip(1),
        "flip rows and columns": lambda x: x + x.flip(2) * x.flip(3),
        "flip everything": lambda x: x.flip(-1, 1, 2) * x,
        "roll channels": lambda x: torch.roll(x, 1, 1),
        "roll pixels": lambda x: x * x.roll((2, -3), (2, 3)),
        "roll pixels by more than half": lambda x: x * x.roll((15, 2, 24), (2, 1, 3)),
        "roll pixels, channels last": lambda x: x.permute(0, 2, 3, 1).roll((-2, 1), (1, 2)).permute(0, 3, 1, 2),
        "roll pixels, columns first": lambda x: x.mT.roll((4, -2), (2, 3)).mT,
        "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
        "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
        "channel shuffle": lambda x: F.channel_shuffle(x, 2),
        "channel shuffle, native": lambda x: x * torch.native_channel_shuffle(x.detach(), 2),
        "unfold": lambda x: (lambda u: (u * torch.softmax(u, 2)).sum(2))(
            F.unfold(x, 3, padding=1).view(1, 4, 9, *SIZE)
        ),
        "unfold (3, 2), dilation (2, 1), stride (2, 3)": lambda x: F.unfold(
            x, (3, 2), dilation=(2, 1), padding=(2, 1), stride=(2, 3)
        ).view(1, 24, 10, 9),
        "unfold and fold": lambda x: F.fold(F.unfold(x, 3, padding=1), SIZE, 3, padding=1),
        "unfold and fold 4, stride 3, padding 2": lambda x: F.fold(
            F.unfold(x, 4, stride=3, padding=2).tanh(), SIZE, 4, stride=3, padding=2
        ),
    },
)

ops(
    "Activations",
    {
        "ReLU": lambda: nn.ReLU(inplace=True),
        "ReLU6": lambda: nn.ReLU6(),
        "LeakyReLU": lambda: nn.LeakyReLU(0.1, inplace=True),
        "PReLU": lambda: nn.PReLU(CHANNELS),
        "ELU": nn.ELU,
        "CELU": nn.CELU,
        "SELU": nn.SELU,
        "GELU": nn.GELU,
        "GELU, tanh": lambda: nn.GELU("tanh"),
        "SiLU": lambda: nn.SiLU(inplace=True),
        "Mish": nn.Mish,
        "Softplus": lambda: nn.Softplus(2.0, 3.0),
        "Hardswish": nn.Hardswish,
        "Hardsigmoid": nn.Hardsigmoid,
        "Hardtanh": lambda: nn.Hardtanh(-0.3, 0.4),
        "Hardshrink": lambda: nn.Hardshrink(0.1),
        "Softshrink": lambda: nn.Softshrink(0.1),
        "Tanhshrink": nn.Tanhshrink,
        "Threshold": lambda: nn.Threshold(0.1, 0.05),
        "Softsign": nn.Softsign,
        "Sigmoid": nn.Sigmoid,
        "LogSigmoid": nn.LogSigmoid,
        "Tanh": nn.Tanh,
        "GLU": lambda: nn.GLU(1),
    },
)


def filled(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    return x * aten.fill.Scalar(y.detach(), 2.0) + aten.fill.Tensor(y.detach(), x.mean())


def where_masked(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[y > 0.2] = 0.3
    y[:, :, y[0, 0] > 0.1] = x.mean()
    return y


def masked_channel(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 2][y[:, 2] > 0.1] = 0.0
    return y


functions(
    "Arithmetic",
    {
        "sum and product": lambda x: x * x.tanh() + x / 3 - 2 * x,
        "powers and roots": lambda x: x**2 + x.abs().add(0.1).sqrt() + (x.abs() + 1) ** 1.7,
        "exp, log, sin": lambda x: torch.exp(-x) + torch.log1p(x * x) + torch.sin(x) * torch.atan2(x, x * x + 1),
        "floor division and reversed subtraction": lambda x: x * (x.detach() // 0.1) + torch.rsub(x * x, x),
        "complex numbers": lambda x: torch.complex(x, x * x + 1).abs() + torch.polar(x.abs() + 0.1, x).abs(),
        "clamp": lambda x: x.clamp(-0.2, 0.3),
        "maximum": lambda x: torch.maximum(x, x.flip(1)),
        "where, tensors": lambda x: torch.where(x > 0, x, x * x),
        "where, a number": lambda x: torch.where(x > 0, x, 0.1) + torch.where(x > 0.2, 0.3, x),
        "where, numbers": lambda x: x * torch.where(x > 0, 1.0, 0.5),
        "masked fill": lambda x: x.masked_fill(x > 0.2, 0.3),
        "masked fill, a tensor": lambda x: x.masked_fill(x > 0.2, x.mean()),
        "write a number where a mask says": where_masked,
        "write into a channel where a mask says": masked_channel,
        "copy": lambda x: x * x.clone().copy_(x[:, :1].tanh()),
        "fill": filled,
        "constants of the map's size": lambda x: (
            x * torch.ones_like(x)
            + torch.zeros_like(x)
            + torch.full_like(x, 0.3) * x.tanh()
            + aten.full_like(x[:, :1], 1)
        ),
        "constants made from a shape": lambda x: x * torch.full(x.shape, 0.7, dtype=x.dtype) + torch.ones(x.shape[2:]),
        "empty, then filled": lambda x: x * torch.empty_like(x).fill_(0.5),
        "to another dtype and back": lambda x: x * (x > 0).to(torch.int32).to(x.dtype),
        "detach": lambda x: x + (x.round() - x).detach(),
        "a coordinate map": lambda x: x * torch.linspace(0, 1, SIZE[0]).to(x).view(-1, 1),
    },
)


def one_hot(x: torch.Tensor) -> torch.Tensor:
    best = x.argmax(1, keepdim=True)
    return x * torch.zeros_like(x).scatter(1, best, 1.5)


def scattered(x: torch.Tensor) -> torch.Tensor:
    order = x.detach().argsort(1)
    blank = torch.zeros_like(x)
    return (
        blank.scatter(1, order, x)
        + blank.scatter_add(1, order % 2, x)
        + x * aten.scatter.reduce(blank, 1, order[:, :2], x.detach()[:, :2].tanh(), reduce="add")
        + x * aten.scatter.value_reduce(blank, 1, order[:, :1], 2.0, reduce="add")
    )


def by_position(x: torch.Tensor) -> torch.Tensor:
    y, z = x.clone(), torch.zeros_like(x)
    y[:, torch.tensor([3, 1])] = x[:, torch.tensor([0, 2])] * 2
    y[:, torch.tensor([2])] = ramp(x)
    z[:, torch.tensor([0, 2])] = x[:, :1]
    z[:, torch.tensor([1, 3])] = x.mean((2, 3), keepdim=True)[:, :2]
    return y + z.index_put((torch.tensor([0]), torch.tensor([1])), x[:, 2] * 2, accumulate=True)


def by_index(x: torch.Tensor) -> torch.Tensor:
    first, last = torch.tensor([3, 1]), torch.tensor([2, 0])
    y = x.index_fill(1, first, 0.5).index_add(1, last, x[:, 2:]).index_copy(1, first, x[:, 1:3] * 2)
    return y + aten.index_fill.int_Tensor(x, 1, last, x.mean())


def among(x: torch.Tensor) -> torch.Tensor:
    y, known = (x.detach() * 4).floor().contiguous(), torch.tensor([0.0, 1.0]).to(x)
    mask = torch.isin(y, known) | torch.isin(y, 2)
    return x * mask + x * torch.bucketize(y, known) * torch.searchsorted(known, y / 2)


def flatter(x: torch.Tensor) -> torch.Tensor:
    """All the ways of picking one channel."""
    picks = [x.max(1)[0], x.min(1)[0], x.median(1)[0], x.kthvalue(2, 1)[0], coarse(x).mode(1)[0]]
    return torch.stack(picks, 1)


functions(
    "Over channels",
    {
        "softmax": lambda x: torch.softmax(x, 1),
        "log-softmax": lambda x: torch.log_softmax(x, 1),
        "safe softmax": lambda x: aten._safe_softmax.default(x, 1),
        "cumulative sum, product, logsumexp": lambda x: x.cumsum(1) + x.cumprod(1) + x.logcumsumexp(1),
        "cumulative maximum": lambda x: x.cummax(1)[0],
        "sort": lambda x: x.sort(1)[0] + x.sort(dim=1, stable=True, descending=True)[0] * 2,
        "max, min, median, k-th, mode": flatter,
        "amax and amin": lambda x: torch.cat([x.amax(1, True), x.amin(1, True)], 1),
        "mean and sum": lambda x: torch.cat([x.mean(1, True), x.sum(1, True)], 1),
        "variance and spread": lambda x: torch.cat([x.var(1, keepdim=True), x.std(1, keepdim=True)], 1),
        "product and logsumexp": lambda x: torch.cat([x.prod(1, True), x.logsumexp(1, True)], 1),
        "norm": lambda x: F.normalize(x, dim=1) + torch.linalg.vector_norm(x, 3, 1, True),
        "norm, older call": lambda x: aten.norm.ScalarOpt_dim(x, 2, [1], True),
        "top k": lambda x: x.topk(2, 1)[0],
        "argmax to one-hot": one_hot,
        "argmin": lambda x: x.gather(1, x.argmin(1, True)),
        "scatter": scattered,
        "channels by position": lambda x: (
            x[:, torch.tensor([3, 1, 0, 2])] * x[:, torch.tensor([[1, 2], [0, 0]])].flatten(1, 2)
        ),
        "channels by position, last": lambda x: x.permute(0, 2, 3, 1)[..., torch.tensor([2, 0, 2])].permute(0, 3, 1, 2),
        "batch and channel by position": lambda x: x[
            torch.zeros(3, dtype=torch.long), torch.tensor([3, 1, 3])
        ].unsqueeze(0),
        "as many positions as columns": lambda x: x[:, torch.arange(SIZE[1]) % 4],
        "write channels by position": by_position,
        "index-fill, -add and -copy": by_index,
        "is one of, and between which": among,
        "index-select": lambda x: x.index_select(1, torch.tensor([2, 0, 2])),
        "split and chunk": lambda x: x.split(2, 1)[0] * x.chunk(2, 1)[1],
        "split with sizes": lambda x: x.split([1, 3], 1)[1] * x.split([1, 3], 1)[0],
        "unbind": lambda x: torch.stack([each * (i + 1) for i, each in enumerate(x.unbind(1))], 1),
        "any and all": lambda x: x * (x > 0.2).any(1, keepdim=True) + x.tanh() * (x > -0.2).all(1, keepdim=True),
        "any and all, several dimensions": lambda x: (
            x * aten.any.dims(x > 0.2, [0, 1], True) + x.tanh() * aten.all.dims(x > -0.2, [0, 1], True)
        ),
        "a look-up by label": lambda x: x * torch.linspace(0.5, 2, 4).to(x)[x.argmax(1)].unsqueeze(1),
        "a look-up by label, gathered": lambda x: (
            x * torch.linspace(0.5, 2, 4).to(x).gather(0, x.argmax(1, True).flatten()).view(1, 1, *SIZE)
        ),
        "an embedding of labels": lambda x: (
            x * F.embedding(x.argmax(1), torch.arange(16.0).to(x).view(4, 4)).permute(0, 3, 1, 2)
        ),
    },
)


class LastDim(nn.Module):
    """A layer that wants channels last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x.permute(0, 2, 3, 1))
        return result.permute(0, 3, 1, 2)


class FusedRms(nn.Module):
    """The op that some builds of PyTorch take for RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = aten._fused_rms_norm.default(x.permute(0, 2, 3, 1), [CHANNELS], self.weight, 1e-6)[0]
        return y.permute(0, 3, 1, 2)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "batch norm, momentum 0.3, not affine": lambda: nn.BatchNorm2d(CHANNELS, momentum=0.3, affine=False),
    "batch norm without running statistics": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "batch norm, twice": lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(), conv(3)(), nn.BatchNorm2d(4)),
    "instance norm": lambda: nn.InstanceNorm2d(CHANNELS),
    "instance norm, affine, running statistics": lambda: nn.InstanceNorm2d(
        CHANNELS, affine=True, track_running_stats=True
    ),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "layer norm over channels": lambda: LastDim(nn.LayerNorm(CHANNELS)),
    "layer norm over the whole map": lambda: nn.LayerNorm([CHANNELS, *SIZE]),
    "RMS norm over channels": lambda: LastDim(nn.RMSNorm(CHANNELS)),
    "RMS norm over channels, fused": FusedRms,
    "local response norm": lambda: nn.LocalResponseNorm(3),
}
for mode in ("training", "evaluation"):
    ops(
        "Norms",
        {f"{name}, {mode}": make for name, make in NORMS.items()},
        training=mode == "training",
        image=lambda: pixels(2),
    )


class Excite(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(CHANNELS, 2), nn.Linear(2, CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


def gated(x: torch.Tensor) -> torch.Tensor:
    """Pooling by attention over all pixels."""
    tokens = x.flatten(2)
    weights = torch.softmax(torch.tanh(tokens[:, :1]) * torch.sigmoid(tokens[:, 1:2]), -1)
    return (weights @ tokens.mT).flatten(1)


functions(
    "Over the map",
    {
        "sum": lambda x: x.sum((2, 3)) / 100,
        "mean, fed back": lambda x: x - x.mean((2, 3), keepdim=True),
        "mean of everything": lambda x: x * x.mean() + x.sum() / 1000,
        "variance": lambda x: x.var((2, 3)),
        "standard deviation, fed back": lambda x: x / x.std((2, 3), keepdim=True),
        "variance and mean": lambda x: torch.cat(torch.var_mean(x, (2, 3)), 1),
        "largest and smallest": lambda x: (x - x.amin((2, 3), True)) / (x.amax((2, 3), True) - x.amin((2, 3), True)),
        "largest and smallest of everything": lambda x: (x - x.min()) / (x.max() - x.min()),
        "largest and smallest at once": lambda x: (lambda low, high: (x - low) / (high - low))(*torch.aminmax(x)),
        "largest with ties": lambda x: coarse(x).amax((2, 3)),
        "any and all, of everything": lambda x: (
            x * torch.where((x > 5).any(), 2.0, 1.0) * torch.where((x > -5).all(), 1.5, 1.0)
        ),
        "norms": lambda x: x.norm(dim=(2, 3)) + torch.linalg.vector_norm(x, 1, dim=(2, 3)),
        "softmax over all pixels": lambda x: torch.softmax(x.flatten(2), -1).view(x.shape) * 100,
        "log-softmax over all pixels": lambda x: torch.log_softmax(x.flatten(2), -1).view(x.shape),
        "pooling by attention": gated,
        "a Gram matrix": lambda x: (x.flatten(2) @ x.flatten(2).mT).flatten(1) / 100,
    },
)
ops("Over the map", {"squeeze and excite": Excite})


class Products(nn.Module):
    """Linear layers over channels, as libraries write them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(CHANNELS, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        tokens = x.flatten(2).mT  # (N, pixels, C)
        if self.how == "tokens":
            result = self.linear(tokens)
        elif self.how == "mm":
            result = (tokens[0] @ weight.t()).unsqueeze(0)
        elif self.how == "addmm":
            result = torch.addmm(bias, tokens[0], weight.t()).unsqueeze(0)
        elif self.how == "bmm":
            result = torch.bmm(tokens, weight.t().unsqueeze(0))
        elif self.how == "baddbmm":
            result = torch.baddbmm(bias.view(1, 1, 3), tokens, weight.t().unsqueeze(0))
        else:
            result = torch.einsum("nchw,kc->nkhw", x, weight).flatten(2).mT
        return result.mT.reshape(x.shape[0], 3, *x.shape[2:])


class Contracted(nn.Module):
    """Channels mixed by einsum and tensordot, for a convolution to read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("nchw,kc->nkhw", x, self.weight) + torch.einsum("kc,nchw->nkhw", self.weight, x)
        return mixed + torch.tensordot(x, self.weight, ([1], [1])).permute(0, 3, 1, 2)


ops(
    "Matrix products",
    {
        "linear over channels": lambda: LastDim(nn.Linear(CHANNELS, 3)),
        "linear over tokens": lambda: Products("tokens"),
        "mm": lambda: Products("mm"),
        "addmm": lambda: Products("addmm"),
        "bmm": lambda: Products("bmm"),
        "baddbmm": lambda: Products("baddbmm"),
        "einsum": lambda: Products("einsum"),
        "einsum to a map": Contracted,
    },
)


def noise(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * torch.randn_like(x) + 0.1 * torch.rand_like(x)


def fresh_noise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand(x.shape, dtype=x.dtype) + torch.randn(x.shape, dtype=x.dtype)


def in_place_noise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.empty_like(x).uniform_(0.5, 1.5) + torch.empty_like(x).normal_(0, 0.1)


ops(
    "Random",
    {
        "dropout": lambda: nn.Dropout(0.4),
        "dropout of channels": lambda: nn.Dropout2d(0.4),
        "alpha dropout": lambda: nn.AlphaDropout(0.2),
        "alpha dropout of channels": lambda: nn.FeatureAlphaDropout(0.2),
        "dropout in place": lambda: nn.Dropout(0.4, inplace=True),
    },
    image=lambda: pixels(2),
)
ops("Random", {"dropout, evaluation": lambda: nn.Dropout(0.4)}, training=False)
functions(
    "Random",
    {
        "Gaussian and uniform noise": noise,
        "noise made from a shape": fresh_noise,
        "noise in place": in_place_noise,
        "Bernoulli with a probability a pixel": lambda x: x * torch.bernoulli(torch.sigmoid(x).detach()),
        "Bernoulli with a number": lambda x: x * torch.bernoulli(x.detach(), 0.7),
        "Bernoulli in place, a probability a pixel": lambda x: (
            x * torch.empty_like(x).bernoulli_(torch.sigmoid(x).detach())
        ),
    },
)


def attention(x: torch.Tensor) -> torch.Tensor:
    """Every pixel with every other."""
    tokens = x.flatten(2).mT
    return (torch.softmax(tokens @ tokens.mT, -1) @ tokens).mT.reshape(x.shape)


def windows(x: torch.Tensor) -> torch.Tensor:
    """Attention within windows of 5 x 13 pixels, as Swin does it."""
    n, c, h, w = x.shape
    parts = x.view(n, c, h // 5, 5, w // 13, 13).permute(0, 2, 4, 3, 5, 1).reshape(-1, 65, c)
    mixed = F.scaled_dot_product_attention(parts, parts, parts)
    return mixed.view(n, h // 5, w // 13, 5, 13, c).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def by_grid(x: torch.Tensor) -> torch.Tensor:
    theta = torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.8, 0.1]], dtype=x.dtype).expand(x.shape[0], 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


class PooledAttention(nn.Module):
    """PyTorch's multi-head attention over pooled pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = F.avg_pool2d(x, 2).flatten(2).mT
        mixed: torch.Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + F.interpolate(mixed.mT.reshape(*x.shape[:2], SIZE[0] // 2, SIZE[1] // 2), scale_factor=2)


WHOLE = "Without locality (on maps held whole)"
ops(WHOLE, {"multi-head attention over pooled pixels": PooledAttention})
functions(
    WHOLE,
    {
        "flatten and linear": lambda x: x.flatten(1),
        "pool, flatten and linear": lambda x: F.max_pool2d(x, 4).flatten(1),
        "attention over all pixels": attention,
        "attention within windows": windows,
        "mean of a row": lambda x: x - x.mean(3, keepdim=True),
        "softmax along a row": lambda x: torch.softmax(x, -1),
        "cumulative sum along columns": lambda x: x.cumsum(2) / 10,
        "sampling by a grid": by_grid,
        "a Fourier filter": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=SIZE),
        "the best pixel": lambda x: x * x.flatten(1).max(1)[0].view(-1, 1, 1, 1),
        "bilinear with antialiasing": resize("bilinear", scale_factor=0.5, antialias=True),
        "trilinear": lambda x: F.interpolate(x.unsqueeze(0), scale_factor=2, mode="trilinear").squeeze(0),
        "3-d convolution": lambda x: F.conv3d(x.unsqueeze(1), torch.ones(1, 1, 3, 3, 3).to(x)).flatten(1, 2),
        "median of everything": lambda x: x * x.median(),
        "logsumexp over the map": lambda x: x.logsumexp((2, 3)),
        "fractions by sorting": lambda x: x.flatten(2).sort(-1)[0][:, :, ::40].flatten(1),
    },
)

LOSSES: dict[str, Loss] = {
    "mean squared error": F.mse_loss,
    "squared error, summed": lambda o, t: F.mse_loss(o, t, reduction="sum") / 100,
    "absolute error": F.l1_loss,
    "smooth L1": F.smooth_l1_loss,
    "Huber": lambda o, t: F.huber_loss(o, t, delta=0.3),
    "binary cross-entropy with logits": lambda o, t: F.binary_cross_entropy_with_logits(
        o, t, pos_weight=torch.tensor(2.0).to(o)
    ),
    "binary cross-entropy": lambda o, t: F.binary_cross_entropy(torch.sigmoid(o), t),
    "soft margin": lambda o, t: F.soft_margin_loss(o, t * 2 - 1),
    "Poisson": lambda o, t: F.poisson_nll_loss(o, t),
    "Kullback-Leibler": lambda o, t: F.kl_div(F.logsigmoid(o), t, reduction="batchmean") / 100,
    "cosine": lambda o, t: 1 - (F.normalize(o, dim=1) * F.normalize(t + 0.1, dim=1)).sum(1).mean(),
    "binary Dice": lambda o, t: 1 - 2 * (torch.sigmoid(o) * t).sum() / (torch.sigmoid(o).sum() + t.sum()),
    "per pixel, worked on afterwards": lambda o, t: (F.mse_loss(o, t, reduction="none") ** 2).mean().sqrt(),
    "hardest pixel": lambda o, t: F.mse_loss(o, t, reduction="none").max(),
    "total variation": lambda o, t: (
        (o[..., 1:, :] - o[..., :-1, :]).abs().mean() + (o[..., 1:] - o[..., :-1]).abs().mean() + ((o - t) ** 2).mean()
    ),
    "at half size": lambda o, t: F.mse_loss(F.avg_pool2d(o, 2), F.avg_pool2d(t, 2)),
}


def multi_class_dice(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    share, truth = output.softmax(1), F.one_hot(target, LABELS).movedim(-1, 1)
    both, either = (share * truth).sum((0, 2, 3)), share.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    return 1 - (2 * both / (either + 1)).mean()


CLASS_LOSSES: dict[str, Loss] = {
    "cross-entropy": F.cross_entropy,
    "cross-entropy with class weights": lambda o, t: F.cross_entropy(o, t, torch.tensor([0.5, 1.0, 2.0]).to(o)),
    "cross-entropy with an ignored label": lambda o, t: F.cross_entropy(o, t, ignore_index=1),
    "cross-entropy with smoothed labels": lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1),
    "cross-entropy, summed": lambda o, t: F.cross_entropy(o, t, reduction="sum") / 100,
    "negative log-likelihood": lambda o, t: F.nll_loss(F.log_softmax(o, 1), t),
    "cross-entropy against probabilities": lambda o, t: F.cross_entropy(
        o, F.one_hot(t, LABELS).movedim(-1, 1).to(o) * 0.8 + 0.1
    ),
    "multi-class Dice": lambda o, t: (
        1
        - (
            2 * (o.softmax(1) * F.one_hot(t, LABELS).movedim(-1, 1)).sum((0, 2, 3)) / (o.softmax(1).sum((0, 2, 3)) + 99)
        ).mean()
    ),
    "focal": lambda o, t: (lambda each: ((1 - torch.exp(-each)) ** 2 * each).mean())(
        F.cross_entropy(o, t, reduction="none")
    ),
}
for name, loss in LOSSES.items():
    add("Losses", name, Plain, loss, lambda: pixels(2), lambda: pixels(2, 1, seed=3).round() * 0.9 + 0.05)
for name, loss in CLASS_LOSSES.items():
    add("Losses", name, lambda: Plain(LABELS), loss, lambda: pixels(2), lambda: labels(2))


class Projected(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, target) * torch.exp(-self.scale) + self.scale


add("Losses", "a loss with trained parameters", Plain, Projected().double(), pixels, lambda: pixels(1, 1, seed=3))
add(
    "Losses",
    "a class for each image",
    lambda: Plain(LABELS, lambda x: x.mean((2, 3))),
    F.cross_entropy,
    lambda: pixels(2),
    lambda: torch.tensor([2, 0]),
)


class Shared(nn.Module):
    """One convolution used twice, and its weight a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.conv(x).tanh())
        return F.conv2d(x, self.conv.weight.flip(2) * 0.5, stride=2)


class Two(nn.Module):
    """Two images in, the second half as large."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(1, 3, 1), nn.Conv2d(6, 2, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        up = F.interpolate(self.right(y).tanh(), scale_factor=2, mode="bilinear")
        result: torch.Tensor = self.both(torch.cat([self.left(x).tanh(), up], 1))
        return result


class Many(nn.Module):
    """Maps at two scales and a vector out, from one trunk, as deep supervision has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, stride=2)
        self.fine, self.head = nn.Conv2d(4, 1, 1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        trunk = self.first(x).tanh()
        return self.fine(trunk), self.second(trunk), self.head(trunk.mean((2, 3)))


class Named(Many):
    """The same, by name."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return dict(zip(("fine", "coarse", "vector"), super().forward(x), strict=True))


class UNet(nn.Module):
    """Two levels, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.c = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        result: torch.Tensor = self.c(torch.cat([a, self.up(b)], 1))
        return result


class Frozen(Plain):
    """The first convolution is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class FrozenNorm(Plain):
    """A batch norm in evaluation mode in the midst of training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        Between.randomise(self.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm.eval()
        return self.last(self.second(self.norm(self.first(x))))


class Teacher(Plain):
    """A part that runs without gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = torch.sigmoid(self.first(x).mean(1, keepdim=True))
        return super().forward(x) * weight


class Recomputed(Plain):
    """PyTorch's own checkpointing inside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.utils.checkpoint.checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=False)
        return self.last(self.second(y))


class Complex(Plain):
    """Parametrised weights and a buffer that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(self.first)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x - self.mean) / 0.3)


add("Networks in parts", "a batch of 3", Plain, image=lambda: pixels(3))
add("Networks in parts", "shared weights", Shared)
add("Networks in parts", "two images", Two, image=lambda: (pixels(), pixels(1, 1, (10, 13))))
add("Networks in parts", "several outputs", Many)
add("Networks in parts", "outputs by name", Named, lambda o, t: square(list(o.values()), t))
add("Networks in parts", "a U-Net", UNet)
add("Networks in parts", "a frozen layer", Frozen)
add("Networks in parts", "a batch norm in evaluation mode while training", FrozenNorm)
add("Networks in parts", "a part without gradient", Teacher)
add("Networks in parts", "checkpointed by PyTorch", Recomputed)
add("Networks in parts", "normalised weights and a buffer", Complex)


def named_cases() -> dict[str, SupportCase]:
    """Cases by group and name."""
    return {f"{case.group}: {case.name}": case for case in CASES}


assert len({(case.group, case.name) for case in CASES}) == len(CASES)


@dataclass(frozen=True)
class Refusal:
    """What is refused before anything wrong is computed: in plain words, with what to do, and how to provoke it."""

    what: str
    remedy: str
    error: str
    match: str
    op: Op | nn.Module | None = None
    loss: Loss = square
    size: tuple[int, int] = SIZE
    budget: str | None = None


def of_pixels(x: torch.Tensor) -> torch.Tensor:
    return x if x.mean() > 0 else -x


def foreign_indices(x: torch.Tensor) -> torch.Tensor:
    value, index = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(value, index.flip(1) * 0, 2)


def hidden_write(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x.clamp_(-0.1, 0.1)
    return x


def reentrant(x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=True)
    return y


STRAY = nn.Parameter(torch.tensor(0.5))
HUGE = (30000, 30000)


def hooked(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y.register_hook(lambda grad: 0.1 * grad)
    return y


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x / self.calls


REFUSED = [
    Refusal(
        "An op without locality on a map so large that it would be a tensor of 2**31 elements or more: a cumulative "
        "sum or a sort along rows or columns",
        "do it on a smaller map (pool first), or register a rule ([how](adding-an-op.md))",
        "UnsupportedOpError", r"2\*\*31", lambda x: x.cumsum(-1), size=HUGE,
    ),
    Refusal(
        "Attention between all pixels of a large map",
        "pool first, attend within windows, or pool by gated attention, which needs no map whole",
        "UnsupportedOpError", "compares every pixel with every other", attention, size=(1000, 1000),
    ),
    Refusal(
        "A part without locality whose whole maps exceed the budget",
        "raise the budget to the one that the error names, or as above",
        "BudgetError", "held whole", lambda x: x.cumsum(3), size=(8000, 8000), budget="1.2GiB",
    ),
    Refusal(
        "Branches on pixel values (`if x.mean() > 0`, `.item()`), in the model or in the loss",
        "`torch.where`; where only a check is meant, do it outside",
        "CaptureError", "cannot be traced", of_pixels,
    ),
    Refusal(
        "Shapes that depend on pixel values: `x[mask]`, `nonzero`, `unique`",
        "multiply by the mask and divide by its sum",
        "CaptureError", "picks elements by a mask", lambda x: x * x[x > 0].mean(),
    ),
    Refusal(
        "In-place writes where autograd does not look (`with torch.no_grad(): y.clamp_()`, `y.data`)",
        "`y + (f(y) - y).detach()`",
        "CaptureError", "where autograd does not look", hidden_write,
    ),
    Refusal(
        "Hooks that change gradients inside: `y.register_hook`, backward hooks of modules",
        "an op with a gradient of its own, or hooks of parameters, which run",
        "CaptureError", "changes a gradient where no trace shows it", hooked,
    ),
    Refusal(
        "`y.detach_()`", "`y = y.detach()`", "CaptureError", "detaches in place", lambda x: x + (2 * x).detach_(),
    ),
    Refusal(
        "Gradients taken inside of model or loss (`torch.autograd.grad`, gradient penalties)",
        "write the derivative out",
        "CaptureError", "takes gradients inside", lambda x: x * torch.autograd.grad(x.sum(), x, create_graph=True)[0],
    ),
    Refusal(
        "Numbers that a module counts in `forward` (`self.steps += 1`)",
        "a buffer, or set them outside of `forward`",
        "CaptureError", "is a number that changes while the model runs", Counting(),
    ),
    Refusal(
        "A `torch.autograd.Function` of your own (PyTorch's reentrant checkpointing is one): the capture sees what its "
        "forward computes, not its backward",
        "a `torch.library.custom_op` ([how](adding-an-op.md)); `checkpoint(..., use_reentrant=False)`",
        "CaptureError", "autograd.Function", reentrant,
    ),
    Refusal(
        "A buffer that becomes a map, or changes its shape",
        "keep statistics, not maps",
        "CaptureError", "is written while the model runs", loss=square,
    ),
    Refusal(
        "A trained tensor that is no parameter of model or loss",
        "make it an `nn.Parameter` of the model, or of a loss that is an `nn.Module`",
        "CaptureError", "is no parameter of either", loss=lambda o, t: (o**2).mean() * STRAY,
    ),
    Refusal(
        "`F.max_unpool2d` with indices that come from elsewhere than a pooling of these sizes",
        "hand on the indices of the pooling that is undone",
        "UnsupportedOpError", "far from where a pooling of these sizes looked", foreign_indices,
    ),
    Refusal(
        "Random numbers along the image other than uniform, normal and Bernoulli ones (`F.gumbel_softmax`)",
        "make them of uniform ones: `-torch.log(-torch.log(torch.rand_like(x)))`",
        "UnsupportedOpError", "exponential", lambda x: F.gumbel_softmax(x, dim=1),
    ),
    Refusal(
        "`F.rrelu`, also in evaluation mode",
        "`F.leaky_relu`",
        "CaptureError", "writes into views", lambda x: F.rrelu(x, training=False),
    ),
    Refusal(
        "A loss that returns something else than one number",
        "sum or average it",
        "CaptureError", "loss: returns", loss=lambda o, t: o.mean((0, 2, 3)).repeat(2),
    ),
]  # fmt: skip


class RemembersMap(Plain):
    """Keeps a map in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.mean = y.detach().mean((0, 1))
        return y


def refused_model(case: Refusal) -> nn.Module:
    """The network that provokes a refusal."""
    if case.op is not None:
        first, op = nn.Conv2d(3, CHANNELS, 3, padding=1), case.op
        return nn.Sequential(first, op if isinstance(op, nn.Module) else _Function(op), nn.Flatten(0, 1))
    return RemembersMap() if "buffer" in case.what else Plain()


class _Function(nn.Module):
    def __init__(self, function: Op) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)

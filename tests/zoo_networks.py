"""Networks as their libraries and papers have them, narrow but whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import AttentionUnet, BasicUNet, DynUNet, SegResNet, UNet
from torch import nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from zoo import Entry, always, both, labels, mask, pixels

# Losses that several entries share.


def supervised(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """nnU-Net's: Dice and cross-entropy of every supervised level, each worth half of the one before."""
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    weights = [0.5**i for i in range(output.shape[1])]
    terms = [w * loss(level, target) for w, level in zip(weights, output.unbind(1), strict=True)]
    return torch.stack(terms).sum() / sum(weights)


def logits_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.logits, target)


def near(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).mean()


# Networks from transformers.


class Pooled(nn.Module):
    """An encoder's pooled features and a linear head."""

    def __init__(self, encoder: nn.Module, features: int, classes: int = 3) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.encoder(x).pooler_output.flatten(1))
        return result


def resnet18() -> ResNetConfig:
    return ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 8, 8], depths=[2, 2, 2, 2], layer_type="basic")


def resnet50() -> ResNetConfig:
    return ResNetConfig(embedding_size=4, hidden_sizes=[8, 8, 16, 16], depths=[3, 4, 6, 3], layer_type="bottleneck")


def convnext(drop_path_rate: float) -> nn.Module:
    """ConvNeXt with layer scales that let its blocks take part."""
    config = ConvNextConfig(
        hidden_sizes=[4, 8, 8, 12], depths=[1, 1, 3, 1], layer_scale_init_value=0.3, drop_path_rate=drop_path_rate
    )
    config.num_labels = 3
    return ConvNextForImageClassification(config)


def classifier() -> nn.Module:
    config = resnet18()
    config.num_labels = 3
    return ResNetForImageClassification(config)


# Networks written by hand, as in papers.


class DoubleConv(nn.Sequential):
    def __init__(self, into: int, out: int, act: type[nn.Module]) -> None:
        super().__init__(
            nn.Conv2d(into, out, 3, padding=1, padding_mode="reflect"),
            nn.GroupNorm(2, out),
            act(),
            nn.Conv2d(out, out, 3, padding=1, padding_mode="reflect"),
            nn.GroupNorm(out, out),
            act(),
        )


class HandUNet(nn.Module):
    """A U-Net with reflected borders, group norm and bilinear upsampling to the size of the skip."""

    def __init__(self, align_corners: bool, act: type[nn.Module]) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.down = nn.ModuleList([DoubleConv(3, 4, act), DoubleConv(4, 6, act), DoubleConv(6, 8, act)])
        self.up = nn.ModuleList([DoubleConv(8 + 6, 6, act), DoubleConv(6 + 4, 4, act)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down[:-1]:
            x = layer(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.down[-1](x)
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=self.align_corners)
            x = layer(torch.cat([skip, x], 1))
        result: torch.Tensor = self.head(x)
        return result


def streaming_net() -> nn.Module:
    """The layers that lightstream tests itself on: three pairs of unpadded convolutions, each pair pooled."""
    layers: list[nn.Module] = []
    for into in (3, 6, 6):
        layers += [nn.Conv2d(into, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers)


class GatedAttention(nn.Module):
    """A slide's classifier: a convolutional encoder whose pixels are pooled by gated attention."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.content, self.gate, self.score = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(x).flatten(2).transpose(1, 2)
        scores = self.score(torch.tanh(self.content(tokens)) * torch.sigmoid(self.gate(tokens)))
        result: torch.Tensor = self.head((torch.softmax(scores, 1) * tokens).sum(1))
        return result


class Bottleneck(nn.Module):
    """Convolutions down to an eighth, attention between all positions there, convolutions back up."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        steps = [(3, 4), (4, 8), (8, 8)]
        self.down = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.GELU()) for i, o in steps))
        self.norm = nn.LayerNorm(8)
        if attention == "module":
            self.places = nn.Parameter(0.1 * torch.randn(1, 8, 4, 4))
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        else:
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up = nn.Sequential(
            *(nn.Sequential(nn.ConvTranspose2d(o, max(i, 4), 2, 2), nn.GELU()) for i, o in reversed(steps))
        )
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def positions(self, x: torch.Tensor) -> torch.Tensor:
        if self.attention == "module":
            return F.interpolate(self.places, size=x.shape[2:], mode="bicubic", align_corners=False)
        rows = torch.arange(x.shape[2], dtype=x.dtype).view(1, -1, 1).expand(1, *x.shape[2:])
        cols = torch.arange(x.shape[3], dtype=x.dtype).view(1, 1, -1).expand(1, *x.shape[2:])
        rates = torch.tensor([1.0, 0.1], dtype=x.dtype).view(-1, 1, 1)
        return torch.cat([f(axis * rates) for axis in (rows, cols) for f in (torch.sin, torch.cos)])[None]

    def attend(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.attention == "module":
            mixed: torch.Tensor = self.mix(tokens, tokens, tokens, need_weights=False)[0]
            return mixed
        n, count, width = tokens.shape
        q, k, v = self.qkv(tokens).view(n, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, count, width)
        return self.out(mixed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        tokens = (x + self.positions(x)).flatten(2).transpose(1, 2)
        tokens = tokens + self.attend(self.norm(tokens))
        result: torch.Tensor = self.head(self.up(tokens.transpose(1, 2).reshape(x.shape)))
        return result


class SqueezeExcite(nn.Module):
    """Residual blocks whose channels are weighted by what the whole map holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.body = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(2)])
        self.squeeze = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid()) for _ in range(2)]
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for body, squeeze in zip(self.body, self.squeeze, strict=True):
            y = body(x)
            x = F.relu(x + y * squeeze(F.adaptive_avg_pool2d(y, 1)))
        result: torch.Tensor = self.head(x.mean((2, 3)))
        return result


class Aspp(nn.Module):
    """DeepLab's head: dilated branches and one of the whole image, put together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.branches = nn.ModuleList([nn.Conv2d(6, 4, 1)])
        self.branches.extend([nn.Conv2d(6, 4, 3, padding=rate, dilation=rate) for rate in (2, 4, 6)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(20, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        pooled = F.interpolate(self.pool(y), size=y.shape[2:], mode="bilinear", align_corners=False)
        y = self.head(self.project(torch.cat([*(branch(y) for branch in self.branches), pooled], 1)))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


class TwoInputs(nn.Module):
    """Two stains of one section, each with an encoder of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(F.relu(torch.cat([self.first(a), self.second(b) * self.first(a)], 1)))
        return result


def shared() -> nn.Module:
    """One block three times, as in recurrent refinement."""
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), block, block, nn.MaxPool2d(2), block, nn.Conv2d(4, 1, 1))


def frozen() -> nn.Module:
    """Early layers that are not trained, under ones that are."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 1, 2, 2),
    )  # fmt: skip
    for layer in net[:4]:
        layer.requires_grad_(False)
    net[1].eval()
    return net


def super_resolution() -> nn.Module:
    return nn.Sequential(
        nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3, padding=1), nn.PReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.PReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip


def circular() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, padding=2, padding_mode="circular"), nn.Softplus(),
        nn.Conv2d(4, 4, 3, 2, padding=1, padding_mode="circular"), nn.Softplus(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip


def dropped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(6, 6, 3, 2, 1), nn.ELU(),
        nn.Dropout(0.4), nn.Conv2d(6, 1, 3, padding=1),
    )  # fmt: skip


def flattened(height: int, width: int) -> nn.Module:
    """Strided convolutions, flattened into a linear layer: a network for one size of image."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * -(-height // 8) * -(-width // 8), 3),
    )  # fmt: skip


def vgg() -> nn.Module:
    """VGG's end: an adaptive pooling to a fixed grid, flattened."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((3, 4)), nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Dropout(),
        nn.Linear(8, 3),
    )  # fmt: skip


def seeded(make: Callable[[], nn.Module], train: bool = True) -> Callable[[], nn.Module]:
    """``make`` with the same weights at each call, in float64; running statistics that are not those of a new norm."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make().double()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:  # biases and norms, which libraries make all alike
                        parameter.add_(0.1 * torch.randn_like(parameter))
                for buffer in model.buffers():
                    if buffer.is_floating_point():
                        buffer.add_(0.2 * torch.rand_like(buffer))
        return model if train else model.eval()

    return build


def basic_unet(dropout: float) -> nn.Module:
    return BasicUNet(2, 3, 1, features=(4, 4, 6, 8, 8, 4), norm="batch", dropout=dropout)


def segresnet() -> nn.Module:
    return SegResNet(
        2, 8, 3, 2, dropout_prob=0.2, norm=("GROUP", {"num_groups": 4}), blocks_down=(1, 1, 2), blocks_up=(1, 1)
    )


def dynunet() -> nn.Module:
    return DynUNet(
        2, 3, 2, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2], filters=[4, 6, 8, 8], deep_supervision=True, deep_supr_num=2
    )


def classes(height: int, width: int) -> torch.Tensor:
    """Labels ``(2, 1, H, W)``, as MONAI's losses take them."""
    result: torch.Tensor = labels(2)(height, width).unsqueeze(1)
    return result


TWO, ONE = pixels(2), pixels(1)
SLIDE = always(torch.tensor([1]))
SLIDES = always(torch.tensor([1, 2]))
BCE = nn.BCEWithLogitsLoss()
CE = nn.CrossEntropyLoss()

NETWORKS = [
    Entry(
        "monai UNet",
        seeded(lambda: UNet(2, 3, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=2)),
        CE, TWO, labels(2), (52, 76), 4,
    ),
    Entry("monai BasicUNet", seeded(lambda: basic_unet(0.0)), DiceCELoss(sigmoid=True), TWO, mask(2), (57, 75)),
    Entry("monai BasicUNet, dropout", seeded(lambda: basic_unet(0.2)), BCE, ONE, mask(), (64, 80)),
    Entry("monai SegResNet", seeded(segresnet), CE, TWO, labels(2), (44, 60), 4),
    Entry("monai DynUNet", seeded(dynunet), supervised, TWO, classes, (48, 72), 8),
    Entry(
        "monai AttentionUnet",
        seeded(lambda: AttentionUnet(2, 3, 1, channels=(4, 8, 8), strides=(2, 2))),
        BCE, TWO, mask(2), (44, 60), 4,
    ),
    Entry("transformers ResNet-18", seeded(lambda: Pooled(ResNetModel(resnet18()), 8)), CE, TWO, SLIDES, (97, 130)),
    Entry(
        "transformers ResNet-50, eval",
        seeded(lambda: Pooled(ResNetModel(resnet50()), 16), train=False), CE, ONE, SLIDE, (97, 129),
    ),
    Entry("transformers ResNetForImageClassification", seeded(classifier), logits_loss, TWO, SLIDES, (90, 118)),
    Entry("transformers ConvNext", seeded(lambda: convnext(0.0)), logits_loss, TWO, SLIDES, (96, 130)),
    Entry("transformers ConvNext, drop path", seeded(lambda: convnext(0.1)), logits_loss, TWO, SLIDES, (96, 128)),
    Entry("U-Net, corners aligned", seeded(lambda: HandUNet(True, nn.GELU)), CE, TWO, labels(2), (46, 59)),
    Entry("U-Net, corners not aligned", seeded(lambda: HandUNet(False, nn.SiLU)), CE, ONE, labels(), (47, 70)),
    Entry("lightstream", seeded(streaming_net), near, ONE, always(torch.tensor([50.0])), (86, 93)),
    Entry("gated attention", seeded(GatedAttention), CE, ONE, SLIDE, (66, 91)),
    Entry("attention module at an eighth", seeded(lambda: Bottleneck("module")), BCE, TWO, mask(2), (48, 64), 8),
    Entry("attention function at an eighth", seeded(lambda: Bottleneck("function")), BCE, TWO, mask(2), (48, 64), 8),
    Entry("squeeze and excite", seeded(SqueezeExcite), CE, TWO, SLIDES, (51, 70)),
    Entry("dilations and image pooling", seeded(Aspp), CE, TWO, labels(2), (61, 83)),
    Entry("flatten and linear", seeded(lambda: flattened(60, 84)), CE, TWO, SLIDES, (60, 84)),
    Entry("adaptive pool, flatten and linear", seeded(vgg), CE, TWO, SLIDES, (62, 87)),
    Entry("pixel shuffle", seeded(super_resolution), nn.MSELoss(), ONE, pixels(1, 3, 7), (46, 70), 2),
    Entry("frozen early layers", seeded(frozen), BCE, TWO, mask(2), (50, 66), 2),
    Entry("shared weights", seeded(shared), near, TWO, always(torch.tensor([0.3])), (51, 67)),
    Entry("two inputs", seeded(TwoInputs), BCE, both(pixels(1), pixels(1, 1, 5)), mask(), (41, 63)),
    Entry("circular padding", seeded(circular), near, TWO, always(torch.tensor([0.3])), (46, 64)),
    Entry("dropout", seeded(dropped), near, TWO, always(torch.tensor([0.3])), (45, 66)),
]  # fmt: skip

"""Triton's kernels for maps computed as they are read, against the CPU's own; without a GPU in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton looks at when it is imported
pytest.importorskip("triton", reason="Triton is not installed")

import wholegrad as wg  # noqa: E402
from oracle import SEED, reference  # noqa: E402
from wholegrad.graph.inline import inline  # noqa: E402
from wholegrad.kernels import choice, pointwise, thin, triton_mixed  # noqa: E402
from wholegrad.kernels.expression import EACH, IDENTITY, ONE, Leaf, Program, Step  # noqa: E402
from wholegrad.kernels.host import host  # noqa: E402
from wholegrad.kernels.stage import Part  # noqa: E402
from wholegrad.kernels.thin import Mixed  # noqa: E402
from wholegrad.losses import LOSSES  # noqa: E402
from wholegrad.proof import random_labels  # noqa: E402
from wholegrad.run.executor import Executor  # noqa: E402
from wholegrad.run.sources import raw_images  # noqa: E402
from wholegrad.verify import EXACT, Case, errors  # noqa: E402

WHERE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    host() is None, reason="the CPU's kernels, which these are compared with, need AVX2 or NEON"
)
BYTES = Program((Leaf(bytes=1),), (Step("u8", (0,)),))
LEAKY = Program((Leaf(grad=True),), (Step("leaky", (0,), (0.1,)),))
MADE = Program(
    (Leaf(grad=True), Leaf(EACH), Leaf(ONE)), (Step("mul", (0, 1)), Step("add", (3, 2), (0.5,)), Step("relu", (4,)))
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mixed(height: int, width: int, n: int = 1, dtype: torch.dtype = torch.float64) -> Mixed:
    """Bytes, an activation, a program of several leaves, and a map whose channels are next to each other in memory."""
    pixels = torch.randint(0, 256, (n, 2, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plain = random(n, 2, height + 1, width + 2, seed=4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    parts = (Part(BYTES, 2), Part(LEAKY, 1), Part(MADE, 2), Part(IDENTITY, 2))
    leaves = (
        pixels, random(n, 1, height, width, dtype=dtype), random(n, 2, height, width, seed=2, dtype=dtype),
        random(2, seed=3, dtype=dtype), random(1, seed=5, dtype=dtype).reshape(()), plain[:, :, 1:, 2:],
    )  # fmt: skip
    return Mixed(parts, leaves)


def there(x: Mixed) -> Mixed:
    return x._replace(leaves=tuple(leaf.to(WHERE) for leaf in x.leaves))


def same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-13) -> None:
    scale = max(float(wanted.abs().max()), 1e-30)
    assert found.shape == wanted.shape
    assert float((found.cpu().double() - wanted.double()).abs().max()) <= tolerance * scale


WINDOWS = [  # samples, outputs, kernel, stride, padding (top, bottom, left, right), dilation
    (1, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (1, 3, (4, 5), (2, 3), (1, 2, 2, 2), (1, 1)),
    (2, 2, (2, 2), (1, 2), (-1, 1, 0, -2), (2, 1)),
]


@pytest.mark.parametrize("window", WINDOWS)
def test_convolutions_of_what_is_computed_as_it_is_read(monkeypatch: pytest.MonkeyPatch, window: Any) -> None:
    samples, outputs, kernel, stride, padding, dilation = window
    monkeypatch.setattr(triton_mixed, "LANES", 16)  # several programs a row
    monkeypatch.setattr(triton_mixed, "ROWS", 2)
    x = mixed(5, 19, n=samples)
    weight, bias = random(outputs, 7, *kernel, seed=6), random(outputs, seed=7)
    given = stride, padding, dilation
    wanted = thin.forward(x, weight, bias, *given)
    found = triton_mixed.forward(there(x), weight.to(WHERE), bias.to(WHERE), *given)
    same(found, wanted)
    grad = random(*wanted.shape, seed=8)
    same(
        triton_mixed.weight_gradient(grad.to(WHERE), there(x), kernel, *given),
        thin.weight_gradient(grad, x, kernel, *given),
    )
    for number in (1, 2):
        mine = weight[:, 2:3] if number == 1 else weight[:, 3:5]
        wanted = thin.input_gradient(grad, mine, (5, 19), *given, factor=x.part(number))
        part = there(x.part(number))
        same(triton_mixed.input_gradient(grad.to(WHERE), mine.to(WHERE), (5, 19), *given, factor=part), wanted)


@pytest.mark.parametrize("planes", [0.9, 1.2, 2.5])
def test_views_of_far_larger_maps_are_read_where_they_lie(planes: float) -> None:
    """A channel times its step passes 2**31 in a slide that lies on the device; few of its pages are there."""
    edge = int((planes * 2**30) ** 0.5)
    whole = torch.empty(3, edge, edge, dtype=torch.uint8, device=WHERE)
    for rows in (slice(0, 8), slice(edge - 8, edge)):
        tile = whole[None, :, rows, 5:37]
        tile.copy_(torch.randint(0, 256, tile.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
        there, here = (Mixed((Part(BYTES, 3),), (each,)) for each in (tile, tile.contiguous()))
        weight, grad = random(2, 3, 3, 3).to(WHERE), random(1, 2, 8, 32).to(WHERE)
        how = (1, 1), (1, 1, 1, 1), (1, 1)
        forward = [triton_mixed.forward(each, weight, None, *how) for each in (there, here)]
        assert torch.equal(*forward)
        back = [triton_mixed.weight_gradient(grad, each, (3, 3), *how) for each in (there, here)]
        assert torch.equal(*back)
        values = [triton_mixed.values(each, torch.float64) for each in (there, here)]
        assert torch.equal(*values)


def test_transposed_convolutions() -> None:
    x, weight, bias = mixed(3, 4), random(7, 2, 4, 4, seed=6), random(2, seed=7)
    given = (8, 10), (2, 2), (0, 0, 1, 1), (1, 1)
    wanted = thin.input_gradient(x, weight, *given, bias)
    same(triton_mixed.input_gradient(there(x), weight.to(WHERE), *given, bias.to(WHERE)), wanted)
    grad = random(*wanted.shape, seed=8)
    sums = [thin.ChannelSums("x"), thin.ChannelSums("x")]
    same(
        triton_mixed.weight_gradient(there(x), grad.to(WHERE), (4, 4), *given[1:], sums[0]),
        thin.weight_gradient(x, grad, (4, 4), *given[1:], sums[1]),
    )
    assert sums[0].found is not None and sums[1].found is not None
    same(sums[0].found, grad.sum((0, 2, 3)))


A, B = Leaf(grad=True), Leaf(grad=True)
PROGRAMS = {
    "constant": Program((A,), (Step("constant", (), (0.3,)), Step("mul", (0, 1)))),
    "fraction": Program((Leaf(bytes=1), B), (Step("u8", (0,)), Step("sub", (2, 1), (0.25,)))),
    "add": Program((A, B), (Step("add", (0, 1), (3.0,)),)),
    "divide": Program((A, B), (Step("abs", (1,)), Step("constant", (), (1.5,)), Step("add", (2, 3)),
                               Step("div", (0, 4)))),
    "negative": Program((A,), (Step("neg", (0,)), Step("square", (1,)))),
    "leaky": Program((A,), (Step("leaky", (0,), (0.1,)),)),
    "prelu": Program((A, Leaf(EACH, grad=True)), (Step("prelu", (0, 1)),)),
    "relu": Program((A,), (Step("relu", (0,)),)),
    "clamp": Program((A,), (Step("clamp", (0,), (-0.5, 0.7)),)),
    "hardtanh": Program((A,), (Step("hardtanh", (0,), (-0.5, 0.7)),)),
    "where": Program((A, B), (Step("lt", (0,), (0.2,)), Step("ge", (1, 0)), Step("not", (3,)), Step("or", (2, 4)),
                              Step("and", (5, 3)), Step("where", (6, 0, 1)))),
    "count": Program((A,), (Step("gt", (0,), (0.1,)), Step("real", (1,)))),
    "exp": Program((A,), (Step("exp", (0,)),)),
    "sigmoid": Program((A,), (Step("sigmoid", (0,)),)),
    "silu": Program((A,), (Step("silu", (0,)),)),
    "bce": Program((A, Leaf(bytes=1)), (Step("bce", (0, 1)),)),
    "scaled": Program((A, Leaf(ONE, grad=True)), (Step("mul", (0, 1)),)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_programs(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    """Values, gradients and sums of every op, against the machine code for the CPU."""
    monkeypatch.setattr(triton_mixed, "LANES", 16)
    program, leaves = PROGRAMS[name], []
    for k, leaf in enumerate(program.leaves):
        shape = {EACH: (3,), ONE: ()}.get(leaf.kind, (1, 3, 2, 21))
        value = random(*shape, seed=k, dtype=dtype)
        leaves.append((value.abs() * 99).clamp(0, 255).to(torch.uint8) % 2 if leaf.bytes else value)
    x = Mixed((Part(program, 3),), tuple(leaves))
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    grad, share = random(1, 3, 2, 21, seed=9, dtype=dtype), random(1, seed=10, dtype=dtype).reshape(())
    same(triton_mixed.values(there(x), dtype), pointwise.values(x, dtype), tolerance)
    wanted, found = pointwise.pull(x, grad), triton_mixed.pull(there(x), grad.to(WHERE))
    assert wanted.keys() == found.keys()
    for i, each in wanted.items():
        same(found[i], each, tolerance)
    if not any(leaf.kind == EACH and leaf.grad for leaf in program.leaves):
        summed, ours = pointwise.total(x, dtype, share), triton_mixed.total(there(x), dtype, share.to(WHERE))
        assert summed.total is not None and ours.total is not None
        same(ours.total, summed.total, tolerance)
        for i, each in summed.grads.items():
            same(ours.grads[i], each, tolerance)


class Small(nn.Module):
    """The published network's parts at a few pixels: strides there and back, an activation, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 2, 4, 2, 1), nn.ConvTranspose2d(2, 2, 4, 2, 1)
        self.head, self.act = nn.Conv2d(5, 1, 3, padding=1), nn.LeakyReLU(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.cat([x, self.act(self.up(self.act(self.down(x))))], 1))
        return found


def test_a_step_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine, as a GPU runs it: tiles whose convolutions and sums are all Triton's, against autograd."""

    def how(self: Executor, graph: Any, segment: Any, pulled: bool = False) -> Any:
        return inline(graph, segment, raw_images(graph, self.sources))

    monkeypatch.setattr(Executor, "_how", how)
    monkeypatch.setattr("wholegrad.asked.default_workers", lambda: 1)  # the interpreter is one thread's
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 12, 16), dtype=np.uint8)
    data = Small().double(), pixels, random_labels((12, 16), 0)
    used = []
    real = triton_mixed.compiled
    monkeypatch.setattr(triton_mixed, "compiled", lambda written: used.append(written) or real(written))
    with choice.using_triton(True, anywhere=True):
        tried = Case(data[0], LOSSES["bce"], *data[1:], torch.float64, SEED, "cpu")
        found = tried.run(tried.plan(tile=(8, 16)), (8, 16))
    wanted = reference(data[0], LOSSES["bce"], *data[1:]).tensors
    assert max(errors(found, wanted).values()) <= EXACT
    assert len(set(used)) >= 8
    assert any("255" in written.text for written in used)  # pixels were read as bytes


CODE = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wholegrad.kernels import triton_mixed as kernels
from test_triton_mixed import BYTES, LEAKY, MADE, PROGRAMS, Part, IDENTITY

def build(written, constants, wide=()):
    signature = {}
    for name in written.arguments:
        if name in constants or name.endswith("_X"):
            signature[name] = "constexpr"
        elif name in kernels.SIZES or name.endswith(("_n", "_c", "_y")) or name in ("blocks", "weight_o", "weight_i"):
            signature[name] = "i32"
        else:
            signature[name] = "*u8" if name in wide else "*fp64" if name[0] == "t" else "*fp32"
    constants = {**constants, **{name: 1 for name in written.arguments if name.endswith("_X")}}
    source = ASTSource(kernels.compiled(written), signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "ld.global" in made.asm["ptx"] and "st.global" in made.asm["ptx"]
    return made

parts = (Part(BYTES, 3), Part(LEAKY, 2), Part(MADE, 2), Part(IDENTITY, 2))
shape = dict(OUT=2, OUT_P=2, KH=5, KW=5, SY=2, SX=2, DY=1, DX=1, BIAS=True, REAL=tl.float32, LANES=512)
for spread in (False, True):
    build(kernels.slide(parts, spread, LEAKY), shape, ("x0",))
more = dict(CHANNELS=9, KW_P=8, ROWS=32, OUT=2, OUT_P=2, KH=5, KW=5, SY=1, SX=1, DY=1, DX=1, REAL=tl.float32, LANES=256)
for part in parts:
    build(kernels.correlate((Part(IDENTITY, 2),), (part,)), more, ("x0",) if part.program is BYTES else ())
for name, program in PROGRAMS.items():
    wide = tuple(f"x{k}" for k, leaf in enumerate(program.leaves) if leaf.bytes)
    maps = tuple(i for i in program.wanted if program.leaves[i].kind == "map")
    build(kernels.walk(program, True, maps, "map", True), dict(CHANNELS=3, REAL=tl.float32, LANES=512), wide)
print("built")
"""


def test_they_compile_for_a_gpu_that_is_not_there() -> None:
    """The interpreter takes what the compiler may refuse: every kind of kernel is built for Hopper."""
    own = [str(Path(wg.__file__).parent.parent), str(Path(__file__).parent)]
    path = os.pathsep.join([*own, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    code = "import torch; torch.cuda.is_available = lambda: True\n" + CODE
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert run.stdout.strip() == "built", run.stderr[-2000:]

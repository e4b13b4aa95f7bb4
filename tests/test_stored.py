"""Maps between convolutions are stored as they are read, and read where they lie, where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wholegrad as wg
from noted import note
from oracle import assert_exact
from wholegrad.graph import strips, tails
from wholegrad.kernels import correlate, slide, thin
from wholegrad.kernels import strips as strip_kernels
from wholegrad.kernels import tail as tail_kernels
from wholegrad.kernels.expression import EACH, IDENTITY, MAP, Leaf, Program, Step, slope_follows
from wholegrad.kernels.host import host
from wholegrad.kernels.stage import Part
from wholegrad.losses import bce_loss

pytestmark = pytest.mark.skipif(host() is None, reason="no kernels on this machine")
Stored = dict[str, list[list[Program | None]]]
Act = Callable[[torch.Tensor], torch.Tensor]

FOLLOWS: dict[str, Act] = {
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "relu": torch.relu,
}
ELSE: dict[str, Act] = {
    "turned leaky": lambda x: F.leaky_relu(x, -0.3),
    "slope zero": lambda x: F.leaky_relu(x, 0.0),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "square": torch.square,
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.2),
    "two steps": lambda x: torch.relu(x - 0.1),
    "no change": lambda x: x,
}
DEAR = ("sigmoid", "silu")  # maps of their own, so that nothing is read through them


class Acted(nn.Module):
    """Three convolutions, the first transposed; what is between them, and beside one the image."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act = act
        self.down = nn.Conv2d(3, 3, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1)
        self.mix, self.head = nn.Conv2d(5, 2, 3, padding=1), nn.Conv2d(2, 1, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.act(self.up(self.down(x)))
        result: torch.Tensor = self.head(self.act(self.mix(torch.cat([up, x], 1))))
        return result


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Stored:
    """Blocks, strips and panels are small; lists fill with the programs that layers' maps are stored by."""
    found: Stored = {"strips": [], "tails": []}

    def noting(name: str) -> Callable[..., tuple[list[tuple[Part, ...]], list[Program | None]]]:
        def noted(*given: Any) -> tuple[list[tuple[Part, ...]], list[Program | None]]:
            made = stored_as_read(*given)
            found[name].append(made[1])
            return made

        return noted

    stored_as_read = strip_kernels.stored_as_read
    monkeypatch.setattr(strip_kernels, "stored_as_read", noting("strips"))
    monkeypatch.setattr(tail_kernels, "stored_as_read", noting("tails"))
    note(monkeypatch, strips, "find", 7, 32)
    note(monkeypatch, tails, "find_tail", 8, 16)
    return found


def pixels(high: int = 90, wide: int = 118) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (3, high, wide), np.uint8)


@pytest.mark.parametrize("name", [*FOLLOWS, *ELSE])
def test_gradients_through_maps_stored_as_read(name: str, stored: Stored) -> None:
    torch.manual_seed(0)
    model = Acted({**FOLLOWS, **ELSE}[name]).double()
    with torch.no_grad():  # slopes on both sides of zero
        model.up.bias.zero_()
        model.mix.bias.zero_()
    image = pixels()
    assert_exact(model, bce_loss, image, image[:1] % 2, tile=(40, 58), budget="8GiB")
    assert {len(each) for each in stored["tails"]} == ({1} if name in DEAR else {3})
    assert all(bool(program) == (name in FOLLOWS) for each in stored["tails"] for program in each[:-1])
    assert all(each[-1] is None for each in stored["tails"])


@pytest.mark.parametrize("name", [*FOLLOWS, *ELSE])
def test_without_a_gradient_any_program_of_one_map_may_be_stored(name: str, stored: Stored) -> None:
    torch.manual_seed(0)
    model, image = Acted({**FOLLOWS, **ELSE}[name]).double(), pixels()
    result = wg.predict(model, image, kind="logits", tile=(40, 58))
    with torch.no_grad():
        wanted = model(torch.from_numpy(image)[None].double() / 255)[0]
    assert result is not None
    np.testing.assert_allclose(result, wanted, rtol=1e-12, atol=1e-13)
    (programs,) = stored["strips"]
    assert [bool(each) for each in programs] == ([False] if name in DEAR else [name != "no change"] * 2 + [False])


LEAKY = Program((Leaf(grad=True),), (Step("leaky", (0,), (0.1,)),))
SCALED = Program((Leaf(), Leaf(EACH)), (Step("mul", (0, 1)),))
SQUARE = Program((Leaf(),), (Step("square", (0,)),))


def layer(parts: tuple[Part, ...], sources: tuple[int, ...]) -> strip_kernels.Layer:
    weight = torch.zeros(2, sum(part.channels for part in parts), 3, 3)
    return strip_kernels.Layer(weight, None, (1, 1), (1, 1), False, parts, sources)


def test_a_map_read_in_two_ways_is_stored_as_it_is() -> None:
    first = layer((Part(IDENTITY, 3),), (0,))
    for other in (IDENTITY, SQUARE):
        readers = [layer((Part(LEAKY, 2),), (~0,)), layer((Part(LEAKY, 2), Part(other, 2)), (~1, ~0))]
        reads, stored = strip_kernels.stored_as_read([first, *readers], slope_follows)
        assert stored == [None, LEAKY._replace(leaves=(Leaf(),)), None]
        assert reads == [first.parts, readers[0].parts, (Part(IDENTITY, 2), Part(other, 2))]
    either = [layer((Part(LEAKY, 2),), (~0,)), layer((Part(SQUARE, 2),), (~0,))]
    assert strip_kernels.stored_as_read([first, *either], lambda program: True)[1] == [None] * 3
    with_small = layer((Part(SCALED, 2),), (~0, 1))
    assert strip_kernels.stored_as_read([first, with_small], lambda program: True) == (
        [first.parts, with_small.parts], [None, None],
    )  # fmt: skip


def test_where_a_slope_follows_from_the_value() -> None:
    relu = Program((Leaf(),), (Step("relu", (0,)),))
    flat, turned = (Program((Leaf(),), (Step("leaky", (0,), (slope,)),)) for slope in (0.0, -0.1))
    twice = Program((Leaf(),), (Step("relu", (0,)), Step("leaky", (1,), (0.1,))))
    assert slope_follows(LEAKY) and slope_follows(relu)
    assert not any(map(slope_follows, (IDENTITY, flat, turned, twice, SQUARE, SCALED)))


def shape(stride: int = 1, transposed: bool = False, kernel: int = 3) -> slide.Shape:
    parts = (Part(IDENTITY, 2), Part(Program((Leaf(MAP, 1),), (Step("u8", (0,)),)), 1), Part(IDENTITY, 1))
    sizes = (4, 2, (kernel, kernel), (stride, stride), (1, 1), transposed, (0, 0), "double")
    return slide.Shape(*sizes, parts=parts)


@pytest.mark.parametrize(
    ("given", "size", "lead", "direct"),
    [
        ((12, 34), (10, 32), (0, 0), True),
        ((13, 36), (10, 32), (-1, -2), True),
        ((12, 34), (10, 32), (1, 0), False),
        ((12, 34), (10, 32), (0, 1), False),
        ((11, 34), (10, 32), (0, 0), False),
        ((12, 33), (10, 32), (0, 0), False),
    ],
)
def test_maps_are_read_where_they_lie_unless_padding_is_read(
    given: tuple[int, int], size: tuple[int, int], lead: tuple[int, int], direct: bool
) -> None:
    there = (True, True, False)
    found = thin.directly(shape(), there, given, size, lead)
    assert found.direct == ((True, False, False) if direct else ())
    assert found.staged == (2 if direct else 4)
    assert thin.directly(shape(), (False, True, False), given, size, lead) == shape()


def test_neither_are_those_of_strides_but_those_of_transposed_convolutions() -> None:
    there = (True, True, True)
    assert thin.directly(shape(2), there, (40, 40), (10, 10), (0, 0)) == shape(2)
    assert thin.directly(shape(2, True), there, (40, 40), (10, 10), (4, 4)).direct == (True, False, True)
    assert thin.directly(shape(2, True), there, (40, 40), (10, 10), (0, 0)) == shape(2, True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_what_is_read_where_it_lies_gives_the_same(transposed: bool, dtype: torch.dtype) -> None:
    """Beside maps, and after them as far as is said, lie NaNs, which no output may see."""
    draw = torch.Generator().manual_seed(0)
    high, wide, size, lead = (12, 40, (19, 70), (3, 5)) if transposed else (15, 40, (13, 38), (0, 0))
    stride = 2 if transposed else 1
    real = "float" if dtype == torch.float32 else "double"
    plain = shape(stride, transposed)._replace(real=real, residue=(lead[0] % stride, lead[1] % stride))
    found = thin.directly(plain, (True, True, True), (high, wide), size, lead)
    assert found.direct == (True, False, True)
    pitch = 48
    beyond = thin.beyond(pitch, dtype) // dtype.itemsize
    memory = [torch.full((n * high * pitch + beyond,), torch.nan, dtype=dtype) for n in (2, 1)]
    maps = [
        each[: n * high * pitch].view(1, n, high, pitch)[..., :wide] for each, n in zip(memory, (2, 1), strict=True)
    ]
    for each in maps:
        each.copy_(torch.randn(each.shape, generator=draw).to(dtype))
    small = torch.randint(0, 256, (1, 1, high, wide), generator=draw, dtype=torch.uint8)
    x = thin.Mixed(plain.parts, (maps[0], small, maps[1]))
    weight, bias = (torch.randn(n, generator=draw).to(dtype) for n in ((2, 4, 3, 3), (2,)))
    results = []
    for each in (plain, found):
        kernel, out = thin.slide_kernel(each), torch.zeros(2, *size, dtype=dtype)
        plan = thin.slide_plan(each, (high, wide), size, lead, (size[0] * size[1], size[1]))
        memory_ = thin.scratch(plan.bytes)
        packed = thin.packed_weight(weight, kernel.block)
        kernel.call(
            plan.sizes, x.table.of(0), packed.data_ptr(), bias.data_ptr(), out.data_ptr(), None,
            memory_ + plan.starts[0], memory_,
        )  # fmt: skip
        results.append(out)
    assert results[0].isfinite().all() and results[0].abs().max() > 1
    assert results[1].equal(results[0])


def weights_shape(stride: int = 1, summed: str = "g", real: str = "double") -> correlate.Shape:
    return correlate.Shape(4, 2, (3, 3), (stride, stride), (1, 1), real, shape().parts, (), summed)


@pytest.mark.parametrize(
    ("given", "size", "padding", "direct"),
    [
        ((12, 34), (10, 32), (0, 0, 0, 0), True),
        ((13, 36), (10, 32), (-1, 0, -2, 0), True),
        ((12, 34), (10, 32), (1, 0, 0, 0), False),
        ((12, 34), (10, 32), (0, 0, 1, 0), False),
        ((11, 34), (10, 32), (0, 0, 0, 0), False),
        ((12, 33), (10, 32), (0, 0, 0, 0), False),
        ((12, 34), (10, 31), (0, 0, 0, 0), False),
    ],
)
def test_a_weights_gradient_reads_maps_where_they_lie_unless_padding_or_part_of_a_vector_is_read(
    given: tuple[int, int], size: tuple[int, int], padding: tuple[int, int, int, int], direct: bool
) -> None:
    there = (True, True, False)
    found = thin.correlated_directly(weights_shape(), there, given, size, padding)
    assert found.direct == ((True, False, False) if direct else ()) and found.staged == (2 if direct else 4)
    for other in (weights_shape(2), weights_shape(summed="x")):
        assert thin.correlated_directly(other, (True, True, True), (90, 90), (10, 32), (0, 0, 0, 0)) == other


@pytest.mark.parametrize("real", ["float", "double"])
def test_a_weights_gradient_is_the_same(real: str) -> None:
    """Beside the maps lie NaNs, which no sum may see."""
    draw, dtype = torch.Generator().manual_seed(0), torch.float32 if real == "float" else torch.float64
    high, wide, size, padding = 40, 51, (37, 48), (-1, 0, -1, 0)
    maps = [torch.full((1, n, high + 2, wide + 9), torch.nan, dtype=dtype)[:, :, 1:-1, :wide] for n in (2, 1)]
    for each in maps:
        each.copy_(torch.randn(each.shape, generator=draw).to(dtype))
    small = torch.randint(0, 256, (1, 1, high, wide), generator=draw, dtype=torch.uint8)
    x = thin.Mixed(shape().parts, (maps[0], small, maps[1]))
    grad = torch.randn(1, 2, *size, generator=draw).to(dtype)
    plain = weights_shape(real=real)
    found = thin.correlated_directly(plain, (True, True, True), (high, wide), size, padding)
    assert found.direct == (True, False, True)
    results = []
    for each in (plain, found):
        kernel, plan = thin.correlate_kernel(each), thin.correlate_plan(each, (high, wide), size, padding)
        totals = torch.zeros(2, 4, 3, 3, kernel.lanes, dtype=torch.float64)
        sums = torch.zeros(4, kernel.lanes, dtype=torch.float64)
        memory = thin.scratch(plan.bytes)
        table = thin.Mixed((Part(IDENTITY, 2),), (grad,)).table
        kernel.call(
            plan.sizes, x.table.of(0), table.of(0), totals.data_ptr(), sums.data_ptr(), memory + plan.starts[0],
            memory + plan.starts[1], memory,
        )  # fmt: skip
        results.append((totals.sum(-1), sums[:2].sum(-1)))
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all() and one.abs().max() > 1
        torch.testing.assert_close(
            other, one, rtol=1e-6 if real == "float" else 1e-13, atol=1e-4 if real == "float" else 1e-11
        )
    torch.testing.assert_close(results[0][1], grad.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)

"""Rule 5 on the published network: every loss, many tilings, odd sizes, ignore labels. And mutants that must fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import wholegrad as wg
from oracle import assert_exact, errors
from wholegrad.errors import BudgetError, NumericsError
from wholegrad.graph.geometry import Interval
from wholegrad.graph.rules import window
from wholegrad.kernels import thin
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan import tiles
from wholegrad.plan.tiles import Grid, Tile
from wholegrad.proof import default_tiles
from wholegrad.run.executor import Executor
from wholegrad.verify import EXACT, Case, Report, Row, by_chance, random_labels


def case(height: int, width: int, seed: int = 0) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, dtype=torch.float64, generator=generator)
    return unet4492(seed=seed).double(), image, random_labels((height, width), seed)


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("tile", [(32, 32), (37, 53), (160, 208), (500, 500)])
def test_every_loss_under_tiles_that_divide_and_that_do_not(loss: str, tile: tuple[int, int]) -> None:
    model, image, labels = case(160, 208)
    assert_exact(model, LOSSES[loss], image, labels, tile=tile)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (61, 130), (5, 7)])
def test_sizes_that_are_no_multiple_of_sixteen_and_images_smaller_than_a_tile(size: tuple[int, int]) -> None:
    model, image, labels = case(*size)
    assert_exact(model, LOSSES["bce+dice"], image, labels, tile=(64, 64))


@pytest.mark.parametrize("tile", [(1, 48), (33, 1), (1, 1)])
def test_tiles_one_pixel_wide(tile: tuple[int, int]) -> None:
    model, image, labels = case(33, 48) if tile != (1, 1) else case(18, 20)
    assert_exact(model, LOSSES["bce"], image, labels, tile=tile)


@pytest.mark.parametrize("placement", ["host", "disk"])
@pytest.mark.parametrize(
    "boundaries", [[], ["middle"], ["down1", "middle"], ["down1", "down2", "middle", "up2", "fuse2", "up1", "head"]]
)
def test_boundaries_and_placements_change_nothing(boundaries: list[str], placement: str) -> None:
    model, image, labels = case(96, 112)
    for loss in ("bce", "dice"):
        assert_exact(model, LOSSES[loss], image, labels, tile=(40, 48), boundaries=boundaries, placement=placement)


def test_nothing_counts_where_every_label_is_ignored() -> None:
    model, image, _ = case(40, 40)
    labels = torch.full((1, 40, 40), 255, dtype=torch.uint8)
    loss = wg.backward(model, LOSSES["bce"], image, labels)
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_same_plan_twice_gives_the_same_bits_whatever_the_number_of_threads() -> None:
    model, image, labels = case(96, 112)
    model.float()
    found = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        model.zero_grad()
        plan = wg.plan(model, LOSSES["bce+dice"], image, labels, tile=(32, 48))
        assert plan.workers == threads
        loss = wg.backward(model, LOSSES["bce+dice"], image, labels, plan=plan)
        found.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.set_num_threads(2)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_gradients_add_to_what_is_there() -> None:
    model, image, labels = case(48, 48)
    wg.backward(model, LOSSES["bce"], image, labels)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    wg.backward(model, LOSSES["bce"], image, labels)
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_float32_is_as_good_as_whole_image_float32(seed: int) -> None:
    report = wg.verify(unet4492(seed=seed), LOSSES["bce+dice"], shape=(3, 200, 168), seed=seed)
    assert report.ok, str(report)


# Mutants: break one thing, and the oracle must say so.


def short_halo(self: Any, node: Any, specs: Any, operand: int, role: Any, out: Interval) -> Interval:
    true = ORIGINAL_NEEDS(self, node, specs, operand, role, out)
    size = specs[0].rows if role == "H" else specs[0].cols
    return Interval(true.lo, true.hi - 1) if true.hi < size and true.size > 1 else true


def no_halo(self: Any, node: Any, specs: Any, operand: int, role: Any, out: Interval) -> Interval:
    """Padding at a tile's border: only the inputs that the outputs sit on are read, the rest becomes zeros."""
    true = ORIGINAL_NEEDS(self, node, specs, operand, role, out)
    if node.args[6] or node.args[3][0] != 1:
        return true
    return Interval(max(true.lo, out.lo), max(min(true.hi, out.hi), max(true.lo, out.lo) + 1))


def skips_a_tile(self: Grid) -> Iterator[Tile]:
    return (tile for tile in ORIGINAL_TILES(self) if tile.number != 3)


def doubly_owned(graph: Any, segment: Any, role: Any, tile: int, bands: None) -> tiles.AxisTiles:
    """Each tile but the last also owns the first element of the next."""
    true = ORIGINAL_AXIS(graph, segment, role, tile)
    ends = {ref: max(mine[ref].hi for mine in true.owned if ref in mine) for mine in true.owned for ref in mine}
    owned = tuple({ref: Interval(i.lo, min(i.hi + 1, ends[ref])) for ref, i in mine.items()} for mine in true.owned)
    spans = tuple(tiles.spans(graph, segment, role, mine) for mine in owned)
    return tiles.AxisTiles(owned, spans, true.count)


ORIGINAL_NEEDS = window.Convolution.needs
ORIGINAL_TILES = Grid.__iter__
ORIGINAL_AXIS = tiles.axis_tiles


@pytest.mark.parametrize(
    ("where", "name", "mutant"),
    [
        (window.Convolution, "needs", short_halo),
        (window.Convolution, "needs", no_halo),
        (Grid, "__iter__", skips_a_tile),
        (tiles, "axis_tiles", doubly_owned),
    ],
    ids=["halo one short", "padding at a tile's border", "a tile skipped", "a pixel owned twice"],
)
def test_the_oracle_fails_on_mutants(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, mutant: Any) -> None:
    model, image, labels = case(64, 64)
    fixed = {"tile": (32, 32), "boundaries": ["middle"]}
    assert max(errors(model, LOSSES["bce"], image, labels, **fixed).values()) <= EXACT
    monkeypatch.setattr(where, name, mutant)
    model, image, labels = case(64, 64)
    assert max(errors(model, LOSSES["bce"], image, labels, **fixed).values()) > 1e-6


def test_lost_digits_are_not_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight's gradient in half of float32's digits: float64 cannot tell, float32 must."""
    true = thin.weight_gradient

    def short(*args: Any) -> torch.Tensor:
        found = true(*args)
        return found if args[0].dtype is torch.float64 else found.half().to(found.dtype)

    monkeypatch.setattr(thin, "weight_gradient", short)
    report = wg.verify(unet4492(seed=0), LOSSES["bce"], shape=(3, 64, 80), tiles=[(33, 40)])
    assert not report.ok and all(row.exact for row in report.rows)
    assert "MISMATCH" in str(report) and "rounding" in str(report.responsible)


@pytest.mark.parametrize(
    ("ours", "whole", "chance"),
    [
        ([1e-3, 1e-6], [1e-6, 6e-4], True),  # the same errors, in other tensors
        ([1e-3, 1e-3], [1e-6, 6e-4], False),  # one more tensor that is far off
        ([1.3e-3, 1e-6], [1e-6, 6e-4], False),  # farther off than any
        ([1.9e-6, 0.0], [0.0, 0.0], True),  # a few roundings
    ],
)
def test_what_is_put_down_to_chance(ours: list[float], whole: list[float], chance: bool) -> None:
    rows = [Row(str(i), 1e-14, *pair) for i, pair in enumerate(zip(ours, whole, strict=True))]
    assert by_chance(rows) is chance
    assert Report(tuple(rows), ()).ok is chance
    assert ("by chance" in str(Report(tuple(rows), ()))) is (chance and not all(row.ok for row in rows))
    wrong = Report((*rows, Row("wrong", 1e-11, 0.0, 0.0)), ())
    assert not wrong.ok and "MISMATCH" in str(wrong)


class Cancels(nn.Module):
    """Four of float64's digits go where a large mean is taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 3, padding=1)
        nn.init.uniform_(self.first.weight, 1e3, 2e3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = self.first(x)
        result: torch.Tensor = self.last(torch.tanh(large - large.mean((2, 3), keepdim=True)))
        return result


def test_rounding_is_told_from_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((output - target) ** 2).mean()

    torch.manual_seed(0)
    options: dict[str, Any] = {"target": torch.tensor([1.0]), "tiles": [(7, 9), (11, 24)], "single": False}
    options["image"] = 1 + 1e-3 * torch.rand(3, 25, 24, dtype=torch.float64)
    report = wg.verify(Cancels(), squared, **options)
    assert report.ok and max(row.double for row in report.rows) > EXACT, str(report)
    assert "parameters rounded anew" in str(report)
    monkeypatch.setattr(window.Convolution, "needs", short_halo)
    report = wg.verify(Cancels(), squared, **options)
    assert not report.ok
    assert not Row("far", 2e-9, 0.0, 0.0, 1.0).ok


class CastLoss(nn.Module):
    """A loss that computes in float32 whatever it is given."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((output.float() - target.float()) ** 2).mean() * 0.3


def test_a_loss_that_computes_in_float32_is_judged_by_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))
    options: dict[str, Any] = {"shape": (3, 25, 34), "tiles": [(9, 12)], "single": False}
    report = wg.verify(model, CastLoss(), **options)
    assert report.ok and report.responsible is None, str(report)
    assert max(row.double for row in report.rows) > EXACT
    assert "\nexact up to the model's own float32: loss (aten._to_copy.default)" in str(report)
    true = Executor._keep
    with monkeypatch.context() as patch:  # a wrong plan, whose every op is right
        patch.setattr(Executor, "_keep", lambda self, ref, box, v: true(self, ref, box, v * (1 + 1e-4 * (box.y0 > 0))))
        patch.setattr(Case, "made", lambda self, tile, place: self.plan(tile=tile, boundaries=["1"]))
        report = wg.verify(model, CastLoss(), **options)
    assert not report.ok and str(report.responsible).startswith("the plan (tiles of 9 x 12")
    monkeypatch.setattr(window.Convolution, "needs", short_halo)
    report = wg.verify(model, CastLoss(), **options)
    assert not report.ok and "aten.convolution.default): forward is wrong" in str(report.responsible)


def test_an_output_that_is_a_map_in_other_dimensions_is_gathered() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.weigh, self.classify = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 1), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.encode(x).flatten(2).transpose(1, 2)
            a = self.weigh(h).transpose(1, 2).softmax(-1)
            return self.classify((a @ h).squeeze(1)), a

    def loss(output: Any, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output[0], target)

    report = wg.verify(Attention(), loss, shape=(3, 24, 31), target=torch.tensor([1]), tiles=[(9, 12)], single=False)
    assert report.ok and "output 1" in {row.name for row in report.rows}, str(report)


def test_an_output_with_channels_last_is_gathered() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.conv(x).permute(0, 2, 3, 1)
            return result

    report = wg.verify(Last(), lambda o, t: (o**2).mean(), shape=(3, 20, 22), tiles=[(7, 9)], single=False)
    assert report.ok and "output" in {row.name for row in report.rows}, str(report)


def test_a_loss_may_view_its_target() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(output.reshape(-1), target.view(-1))

    options: dict[str, Any] = {"shape": (3, 16, 17), "tiles": [(9, 12)], "single": False}
    assert wg.verify(nn.Conv2d(3, 2, 1), loss, target=torch.rand(2, 16, 17), **options).ok


@pytest.mark.parametrize("size", [(2048, 2048), (769, 769), (300, 40000), (40000, 17), (65536, 65536)])
def test_tiles_of_large_images_stay_small(size: tuple[int, int]) -> None:
    chosen = default_tiles(*size)
    assert len(chosen) >= 2 and all(rows * cols <= 512 * 512 for rows, cols in chosen)
    assert all(rows <= size[0] and cols <= size[1] for rows, cols in chosen)


def test_what_cannot_be_verified_is_refused_before_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile whose plan does not fit, an image that does not fit whole, weights that are no numbers."""

    def never(*args: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(Case, "reference", never)
    model, said = nn.Conv2d(3, 1, 3, padding=1), []
    with monkeypatch.context() as patch, pytest.raises(BudgetError, match=r"tiles of 300 x 400: .*smallest"):
        patch.setattr("wholegrad.asked.budget_bytes", lambda budget: 10 << 20)
        wg.verify(model, LOSSES["bce"], shape=(3, 300, 400), tiles=[(300, 400)])
    with monkeypatch.context() as patch, pytest.raises(BudgetError, match=r"needs about .* at 300 x 400, .*smaller"):
        patch.setattr("wholegrad.run.process.available", lambda: 1 << 20)
        patch.setattr("wholegrad.asked.budget_bytes", lambda budget: 4 << 30)
        wg.verify(model, LOSSES["bce"], shape=(3, 300, 400), progress=said.append)
    assert said == ["plans"]
    with torch.no_grad():
        model.bias.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(NumericsError, match="bias: has elements that are not finite"):
        wg.verify(model, LOSSES["bce"], shape=(3, 30, 40))

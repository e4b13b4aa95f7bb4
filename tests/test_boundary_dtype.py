"""Boundaries stored in 16 bits: off by default, rounded once, counted right, and never silently infinite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wholegrad as wg
from oracle import reference
from wholegrad.commands.common import blank
from wholegrad.errors import NumericsError, PlanError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Spec
from wholegrad.graph.layout import map_layout
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan.plan import Placement
from wholegrad.plan.storage import NARROW, stored_bytes, stored_dtype
from wholegrad.proof import errors, random_labels
from wholegrad.run.blocks import Blocks
from wholegrad.run.spill import Spill
from wholegrad.run.spill_store import DiskStore
from wholegrad.run.store import HostStore, MapStore, overflows
from wholegrad.verify import EXACT

BOUNDARIES = ["down1", "middle", "up1"]
SIZE = (96, 112)
DTYPES = list(NARROW.values())


def case(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    image = torch.rand(3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return unet4492(seed=0).to(dtype), image.to(dtype), random_labels(SIZE, 0)


def gradients(model: nn.Module, image: torch.Tensor, labels: Any, loss: str = "bce", **fixed: Any) -> dict[str, Any]:
    """The loss and every gradient by name."""
    model.zero_grad()
    plan = wg.plan(model, LOSSES[loss], image, labels, tile=(40, 48), **fixed)
    value = wg.backward(model, LOSSES[loss], image, labels, plan=plan)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value, **grads}


class RoundThrough(torch.autograd.Function):
    """Rounds; its gradient is one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def rounding(model: nn.Module, names: list[str], dtype: torch.dtype) -> nn.Module:
    """The same model, rounding what these modules give."""
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, out: RoundThrough.apply(out, dtype))
    return model


@pytest.mark.parametrize("placement", ["host", "disk"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["bce", "dice"])
def test_forward_and_recomputing_backward_see_the_same_rounded_values(
    loss: str, dtype: torch.dtype, placement: str
) -> None:
    """In float64 it is exactly the whole-image run of a model that rounds there."""
    model, image, labels = case(torch.float64)
    fixed = {"boundaries": BOUNDARIES, "placement": placement}
    found = gradients(model, image, labels, loss, boundary_dtype=dtype, **fixed)
    wanted = reference(rounding(model, BOUNDARIES, dtype), LOSSES[loss], image, labels)
    apart = errors(found, {"loss": wanted.loss, **wanted.grads})
    assert max(apart.values()) <= EXACT, apart
    model, image, labels = case(torch.float64)
    plain = gradients(model, image, labels, loss, **fixed)
    assert max(errors(plain, found).values()) > 1e-6, "something was rounded"


def test_off_or_without_a_wider_boundary_not_a_bit_changes() -> None:
    model, image, labels = case()
    plain = gradients(model, image, labels, boundaries=BOUNDARIES)
    off = gradients(model, image, labels, boundaries=BOUNDARIES, boundary_dtype=None)
    none = gradients(model, image, labels, boundaries=[])
    on = gradients(model, image, labels, boundaries=[], boundary_dtype=torch.bfloat16)
    for one, other in ((plain, off), (none, on)):
        assert all(torch.equal(one[name], other[name]) for name in one)


def float32_errors(model: nn.Module, names: list[str], dtype: torch.dtype | None) -> list[float]:
    """The error of the loss and each gradient in float32 against whole-image float64, in order."""
    _, image, labels = case()
    wanted = reference(model, LOSSES["bce"], image, labels)
    found = gradients(model, image, labels, boundaries=names, boundary_dtype=dtype)
    return sorted(errors(found, {"loss": wanted.loss, **wanted.grads}).values())


def smooth() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_float32_a_smooth_networks_errors_are_of_the_order_of_the_rounding(dtype: torch.dtype) -> None:
    rounding_unit = torch.finfo(dtype).eps / 2
    assert 1e-2 * rounding_unit < float32_errors(smooth(), ["1", "3"], dtype)[-1] < rounding_unit
    assert float32_errors(smooth(), ["1", "3"], None)[-1] < 1e-5


@pytest.mark.parametrize(("dtype", "typical"), [(torch.bfloat16, 1e-2), (torch.float16, 3e-3)])
def test_in_float32_the_published_networks_errors_are_larger(dtype: torch.dtype, typical: float) -> None:
    """Where rounding carries a ReLU's input past zero the gradient jumps: single tensors are farther off."""
    found = float32_errors(unet4492(seed=0), BOUNDARIES, dtype)
    assert found[len(found) // 2] < typical and found[-1] < 5e-2


def test_results_do_not_depend_on_tiles_beyond_rounding() -> None:
    model, image, labels = case(torch.float64)
    found = []
    for tile in ((32, 32), (37, 53), (96, 112)):
        model.zero_grad()
        plan = wg.plan(
            model, LOSSES["bce"], image, labels, tile=tile, boundaries=BOUNDARIES, boundary_dtype=torch.float16
        )
        wg.backward(model, LOSSES["bce"], image, labels, plan=plan)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert max(errors(other, found[0]).values()) <= EXACT


def spec(dtype: torch.dtype) -> Spec:
    return Spec(map_layout((2, 3, 7, 9)), dtype)


def stores(kind: torch.dtype, dtype: torch.dtype, spill: Spill) -> list[MapStore]:
    cuts = [0, 4, 7], [0, 5, 9]
    return [HostStore(spec(kind), Blocks(), dtype=dtype), DiskStore(spec(kind), spill, cuts, "a map", dtype)]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_rounds_once_and_reads_in_the_graphs_dtype(
    kind: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = torch.randn(2, 3, 7, 9, dtype=kind)
    spill = Spill(1 << 20, tmp_path, 0)
    for store in stores(kind, dtype, spill):
        for box in (Box(0, 4, 0, 9), Box(4, 7, 0, 5), Box(4, 7, 5, 9)):
            rows, cols = box.slices()
            store.write(box, whole[..., rows, cols])
        read = store.read(Box(1, 6, 2, 8))
        assert read.dtype == kind and store.nbytes == 2 * whole.numel()
        assert torch.equal(read, whole.to(dtype).to(kind)[..., 1:6, 2:8])
        store.close()
    spill.close()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.bfloat16, torch.float16])
def test_only_wider_floating_point_maps_are_narrowed(dtype: torch.dtype) -> None:
    for narrow in (*DTYPES, None):
        assert stored_dtype(spec(dtype), narrow) == dtype
        assert stored_bytes(spec(dtype), narrow) == spec(dtype).nbytes
    assert stored_bytes(spec(torch.float64), torch.bfloat16) == spec(torch.float64).nbytes // 4
    assert stored_dtype(spec(torch.float32), None) == torch.float32


@pytest.mark.parametrize(
    ("value", "dtype", "too_large"),
    [
        (65504.0, torch.float16, False),
        (65519.0, torch.float16, False),  # rounds to 65504
        (65520.0, torch.float16, True),
        (-7e4, torch.float16, True),
        (7e4, torch.bfloat16, False),
        (3.4e38, torch.bfloat16, True),
        (1e300, torch.float32, True),
        (float("inf"), torch.float16, False),  # already infinite
        (float("nan"), torch.float16, False),
    ],
)
def test_what_overflows(value: float, dtype: torch.dtype, too_large: bool) -> None:
    tile = torch.tensor([0.0, value, 1.0], dtype=torch.float64)
    assert overflows(tile, dtype) is too_large
    assert overflows(torch.tensor([float("nan"), 1e300], dtype=torch.float64), dtype), "NaN hides nothing"
    assert not overflows(tile.to(dtype), dtype)


class Loud(nn.Module):
    """Values near 1e5 between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.first(x) * 1e5) * 1e-5
        return result


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_float16_refuses_a_boundary_that_it_cannot_hold(placement: str) -> None:
    torch.manual_seed(0)
    model, image, target = Loud(), torch.rand(3, 30, 40), torch.rand(1, 26, 36)
    loss = nn.functional.mse_loss

    def run(dtype: torch.dtype | None) -> None:
        plan = wg.plan(model, loss, image, target, boundaries=["mul"], placement=placement, boundary_dtype=dtype)
        wg.backward(model, loss, image, target, plan=plan)

    said = r"boundary .*aten.mul.*: reaches \d+ on rows 0 to .* float16, .* can hold \(65504\); use bfloat16"
    with pytest.raises(NumericsError, match=said):
        run(torch.float16)
    assert all(p.grad is None for p in model.parameters())
    run(torch.bfloat16)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("wrong", [torch.float32, torch.int8, torch.float8_e5m2, "bfloat16", 16])
def test_other_dtypes_are_refused(wrong: Any) -> None:
    with pytest.raises(PlanError, match=r"boundary_dtype: is .*; choose torch.bfloat16 or torch.float16, or None"):
        wg.plan(unet4492(seed=0), LOSSES["bce"], blank(3, 64, 64), blank(1, 64, 64), boundary_dtype=wrong)


def planned(**fixed: Any) -> wg.Plan:
    return wg.plan(unet4492(seed=0), LOSSES["bce"], blank(3, 4000, 8000), blank(1, 4000, 8000), **fixed)


@pytest.fixture
def _a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wholegrad.run.process.resident", lambda: 320 << 20)
    monkeypatch.setattr("wholegrad.run.process.has_run", lambda: False)


@pytest.mark.usefixtures("_a_fresh_process")
def test_a_plan_counts_half_the_bytes_and_prints_them() -> None:
    fixed: dict[str, Any] = {"boundaries": ["down1"], "placement": "host", "tile": (500, 1000), "budget": "8GiB"}
    plain, narrow = planned(**fixed), planned(**fixed, boundary_dtype=torch.bfloat16)
    (ref,) = plain.boundaries
    whole = plain.graph.spec(ref).nbytes
    assert (plain.stored_bytes(ref), narrow.stored_bytes(ref)) == (whole, whole // 2)
    assert plain.projected - narrow.projected == whole // 2, "its gradient is as large as before"
    assert plain.boundary_dtype is None and narrow.boundary_dtype is torch.bfloat16
    assert "rounded" not in str(plain) and "in host, rounded to bfloat16;" in str(narrow)
    assert "rounded" not in str(planned(boundaries=[], boundary_dtype=torch.bfloat16))


@pytest.mark.usefixtures("_a_fresh_process")
def test_boundaries_move_from_disk_to_host_memory() -> None:
    """One map of full resolution and its gradient: 4 + 4 bytes a value do not fit into what is left, 2 + 4 do."""
    fixed: dict[str, Any] = {"boundaries": ["fuse1"], "tile": (256, 512)}
    narrow = planned(**fixed, budget="8GiB", placement="host", boundary_dtype=torch.float16)
    budget = narrow.projected + narrow.graph.spec(next(iter(narrow.boundaries))).nbytes // 4
    plain, narrow = planned(**fixed, budget=budget), planned(**fixed, budget=budget, boundary_dtype=torch.float16)
    assert set(plain.placements.values()) == {Placement.DISK}
    assert set(narrow.placements.values()) == {Placement.HOST}
    assert max(plain.projected, narrow.projected) <= budget
    assert narrow.seconds < plain.seconds

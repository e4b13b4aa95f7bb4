"""Tiles on a device with memory of its own: exact, nothing mixed, nothing crossing that need not, within its budget.

No GPU is asked for: the device is a pretended one (:mod:`pretend`). ``test_gpu.py`` has what only a real one can show.
"""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pretend
import wholegrad as wg
from oracle import SEED, reference
from pretend import LEDGER, MixedError
from support_cases import named_cases
from wholegrad.errors import BudgetError, NumericsError, PlanError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan import devices
from wholegrad.plan.plan import Placement
from wholegrad.proof import random_labels
from wholegrad.run.boundaries import Boundaries
from wholegrad.run.device import open_device
from wholegrad.train.plans import device_of_run
from wholegrad.train.tables import TrainConfig
from wholegrad.train.team import Place
from wholegrad.verify import EXACT, Case, errors
from zoo import Entry
from zoo_networks import NETWORKS

pretend.install()
FEW_NETWORKS = ("monai SegResNet", "transformers ResNet-18", "gated attention", "two inputs", "dropout")
OPS = (
    "Convolution: padding circular", "Transposed convolution: transposed 2 x 2, stride 3 (gaps)",
    "Pooling: max, with indices", "Pooling: max unpool 3, padding 1", "Pooling: average (3, 4), ceil",
    "Pooling: adaptive average (3, 5)", "Pooling: adaptive average, larger", "Pooling: adaptive max (3, 5)",
    "Pooling: adaptive max 1", "Interpolation: nearest 1.5", "Interpolation: bilinear 1.7",
    "Interpolation: bicubic to a size, corners aligned", "Padding, cropping and joining: roll pixels",
    "Padding, cropping and joining: unfold and fold", "Over channels: a look-up by label",
    "Norms: batch norm, training", "Norms: group norm, training", "Norms: layer norm over the whole map, training",
    "Over the map: standard deviation, fed back", "Over the map: largest with ties",
    "Over the map: pooling by attention",
    "Random: dropout", "Random: dropout of channels", "Random: Gaussian and uniform noise",
    "Random: noise made from a shape", "Random: Bernoulli with a probability a pixel",
    "Without locality (on maps held whole): attention within windows",
    "Without locality (on maps held whole): sampling by a grid",
    "Losses: cross-entropy with an ignored label", "Losses: a loss with trained parameters",
    "Networks in parts: a U-Net", "Networks in parts: normalised weights and a buffer",
)  # fmt: skip
Data = tuple[torch.nn.Module, torch.Tensor, torch.Tensor]


def case(height: int, width: int, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, dtype=torch.float64, generator=generator)
    return unet4492(seed=seed).double(), image, random_labels((height, width), seed)


def device_errors(data: Data, loss: Any, **fixed: Any) -> dict[str, float]:
    """Relative errors of a run on the device against whole-image autograd."""
    tried = Case(data[0], loss, *data[1:], torch.float64, SEED, pretend.device())
    found = tried.run(tried.plan(**fixed), fixed.get("tile"))
    return errors(found, reference(data[0], loss, *data[1:]).tensors)


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    there = torch.ones(2, 3).to("pretend")
    with pytest.raises(MixedError):
        there + torch.ones(2, 3)
    with pytest.raises(MixedError):
        torch.nn.functional.conv2d(there.view(1, 1, 2, 3), torch.ones(1, 1, 1, 1))
    assert torch.equal((there * 2).cpu(), torch.full((2, 3), 2.0))


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("tile", [(37, 53), (500, 500)])
def test_every_loss_is_exact(loss: str, tile: tuple[int, int]) -> None:
    found = device_errors(case(96, 112), LOSSES[loss], tile=tile)
    assert max(found.values()) <= EXACT, found


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
@pytest.mark.parametrize("boundaries", [["middle"], ["down1", "down2", "middle", "up2", "fuse2", "up1", "head"]])
def test_boundaries_are_exact_wherever_they_live(placement: str, boundaries: list[str]) -> None:
    for loss in ("bce", "dice"):
        found = device_errors(case(96, 112), LOSSES[loss], tile=(40, 48), boundaries=boundaries, placement=placement)
        assert max(found.values()) <= EXACT, found


@pytest.mark.parametrize("entry", [entry for entry in NETWORKS if entry.name in FEW_NETWORKS], ids=str)
def test_networks_of_many_kinds_are_exact(entry: Entry) -> None:
    height, width = entry.size
    data = (entry.build(), entry.image(height, width), entry.target(height, width))
    found = device_errors(data, entry.loss, tile=(height // 2 + 1, width // 3 + 2))
    assert max(found.values()) <= EXACT, found


@pytest.mark.parametrize("name", OPS)
def test_ops_that_make_tensors_of_their_own_make_them_there(name: str) -> None:
    """Those whose rules make index, weight and counting tensors, or draw; every other op takes what it is given."""
    each = named_cases()[name]
    found = device_errors((each.build(), each.image(), each.target()), each.loss, tile=(9, 11))
    assert max(found.values()) <= EXACT, found


def bytes_case(height: int = 64, width: int = 80) -> tuple[torch.nn.Module, np.ndarray, torch.Tensor]:
    """The published network in float32 with an image of bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    return unet4492().float(), pixels, random_labels((height, width), 0)


def step(data: Any, **options: Any) -> tuple[wg.Plan, dict[str, torch.Tensor]]:
    """One step on the device: its plan and gradients."""
    model, image, target = data
    model.zero_grad(set_to_none=True)
    plan = wg.plan(model, LOSSES["bce"], image, target, **{"device": pretend.device(), **options})
    wg.backward(model, LOSSES["bce"], image, target, plan=plan)
    return plan, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_images_cross_as_bytes_and_nothing_comes_back_but_results() -> None:
    data = bytes_case()
    step(data, tile=(64, 80))
    LEDGER.forget()
    plan, grads = step(data, tile=(64, 80))
    image, labels = 3 * 64 * 80, 64 * 80
    parameters = sum(4 * parameter.numel() for parameter in data[0].parameters())
    assert [part.tiles for part in plan.segments] == [1, 1]  # labels are counted first, and read again
    assert image + 2 * labels + parameters <= LEDGER.up <= image + 2 * labels + parameters + 512
    assert LEDGER.down <= sum(8 * grad.numel() for grad in grads.values()) + 512


def test_boundaries_cross_only_where_they_live_elsewhere() -> None:
    data, fixed = case(96, 112), {"tile": (48, 56), "boundaries": ["middle"]}
    moved = {}
    for placement in ("device", "host", "disk"):
        LEDGER.forget()
        plan, _ = step(data, placement=placement, **fixed)
        moved[placement] = LEDGER.up, LEDGER.down
    (ref,) = plan.boundaries
    size = plan.stored_bytes(ref)
    for away in ("host", "disk"):
        up, down = (moved[away][i] - moved["device"][i] for i in (0, 1))
        assert up >= 3 * size  # read forward and backward, and its gradient
        assert down >= 2 * size  # written, and its gradient added to
    assert abs(moved["host"][0] - moved["disk"][0]) < size


def test_a_step_on_the_device_and_on_the_cpu_agree_to_rounding() -> None:
    data = bytes_case(96, 112)
    _, there = step(data, tile=(40, 48))
    _, here = step(data, tile=(40, 48), device="cpu")
    for name, grad in there.items():
        scale = here[name].abs().max()
        assert (grad - here[name]).abs().max() <= 2e-4 * scale, name


def test_the_same_plan_twice_gives_the_same_bits_whatever_is_in_flight() -> None:
    data = bytes_case(96, 112)
    torch.set_num_threads(1)  # which are not the device's, as a GPU's are
    try:
        found = [step(data, tile=(32, 48), device=pretend.device(at_once=k))[1] for k in (1, 2, 2, 3)]
    finally:
        torch.set_num_threads(2)
    for other in found[1:]:
        assert all(torch.equal(other[name], grad) for name, grad in found[0].items())


@pytest.mark.parametrize("budget", ["300MiB", "320MiB", "1GiB"])
@pytest.mark.parametrize("boundaries", [None, ["down1", "middle", "up1"]])
def test_tensors_there_stay_within_the_projected_peak(budget: str, boundaries: list[str] | None) -> None:
    """Rule 7, by what tensors hold; what a library's kernels take beside them is ``WORKSPACE``."""
    data = bytes_case(1200, 1600)
    LEDGER.forget()
    plan, _ = step(data, budget=budget, boundaries=boundaries)
    assert plan.budget is not None and plan.host is not None
    assert LEDGER.peak <= plan.projected - devices.WORKSPACE <= plan.budget - devices.WORKSPACE
    assert 0 < LEDGER.most_staged <= plan.host.projected - plan.host.reserved


def test_a_smaller_budget_moves_boundaries_away_and_one_too_small_is_refused() -> None:
    model, image, target = bytes_case(1200, 1600)
    made = {}
    for budget in ("290MiB", "1GiB"):
        made[budget] = wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(), budget=budget,
                               boundaries=["down1", "up1"])  # fmt: skip
    places = {budget: sorted(map(str, plan.placements.values())) for budget, plan in made.items()}
    assert places["1GiB"] == ["device", "device"]
    assert "device" not in places["290MiB"]
    with pytest.raises(BudgetError, match="the smallest that would do is") as refused:
        wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(), budget="1MiB")
    assert refused.value.smallest is not None
    enough = wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(), budget=refused.value.smallest)
    assert enough.projected <= refused.value.smallest


def test_the_hosts_own_budget_is_kept_too() -> None:
    model, image, target = bytes_case(1200, 1600)
    options: dict[str, Any] = {"device": pretend.device(), "budget": "290MiB", "boundaries": ["down1", "up1"]}
    roomy = wg.plan(model, LOSSES["bce"], image, target, host_budget="64GiB", **options)
    assert Placement.HOST in roomy.placements.values()
    assert roomy.host is not None
    tight = wg.plan(model, LOSSES["bce"], image, target, host_budget=roomy.host.projected - (8 << 20), **options)
    assert tight.host is not None and tight.host.projected <= roomy.host.projected - (8 << 20)
    with pytest.raises(BudgetError, match="host budget"):
        wg.plan(model, LOSSES["bce"], image, target, host_budget="10MiB", **options)
    with pytest.raises(PlanError, match="host_budget"):
        wg.plan(model, LOSSES["bce"], image, target, host_budget="1GiB", device="cpu")


def test_the_host_makes_room_for_what_goes_to_a_device_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, target = bytes_case(600, 800)
    device = pretend.device()
    plan = wg.plan(model, LOSSES["bce"], image, target, device=device, tile=(160, 160), boundaries=["down1"])
    asked: list[int] = []
    monkeypatch.setattr(Boundaries, "make_room", lambda kept, working, new: asked.append(working))
    wg.backward(model, LOSSES["bce"], image, target, plan=plan, device=device)
    assert set(asked) == {part.staging for part in plan.segments} and min(asked) > 0
    assert plan.host is not None and plan.host.projected - plan.host.reserved >= max(asked)
    here = wg.plan(model, LOSSES["bce"], image, target, tile=(160, 160), boundaries=["down1"])
    wg.backward(model, LOSSES["bce"], image, target, plan=here)
    tiles = {each for part in here.segments for each in (part.working.forward, part.working.backward)}
    assert {part.staging for part in here.segments} == {0} and set(asked[len(plan.segments) :]) & tiles


def test_tensors_stay_below_the_devices_own_limit() -> None:
    """Rule 8: fewer than 2**32 bytes on Apple's GPUs; here so few that tiles and boundaries must heed it."""
    model, image, target = bytes_case(1200, 1600)
    small = pretend.device()
    small.most_bytes = 1 << 20
    free = wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(), boundaries=["down1"])
    held = wg.plan(model, LOSSES["bce"], image, target, device=small, boundaries=["down1"])
    assert list(free.placements.values()) == [Placement.DEVICE]
    assert list(held.placements.values()) != [Placement.DEVICE]
    assert max(largest_tensor(held, i) for i in range(len(held.segments))) < 1 << 20
    assert max(largest_tensor(free, i) for i in range(len(free.segments))) >= 1 << 20
    with pytest.raises(PlanError, match="1048576 bytes or more"):
        wg.plan(model, LOSSES["bce"], image, target, device=small, tile=(1200, 1600))


def largest_tensor(plan: wg.Plan, number: int) -> int:
    grid, segment = plan.grid(number), plan.segments[number].segment
    nodes = (*segment.nodes, *(ref.node for ref in segment.maps))
    return max(
        grid.rows.largest.get(i, 0) * grid.cols.largest.get(i, 0) * plan.graph.nodes[i].outputs[0].pixel_bytes
        for i in nodes
    )


def test_a_device_without_float64_runs_in_float32() -> None:
    model, image, target = bytes_case(96, 112)
    args = torch.from_numpy(image).double()[None] / 255
    whole = copy.deepcopy(model).double()
    LOSSES["bce"](whole(args), target[None]).backward()
    with pretend.without_doubles():
        _, found = step((model, image, target), tile=(40, 48))
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        assert (found[name] - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max(), name


def test_a_model_on_the_device_runs_there_and_gets_its_gradients_there() -> None:
    data = bytes_case(96, 112)
    _, wanted = step(data, tile=(40, 48))
    model, image, target = data
    there = copy.deepcopy(model).to("pretend")
    plan = wg.plan(there, LOSSES["bce"], image, target, tile=(40, 48))
    assert plan.device == "pretend:0"
    loss = wg.backward(there, LOSSES["bce"], image, target, plan=plan)
    assert loss.device.type == "cpu"
    for name, parameter in there.named_parameters():
        assert parameter.grad is not None and parameter.grad.device.type == "pretend"
        assert torch.equal(parameter.grad.cpu(), wanted[name])


def test_masks_are_predicted_there(tmp_path: Path) -> None:
    model, image, _ = bytes_case(96, 112)
    wanted = wg.predict(model, image, kind="logits", tile=(40, 48), device="cpu")
    LEDGER.forget()
    found = wg.predict(model, image, kind="logits", tile=(40, 48), device=pretend.device())
    assert LEDGER.ups > 4
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    wg.predict(model, image, out=tmp_path / "mask.npy", device=pretend.device())
    assert (np.load(tmp_path / "mask.npy") == (found > 0)).all()


def test_sums_that_are_not_finite_are_named_with_their_place() -> None:
    model, image, target = case(64, 64)
    image[:, 40:50, 40:50] = float("nan")
    plan = wg.plan(model, LOSSES["dice"], image, target, tile=(32, 32), device=pretend.device())
    with pytest.raises(NumericsError, match=r"loss .* is not finite on rows 0 to 32, columns 0 to 32"):
        wg.backward(model, LOSSES["dice"], image, target, plan=plan)


def test_a_plan_runs_only_where_it_was_made_for() -> None:
    model, image, target = bytes_case()
    plan = wg.plan(model, LOSSES["bce"], image, target, device=pretend.device())
    with pytest.raises(PlanError, match="was made for pretend:0; plan again for cpu"):
        wg.backward(model, LOSSES["bce"], image, target, plan=plan, device="cpu")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("tpu", "which PyTorch does not know"),
        ("meta", "on which tiles do not run"),
        (3.5, "which PyTorch does not know"),
    ],
)
def test_devices_that_are_none_are_refused(device: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        open_device(device)


def test_devices_that_are_not_there_are_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(PlanError, match="PyTorch finds no GPU"):
            open_device("cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(PlanError, match="no GPU of Apple's"):
            open_device("mps")
    assert open_device("auto").name in ("cpu", "cuda:0", "mps:0")


def test_reading_ahead_leaves_nothing_behind_when_a_reader_fails() -> None:
    class Broken:
        shape, dtype, cache_bytes, name = (3, 320, 80), np.dtype(np.uint8), 0, "broken.tif"

        def read(self, box: Box) -> np.ndarray:
            if box.y1 == 320:
                raise SlideError("broken.tif", "is cut short", "copy it again")
            return np.zeros((3, box.height, box.width), np.uint8)

    model, _, target = bytes_case(320, 80)
    before = threading.active_count()
    plan = wg.plan(model, LOSSES["bce"], Broken(), target, tile=(16, 16), device=pretend.device())
    with pytest.raises(SlideError, match="is cut short"):
        wg.backward(model, LOSSES["bce"], Broken(), target, plan=plan)
    assert threading.active_count() <= before + 1  # PyTorch's own thread of the device stays


def test_verify_proves_it_there() -> None:
    report = wg.verify(unet4492(), LOSSES["bce"], shape=(3, 64, 80), tiles=[(40, 48)], device=pretend.device())
    assert report.ok, str(report)
    assert not any(math.isnan(row.single) for row in report.rows)


def test_pixels_that_lie_there_do_not_cross() -> None:
    model, image, target = bytes_case(96, 112)
    _, wanted = step((model, image, target), tile=(40, 48))
    there = torch.from_numpy(image).to("pretend"), target.to("pretend")
    plan = wg.plan(model, LOSSES["bce"], *there, tile=(40, 48), device=pretend.device())
    model.zero_grad(set_to_none=True)
    LEDGER.forget()
    wg.backward(model, LOSSES["bce"], *there, plan=plan)
    assert LEDGER.up <= sum(4 * parameter.numel() for parameter in model.parameters()) + 512
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, wanted[name])
    here = wg.plan(model, LOSSES["bce"], *there, tile=(40, 48), device="cpu")
    model.zero_grad(set_to_none=True)
    wg.backward(model, LOSSES["bce"], *there, plan=here)  # a reader like any other
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - wanted[name]).abs().max() <= 2e-4 * wanted[name].abs().max()


@pytest.mark.parametrize("option", ["tf32", "triton", "graphs"])
def test_a_processor_takes_no_option_of_other_devices(option: str) -> None:
    with pytest.raises(PlanError, match=f"{option}=True: is an option of other devices than cpu; leave it out"):
        wg.open_device("cpu", **{option: True})
    with pytest.raises(PlanError, match=f"{option}=True"):
        device_of_run(TrainConfig(lr=0.1, **{option: True}), Place())
    assert device_of_run(TrainConfig(lr=0.1, deterministic=True), Place()) is None
    assert wg.open_device("cpu", deterministic=True).name == "cpu", "as its plans are"


@pytest.mark.parametrize("at_once", [0, 1.5, "2"])
def test_tiles_in_flight_are_counted(at_once: Any) -> None:
    with pytest.raises(PlanError, match=f"at_once: is {at_once!r}; give 1 or more"):
        wg.open_device("pretend", at_once=at_once)


def test_the_hosts_budget_is_called_by_its_name() -> None:
    model, image, target = bytes_case()
    with pytest.raises(PlanError, match=r"^host_budget: "):
        wg.plan(model, LOSSES["bce"], image, target, device=pretend.device(), host_budget="lots")


def test_workspaces_of_products_are_counted_where_there_are_products() -> None:
    """A library keeps one for each thread with each stream."""
    image, target = torch.rand(3, 64, 64), torch.rand(64, 64)
    loss = lambda found, wanted: (found[0, 0] - wanted).square().mean()  # noqa: E731

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    reserved = []
    for at_once in (1, 2):
        each = wg.plan(Mixing(), loss, image, target, device=pretend.device(at_once=at_once), budget="8GiB")
        reserved.append(each.reserved - devices.WORKSPACE - LEDGER.now)
    assert reserved[1] - reserved[0] == 6 * devices.OF_PRODUCTS and reserved[0] >= 4 * devices.OF_PRODUCTS
    without = wg.plan(nn.Conv2d(3, 1, 1), loss, image, target, device=pretend.device(), budget="8GiB")
    assert without.reserved - devices.WORKSPACE - LEDGER.now < devices.OF_PRODUCTS


def test_all_is_closed_although_the_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of a GPU every call to it raises; files and memory of the host's go back all the same."""
    model, image, target = bytes_case()
    there, closed = pretend.device(), []
    plan = wg.plan(model, LOSSES["bce"], image, target, device=there, boundaries=["middle"], placement="disk")

    def lost() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    own = Boundaries.close
    monkeypatch.setattr(Boundaries, "close", lambda kept: closed.append(own(kept)))
    monkeypatch.setattr(there, "finish", lost)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        wg.backward(model, LOSSES["bce"], image, target, plan=plan, device=there)
    assert closed == [None]
    assert not [each for each in threading.enumerate() if each.name.startswith("wholegrad")]

"""What only a real GPU can show: rule 5 in float64, bits, bytes and transfers on CUDA. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import wholegrad as wg
from oracle import SEED, reference
from support_cases import named_cases
from wholegrad.errors import PlanError
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan.devices import WORKSPACE
from wholegrad.plan.strategies import WHOLE as ON_GPU
from wholegrad.plan.strategies import WholePlan
from wholegrad.proof import random_labels
from wholegrad.run import cudart, pinned
from wholegrad.run.process import resident
from wholegrad.run.recordings import recordings_of
from wholegrad.verify import EXACT, Case, errors
from zoo import Entry

try:
    from zoo_losses import LOSSES as ZOO_LOSSES
    from zoo_networks import NETWORKS
except ImportError:  # MONAI or transformers is not there: the rest is worth having without
    ZOO_LOSSES, NETWORKS = [], []

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU (torch.cuda.is_available())"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:.*reduce argument of torch.scatter"),
]
Data = tuple[torch.nn.Module, Any, Any]


def case(height: int, width: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, height, width, dtype=torch.float64, generator=generator)
    return unet4492(seed=0).double(), image, random_labels((height, width), 0)


def bytes_case(height: int, width: int) -> Data:
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    return unet4492(seed=0), pixels, random_labels((height, width), 0)


def gpu_errors(data: Data, loss: Any, there: Any = "cuda", **fixed: Any) -> dict[str, float]:
    """Relative errors of a run on the GPU against whole-image autograd on the CPU."""
    tried = Case(data[0], loss, *data[1:], torch.float64, SEED, there)
    found = tried.run(tried.plan(**fixed), fixed.get("tile"))
    return errors(found, reference(data[0], loss, *data[1:]).tensors)


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("tile", [(37, 53), (500, 500)])
def test_every_loss_is_exact(loss: str, tile: tuple[int, int]) -> None:
    assert max(gpu_errors(case(160, 208), LOSSES[loss], tile=tile).values()) <= EXACT


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_boundaries_are_exact_wherever_they_live(placement: str) -> None:
    names = ["down1", "down2", "middle", "up2", "fuse2", "up1", "head"]
    found = gpu_errors(case(96, 112), LOSSES["dice"], tile=(40, 48), boundaries=names, placement=placement)
    assert max(found.values()) <= EXACT


def test_memory_of_the_hosts_is_reached_and_given_back() -> None:
    """Where CUDA says so; elsewhere boundaries in the host's memory pass through staging, which is tested above."""
    where, size = torch.device("cuda", torch.cuda.current_device()), 64 << 20
    torch.ones(1, device=where).add_(1)  # libraries are there
    library = cudart.runtime()
    if library is None or not cudart.attribute(library, pinned.SAME_ADDRESSES, where):
        assert pinned.block(size, where) is None
        return
    before = resident(), torch.cuda.memory_allocated()
    block = pinned.block(size, where)
    assert block is not None and block.device == where and not block.any()
    block.fill_(7)
    torch.cuda.synchronize()
    assert int(block.sum(dtype=torch.int64)) == 7 * size and torch.cuda.memory_allocated() - before[1] < size // 2
    del block
    assert resident() - before[0] < size // 2


@pytest.mark.parametrize("reached", [True, False])
def test_boundaries_on_the_host_give_the_same_bits_either_way(monkeypatch: pytest.MonkeyPatch, reached: bool) -> None:
    data, found = bytes_case(192, 256), []
    for way in (True, reached):
        if not way:
            monkeypatch.setattr(pinned, "trusted", lambda where: False)
        there = wg.open_device("cuda", deterministic=True)
        plan = wg.plan(data[0], LOSSES["dice"], *data[1:], device=there, tile=(64, 64), boundaries=["middle", "up2"],
                       placement="host")  # fmt: skip
        for _ in range(3):
            data[0].zero_grad(set_to_none=True)
            wg.backward(data[0], LOSSES["dice"], *data[1:], plan=plan)
        found.append([p.grad.clone() for p in data[0].parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("entry", [*NETWORKS, *ZOO_LOSSES], ids=str)
def test_the_zoo_is_exact(entry: Entry) -> None:
    height, width = entry.size
    data = (entry.build(), entry.image(height, width), entry.target(height, width))
    found = gpu_errors(data, entry.loss, tile=(height // 2 + 1, width // 3 + 2))
    assert max(found.values()) <= EXACT, found


@pytest.mark.parametrize("name", named_cases())
def test_every_supported_op_is_exact(name: str) -> None:
    each = named_cases()[name]
    found = gpu_errors((each.build(), each.image(), each.target()), each.loss, tile=(9, 11))
    assert max(found.values()) <= EXACT, found


def test_float32_is_as_good_as_whole_image_float32_without_tf32() -> None:
    report = wg.verify(unet4492(), LOSSES["bce+dice"], shape=(3, 400, 328), device="cuda")
    assert report.ok, str(report)


WAYS: list[dict[str, Any]] = [
    {"at_once": 1},
    {"at_once": 4},
    {"at_once": 1, "graphs": True},
    {"at_once": 3, "graphs": True},
    {"at_once": 2, "triton": True},
    {"at_once": 2, "triton": True, "graphs": True},
]


def opened(**options: Any) -> wg.Device:
    if options.get("triton"):
        pytest.importorskip("triton", reason="Triton is not installed")
    return wg.open_device("cuda", **options)


def recorded_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record what can be, also where launching takes little of a tile's time."""
    monkeypatch.setattr("wholegrad.run.cuda.LAUNCHING", 0.0)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("loss", ["bce", "dice"])
def test_every_way_of_running_is_exact(monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], loss: str) -> None:
    recorded_all(monkeypatch)
    fixed = {"tile": (64, 64), "boundaries": ["middle"], "there": opened(**way)}
    assert max(gpu_errors(case(384, 448), LOSSES[loss], **fixed).values()) <= EXACT


@pytest.mark.parametrize("entry", NETWORKS, ids=str)
def test_the_zoo_is_exact_with_recordings(monkeypatch: pytest.MonkeyPatch, entry: Entry) -> None:
    recorded_all(monkeypatch)
    height, width = entry.size
    data = (entry.build(), entry.image(height, width), entry.target(height, width))
    there = opened(at_once=2, graphs=True)
    found = gpu_errors(data, entry.loss, there, tile=(height // 4 + 1, width // 4 + 2))
    assert max(found.values()) <= EXACT, found


def test_tiles_are_recorded_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of falling back silently: interior tiles have CUDA graphs, kept from step to step, in bounded memory."""
    recorded_all(monkeypatch)
    model, image, target = bytes_case(1024, 1536)
    there = opened(at_once=2, graphs=True)
    plan = wg.plan(model, LOSSES["bce"], image, target, tile=(128, 128), device=there)
    there.forget_peak()
    for _ in range(3):
        wg.backward(model, LOSSES["bce"], image, target, plan=plan)
    made = recordings_of(plan, there)
    assert made.count >= 2
    assert there.peak() <= plan.projected


def test_work_that_waits_is_not_recorded_and_other_work_still_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording that breaks off leaves PyTorch's allocator unfit for the next: it is found before one begins."""
    recorded_all(monkeypatch)
    each = named_cases()["Pooling: average, ceil, not counted"]  # makes a tensor on the host
    there = opened(at_once=1, graphs=True)
    data = each.build(), each.image(), each.target()
    assert max(gpu_errors(data, each.loss, there, tile=(4, 4)).values()) <= EXACT
    torch.cuda.empty_cache()
    model, image, target = bytes_case(512, 512)
    plan = wg.plan(model, LOSSES["bce"], image, target, tile=(64, 64), device=there)
    wg.backward(model, LOSSES["bce"], image, target, plan=plan)
    assert recordings_of(plan, there).count >= 1
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.cuda.empty_cache()


def test_a_callers_stream_is_waited_for_and_waits() -> None:
    """A caller on a stream of its own: weights that it has only asked for, gradients that it reads at once."""
    model, image, target = bytes_case(512, 640)
    model.cuda()
    there = opened(at_once=2)
    plan = wg.plan(model, LOSSES["bce"], image, target, tile=(128, 160), device=there)
    found = []
    for stream in (None, torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for parameter in model.parameters():
                parameter.grad = None
                torch.cuda._sleep(10_000_000)  # the device is busy before weights are there
                parameter.data.mul_(1.0)
            wg.backward(model, LOSSES["bce"], image, target, plan=plan)
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.cuda.synchronize()
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_plan_twice_gives_the_same_bits(way: dict[str, Any]) -> None:
    model, image, target = bytes_case(512, 640)
    there = opened(deterministic=True, **way)
    plan = wg.plan(model, LOSSES["bce+dice"], image, target, tile=(128, 160), device=there)
    found = []
    for _ in range(3):
        model.zero_grad()
        loss = wg.backward(model, LOSSES["bce+dice"], image, target, plan=plan)
        found.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("size", [(2000, 3000), (4096, 8192)])
@pytest.mark.parametrize("budget", ["400MiB", "600MiB", "2GiB"])
@pytest.mark.parametrize("boundaries", [None, ["down1", "middle", "up1"]])
def test_tensors_stay_within_the_projected_peak(
    size: tuple[int, int], budget: str, boundaries: list[str] | None
) -> None:
    model, image, target = bytes_case(*size)
    there = wg.open_device("cuda")
    torch.cuda.empty_cache()
    plan = wg.plan(model, LOSSES["bce"], image, target, budget=budget, device=there, boundaries=boundaries)
    there.forget_peak()
    wg.backward(model, LOSSES["bce"], image, target, plan=plan)
    assert there.peak() <= plan.projected <= (plan.budget or 0)
    assert plan.host is not None and resident() <= plan.host.projected


def pageable() -> None:
    """Skip where managed memory is not safe."""
    try:
        wg.open_device("cuda").check_managed()
    except PlanError as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("strategy", ON_GPU)
@pytest.mark.parametrize("loss", ["bce", "dice"])
def test_strategies_on_whole_maps_are_exact(strategy: str, loss: str) -> None:
    if strategy == "managed":
        pageable()
    found = gpu_errors(case(384, 448), LOSSES[loss], strategy=strategy)
    assert max(found.values()) <= EXACT, found


def test_managed_memory_is_free_after_a_step_and_within_the_projection() -> None:
    pageable()
    model, image, target = bytes_case(2000, 3000)
    there = wg.open_device("cuda")
    plan = wg.plan(model, LOSSES["bce"], image, target, device=there, strategy="managed")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    there.forget_peak()
    for _ in range(3):
        wg.backward(model, LOSSES["bce"], image, target, plan=plan)
    assert 3 * image.nbytes < there.peak() <= plan.projected
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before <= WORKSPACE, "the pool of each step is gone"


def test_managed_memory_may_be_more_than_the_device_has_left() -> None:
    """All but a little of the device is taken by another tensor: what the step makes has no room beside it."""
    pageable()
    model, image, target = bytes_case(2000, 3000)
    there = wg.open_device("cuda")
    needed = wg.plan(model, LOSSES["bce"], image, target, device=there, strategy="managed").projected
    torch.cuda.empty_cache()
    held = torch.empty(max(torch.cuda.mem_get_info()[0] - needed // 2, 1), dtype=torch.uint8, device="cuda")
    plan = wg.plan(model, LOSSES["bce"], image, target, device=there, strategy="managed")
    assert isinstance(plan, WholePlan) and plan.beyond > 0
    wg.backward(model, LOSSES["bce"], image, target, plan=plan)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    del held


def test_a_model_on_the_gpu_runs_there() -> None:
    model, image, target = bytes_case(256, 320)
    model.cuda()
    plan = wg.plan(model, LOSSES["bce"], image, target)
    assert plan.device == "cuda:0"
    wg.backward(model, LOSSES["bce"], image, target, plan=plan)
    assert all(p.grad is not None and p.grad.is_cuda for p in model.parameters())


def test_settings_are_put_back() -> None:
    model, image, target = bytes_case(128, 160)
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
              torch.are_deterministic_algorithms_enabled())  # fmt: skip
    there = wg.open_device("cuda", tf32=not before[0], deterministic=True)
    wg.backward(model, LOSSES["bce"], image, target, device=there)
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
                      torch.are_deterministic_algorithms_enabled())  # fmt: skip

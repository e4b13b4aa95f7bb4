"""Strategy ``managed`` without a GPU: its functions called as PyTorch would, its refusals, and what a plan counts."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pretend
import wholegrad as wg
from pretend import LEDGER, TOTAL
from test_device import case
from wholegrad.errors import BudgetError, PlanError
from wholegrad.losses import LOSSES
from wholegrad.plan import devices
from wholegrad.plan.planner import MARGIN
from wholegrad.plan.strategies import WholePlan
from wholegrad.run import budget as budgets
from wholegrad.run import cudart, managed
from wholegrad.run.cuda import CudaDevice
from wholegrad.run.device import Device, Room
from wholegrad.run.mps import MpsDevice
from wholegrad.run.pressure import Look
from wholegrad.run.whole_image import Outcome
from wholegrad.train import plans
from wholegrad.train.cases import Readers
from wholegrad.train.config import TrainConfig
from wholegrad.train.team import Team

pretend.install()
SIZE, MEMORY = (1 << 40) + 512, 0x7F12_3456_7000
ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
TAKES = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint)
GIVES = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
ASKS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int)


def address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


# The two functions.


@pytest.mark.parametrize("status", [0, 2])
def test_memory_is_taken_by_the_runtime_and_none_where_it_fails(status: int) -> None:
    asked: list[tuple[int, int]] = []
    freed: list[int] = []

    def take(place: Any, size: int, flags: int) -> int:
        asked.append((size, flags))
        place[0] = MEMORY  # also where it fails: nobody promises that it is left alone
        return status

    takes, gives = TAKES(take), GIVES(lambda memory: freed.append(memory) or 0)
    alloc, free = managed.functions(address(takes), address(gives))
    assert ALLOC(alloc)(SIZE, 3, 7) == (MEMORY if status == 0 else None)
    assert asked == [(SIZE, 1)] and not freed
    FREE(free)(MEMORY, SIZE, 3, 7)
    assert freed == [MEMORY]


# Which runtime.


def test_the_runtime_is_the_one_that_is_loaded_else_the_one_that_pytorch_was_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 12   /opt/torch/lib/libc10.so\n"
        "7f01-7f02 r-xp 00000000 08:01 13   /opt/nvidia libs/libcudart-a1b2.so.12\n"
        "7f02-7f03 rw-p 00001000 08:01 13   /opt/nvidia libs/libcudart-a1b2.so.12\n"
        "7f03-7f04 rw-p 00000000 00:00 0\n"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    assert list(cudart.libraries(maps)) == ["/opt/nvidia libs/libcudart-a1b2.so.12", "libcudart.so.13"]
    assert list(cudart.libraries(tmp_path / "none")) == ["libcudart.so.13"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert list(cudart.libraries(tmp_path / "none")) == []


def test_a_library_that_lacks_what_is_needed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(**dict.fromkeys(cudart.NEEDED, 1))
    short = SimpleNamespace(**dict.fromkeys(cudart.NEEDED[1:], 1))

    def load(name: str) -> Any:
        if name == "gone":
            raise OSError
        return {"short": short, "full": full}[name]

    monkeypatch.setattr(cudart.ctypes, "CDLL", load)
    monkeypatch.setattr(cudart, "libraries", lambda: ["gone", "short", "full"])
    cudart.runtime.cache_clear()
    assert managed.runtime() is full
    cudart.runtime.cache_clear()
    monkeypatch.setattr(cudart, "libraries", lambda: ["gone", "short"])
    with pytest.raises(PlanError, match=r"strategy managed: does not find the CUDA runtime .* use strategy offload"):
        managed.runtime()


# Where it is safe.


@pytest.fixture
def safe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU that pages; what the runtime was asked for and what it answers can be read and changed."""
    state: dict[str, Any] = {"value": 1, "status": 0, "asked": []}

    def ask(value: Any, attribute: int, device: int) -> int:
        state["asked"].append((attribute, device))
        value._obj.value = state["value"]
        return int(state["status"])

    monkeypatch.setattr(managed, "runtime", lambda: SimpleNamespace(cudaDeviceGetAttribute=ask))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(managed.sys, "platform", "linux")
    for name in managed.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return state


def test_a_gpu_that_pages_while_kernels_run_is_safe(safe: dict[str, Any]) -> None:
    managed.check(torch.device("cuda", 2))
    assert safe["asked"] == [(89, 2)]


@pytest.mark.parametrize(("value", "status"), [(0, 0), (1, 101)])
def test_a_gpu_that_does_not_is_refused(safe: dict[str, Any], value: int, status: int) -> None:
    safe |= {"value": value, "status": status}
    with pytest.raises(PlanError, match=r"strategy managed: is not safe on cuda:2: .* WSL; use strategy offload"):
        managed.check(torch.device("cuda", 2))


def test_rocm_other_systems_and_other_allocators_are_refused(
    safe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = torch.device("cuda", 0)

    def refused(said: str, change: Callable[[pytest.MonkeyPatch], None]) -> None:
        with monkeypatch.context() as patch:
            change(patch)
            with pytest.raises(PlanError, match=said):
                managed.check(where)
        managed.check(where)

    refused("built for ROCm; use strategy offload", lambda patch: patch.setattr(torch.version, "hip", "6.4"))
    refused("needs Linux, and this is win32", lambda patch: patch.setattr(managed.sys, "platform", "win32"))
    own = "needs PyTorch's own allocator, without expandable segments; leave backend"
    refused(own, lambda patch: patch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync"))
    for name in managed.SETTINGS:
        refused(own, lambda patch, name=name: patch.setenv(name, "a:1, expandable_segments: True"))
    monkeypatch.setenv(managed.SETTINGS[0], "expandable_segments:False")
    managed.check(where)


def test_it_is_refused_where_memory_is_the_hosts() -> None:
    model, image, target = case(90, 130)
    for call in (wg.plan, wg.backward):
        with pytest.raises(PlanError, match=r"the memory of cpu is the host's.*; use strategy in-core"):
            call(model, LOSSES["bce"], image, target, strategy="managed")
    with pytest.raises(PlanError, match="the memory of cpu is the host's"):
        Device().managed(lambda: pytest.fail("it ran"), lambda found: found)
    assert MpsDevice.check_managed is Device.check_managed


# On a stand-in for CUDA.


def test_the_pool_is_open_for_the_work_and_gone_after_the_copy(
    safe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Pool:
        def __init__(self, made_by: Any) -> None:
            said.append(f"made by {made_by}")

        def __del__(self) -> None:
            said.append("freed")

    @contextmanager
    def using(pool: Pool, where: torch.device) -> Iterator[None]:
        said.append(f"open on {where}")
        yield
        said.append("closed")

    @contextmanager
    def current(where: torch.device) -> Iterator[None]:
        yield

    monkeypatch.setattr(managed, "allocator", lambda: "functions")
    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", using)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: said.append("done"))
    monkeypatch.setattr(managed, "warm", lambda where: said.append("libraries"))
    device = CudaDevice.__new__(CudaDevice)
    device.torch = torch.device("cuda", 0)
    found = device.managed(lambda: said.append("work") or 7, lambda value: said.append("copy") or value + 1)
    order = ["libraries", "made by functions", "open on cuda:0", "work", "closed", "copy", "done", "freed"]
    assert found == 8 and said == order
    safe["value"] = 0
    with pytest.raises(PlanError, match="is not safe on cuda:0"):
        device.managed(lambda: pytest.fail("it ran"), lambda value: value)


def test_pytorch_is_given_the_functions_that_call_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    library = SimpleNamespace(
        cudaMallocManaged=TAKES(lambda place, size, flags: asked.append(size) or 1),
        cudaFree=GIVES(lambda memory: asked.append(-memory) or 0),
    )
    given: list[int] = []
    monkeypatch.setattr(managed, "runtime", lambda: library)
    monkeypatch.setattr(torch._C, "_cuda_customAllocator", lambda *each: given.extend(each) or "made", raising=False)
    managed.allocator.cache_clear()
    assert managed.allocator() == managed.allocator() == "made" and len(given) == 2
    managed.allocator.cache_clear()
    assert ALLOC(given[0])(5, 0, None) is None
    FREE(given[1])(6, 5, 0, None)
    assert asked == [5, -6]


# A step on the pretended device.


def test_all_that_a_step_makes_is_managed_and_none_of_what_it_leaves() -> None:
    model, image, target = case(400, 600)
    model = copy.deepcopy(model).to("pretend")  # so that gradients stay there
    device = pretend.device()
    plan = wg.plan(model, LOSSES["bce"], image, target, device=device, strategy="managed")
    device.forget_peak()
    before = LEDGER.now
    wg.backward(model, LOSSES["bce"], image, target, plan=plan)
    assert LEDGER.most_paged == LEDGER.peak - before > 3 * image.nbytes
    assert LEDGER.strayed == 0, "the backward sweep's too"
    assert LEDGER.paged == 0 and LEDGER.paging is None
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.autograd.is_multithreading_enabled()


def test_an_outcome_is_copied_out_tensor_by_tensor() -> None:
    made = Outcome(torch.ones(()), {"a": torch.ones(2)}, {"b": torch.zeros(3)}, {"c": torch.ones(1)})
    copied = made.copied()
    pairs = [(made.loss, copied.loss)]
    for old, new in ((made.grads, copied.grads), (made.updates, copied.updates), (made.metrics, copied.metrics)):
        assert old.keys() == new.keys()
        pairs += [(old[name], new[name]) for name in old]
    for old, new in pairs:
        assert torch.equal(old, new) and old.data_ptr() != new.data_ptr()


# What a plan counts.


def planned(monkeypatch: pytest.MonkeyPatch, free: int, **asked: Any) -> WholePlan:
    """A plan on the pretended device, of which so many bytes are free."""
    monkeypatch.setattr(pretend.PretendDevice, "room", lambda self: Room(TOTAL, LEDGER.now, free))
    model, image, target = case(400, 600)
    options = {"device": pretend.device(), "strategy": "managed", **asked}
    made = wg.plan(model, LOSSES["bce"], image, target, **options)
    assert isinstance(made, WholePlan)
    return made


def test_the_footprint_is_in_cores_and_what_has_no_room_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    core = planned(monkeypatch, TOTAL, strategy="in-core", host_budget="64GiB")
    roomy = planned(monkeypatch, TOTAL, host_budget="64GiB")
    assert (roomy.projected, roomy.footprint, roomy.beyond) == (core.projected, core.footprint, 0)
    assert core.host is not None and roomy.host is not None
    assert roomy.seconds == core.seconds
    taken = int(roomy.reserved + (roomy.projected - roomy.reserved) * devices.PIECES)
    for short in (0, 1, 1 << 20):  # bytes by which the safe share of the device falls short
        free = -(-(taken - short - LEDGER.now) * 10 // 9)
        made = planned(monkeypatch, free, host_budget="64GiB")
        assert made.apart is not None and made.host is not None
        assert made.apart.safe == LEDGER.now + int(0.9 * free)
        assert made.beyond == max(taken - made.apart.safe, 0) and abs(made.beyond - short) <= 1
        assert made.projected == core.projected, "of tensors, wherever they lie"
        assert made.host.projected - made.host.reserved == core.host.projected - core.host.reserved + made.beyond
        assert made.seconds == pytest.approx(core.seconds + 2 * made.apart.across * made.beyond, rel=1e-12)
    said = str(made)
    assert "1.0 MiB may have no room on pretend:0 and lie in the host's" in said
    assert "projected peak of tensors, wherever they lie, " in said
    assert said.count("of a budget of") == 1, "the host's: the device's is not kept"
    assert str(roomy).count("of a budget of") == 2


def test_the_hosts_budget_must_hold_what_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(monkeypatch, 256 << 20, host_budget="64GiB")
    assert made.host is not None and made.beyond > 50 << 20
    tight = made.host.projected + (32 << 20)  # the process may grow meanwhile
    assert planned(monkeypatch, 256 << 20, host_budget=tight).beyond == made.beyond
    free = Look(made.host.reserved, made.beyond)  # nobody names a budget: what is safe to take of what the host has
    monkeypatch.setattr(budgets, "_automatic", budgets.Automatic(lambda: free))
    for host_budget in (made.host.projected - made.beyond, None):
        with pytest.raises(BudgetError, match=r"too small for strategy managed .* may have no room on pretend") as no:
            planned(monkeypatch, 256 << 20, host_budget=host_budget)
        assert no.value.smallest is not None and abs(no.value.smallest - made.host.projected) < 32 << 20


def test_a_budget_that_the_driver_would_not_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free, options = 300 << 20, {"host_budget": "64GiB"}
    needed = planned(monkeypatch, free, **options).projected
    room = LEDGER.now + free
    assert 200 << 20 < room < needed
    words = r"too small for strategy managed .* would not be kept: the driver takes all of pretend:0"
    with pytest.raises(BudgetError, match=words) as refused:
        planned(monkeypatch, free, budget=room - 1, **options)
    assert refused.value.smallest == room, "as much as the device has: it takes no more"
    assert planned(monkeypatch, free, budget=room, **options).beyond > 0
    assert planned(monkeypatch, TOTAL, budget=needed, **options).beyond == 0
    with pytest.raises(BudgetError, match=words) as refused:
        planned(monkeypatch, TOTAL, budget=needed - 1, **options)
    assert refused.value.smallest == needed + MARGIN
    for nobodys in (None, "auto"):
        made = planned(monkeypatch, free, budget=nobodys, **options)
        assert made.budget is not None and made.projected > made.budget


def test_a_training_run_without_a_budget_leaves_it_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(plans.wg, "plan", lambda *parts, budget, **rest: asked.append(budget))
    reader = SimpleNamespace(shape=(3, 64, 64), cache_bytes=0)
    readers: Any = Readers(*[reader] * 2)  # type: ignore[list-item]
    for strategy, budget in (("managed", None), ("managed", "3GiB"), ("in-core", None)):
        train = TrainConfig(steps=1, strategy=strategy, budget=budget, device="pretend")
        made = plans.Plans(train, plans.Conditions(3 << 30, 0, 1), Team())
        made.of(torch.nn.Identity(), LOSSES["bce"], readers)
    assert asked == [None, 3 << 30, 3 << 30]

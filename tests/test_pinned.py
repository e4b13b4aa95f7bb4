"""Boundaries in memory of the host's that a device's ops reach: exact, in order, past staging, given back in order.

The device is a pretended one; CUDA's runtime is a list of what it was asked for.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pretend
import wholegrad as wg
from oracle import SEED, reference
from pretend import LEDGER
from pretend_streams import RaceError, streamed
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Spec
from wholegrad.graph.layout import map_layout
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.proof import random_labels
from wholegrad.run import pinned
from wholegrad.run.blocks import Blocks
from wholegrad.run.device import Device
from wholegrad.run.recordings import drop_recordings
from wholegrad.run.store import HostStore
from wholegrad.verify import EXACT, Case, errors

pretend.install()
MIDDLE = ["down2", "middle", "up2"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)  # which are not the device's, as a GPU's are
    yield
    torch.set_num_threads(2)
    drop_recordings()


def doubles(height: int = 96, width: int = 112) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    image = torch.rand(3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return unet4492(seed=0).double(), image, random_labels((height, width), 0)


def exact(there: Device, boundaries: list[str], loss: str = "bce") -> None:
    data = doubles()
    fixed = {"tile": (40, 48), "boundaries": boundaries, "placement": "host"}
    tried = Case(data[0], LOSSES[loss], *data[1:], torch.float64, SEED, there)
    found = errors(tried.run(tried.plan(**fixed), (40, 48)), reference(data[0], LOSSES[loss], *data[1:]).tensors)
    assert max(found.values()) <= EXACT, found


def step(there: Device, steps: int = 1, **options: Any) -> list[torch.Tensor]:
    """Loss and gradients of the last of so many steps of one plan, in float32."""
    model = unet4492(seed=0)
    data = np.random.default_rng(0).integers(0, 256, (3, 96, 112), dtype=np.uint8), random_labels((96, 112), 0)
    options = {"tile": (40, 48), "boundaries": MIDDLE, "placement": "host", **options}
    plan = wg.plan(model, LOSSES["dice"], *data, device=there, **options)
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        loss = wg.backward(model, LOSSES["dice"], *data, plan=plan)
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("loss", ["bce", "dice"])
@pytest.mark.parametrize("boundaries", [["middle"], ["down1", "down2", "middle", "up2", "fuse2", "up1", "head"]])
def test_boundaries_there_are_exact(loss: str, boundaries: list[str]) -> None:
    exact(pretend.device(reaches_host=True), boundaries, loss)


def test_a_block_that_is_not_to_be_had_goes_by_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles do not know which boundary lies where: what the device cannot reach is fetched when it is written."""
    there, asked = pretend.device(reaches_host=True), []
    own = there.host_block

    def every_second(nbytes: int) -> torch.Tensor | None:
        asked.append(nbytes)
        return own(nbytes) if len(asked) % 2 else None

    monkeypatch.setattr(there, "host_block", every_second)
    exact(there, MIDDLE)
    assert len(asked) >= 4


def test_nothing_of_them_is_staged() -> None:
    """What is sent and fetched is what is where boundaries lie on the device."""
    found, crossed = {}, {}
    for name, reached, placement in (("there", True, "host"), ("staged", False, "host"), ("device", False, "device")):
        LEDGER.forget()
        found[name] = step(pretend.device(reaches_host=reached), placement=placement)
        crossed[name] = LEDGER.up, LEDGER.down
    assert crossed["there"] == crossed["device"]
    assert crossed["there"][0] < crossed["staged"][0] and crossed["there"][1] < crossed["staged"][1]
    for other in ("staged", "device"):
        assert all(torch.equal(a, b) for a, b in zip(found["there"], found[other], strict=True))


def test_rounded_ones_are_the_same_wherever_they_are_rounded() -> None:
    found = [step(pretend.device(reaches_host=each), boundary_dtype=torch.bfloat16) for each in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][1], step(pretend.device(reaches_host=True))[1])


@pytest.mark.parametrize("graphs", [False, True])
def test_no_two_streams_meet_there_in_no_order(graphs: bool) -> None:
    """Blocks go from one boundary to the next, and from step to step, without the host waiting in between."""
    found = []
    for at_once in (2, 3):
        with streamed(reaches_host=True, at_once=at_once, graphs=graphs) as there:
            found.append(step(there, steps=2))
    plain = step(pretend.device(at_once=1))
    for other in found:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_the_watch_looks_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretend_streams.Streams.wait", lambda self, *given: None)
    with pytest.raises(RaceError), streamed(reaches_host=True, at_once=2) as there:
        step(there)


def store(channels: int) -> HostStore:
    blocks = Blocks()
    blocks.make = LEDGER.reach
    return HostStore(Spec(map_layout((1, channels, 8, 12)), torch.float32), blocks)


@pytest.mark.parametrize("channels", [3, 24])
def test_tiles_get_a_copy_in_the_devices_own_memory(channels: int) -> None:
    """What many ops read crosses the bus once: the store hands out no view of itself."""
    made, box = store(channels), Box(2, 6, 1, 9)
    values = torch.rand(1, channels, 4, 8)
    held = LEDGER.now
    made.write(box, values.to("pretend"))
    seen = made.look(box)
    assert made.across and LEDGER.now - held == values.nbytes
    made.add(box, values.to("pretend"))
    assert torch.equal(seen.cpu(), values) and torch.equal(made.read(box).cpu(), 2 * values)
    assert not made.read(Box(0, 2, 0, 12)).cpu().any()


class Asked:
    """CUDA's runtime as far as it is asked; refuses what is too much."""

    def __init__(self, most: int = 1 << 20) -> None:
        self.most, self.calls = most, []  # type: ignore[var-annotated]

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.calls.append(("register", address, nbytes, flags))
        return 0 if nbytes <= self.most else 2

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unregister", address))
        return 0

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_pages_are_registered_and_let_go_when_the_device_is_done() -> None:
    asked = Asked()
    pages = pinned.Pages(5000, asked, asked.finish)
    address = pages.host.data_ptr()
    about = pages.__cuda_array_interface__
    assert about["shape"] == (5000,) and about["typestr"] == "|u1" and about["data"] == (address, False)
    assert address % 4096 == 0 and not pages.host.any()
    assert asked.calls == [("register", address, 5000, 3)]
    del pages, about
    gc.collect()
    assert asked.calls[1:] == [("finish",), ("unregister", address)]


@pytest.mark.parametrize("why", ["the device is lost", "CUDA keeps them"])
def test_pages_that_are_not_let_go_stay(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """To unmap what the device may still write into would be worse."""
    asked, stuck = Asked(), []  # type: ignore[var-annotated]
    monkeypatch.setattr(pinned, "_stuck", stuck)

    def lost() -> None:
        raise RuntimeError("unspecified launch failure")

    if why == "CUDA keeps them":
        monkeypatch.setattr(asked, "cudaHostUnregister", lambda address: 1)
    pages = pinned.Pages(5000, asked, lost if why == "the device is lost" else asked.finish)
    address = pages.host.data_ptr()
    del pages
    gc.collect()
    assert [host.data_ptr() for host in stuck] == [address]


def test_pages_that_cannot_be_registered_are_not_unregistered() -> None:
    asked = Asked(most=4096)
    with pytest.raises(MemoryError, match="5000 bytes"):
        pinned.Pages(5000, asked, asked.finish)
    gc.collect()
    assert [call[0] for call in asked.calls] == ["register"]


def bytes_of_a_map() -> torch.Tensor:
    rows, columns = pinned.TRIED
    return torch.zeros(4 * rows * columns, dtype=torch.uint8)


def test_a_device_is_tried_with_every_kind_of_op() -> None:
    same = bytes_of_a_map()
    assert pinned.right(same, same, lambda: None)
    assert not pinned.right(bytes_of_a_map(), bytes_of_a_map(), lambda: None)


class Wrong(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Spoils the last element of what the n-th of these ops on the map gives or writes."""

    def __init__(self, op: Any, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.op, self.count = op, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is self.op:
            self.count -= 1
            if not self.count:
                found.view_as(found)[-1, -1] += 1
        return found


aten = torch.ops.aten


@pytest.mark.parametrize(
    ("op", "count"),
    [(aten.clone.default, 2), (aten.clone.default, 3), (aten.add_.Tensor, 1), (aten.copy_.default, 2),
     (aten.copy_.default, 3), (aten.zero_.default, 1)],
)  # fmt: skip
def test_one_op_that_is_wrong_is_enough_to_do_without(op: Any, count: int) -> None:
    """The first clone is of the numbers that are wanted, the first copy the host's own."""
    same = bytes_of_a_map()
    with Wrong(op, count):
        assert not pinned.right(same, same, lambda: None)


class Later(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The device's memory is a copy of the host's, brought there and back only when somebody waits."""

    def __init__(self, host: torch.Tensor, there: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.host, self.there, self.waited = host, there, 0

    def finish(self) -> None:
        self.waited += 1
        self.host.copy_(self.there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        written = func is aten.copy_.default and args[0].data_ptr() == self.host.data_ptr()
        if written and not self.waited:  # what the host writes is there at once
            self.there.copy_(self.host)
        return found


def test_the_host_looks_only_when_the_device_is_done() -> None:
    """Ops of a device are done later: whoever looked before it finished would see what was there before."""
    later = Later(bytes_of_a_map(), bytes_of_a_map())
    with later:
        assert pinned.right(later.host, later.there, later.finish)
    assert later.waited == 4


@pytest.mark.parametrize("answer", [None, 0, 1])
def test_only_a_gpu_that_uses_the_hosts_addresses_is_tried(monkeypatch: pytest.MonkeyPatch, answer: int | None) -> None:
    """What CUDA says of it comes first: an op on an address that it does not know would end all work on the GPU."""
    where, tried = torch.device("cuda", 0), []

    def pages(nbytes: int, where: torch.device) -> Any:
        tried.append(nbytes)
        raise MemoryError

    monkeypatch.setattr(pinned.cudart, "runtime", lambda: None if answer is None else object())
    monkeypatch.setattr(pinned.cudart, "attribute", lambda library, number, where: answer if number == 91 else 1)
    monkeypatch.setattr(pinned, "_pages", pages)
    pinned.trusted.cache_clear()
    assert not pinned.trusted(where) and pinned.block(4096, where) is None
    assert bool(tried) == (answer == 1)
    pinned.trusted.cache_clear()


def test_blocks_are_made_as_asked_and_kept() -> None:
    made: list[int] = []

    def make(nbytes: int) -> torch.Tensor:
        made.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    blocks = Blocks()
    blocks.make = make
    take: Callable[[], torch.Tensor] = lambda: blocks.take(64, zero=True)  # noqa: E731
    first = take()
    first.fill_(7)
    blocks.give(first)
    assert take() is first and not first.any() and made == [64]

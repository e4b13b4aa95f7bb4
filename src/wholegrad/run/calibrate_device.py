"""Measure how fast a device with memory of its own is: what :mod:`wholegrad.run.calibrate` is for the processor.

Nothing is measured unless asked for (``wholegrad plan --calibrate --device cuda``); what was kept holds for one kind of
device, the version of PyTorch and the options by which kernels are chosen. Times are by the clock, of work that is
asked for many times and then waited for, so that asking overlaps with the work as in a tile; the best of some tries,
after one that does not count. :class:`~wholegrad.plan.devices.DeviceRates` says what they mean to a plan.

With ``triton`` the project's own kernels are measured too, and up to how many channels they beat PyTorch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from wholegrad.errors import PlanError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Spec
from wholegrad.graph.layout import map_layout
from wholegrad.graph.rules.convolve import Settings, weight_gradient
from wholegrad.graph.rules.reduction import wide
from wholegrad.graph.rules.thin import convolutions, passes
from wholegrad.kernels.choice import THIN, triton_runs
from wholegrad.kernels.expression import Leaf, Program, Step
from wholegrad.kernels.stage import Part
from wholegrad.kernels.thin import Mixed
from wholegrad.plan.devices import ASSUMED, BEYOND, Apart, DeviceRates
from wholegrad.plan.rates import CHANNELS, FEW
from wholegrad.run.blocks import Blocks
from wholegrad.run.calibrate import Three, Work, disk, file_of, keep, kept, statistics
from wholegrad.run.device import AT_ONCE, Device
from wholegrad.run.spill_file import spill_folder
from wholegrad.run.store import AwayStore, DeviceStore, HostStore, host_block

aten = torch.ops.aten
VERSION = 1  # of what is measured and kept
TRIES = 4
CALLS = 20  # asked for before anybody waits
TINY_CALLS = 1000
ELEMENTS = 1 << 24  # of a map
ROWS = 512  # of one
SENT = 1 << 22  # bytes that cross at once
PRODUCT = 4096  # rows and columns of a matrix
PARAMETERS = 1 << 22
TRIED = (1, 2, 4, 8, 16)  # channels on both sides of a convolution, for Triton's kernels and PyTorch's


def key(device: Device) -> str:
    """What rates hold for, in words: the device, PyTorch, options that change how fast it is."""
    options = device.options
    how = [name for name in ("tf32", "deterministic", "triton") if getattr(options, name)]
    return f"{VERSION} {device.model} torch {torch.__version__} {' '.join(how) or 'no options'}"


def rates_file(device: Device) -> Path:
    """Where they are kept."""
    return file_of(key(device))


def rates(device: Device) -> DeviceRates:
    """Those of this device if they were measured, else those that are assumed."""
    return kept(key(device), DeviceRates) or ASSUMED


def calibrate(device: Device) -> DeviceRates:
    """Measure, and keep for other processes.

    Raises:
        OSError: the cache folder cannot be written.
        PlanError: the device has no memory of its own, or too little.
    """
    return keep(key(device), measured(device))


def measured(device: Device) -> DeviceRates:
    """The rates of this device, measured now; ``backward``, ``row`` and ``step`` stay as they are assumed.

    Raises:
        PlanError: it has no memory of its own, or too little.
    """
    if not device.apart:
        raise PlanError(f"device {device.name}", "is the processor", "use wholegrad.run.calibrate")
    triton = THIN if device.options.triton else None
    with torch.no_grad(), device.running(Apart(device.name, AT_ONCE, triton=triton)):
        best = partial(_best, device)
        x = _map(device, 32)
        found = replace(
            ASSUMED,
            wide=tuple(_three(best, _convolution(device, *_sides(channels))) for channels in CHANNELS),
            product=best(*_product(device)),
            made=best(lambda: torch.nn.functional.leaky_relu(x, 0.1), float(x.nbytes)),
            summed=best(statistics(x), float(x.nbytes)),
            stored=best(*_storing(device)),
            call=best(*_call(device)),
            parameter=best(*_parameters(device)),
            pixels=_pixels(device),
            across=_across(device),
            disk=disk(spill_folder(None)),
        )
        found = replace(found, passed=found.made)
        return found if triton is None else _with_triton(device, best, found)


# What runs there.

Best = Callable[[Work, float], float]


def _best(device: Device, work: Work, units: float) -> float:
    """Seconds of one of ``units`` that ``work`` does."""

    def often() -> None:
        for _ in range(CALLS):
            work()

    return _fastest(device, often) / (CALLS * units)


def _fastest(device: Device, work: Work) -> float:
    """Seconds by the clock from nothing asked for to all of it done."""
    work()
    found = []
    for _ in range(TRIES):
        device.finish()
        begin = time.perf_counter()
        work()
        device.finish()
        found.append(time.perf_counter() - begin)
    return min(found)


class Convolution(NamedTuple):
    """One and both its gradients: what each makes, and multiply-adds of each."""

    forward: Work
    input_gradient: Work
    weight_gradient: Work
    macs: float


def _three(best: Best, of: Convolution) -> Three:
    return best(of.forward, of.macs), best(of.input_gradient, of.macs), best(of.weight_gradient, of.macs)


def _map(device: Device, channels: int, over: int = 1) -> torch.Tensor:
    """A map of ``ELEMENTS / over`` as a tile has it there: planar up to ``THIN`` channels, else interleaved."""
    x = torch.rand(1, channels, ROWS, max(ELEMENTS // (over * ROWS * channels), 1)).to(device.torch)
    return x if channels <= THIN else x.contiguous(memory_format=torch.channels_last)


def _sides(channels: int) -> tuple[int, int, int]:
    """Inputs, outputs and groups of a convolution with so many channels on its thinner side."""
    if channels == 1:
        return 32, 32, 32
    return channels, max(channels, 64 if channels <= THIN else channels), 1


def _convolution(device: Device, into: int, out: int, groups: int = 1) -> Convolution:
    """By PyTorch, 3 x 3; output and gradients lie as the input does."""
    x, weight = _map(device, into, max(out // into, 1)), torch.rand(out, into // groups, 3, 3).to(device.torch)
    settings = Settings((1, 1), (1, 1), (1, 1), False, (0, 0), groups)
    grad = torch.rand_like(aten.convolution(x, weight, None, *settings))
    return Convolution(
        lambda: aten.convolution(x, weight, None, *settings),
        lambda: aten.convolution_backward(grad, x, weight, None, *settings, [True, False, False]),
        lambda: weight_gradient(grad, x, weight, settings),
        float(weight.numel() * x.shape[2] * x.shape[3]),
    )


def _product(device: Device) -> tuple[Work, float]:
    a, b, out = (torch.ones(PRODUCT, PRODUCT).to(device.torch) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), float(PRODUCT**3)


def _storing(device: Device) -> tuple[Work, float]:
    """A tile written into a boundary in the device's memory, which lies as the tile does."""
    tile = _map(device, THIN + 8)
    store = DeviceStore(Spec(map_layout(tuple(tile.shape)), torch.float32), device)
    box = Box(0, tile.shape[2], 0, tile.shape[3])
    return lambda: store.write(box, tile), float(store.nbytes)


def _call(device: Device) -> tuple[Work, float]:
    """Ops on next to nothing."""
    x = torch.ones(1).to(device.torch)

    def work() -> None:
        for _ in range(TINY_CALLS):
            torch.add(x, x)

    return work, float(TINY_CALLS)


def _parameters(device: Device) -> tuple[Work, float]:
    """A tile's gradients of parameters, joined and added to those of others."""
    grad, dtype = torch.ones(PARAMETERS).to(device.torch), wide(torch.float32, device.torch)
    total = torch.zeros(PARAMETERS).to(dtype).to(device.torch)
    return lambda: total.add_(torch.cat([grad.to(dtype)])), float(PARAMETERS)


# What crosses.


def _side_by_side(device: Device, threads: int, work: Work, units: float) -> float:
    """Seconds of one of ``units`` that ``work`` does, where so many threads do it at once."""

    def often() -> None:
        for _ in range(CALLS):
            work()

    with ThreadPoolExecutor(threads) as pool:

        def together() -> None:
            for task in [pool.submit(often) for _ in range(threads)]:
                task.result()

        return _fastest(device, together) / (threads * CALLS * units)


def _pixels(device: Device) -> float:
    """Bytes copied into staging memory and sent, by as many threads as read ahead of tiles."""
    pixels = torch.ones(SENT, dtype=torch.uint8)

    def work() -> None:
        staged = device.staging((SENT,), torch.uint8).copy_(pixels)
        device.arrived(device.send(staged))

    return _side_by_side(device, AT_ONCE + BEYOND, work, float(SENT))


def _across(device: Device) -> float:
    """A tile written into a boundary in the host's memory and read back, by as many threads as run tiles."""
    tile = _map(device, THIN + 8, over=max(4 * ELEMENTS // SENT, 1))
    spec, box = Spec(map_layout(tuple(tile.shape)), torch.float32), Box(0, tile.shape[2], 0, tile.shape[3])
    blocks = Blocks()
    blocks.make = partial(host_block, device)
    there = HostStore(spec, blocks)
    store = there if there.across else AwayStore(spec, device, there)

    def work() -> None:
        store.write(box, tile if there.across else device.fetched(tile))
        store.read(box)

    try:
        return _side_by_side(device, AT_ONCE, work, 2.0 * store.nbytes)
    finally:
        device.finish()
        store.close()


# The project's own kernels there.


def _with_triton(device: Device, best: Best, found: DeviceRates) -> DeviceRates:
    """With rates of Triton's kernels, and how many channels are few enough for them."""
    x = _map(device, TRIED[0])
    if not triton_runs(x):
        raise PlanError(f"device {device.name}", "runs no Triton", "calibrate it without triton")
    leaky = Mixed((Part(Program((Leaf(),), (Step("leaky", (0,), (0.1,)),)), x.shape[1]),), (x,))
    ours = {channels: _three(best, _own(device, channels)) for channels in TRIED}
    theirs = {channels: _three(best, _convolution(device, channels, channels)) for channels in TRIED}
    return replace(
        found,
        thin=tuple(ours[channels] for channels in FEW),
        passed=best(lambda: passes(x).values(leaky, torch.float32), float(x.nbytes)),
        up_to=up_to([(channels, sum(ours[channels]), sum(theirs[channels])) for channels in TRIED]),
    )


def up_to(tried: Sequence[tuple[int, float, float]]) -> int:
    """The most channels up to which our own kernels take less than PyTorch's, with every smaller number too; or 0.

    Args:
        tried: channels, from the fewest; our seconds; PyTorch's.
    """
    most = 0
    for channels, ours, theirs in tried:
        if ours >= theirs:
            break
        most = channels
    return most


def _own(device: Device, channels: int) -> Convolution:
    """By the kernels of tiles there, 3 x 3; what they write is part of their multiply-adds."""
    x, grad = _map(device, channels), _map(device, channels)
    weight, kernels = torch.rand(channels, channels, 3, 3).to(device.torch), convolutions(x)
    how, size = ((1, 1), (1, 1, 1, 1), (1, 1)), (x.shape[2], x.shape[3])
    return Convolution(
        lambda: kernels.forward(x, weight, None, *how),
        lambda: kernels.input_gradient(grad, weight, size, *how),
        lambda: kernels.weight_gradient(grad, x, (3, 3), *how),
        float(weight.numel() * size[0] * size[1]),
    )

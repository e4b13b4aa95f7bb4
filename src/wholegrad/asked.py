"""What is asked of the planner: budgets in bytes, of the host and of a device, and what each holds already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from wholegrad.errors import PlanError
from wholegrad.given import Given
from wholegrad.graph.graph import Graph, Kind, Ref
from wholegrad.plan import devices, memory
from wholegrad.plan.boundaries import storable
from wholegrad.plan.devices import Apart, DeviceRates
from wholegrad.plan.memory import Reserved
from wholegrad.plan.plan import Placement, Plan, Room, show_bytes
from wholegrad.plan.planner import Request
from wholegrad.plan.rates import Rates
from wholegrad.plan.storage import NARROW
from wholegrad.run import calibrate, calibrate_device, process
from wholegrad.run.blocks import drop_all
from wholegrad.run.budget import budget_bytes, is_automatic
from wholegrad.run.device import Device
from wholegrad.run.device import Room as RoomThere
from wholegrad.run.recordings import drop_recordings
from wholegrad.run.sources import raw_images
from wholegrad.run.workers import default_workers

SHARE = 0.9  # of what a device has free, for a budget where nobody names one


def check_tile(tile: Any) -> None:
    good = tile is None or (
        isinstance(tile, tuple | list) and len(tile) == 2 and all(isinstance(edge, int) and edge > 0 for edge in tile)
    )
    if not good:
        raise PlanError("tile", f"is {tile!r}", "give a height and a width of at least 1 pixel, such as (512, 512)")


def placement_of(name: str | None, device: Device) -> Placement | None:
    known = [place for place in Placement if place is not Placement.DEVICE or device.apart]
    if name is None or name in known:
        return None if name is None else Placement(name)
    raise PlanError("placement", f"{name!r} is unknown", f"choose from {[str(place) for place in known]}")


def check_boundary_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in NARROW.values():
        raise PlanError("boundary_dtype", f"is {dtype!r}", f"choose {' or '.join(map(str, NARROW.values()))}, or None")


def boundary_refs(graph: Graph, names: Sequence[str] | None) -> frozenset[Ref] | None:
    """Boundaries named by module path (the last map that the module computes) or node name."""
    if names is None:
        return None
    if isinstance(names, str):
        raise PlanError("boundaries", f"is the text {names!r}", f"give a list: [{names!r}]")
    found = set()
    for name in names:
        nodes = [n for n in graph.of_kind(Kind.MAP) if name in (n.path, n.name) and storable(n.outputs[0])]
        if not nodes:
            known = ", ".join(dict.fromkeys(n.path for n in graph.of_kind(Kind.MAP) if n.path))
            raise PlanError(f"boundary {name!r}", "is no module that computes a map", f"choose from: {known}")
        found.add(Ref(nodes[-1].index))
    return frozenset(found)


def request_of(
    graph: Graph,
    inputs: Given,
    tensors: Mapping[str, torch.Tensor],
    budget: str | int | None,
    backward: bool,
    *,
    sinks: tuple[Ref, ...] = (),
    rates: Rates | None = None,
    device: Device | None = None,
    host_budget: str | int | None = None,
    exchange: int = 0,
) -> Request:
    """A request for a plan of ``graph``.

    Args:
        tensors: parameters and buffers by name.
        budget: of the memory in which tiles run.
        rates: of the machine, or of a device (:class:`~wholegrad.plan.devices.DeviceRates`: others say nothing of one);
            None for what was measured there and kept, else what is built in or assumed.
        host_budget: of the whole process, where tiles run on a device with memory of its own.
        exchange: bytes of the host's memory that bringing several slides' gradients together takes.

    Raises:
        PlanError: a budget cannot be read, or is of a host that has the only one.
    """
    drop_all()
    drop_recordings()
    raw = raw_images(graph, inputs.sources)
    if device is None or not device.apart:
        if host_budget is not None:
            raise PlanError("host_budget", "is for tiles on a device with memory of its own", "give budget")
        still_to_load = memory.libraries(graph) // (4 if process.has_run() else 1)
        held = Reserved(process.resident(), still_to_load, memory.of_readers(inputs.cache_bytes), exchange)
        limit = int(held) - exchange + budget if isinstance(budget, Room) else budget_bytes(budget)
        return Request(limit, held, backward, default_workers(), sinks, raw=raw, rates=rates or calibrate.rates())
    sent = sum(tensor.nbytes for tensor in tensors.values() if tensor.device != device.torch)
    there = device.room()
    limit = _of_device(there, budget)
    still_to_load = 0 if process.has_run() else devices.RUNTIME
    on_host = int(Reserved(process.resident(), still_to_load, memory.of_readers(inputs.cache_bytes), exchange))
    of_device = calibrate_device.rates(device) if rates is None else rates
    known = of_device if isinstance(of_device, DeviceRates) else devices.ASSUMED
    apart = Apart(
        name=device.name,
        at_once=device.options.at_once,
        graphs=device.options.graphs,
        triton=known.up_to if device.options.triton else None,
        across=known.across,
        most_bytes=device.most_bytes,
        host_budget=budget_bytes(host_budget, "host_budget"),
        host_reserved=on_host,
        room=there.held + there.free,
        safe=_safe(there),
        named=not is_automatic(budget),
    )
    products = any(node.op in memory.PRODUCTS for node in graph.nodes)
    reserved = Reserved(there.held + sent, devices.workspace(products, apart.at_once))
    return Request(limit, reserved, backward, apart.at_once, sinks, raw=raw, rates=known, apart=apart)


def room_there(device: Device, budget: str | int | None) -> int:
    """Bytes of a device's budget beyond what is held there.

    Raises:
        PlanError: the budget cannot be read, or is held already.
    """
    room = device.room()
    limit, held = _of_device(room, budget), room.held
    if limit <= held:
        held_text = f"{show_bytes(held)} are held on {device.name} already"
        raise PlanError(f"budget {show_bytes(limit)}", held_text, "give a larger one")
    return limit - held


def _of_device(there: RoomThere, budget: str | int | None) -> int:
    """Bytes of a device's budget; of none or ``"auto"`` a share of what is free there."""
    if isinstance(budget, Room):
        return there.held + budget
    if is_automatic(budget):
        return _safe(there)
    return budget_bytes(budget)


def _safe(there: RoomThere) -> int:
    return there.held + int(SHARE * there.free)


def check_device(made: Plan, device: Device) -> None:
    """Whether a plan may run there.

    Raises:
        PlanError: it was made for another device, or for one that keeps less.
    """
    if made.device != device.name:
        raise PlanError("plan", f"was made for {made.device}", f"plan again for {device.name}")
    if device.options.graphs and made.apart is not None and not made.apart.graphs:
        raise PlanError(
            "plan", f"was made for {made.device} without graphs, which take memory", "plan again with graphs"
        )
    if made.apart is not None and device.options.graphs and device.options.at_once > made.apart.at_once:
        counted = f"of which {made.apart.at_once} are counted"
        cause = f"is run with recordings of {device.options.at_once} tiles in flight, {counted}"
        raise PlanError("plan", cause, "plan again for this device, or open it with fewer at once")
    if made.apart is not None and device.options.triton != (made.apart.triton is not None):
        word = "without" if device.options.triton else "with"
        raise PlanError("plan", f"was made for {made.device} {word} triton", f"plan again, or open it {word} triton")

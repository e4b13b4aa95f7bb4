"""Where tiles run: the CPU, or an accelerator whose memory is not the host's.

The executor asks a :class:`Device` for everything that crosses between the two. On the CPU nothing does. What is said
here of an accelerator holds for any that PyTorch knows: tensors move by ``Tensor.to`` and arrive when the call returns.
:mod:`wholegrad.run.cuda` moves them beside the arithmetic; :mod:`wholegrad.run.mps` knows Apple's limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from wholegrad.errors import PlanError
from wholegrad.plan.devices import Apart

CPU = torch.device("cpu")
AUTO = "auto"
T = TypeVar("T")
AT_ONCE = 2  # tiles in flight on an accelerator: while results of one come back, the next one's ops are there


@dataclass(frozen=True)
class Options:
    """How an accelerator computes.

    Attributes:
        tf32: whether float32 products of matrices and convolutions may round their factors to 10 bits.
        deterministic: whether ops whose sums come in no fixed order are refused, so that the same plan twice gives the
            same bits (rule 6). PyTorch has no other kernel for some ops of a GPU.
        triton: whether convolutions of few channels, chains of pointwise ops and sums run in the project's own Triton
            kernels (CUDA).
        at_once: tiles in flight, each on a stream of its own where the device has streams.
        graphs: whether tiles that are computed alike are recorded once and replayed (CUDA graphs), so that a tile costs
            one launch; each tile in flight then holds its working set twice.
    """

    tf32: bool = False
    deterministic: bool = False
    triton: bool = False
    at_once: int = AT_ONCE
    graphs: bool = False


class Room(NamedTuple):
    """Bytes of a device: all, what this process's tensors hold, and what they could still take."""

    total: int
    held: int
    free: int


class Moving(NamedTuple):
    """A tensor on its way to the device; ``mark`` is what to wait for."""

    tensor: torch.Tensor
    mark: object = None


class Recording(Protocol):
    """Work that was recorded once; it reads and writes the tensors that it read and wrote then."""

    def replay(self) -> None:
        """Ask for the same work again, on the calling thread's stream."""


class Gate:
    """Between the thread that merges results and those that run tiles, for one pass over a segment's tiles.

    The merging thread makes it when all that tiles read is asked for. This class is for devices whose ops run in the
    order in which any thread asks for them: nobody waits.
    """

    @contextmanager
    def lane(self) -> Iterator[int]:
        """Open while a thread runs a tile; gives the number of the tiles' lane, below ``at_once``."""
        yield 0

    def done(self) -> Any:
        """A mark behind all that this lane was asked for so far."""

    def join(self, mark: Any, tensors: Iterable[torch.Tensor]) -> None:
        """Have the merging thread's ops wait for a mark, after which they read (and free) these tensors."""


class Device:
    """One device. This class is the CPU's: nothing crosses, and nothing waits.

    Attributes:
        torch: as PyTorch names it.
        options: how it computes.
        most_bytes: a tensor has fewer (rule 8); None without such a limit.
    """

    most_bytes: int | None = None

    def __init__(self, where: torch.device = CPU, options: Options = Options()) -> None:
        self.torch, self.options = where, options

    @property
    def name(self) -> str:
        """``cpu``, ``cuda:0``."""
        return str(self.torch)

    @property
    def model(self) -> str:
        """What it is, for rates that hold for all of its kind."""
        return self.torch.type

    @property
    def apart(self) -> bool:
        """Whether it has memory of its own."""
        return self.torch.type != "cpu"

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An empty host tensor, contiguous, from which :meth:`send` is quick."""
        return torch.empty(shape, dtype=dtype)

    def send(self, tensor: torch.Tensor) -> Moving:
        """Start to move a host tensor here. Nobody may write into it any more."""
        return Moving(tensor.to(self.torch))

    def arrived(self, moving: Moving) -> torch.Tensor:
        """What was sent, for ops of the calling thread."""
        return moving.tensor

    def fetched(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in host memory; strides are kept."""
        return tensor.to(CPU)

    @property
    def reaches_host(self) -> bool:
        """Whether its ops may read and write memory of the host's where it lies (:meth:`host_block`)."""
        return False

    def host_block(self, nbytes: int) -> torch.Tensor | None:
        """New bytes, zeros, in the host's memory, as a tensor of this device; None where there is no such memory.

        What lives in the host's memory and cannot be reached passes through :meth:`staging`.
        """
        return None

    def gate(self) -> Gate:
        """For tiles that read what the calling thread has asked for so far."""
        return Gate()

    def recorded(self, work: Callable[[], None], lane: int) -> Recording | None:
        """Record ``work``, which reads and writes tensors that stay; None where it cannot be, or would save no time.

        Args:
            lane: in which it will be replayed; what is recorded for one lane may share memory.
        """
        return None

    def forget_recordings(self) -> None:
        """Nobody will replay what was recorded."""

    def check_managed(self) -> None:
        """Whether :meth:`managed` is safe here.

        Raises:
            PlanError: it is not.
        """
        cause = f"needs a GPU of NVIDIA's: the memory of {self.name} is the host's, and there is nothing to page"
        raise PlanError("strategy managed", cause, "use strategy in-core")

    def managed(self, work: Callable[[], T], out: Callable[[T], T]) -> T:
        """Run ``work`` with tensors in memory that the driver pages between the device and the host.

        Only what the calling thread makes lies there, and only until this returns.

        Args:
            out: makes a copy of what ``work`` gives; it runs when tensors are made in ordinary memory again.

        Raises:
            PlanError: that is not safe here.
        """
        self.check_managed()
        return out(work())

    def room(self) -> Room:
        """What there is now.

        Raises:
            PlanError: nobody knows.
        """
        raise PlanError(f"device {self.name}", "does not say how much memory it has", "give budget=")

    def peak(self) -> int:
        """The most bytes that tensors held since :meth:`forget_peak`."""
        return 0

    def forget_peak(self) -> None:
        """Count the peak from now on."""

    def finish(self) -> None:
        """Wait until all that was asked for is done."""

    @contextmanager
    def running(self, plan: Apart | None = None) -> Iterator[None]:
        """Open while a step runs: the precision and order of sums that :class:`Options` ask for.

        Args:
            plan: as the step's plan sees the device: which convolutions Triton's kernels run; None for none.
        """
        yield


def _cuda(where: torch.device, options: Options) -> Device:
    from wholegrad.run.cuda import CudaDevice

    return CudaDevice(where, options)


def _mps(where: torch.device, options: Options) -> Device:
    from wholegrad.run.mps import MpsDevice

    return MpsDevice(where, options)


TAKES = {"cpu": ("deterministic",), "mps": ("deterministic",)}  # of options that are on or off; others take all
KINDS: dict[str, Callable[[torch.device, Options], Device]] = {"cpu": Device, "cuda": _cuda, "mps": _mps}


def register(kind: str, make: Callable[[torch.device, Options], Device]) -> None:
    """Let devices of this type be made by ``make``."""
    KINDS[kind] = make


def tensors_device(model: nn.Module) -> torch.device:
    """Where a model's parameters are (or its buffers); the CPU if it has neither.

    Raises:
        PlanError: on several devices.
    """
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise PlanError("model", f"lies on {names}", "move all of it to one device, or give device=")
    return next(iter(found), CPU)


def device_of(model: nn.Module, device: str | torch.device | Device | None = None) -> Device:
    """Where a step runs.

    Args:
        device: None for where the model's parameters are; ``"auto"`` for the accelerator that PyTorch finds, else the
            CPU; a name such as ``"cuda"`` or ``"cuda:1"``; a :class:`Device` to choose options too.

    Raises:
        PlanError: there is no such device, or the project does not know how to use it.
    """
    if isinstance(device, Device):
        return device
    if device is None:
        return open_device(tensors_device(model))
    return open_device(device)


def open_device(
    device: str | torch.device,
    *,
    tf32: bool = False,
    deterministic: bool = False,
    triton: bool = False,
    at_once: int = AT_ONCE,
    graphs: bool = False,
) -> Device:
    """A device by its name, with options, for ``device=`` of every call.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or ``"auto"`` for the accelerator that PyTorch finds.
        tf32, deterministic, triton, at_once, graphs: see :class:`Options`; a CPU's plans are deterministic, and take
            nothing else of them.

    Raises:
        PlanError: there is no such device, the project does not know how to use it, or it does not take an option.
    """
    if device == AUTO:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = CPU if found is None or found.type not in KINDS else found
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        cause = f"is {device!r}, which PyTorch does not know"
        raise PlanError("device", cause, "choose cpu, cuda, mps or auto") from None
    if where.type not in KINDS:
        known = ", ".join(KINDS)
        raise PlanError("device", f"is {where}, on which tiles do not run", f"choose from {known}") from None
    if not isinstance(at_once, int) or at_once < 1:
        raise PlanError("at_once", f"is {at_once!r}", "give 1 or more tiles in flight")
    for name, on in (("tf32", tf32), ("deterministic", deterministic), ("triton", triton), ("graphs", graphs)):
        if on and name not in TAKES.get(where.type, (name,)):
            raise PlanError(f"{name}=True", f"is an option of other devices than {where}", "leave it out")
    return KINDS[where.type](where, Options(tf32, deterministic, triton, at_once, graphs))

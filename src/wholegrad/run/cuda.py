"""NVIDIA's and AMD's GPUs: transfers beside the arithmetic, memory as PyTorch's allocator counts it.

What is uploaded goes through a stream of its own, from pinned memory, so that pixels of the next tile arrive while this
one is computed. The pinned memory comes from PyTorch's own cache, which hands a block out again only when the copy from
it is done. Tiles run on streams beside that of the thread that merges them (:mod:`wholegrad.run.lanes`).
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import torch

from wholegrad.errors import PlanError, WholegradError
from wholegrad.kernels.choice import using_triton
from wholegrad.plan.devices import Apart
from wholegrad.run import managed, pinned
from wholegrad.run.device import Device, Gate, Moving, Options, Recording, Room, T
from wholegrad.run.lanes import Lanes, StreamGate

FILLS = "fill_uninitialized_memory"  # a setting of torch.utils.deterministic
_broken: list[Any] = []  # graphs whose recording did not end, which PyTorch may still look at
_asking = threading.Lock()  # for a setting of the whole process
LAUNCHING = 0.5  # of the time of a tile's work, which asking for it must take for a recording to be worth its memory


class CudaDevice(Device):
    """One GPU."""

    def __init__(self, where: torch.device, options: Options = Options()) -> None:  # noqa: B008
        if not torch.cuda.is_available():
            raise PlanError(f"device {where}", "is not there: PyTorch finds no GPU", "give device='cpu'")
        count = torch.cuda.device_count()
        if where.index is not None and where.index >= count:
            raise PlanError(f"device {where}", f"is not there: PyTorch finds {count}", "choose a lower number")
        number = torch.cuda.current_device() if where.index is None else where.index
        super().__init__(torch.device("cuda", number), options)
        if options.triton and not find_spec("triton"):
            raise PlanError("triton=True", "needs Triton, which is not installed", "pip install triton")
        self._lock = threading.Lock()
        self._uploads: torch.cuda.Stream | None = None
        self._lanes: Lanes | None = None
        self._pools: dict[int, Any] = {}  # of recordings, by lane
        self._recording: dict[int, torch.cuda.Stream] = {}  # likewise
        self._recorded_bytes = 0

    @property
    def model(self) -> str:
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        return f"{torch.cuda.get_device_name(self.torch)} by {built}"

    def _stream(self) -> torch.cuda.Stream:
        with self._lock:
            if self._uploads is None:
                self._uploads = torch.cuda.Stream(self.torch)  # type: ignore[no-untyped-call]
            return self._uploads

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with torch.cuda.device(self.torch):
            return torch.empty(shape, dtype=dtype, pin_memory=True)

    def send(self, tensor: torch.Tensor) -> Moving:
        with torch.cuda.stream(self._stream()):
            sent = tensor.to(self.torch, non_blocking=tensor.is_pinned())
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return Moving(sent, arrived)

    def arrived(self, moving: Moving) -> torch.Tensor:
        current = torch.cuda.current_stream(self.torch)
        assert isinstance(moving.mark, torch.cuda.Event)
        current.wait_event(moving.mark)
        moving.tensor.record_stream(current)  # its memory is used again only when this stream is done with it
        return moving.tensor

    def fetched(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device(self.torch):
            here = torch.empty_like(tensor, device="cpu", pin_memory=True)
            here.copy_(tensor.detach(), non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        done.synchronize()  # for this copy and what its own stream did before: other tiles' streams go on
        return here

    @property
    def reaches_host(self) -> bool:
        return pinned.trusted(self.torch)

    def host_block(self, nbytes: int) -> torch.Tensor | None:
        return pinned.block(nbytes, self.torch)

    def gate(self) -> Gate:
        if self._lanes is None:
            streams = [torch.cuda.Stream(self.torch) for _ in range(self.options.at_once)]  # type: ignore[no-untyped-call]
            self._lanes = Lanes(streams)
        return StreamGate(CudaStreams(self.torch), self._lanes)

    def recorded(self, work: Callable[[], None], lane: int) -> Recording | None:
        """A CUDA graph; what is recorded for one lane shares one pool of memory, since a lane replays one at a time.

        It is made where asking for the work takes at least ``LAUNCHING`` of the time that the work takes: of one run
        after one that warms up, in which libraries choose their kernels and make their handles. Work that waits for the
        device is found before anything is recorded: PyTorch's allocator does not get over a recording that breaks off.
        """
        if _broken:
            return None
        with torch.cuda.device(self.torch):
            callers = torch.cuda.current_stream(self.torch)
            if lane not in self._recording:  # one for each lane: memory is used again by ops of its own stream alone
                self._recording[lane] = torch.cuda.Stream(self.torch)  # type: ignore[no-untyped-call]
            stream = self._recording[lane]
            stream.wait_stream(callers)
            with torch.cuda.stream(stream):
                work()
                stream.synchronize()
                start = time.perf_counter()
                try:
                    alone = _waits_for_nothing(work)
                    asked = time.perf_counter()
                finally:
                    stream.synchronize()  # what it asked for so far reads what others may write next
                done = time.perf_counter()
            if not alone or asked - start < LAUNCHING * (done - start):
                return None
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self.torch)
            graph = torch.cuda.CUDAGraph()
            if lane not in self._pools:
                self._pools[lane] = torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.graph(graph, pool=self._pools[lane], stream=stream, capture_error_mode="thread_local"):
                    work()
            except RuntimeError as error:  # an op that no graph can hold
                torch.cuda.set_stream(callers)  # which PyTorch leaves undone where the end of a capture fails
                self._break_off(graph, lane)
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                return None
            self._recorded_bytes += max(torch.cuda.memory_reserved(self.torch) - before, 0)
        return graph

    def _break_off(self, graph: Any, lane: int) -> None:
        """Give a graph back that came to nothing. Where its recording did not even end, nothing is recorded any more.

        PyTorch's allocator then still expects its end, and is told of it; nobody can tell the one of pinned memory.
        """
        torch.cuda.synchronize(self.torch)
        try:
            graph.pool()
        except RuntimeError:
            _broken.append(graph)
            pool = self._pools.pop(lane)
            for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with suppress(RuntimeError):
                    end(self.torch.index, pool)
        else:
            graph.reset()

    def forget_recordings(self) -> None:
        """Recordings are gone: what they held is free."""
        self._pools.clear()
        self._recorded_bytes = 0

    def check_managed(self) -> None:
        managed.check(self.torch)

    def managed(self, work: Callable[[], T], out: Callable[[T], T]) -> T:
        self.check_managed()
        return managed.managed(self.torch, work, out)

    def room(self) -> Room:
        free, total = torch.cuda.mem_get_info(self.torch)
        held = torch.cuda.memory_allocated(self.torch)
        return Room(total, held, free + torch.cuda.memory_reserved(self.torch) - held)

    def peak(self) -> int:
        """The most that tensors held, and what recordings keep for themselves beside tensors."""
        return int(torch.cuda.max_memory_allocated(self.torch)) + self._recorded_bytes

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch)

    def finish(self) -> None:
        torch.cuda.synchronize(self.torch)

    @contextmanager
    def running(self, plan: Apart | None = None) -> Iterator[None]:
        up_to = None if plan is None else plan.triton
        with settings(self.options):
            try:
                with torch.cuda.device(self.torch), using_triton(up_to is not None, up_to=up_to or 0):
                    yield
            except torch.OutOfMemoryError as error:
                raise _out_of_memory(self, error) from error
            except RuntimeError as error:
                if "deterministic implementation" in str(error):
                    raise _no_order(error) from error
                raise


def _waits_for_nothing(work: Callable[[], None]) -> bool:
    """Do the work, unless one of its ops makes the host wait for the device."""
    with _asking:
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch says once that the setting is a prototype
                torch.cuda.set_sync_debug_mode("error")
            work()
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            return False
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return True


class CudaStreams:
    """What :class:`~wholegrad.run.lanes.StreamGate` asks of CUDA."""

    def __init__(self, where: torch.device) -> None:
        self.where = where

    def current(self) -> Any:
        return torch.cuda.current_stream(self.where)

    @contextmanager
    def using(self, stream: Any) -> Iterator[None]:
        with torch.cuda.device(self.where), torch.cuda.stream(stream):  # both are kept a thread
            yield

    def mark(self, stream: Any) -> Any:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: Any, mark: Any) -> None:
        stream.wait_event(mark)

    def look(self, mark: Any) -> None:
        mark.synchronize()

    def used_on(self, tensor: torch.Tensor, stream: Any) -> None:
        if tensor.is_cuda:
            tensor.record_stream(stream)


@contextmanager
def settings(options: Options) -> Iterator[None]:
    """PyTorch's settings of precision and of the order of sums, as the options ask for them, put back afterwards.

    Precision has two faces: ``fp32_precision``, where a setting may also come from a more general one, and the older
    ``allow_tf32``, which cannot be read where the newer ones differ. Both are set, so that whoever reads either agrees.
    """
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads when it is first used
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    newer: tuple[Any, ...] = (products, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
    precisions = [each.fp32_precision for each in newer]
    older = _older()
    before = cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), _fills()
    products.allow_tf32 = cudnn.allow_tf32 = options.tf32
    for each in newer:
        each.fp32_precision = "tf32" if options.tf32 else "ieee"
    cudnn.deterministic, cudnn.benchmark = options.deterministic, False  # tiles at edges have shapes of their own
    torch.use_deterministic_algorithms(options.deterministic)
    _set_fills(False)
    try:
        yield
    finally:
        if older is not None:
            products.allow_tf32, cudnn.allow_tf32 = older
        for each, precision in zip(newer, precisions, strict=True):
            each.fp32_precision = precision
        cudnn.deterministic, cudnn.benchmark = before[:2]
        torch.use_deterministic_algorithms(before[2])
        _set_fills(before[3])


def _older() -> tuple[bool, bool] | None:
    """``allow_tf32`` of products of matrices and of cuDNN; None where the newer settings do not let it be read."""
    try:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _fills() -> bool:
    """Whether PyTorch fills new memory while deterministic algorithms are asked for; no op here reads what it holds."""
    return bool(getattr(torch.utils.deterministic, FILLS))


def _set_fills(value: bool) -> None:
    setattr(torch.utils.deterministic, FILLS, value)


def _out_of_memory(device: Device, error: Exception) -> WholegradError:
    said = " ".join(str(error).split()).partition(". ")[0]
    return PlanError(f"device {device.name}", f"ran out of memory ({said})", "plan with a smaller budget")


def _no_order(error: Exception) -> WholegradError:
    op = str(error).split(" ")[0]
    cause = "sums in no fixed order on this device, so that two runs differ in rounding"
    return PlanError(op, cause, "run without deterministic=True, or on the CPU")

"""NVIDIA's and AMD's GPUs: transfers beside the arithmetic, memory as PyTorch's allocator counts it.

Ops of all threads go to the current stream, in the order in which they are called; what is uploaded goes through a
stream of its own, from pinned memory, so that pixels of the next tile arrive while this one is computed. The pinned
memory comes from PyTorch's own cache, which hands a block out again only when the copy from it is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from wholegrad.errors import PlanError, WholegradError
from wholegrad.kernels.choice import using_triton
from wholegrad.run.device import Device, Moving, Options, Room

FILLS = "fill_uninitialized_memory"  # a setting of torch.utils.deterministic


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
        self._uploads: torch.cuda.Stream | None = None

    def _stream(self) -> torch.cuda.Stream:
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
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        done.synchronize()  # for this copy alone: other threads' tiles go on
        return here

    def room(self) -> Room:
        free, total = torch.cuda.mem_get_info(self.torch)
        held = torch.cuda.memory_allocated(self.torch)
        return Room(total, held, free + torch.cuda.memory_reserved(self.torch) - held)

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.torch))

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch)

    def finish(self) -> None:
        torch.cuda.synchronize(self.torch)

    @contextmanager
    def running(self) -> Iterator[None]:
        options = self.options
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads when it is first used
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = (
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(), _fills(),
        )  # fmt: skip
        matmul.allow_tf32 = cudnn.allow_tf32 = options.tf32
        cudnn.deterministic, cudnn.benchmark = options.deterministic, False
        torch.use_deterministic_algorithms(options.deterministic)
        _set_fills(False)
        try:
            with torch.cuda.device(self.torch), using_triton(options.triton):
                yield
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(self, error) from error
        except RuntimeError as error:
            if "deterministic implementation" in str(error):
                raise _no_order(error) from error
            raise
        finally:
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before[:4]
            torch.use_deterministic_algorithms(before[4])
            _set_fills(before[5])


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

"""Measure how fast this machine is, for predicted times: a few seconds, kept in the user's cache folder.

Nothing is measured unless asked for (``wholegrad plan --calibrate``), so that plans do not change by themselves; what
was kept holds for a processor, a number of threads and a version of PyTorch. Each figure is the best of some tries, in
processor seconds of a thread while all other threads do the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import torch

from wholegrad.errors import SpillError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Kind, Node, Ref, Spec
from wholegrad.graph.layout import map_layout, plain
from wholegrad.graph.rules import ReductionRule, rule_for
from wholegrad.graph.rules.convolve import Settings, interleaved, weight_gradient
from wholegrad.kernels import thin
from wholegrad.kernels.choice import THIN
from wholegrad.kernels.compile import cache_folder
from wholegrad.kernels.host import host
from wholegrad.plan.rates import BUILT_IN, CHANNELS, FEW, Rates
from wholegrad.run.blocks import Blocks
from wholegrad.run.spill_file import spill_folder, trial
from wholegrad.run.store import HostStore
from wholegrad.run.workers import default_workers

aten = torch.ops.aten
VERSION = 4  # of what is measured and kept
TRIES = 4
PIXELS = (128, 512)  # of a tile
WIDE_MAP = (1024, 2048)  # of a boundary, 64 MiB with the channels below
MIB_READ = 64
ON_DISK = 128 << 20  # bytes written and read past the page cache
FRESH = 1 << 26  # bytes of a tensor, which glibc takes anew each time

Work = Callable[[], object]
R = TypeVar("R", bound=Rates)


def key() -> str:
    """What rates hold for, in words: processor, threads, PyTorch."""
    found = host()
    processor = f"{platform.machine()} {platform.processor()}" if found is None else found.identity
    return f"{VERSION} {processor} threads {default_workers()} torch {torch.__version__}"


def rates_file() -> Path:
    """Where they are kept."""
    return file_of(key())


def rates() -> Rates:
    """Those of this machine if they were measured, else those that are built in."""
    return kept(key(), Rates) or BUILT_IN


def calibrate() -> Rates:
    """Measure, and keep for other processes.

    Raises:
        OSError: the cache folder cannot be written.
    """
    return keep(key(), measured(default_workers()))


def file_of(key: str) -> Path:
    """Where rates are kept that hold for this key."""
    return cache_folder().parent / f"rates-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def kept(key: str, kind: type[R]) -> R | None:
    """Rates of this kind that were kept for a key; None if there are none, or the file is damaged."""
    try:
        found = json.loads(file_of(key).read_text())
        return kind.of(found["rates"]) if found["key"] == key else None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None


def keep(key: str, found: R) -> R:
    """Write rates for other processes, whole or not at all.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = file_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": key, "rates": json.loads(found.to_json())}, indent=2)
    descriptor, aside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return found


def measured(threads: int) -> Rates:
    """The rates of one of so many threads that work at once."""
    start = Barrier(threads)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        tasks = [pool.submit(_on_thread, start) for _ in range(threads)]
        found = [task.result() for task in tasks]
    mean = [sum(values) / threads for values in zip(*(each[0] for each in found), strict=True)]
    tables = _mean([each[1] for each in found]), _mean([each[2] for each in found])
    made, passed, summed, fresh, stored, pixels, product = mean
    return replace(
        BUILT_IN,
        wide=tables[0],
        thin=tables[1],
        made=made,
        passed=passed,
        summed=summed,
        fresh=max(fresh - passed, 0.0),
        stored=stored,
        pixels=pixels,
        disk=disk(spill_folder(None)),
        product=product,
    )


Three = tuple[float, float, float]
Table = tuple[Three, ...]
Found = tuple[list[float], Table, Table]


def _mean(tables: list[Table]) -> Table:
    def mean(rows: tuple[Three, ...]) -> Three:
        first, second, third = (sum(values) / len(tables) for values in zip(*rows, strict=True))
        return first, second, third

    return tuple(mean(rows) for rows in zip(*tables, strict=True))


def _on_thread(start: Barrier) -> Found:
    """What one thread found; one that fails ends the others, which would wait for it."""
    try:
        return _all(start)
    except BaseException:
        start.abort()
        raise


def _all(start: Barrier) -> Found:
    """Everything on one thread; all threads come to each measurement together."""
    best = partial(_best, start)
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(MIB_READ << 20))
        single = [best(*work) for work in (*_passes(), _storing(), _reading(file), _product())]
    wide = tuple(_three(best, *_wide(channels)) for channels in CHANNELS)
    own = tuple(_three(best, *_thin(channels)) for channels in FEW) if host() is not None else BUILT_IN.thin
    return single, wide, own


def _three(best: Callable[[Work, float], float], works: tuple[Work, Work, Work], macs: float) -> Three:
    return best(works[0], macs), best(works[1], macs), best(works[2], macs)


def _best(start: Barrier, work: Work, units: float) -> float:
    """Processor seconds of one of ``units`` that ``work`` does."""
    work()
    found = []
    for _ in range(TRIES):
        start.wait()
        begin = time.thread_time()
        work()
        found.append(time.thread_time() - begin)
    return min(found) / units


def _wide(channels: int) -> tuple[tuple[Work, Work, Work], float]:
    """A convolution by PyTorch with so many channels on its thinner side: forward, and both gradients."""
    groups = 32 if channels == 1 else 1
    into, out = (32, 32) if channels == 1 else (channels, max(channels, 64 if channels <= THIN else channels))
    height, width = PIXELS if channels <= 64 else (64, 256)
    x, weight = interleaved(torch.rand(1, into, height, width)), torch.rand(out, into // groups, 3, 3)
    grad = interleaved(torch.rand(1, out, height, width))
    settings = Settings((1, 1), (1, 1), (1, 1), False, (0, 0), groups)
    works = (
        lambda: aten.convolution(x, weight, None, *settings),
        lambda: aten.convolution_backward(grad, x, weight, None, *settings, [True, False, False]),
        lambda: weight_gradient(grad, x, weight, settings),
    )
    return works, float(weight.numel() * height * width)


def _thin(channels: int) -> tuple[tuple[Work, Work, Work], float]:
    """The same by the project's own kernels; what they write is counted by the byte elsewhere too, but little of it."""
    height, width = 512, 512
    x, grad = torch.rand(1, channels, height, width), torch.rand(1, channels, height, width)
    weight = torch.rand(channels, channels, 3, 3)
    how = ((1, 1), (1, 1, 1, 1), (1, 1))
    works = (
        lambda: thin.forward(x, weight, None, *how),
        lambda: thin.input_gradient(grad, weight, (height, width), *how),
        lambda: thin.weight_gradient(grad, x, (3, 3), *how),
    )
    return works, float(weight.numel() * height * width)


def _passes() -> list[tuple[Work, float]]:
    """An op of PyTorch's, a copy, a norm's sums and memory that is fresh: per byte made, made, read, made."""
    x = interleaved(torch.rand(1, 32, 256, 512))
    out = torch.empty_like(x)
    size = x.numel() * x.element_size()
    return [
        (lambda: torch.nn.functional.max_pool2d(x, 3, 1, 1), 3.0 * size),
        (lambda: torch.add(x, x, out=out), float(size)),
        (statistics(x), float(size)),
        (lambda: torch.empty(FRESH, dtype=torch.uint8).zero_(), float(FRESH)),
    ]


def statistics(x: torch.Tensor) -> Work:
    """A norm's sums over a map ``(1, C, H, W)``."""
    op = aten.var_mean.correction
    spec = Spec(plain(x.shape[1:2]), torch.float32)
    norm = Node(0, "", Kind.REDUCTION, op, (Ref(0), [0, 2, 3]), {}, (Ref(0),), (spec, spec), "", False)
    sums = rule_for(op)
    assert isinstance(sums, ReductionRule)
    return lambda: sums.partial(norm, x)


def _storing() -> tuple[Work, float]:
    """A tile written into a boundary."""
    channels = THIN + 8  # a map that lies interleaved, as the tile does
    shape = (1, channels, *WIDE_MAP)
    store = HostStore(Spec(map_layout(shape), torch.float32), Blocks())
    tile = interleaved(torch.rand(1, channels, 256, 512))
    boxes = [Box(y, y + 256, x, x + 512) for y in range(0, WIDE_MAP[0], 256) for x in range(0, WIDE_MAP[1], 512)]

    def work() -> None:
        for box in boxes:
            store.write(box, tile)

    return work, float(store.nbytes)


def _reading(file: Any) -> tuple[Work, float]:
    """Pixels read from a file in long rows, from the system's cache."""
    buffer = memoryview(bytearray(1 << 20))

    def work() -> None:
        for i in range(MIB_READ):
            file.seek(i << 20)
            file.readinto(buffer)

    return work, float(MIB_READ << 20)


def disk(folder: Path) -> float:
    """Seconds of a byte that boundaries write there or read; as they are built in where the folder takes none."""
    try:
        tried = trial(folder, ON_DISK)
    except SpillError:
        return BUILT_IN.disk
    return (tried.writing + tried.reading) / (2 * ON_DISK)


def _product() -> tuple[Work, float]:
    a, b, out = (torch.ones(512, 512) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 512.0**3

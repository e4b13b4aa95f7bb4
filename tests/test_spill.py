"""Boundaries on disk: exact, the same bits as in memory, bounded, checked, and gone afterwards, whatever fails."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import wholegrad as wg
from oracle import assert_exact
from wholegrad.errors import SpillError
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Spec
from wholegrad.graph.layout import map_layout
from wholegrad.kernels.choice import THIN
from wholegrad.plan import cuttings
from wholegrad.plan import spill as planned
from wholegrad.plan.spill import layout
from wholegrad.run import spill as spilling
from wholegrad.run import spill_file
from wholegrad.run.profile import recording
from wholegrad.run.spill import Spill
from wholegrad.run.spill_blocks import BlockFile, checksum
from wholegrad.run.spill_file import SpillFile, remove_orphans
from wholegrad.run.spill_store import DiskStore

PAGE = planned.PAGE


class Net(nn.Module):
    """Two scales, batch norm, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.low = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Conv2d(20, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = self.top(x)
        low = self.low(nn.functional.max_pool2d(top, 2))
        up = nn.functional.interpolate(low, scale_factor=2.0, mode="nearest")
        result: torch.Tensor = self.head(torch.cat([top, up], 1))
        return result


BOUNDARIES = ["top.0", "top.2", "low.0", "low.2"]


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output, target)


def case(dtype: torch.dtype = torch.float64) -> tuple[Net, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    image, target = torch.rand(3, 96, 116, dtype=dtype), torch.rand(1, 96, 116, dtype=dtype)
    return Net().to(dtype).train(), image, target


FIXED: dict[str, Any] = {"tile": (24, 40), "boundaries": BOUNDARIES}


@pytest.fixture(name="small")
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few pages and little memory for them, so that these small maps go to disk and come back."""
    monkeypatch.setattr(planned, "BLOCK", 2 * PAGE)
    monkeypatch.setattr(planned, "HELD", 1)


@pytest.fixture(name="moved")
def _moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Spill]]:
    """Every Spill that is made."""
    found: list[Spill] = []
    before = Spill.__init__

    def noted(self: Spill, *args: Any) -> None:
        before(self, *args)
        found.append(self)

    monkeypatch.setattr(Spill, "__init__", noted)
    yield found
    for each in found:
        assert not any(thread.is_alive() for thread in each._threads), "a step left a thread behind"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Exactness.


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("tile", [(24, 40), (17, 200), (7, 9)])
def test_gradients_and_statistics_are_exact(workers: int, tile: tuple[int, int], moved: list[Spill]) -> None:
    model, image, target = case()
    with threads(workers):
        assert_exact(model, loss, image, target, tile=tile, boundaries=BOUNDARIES, placement="disk")
    assert moved[-1].written.bytes > 0 and moved[-1].read.bytes > 0, "nothing was on disk"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direct", [True, False])
def test_bits_are_those_of_boundaries_in_memory(
    dtype: torch.dtype | None, direct: bool, tmp_path: Path, moved: list[Spill], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1 and 3 workers, with direct input and output and through the page cache."""
    if not direct:
        monkeypatch.setattr(spill_file, "_DIRECT", 0)
        monkeypatch.setattr(spill_file, "FLUSHED", 3 * PAGE)
    found = []
    for placement, workers in (("host", 1), ("disk", 1), ("disk", 3)):
        model, image, target = case(torch.float32)
        fixed = {**FIXED, "placement": placement, "boundary_dtype": dtype, "spill_dir": tmp_path}
        with threads(workers):
            plan = wg.plan(model, loss, image, target, **fixed)
            value = wg.backward(model, loss, image, target, plan=plan)
        found.append([value, *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(moved) == 2 and all(each.written.bytes and each.read.bytes for each in moved)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert list(tmp_path.iterdir()) == []


# Layout.

CUTS = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(
    lambda steps: [sum(steps[:i]) for i in range(len(steps) + 1)]
)


@settings(max_examples=200, deadline=None)
@given(CUTS, CUTS, st.integers(1, 3000), st.data())
def test_blocks_partition_the_map_and_fit(rows: list[int], cols: list[int], pixel: int, data: st.DataObject) -> None:
    found = layout(rows, cols, pixel)
    assert found.rows[0] == found.cols[0] == 0 and (found.rows[-1], found.cols[-1]) == (rows[-1], cols[-1])
    assert all(a < b for cuts in (found.rows, found.cols) for a, b in pairwise(cuts))
    assert set(rows) <= set(found.rows), "a row of tiles fills its blocks"
    assert all(found.box(i).area * pixel <= found.slot for i in range(found.count))
    assert found.slot <= max(planned.BLOCK, planned.paged(pixel)) and found.slot % PAGE == 0
    y0, x0 = data.draw(st.integers(0, rows[-1] - 1)), data.draw(st.integers(0, cols[-1] - 1))
    box = Box(y0, data.draw(st.integers(y0 + 1, rows[-1])), x0, data.draw(st.integers(x0 + 1, cols[-1])))

    def meets(other: Box) -> bool:
        return other.y0 < box.y1 and box.y0 < other.y1 and other.x0 < box.x1 and box.x0 < other.x1

    assert found.on(box) == [i for i in range(found.count) if meets(found.box(i))]


def test_large_tiles_are_split_evenly_into_wide_blocks_and_narrow_ones_share_them() -> None:
    large = layout([0, 512, 700], [0, 1024], 32)
    assert large.rows == (*range(0, 512, 64), 512, 574, 637, 700) and large.cols == (0, 512, 1024)
    narrow = layout([0, 8, 16], list(range(0, 4097, 8)), 8)
    assert (narrow.rows, narrow.cols) == ((0, 8, 16), (0, 4096)), "one block holds a row of tiles"


def spec(*shape: int) -> Spec:
    return Spec(map_layout(shape), torch.float32)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("channels", [3, THIN + 1])
def test_a_store_holds_what_many_boxes_wrote_and_added(channels: int, tmp_path: Path) -> None:
    """Against a tensor, with one slot more than the least."""
    torch.manual_seed(1)
    largest = -(-33 * 33 * 2 * channels * 4 // PAGE) * PAGE
    spill = Spill(6 * largest, tmp_path, 0)
    shape = (2, channels, 60, 70)
    stores = [DiskStore(spec(*shape), spill, ([0, 33, 60], [0, 31, 64, 70]), f"map {i}") for i in range(2)]
    truth = [torch.zeros(shape) for _ in stores]
    for _ in range(150):
        for store, whole in zip(stores, truth, strict=True):
            (y0, y1), (x0, x1) = (sorted(torch.randperm(n + 1)[:2].tolist()) for n in (60, 70))
            box, tile = Box(y0, y1, x0, x1), torch.randn(2, channels, y1 - y0, x1 - x0)
            kind = int(torch.randint(3, ()))
            if kind == 0:
                store.write(box, tile)
                whole[..., y0:y1, x0:x1] = tile
            elif kind == 1:
                store.add(box, tile)
                whole[..., y0:y1, x0:x1] += tile
            else:
                store.ahead(box)
                assert torch.equal(store.read(box), whole[..., y0:y1, x0:x1])
    assert spill.written.bytes > spill.limit and spill.held <= spill.limit
    for store in stores:
        store.close()
    spill.close()


def test_boundaries_on_disk_count_towards_the_projected_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wholegrad.run.process.resident", lambda: 320 << 20)
    monkeypatch.setattr("wholegrad.run.process.has_run", lambda: False)
    model, image, target = case(torch.float32)

    def plan() -> wg.Plan:
        return wg.plan(model, loss, image, target, **FIXED, placement="disk")

    counted = plan()
    held = planned.spill_bytes(counted.graph, counted.boundaries, None, counted.workers)
    assert held == (counted.workers + planned.SPARE) * planned.BLOCK
    monkeypatch.setattr(cuttings, "spill_bytes", lambda *_: 0)
    assert counted.projected - plan().projected == held
    assert planned.spill_bytes(counted.graph, [], None, 2) == 0


# Faults.


class Step:
    """A step whose boundaries go by disk, on a model that holds gradients and statistics already."""

    def __init__(self, folder: Path) -> None:
        self.model, self.image, self.target = case(torch.float32)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        self.plan = wg.plan(self.model, loss, self.image, self.target, **FIXED, placement="disk", spill_dir=folder)
        self.before = self.state()

    def state(self) -> list[torch.Tensor]:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [tensor.clone() for tensor in (*self.model.buffers(), *grads)]

    def run(self, progress: Callable[[wg.Progress], None] | None = None) -> torch.Tensor:
        return wg.backward(self.model, loss, self.image, self.target, plan=self.plan, progress=progress)

    def fails(self, match: str, progress: Callable[[wg.Progress], None] | None = None) -> SpillError:
        """The step raises, and leaves gradients and buffers alone."""
        with pytest.raises(SpillError, match=match) as caught:
            self.run(progress)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(a, b) for a, b in zip(self.before, self.state(), strict=True)), "half a step was left"
        return caught.value

    def works(self) -> None:
        """The next step gives what the same step in memory gives."""
        value = self.run()
        other, image, target = case(torch.float32)
        for parameter in other.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        plan = wg.plan(other, loss, image, target, **FIXED, placement="host")
        assert torch.equal(value, wg.backward(other, loss, image, target, plan=plan))
        wanted = [*other.buffers(), *(p.grad for p in other.parameters() if p.grad is not None)]
        assert all(torch.equal(a, b) for a, b in zip(wanted, self.state(), strict=True))


def flip(file: BlockFile, number: int, at: int) -> None:
    """Change a byte of a block where it lies on disk."""
    slot = spilling.mmap.mmap(-1, PAGE)
    page = number * file.layout.slot + at // PAGE * PAGE
    file.file.read(memoryview(slot), page)
    slot[at % PAGE] ^= 4
    file.file.write(memoryview(slot), page)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("what", ["boundary top.0", "boundary low.2", "gradient of boundary top.2"])
def test_a_byte_that_changes_on_disk_ends_the_step(
    what: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = BlockFile.write

    def spoilt(self: BlockFile, number: int, slot: memoryview) -> int:
        count = write(self, number, slot)
        if self.what.startswith(what):
            flip(self, number, count - 9)
        return count

    with threads(workers):
        step = Step(tmp_path)
        monkeypatch.setattr(BlockFile, "write", spoilt)
        said = (
            rf"block \d+ of {what} .*rows \d+ to \d+, columns \d+ to \d+; \d+ bytes at \d+ .* not hold what was written"
        )
        assert str(tmp_path) in step.fails(said).where
        monkeypatch.setattr(BlockFile, "write", write)
        step.works()


def test_every_flipped_bit_and_exchanged_rows_change_the_checksum() -> None:
    torch.manual_seed(0)
    block = bytearray(torch.randint(256, (3 * PAGE,), dtype=torch.uint8).numpy().tobytes())
    whole = checksum(memoryview(block))
    for at in torch.randint(3 * PAGE, (300,)).tolist():
        for bit in range(8):
            block[at] ^= 1 << bit
            assert checksum(memoryview(block)) != whole
            block[at] ^= 1 << bit
    assert checksum(memoryview(block)) == whole
    assert checksum(memoryview(block[PAGE : 2 * PAGE] + block[:PAGE] + block[2 * PAGE :])) != whole


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("after", [0, 20])
def test_a_write_that_fails_ends_the_step(
    number: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, pwrite, calls = Step(tmp_path), os.pwrite, []

    def fails(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fails)
    said = step.fails(rf"boundary .*KiB on disk, cannot write 8\.0 KiB: {os.strerror(number)} \(.* free\)")
    assert ("free space" in said.remedy) is (number != errno.EIO)
    monkeypatch.undo()
    step.works()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own in ``folder``; skips where that may not be."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a file system here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a file system of Linux")


@linux
@pytest.mark.usefixtures("small")
def test_a_disk_that_fills_up_in_the_middle_of_a_step(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=8m"):
        step, filler = Step(tmp_path), tmp_path / "other"

        def fill(progress: wg.Progress) -> None:
            if progress.done == 3:
                with filler.open("wb") as file, pytest.raises(OSError, match="No space"):
                    file.write(bytes(16 << 20))

        said = step.fails(r"boundary .* on disk, cannot write .*: No space left on device \(.* free\)", fill)
        assert said.remedy == "free space, or choose another spill_dir or a larger budget"
        filler.unlink()
        step.works()
        assert list(tmp_path.iterdir()) == []


@linux
@pytest.mark.usefixtures("small")
def test_a_disk_that_is_too_small_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=1m"):
        step, tiles = Step(tmp_path), []
        step.fails(r"[\d.]+ MiB of boundaries do not fit into the .* free", tiles.append)
        assert not tiles


@linux
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path, "ro"):
        Step(tmp_path).fails(r"boundary .*, [\d.]+ [KM]iB on disk, cannot make its file: Read-only file system")


def test_a_missing_folder_and_one_that_is_a_file_are_refused(tmp_path: Path) -> None:
    Step(tmp_path / "none").fails("none: cannot hold .* of boundaries: No such file or directory")
    (tmp_path / "file").write_bytes(b"")
    Step(tmp_path / "file").fails("file: boundary .* cannot make its file: Not a directory")


def test_a_limit_on_the_size_of_files_is_an_error(tmp_path: Path) -> None:
    step, before = Step(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, before[1]))
    try:
        step.fails(r"boundary .* on disk, cannot make its file: File too large \(.* free\); free space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    step.works()


def test_alignment_that_a_disk_does_not_take_goes_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SpillFile(tmp_path, 4 * PAGE, "a map")
    pwrite, calls = os.pwrite, []

    def fussy(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data[:1000], offset)  # and writes less than it was given

    monkeypatch.setattr(os, "pwrite", fussy)
    file.direct = True
    data = bytes(range(256)) * (PAGE // 256)
    file.write(memoryview(data), PAGE)
    found = bytearray(PAGE)
    file.read(memoryview(found), PAGE)
    assert found == data and not file.direct
    file.close()


@linux
def test_without_direct_files_little_stays_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is flushed and dropped every few blocks, and what is read is dropped at once."""
    monkeypatch.setattr(spill_file, "_DIRECT", 0)
    monkeypatch.setattr(spill_file, "FLUSHED", 4 * PAGE)
    fsync, advise, done = os.fsync, os.posix_fadvise, []

    def flushed(descriptor: int) -> None:
        done.append("flushed")
        fsync(descriptor)

    def dropped(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        done.append((offset, length))
        advise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "posix_fadvise", dropped)
    file, page = SpillFile(tmp_path, 10 * PAGE, "a map"), memoryview(bytearray(PAGE))
    assert not file.direct
    for number in range(10):
        file.write(page, number * PAGE)
        assert done.count("flushed") == (number + 1) // 4
    assert done == ["flushed", (0, 0)] * 2
    file.read(page, 7 * PAGE)
    assert done[4:] == [(7 * PAGE, PAGE)]
    file.close()


# Gone afterwards.

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_spill
from pathlib import Path
from wholegrad.plan import spill
from wholegrad.run import spill_file

spill.BLOCK, spill.HELD = 2 * spill.PAGE, 1
if sys.argv[3] == "named":
    spill_file._UNNAMED = 0
    Path.unlink = lambda path: os.kill(os.getpid(), signal.SIGKILL)

def kill(progress):
    if progress.phase == "backward" and progress.done > 30:
        os.kill(os.getpid(), signal.SIGKILL)

test_spill.Step(Path(sys.argv[1])).run(kill)
"""


def killed(folder: Path, how: str) -> None:
    command = [sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent), how]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL


@linux
def test_a_killed_step_leaves_nothing(tmp_path: Path) -> None:
    free = [spill_file.shutil.disk_usage(tmp_path).free]
    killed(tmp_path, "unnamed")
    assert list(tmp_path.iterdir()) == [] and free


@pytest.mark.usefixtures("small")
def test_what_a_killed_process_left_is_removed_by_the_next_run(tmp_path: Path) -> None:
    killed(tmp_path, "named")
    (left,) = tmp_path.iterdir()
    assert left.stat().st_size == 0, "files lose their names before they hold anything"
    mine = tmp_path / spill_file._name()
    host, number = spill_file._owner(mine.name) or ("", 0)
    assert number == os.getpid()
    elsewhere = tmp_path / left.name.replace(host, "another-host")
    others = [mine, elsewhere, tmp_path / "wholegrad-notes.map", tmp_path / "mine.map"]
    for path in others:
        path.write_bytes(b"x")
    Step(tmp_path).works()
    assert sorted(tmp_path.iterdir()) == sorted(others)
    assert remove_orphans(tmp_path) == []


@pytest.mark.usefixtures("small")
def test_without_unnamed_files_nothing_is_left_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_file, "_UNNAMED", 0)
    seen = []
    Step(tmp_path).run(lambda _: seen.extend(tmp_path.iterdir()))
    assert seen == [] and list(tmp_path.iterdir()) == []


# Slow disks.


@pytest.mark.usefixtures("small")
def test_a_slow_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilling, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(spilling, "SLOW_SHARE", 0.01)
    monkeypatch.setattr(spilling, "_warned", set())
    read = SpillFile.read

    def slowly(self: SpillFile, data: memoryview, offset: int) -> None:
        threading.Event().wait(0.002)
        read(self, data, offset)

    monkeypatch.setattr(SpillFile, "read", slowly)
    step = Step(tmp_path)
    said = r"tiles waited \S+ s of a step of \S+ s for the disk \(\S+ GB at \d+ MB/s written, \S+ GB at \d+ MB/s read\)"
    with pytest.warns(UserWarning, match=said), recording(1) as profile:
        step.run()
    step.run()  # said once
    (line,) = profile.disk()
    assert line in profile.table()
    found = re.fullmatch(
        r"boundaries on disk: (\S+) GB written at \d+ MB/s, (\S+) GB read at \d+ MB/s; tiles waited (\S+) s for it",
        line,
    )
    assert found and all(float(figure) > 0 for figure in found.groups())
    entries = [entry for entry in profile.entries() if entry.counts]
    assert profile.summary().reading <= 1 and all(entry.stage != "disk" for entry in entries)


@pytest.mark.usefixtures("small")
def test_what_the_next_tile_reads_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "HELD", 200 * PAGE)
    with recording(1) as profile, threads(1):
        Step(tmp_path).run()
    read = {e.stage: e.bytes for e in profile.entries() if e.op == "read"}
    assert read["disk"] > 0.5 * sum(read.values()), f"tiles waited for most of what they read: {read}"

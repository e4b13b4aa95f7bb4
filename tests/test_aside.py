"""What a killed process leaves beside its results goes with the next; what a live process is at, and others' stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from wholegrad import aside as module
from wholegrad.aside import PARTIAL, REPLACED, aside, held_folder, sweep
from wholegrad.slide.bigtiff import PartialFile
from wholegrad.slide.zarr_write import ZarrWriter
from wholegrad.train.state import write_whole

BEGIN = """
import sys, time
from pathlib import Path
import numpy as np
from wholegrad.aside import aside, held_folder
from wholegrad.slide.bigtiff import PartialFile
from wholegrad.slide.zarr_write import ZarrWriter
from wholegrad.train.state import write_whole
import wholegrad.train.state as state

folder = Path(sys.argv[1])
file = PartialFile(folder / "mask.tif")
store = ZarrWriter(folder / "mask.zarr", (1, 40, 50))
store.write_rows(np.ones((40, 50, 1), np.uint8))
store.seal()

def stop(handle):
    print("ready", flush=True)
    time.sleep(600)

state.os.fsync = stop
with held_folder(folder) as held:
    (held / "mask.npy").write_bytes(b"1")
    write_whole(folder / "weights.safetensors", b"2")
"""


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of four results."""
    process = subprocess.Popen([sys.executable, "-c", BEGIN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def write(folder: Path, how: str) -> None:
    if how == "file":
        PartialFile(folder / "other.tif").discard()
    elif how == "store":
        ZarrWriter(folder / "other.zarr", (1, 4, 5)).abort()
    else:
        with held_folder(folder):
            pass


@pytest.mark.parametrize("how", ["file", "store", "folder"])
def test_what_a_killed_process_left_goes(tmp_path: Path, at_work: subprocess.Popen[str], how: str) -> None:
    left = sorted(tmp_path.iterdir())
    assert [path.name.partition(".partial-")[2] for path in left] != [""] * 4 and len(left) == 4
    write(tmp_path, how)
    assert sorted(tmp_path.iterdir()) == left  # it still works on them
    at_work.send_signal(signal.SIGKILL)
    at_work.wait()
    (tmp_path / ".wholegrad-notes").write_text("someone's own")
    write(tmp_path, how)
    assert [path.name for path in tmp_path.iterdir()] == [".wholegrad-notes"]


def dead() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_another_host_may_be_at_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", dead)
    monkeypatch.setattr(module, "host_number", lambda: "0123abcd")
    other = aside(tmp_path / "mask.tif")
    other.write_bytes(b"")
    monkeypatch.undo()
    sweep(tmp_path)
    assert other.exists()
    sweep(tmp_path / "no folder")


def test_a_store_that_stepped_aside_for_one_that_never_came_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", dead)
    before, part = aside(tmp_path / "mask.zarr", REPLACED), aside(tmp_path / "mask.zarr", PARTIAL)
    monkeypatch.undo()
    for path, text in ((before, "old"), (part, "new")):
        path.mkdir()
        (path / "0").write_text(text)
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.zarr"]
    assert (tmp_path / "mask.zarr/0").read_text() == "old"
    (tmp_path / "mask.zarr").rename(before)
    (tmp_path / "mask.zarr").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.zarr"] and not any((tmp_path / "mask.zarr").iterdir())


def test_names_fit_and_files_get_the_usual_rights(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 240 + ".tif")
    write_whole(path, b"1")
    file = PartialFile(path)
    file.append(b"2")
    file.commit()
    assert path.read_bytes() == b"2"
    (tmp_path / "plain").write_text("")
    store = ZarrWriter(tmp_path / "mask.zarr", (1, 4, 5))
    for _ in range(2):  # the second replaces the first
        store.write_rows(np.ones((4, 5, 1), np.uint8))
        store.seal()
        store.publish()
        store = ZarrWriter(tmp_path / "mask.zarr", (1, 4, 5))
    store.abort()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "mask.zarr").stat().st_mode & 0o777 == (tmp_path / "mask.zarr/0").stat().st_mode & 0o777
    assert len(list(tmp_path.iterdir())) == 3

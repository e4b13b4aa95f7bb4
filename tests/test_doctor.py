"""``wholegrad doctor``: it tells what is there, notices what is broken, and its exit code says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wholegrad_start
from wholegrad import doctor
from wholegrad.cli import main
from wholegrad.doctor import folders, machine, reading, software, step, threads
from wholegrad.doctor.finding import Finding, State, all_of
from wholegrad.kernels import thin
from wholegrad.kernels.compile import cache_folder
from wholegrad.kernels.host import host
from wholegrad.run import spill_file
from wholegrad.run.limits import Limit


def named(findings: Iterator[Finding] | list[Finding], name: str) -> Finding:
    return next(each for each in findings if each.name == name)


def test_everything_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for heading in ("machine", "versions", "memory", "threads", "decoders", "boundaries on disk", "kernels", "a step"):
        assert f"\n{heading}\n" in f"\n{said}"
    assert "JPEG 2000" in said and "agree with whole-image autograd to" in said and "what to mend" in said
    assert " X " not in said


def test_quick_is_quick_and_json_is_json() -> None:
    command = [sys.executable, "-m", "wholegrad", "doctor", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["ok"] is True and "a step" not in told["sections"]
    memory = {each["name"]: each for each in told["sections"]["memory"]}
    assert memory["total"]["value"] > memory["free"]["value"] > 0
    versions = {each["name"]: each["value"] for each in told["sections"]["versions"]}
    assert versions["python"] == ".".join(map(str, sys.version_info[:3])) and versions["torch"]
    assert {each["state"] for each in told["mend"]} <= {"advice"}


def test_what_is_broken_comes_first_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sections(*_: Any) -> Iterator[doctor.Section]:
        yield doctor.Section("disks", (Finding("folder", "is small", None, State.ADVICE, "free [some]"),))
        yield doctor.Section("versions", (Finding("torch", "does not load", None, State.BROKEN, "install it"),))
        yield doctor.Section("extras", (Finding("zarr", "not there", None, State.ABSENT, "pip install it"),))

    monkeypatch.setattr("wholegrad.commands.doctor.examine", sections)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("what to mend")
    assert lines[at + 1 :] == [
        " X versions, torch: does not load; install it", " ! disks, folder: is small; free [some]"
    ]  # fmt: skip
    assert " - zarr  not there (pip install it)" in lines
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_a_look_that_fails_is_a_finding() -> None:
    def look() -> Iterator[Finding]:
        yield Finding("first", "well")
        raise ValueError("two\nlines")

    first, second = all_of("things", look)
    assert first.text == "well" and second.state is State.BROKEN and second.text == "ValueError: two lines"


@pytest.mark.parametrize(
    ("found", "state", "text"),
    [
        ("2.9.1", State.BROKEN, "2.9.1 is older than 2.11"),
        ("2.11.0+cu128", State.OK, "2.11.0+cu128"),
        ("2.11.0rc1", State.OK, "2.11.0rc1"),
        (None, State.BROKEN, "is not installed"),
    ],
)
def test_versions_are_compared(found: str | None, state: State, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise software.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(software, "version", version)
    told = software._package("torch", "2.11", True)
    assert (told.state, told.text) == (state, text)
    assert state is State.OK or told.mend == "pip install 'torch>=2.11'"


def test_a_library_that_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError("libopenslide.so.1: cannot open shared object file")

    monkeypatch.setattr(wholegrad_start.importlib, "import_module", load)
    told = software._package("openslide-python", None, False)
    assert told.state is State.BROKEN and "does not load (OSError: libopenslide.so.1" in told.text
    assert software._package("openslide-python", None, True).state is State.OK


@pytest.mark.parametrize(
    ("words", "code", "where"), [(["doctor"], 1, "err"), (["doctor", "--json"], 1, "out"), (["plan"], 2, "err")]
)
def test_a_library_without_which_nothing_starts_is_one_line(
    words: list[str], code: int, where: str, tmp_path: Path
) -> None:
    (tmp_path / "imagecodecs").mkdir()
    (tmp_path / "imagecodecs/__init__.py").write_text("raise OSError('libjpeg.so: cannot open\\nshared object file')\n")
    path = os.pathsep.join([str(tmp_path), str(Path(wholegrad_start.__file__).parent)])
    start = "import sys, wholegrad_start; sys.exit(wholegrad_start.main())"
    command = [sys.executable, "-c", start, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == code
    line = (
        f"imagecodecs {software.version('imagecodecs')}: does not load (OSError: libjpeg.so: cannot open shared object "
    )
    line += "file); pip install --force-reinstall imagecodecs"
    if where == "out":
        told = json.loads(done.stdout)
        assert told["ok"] is False and {"state": "broken", "what": line} in told["mend"]
    else:
        assert f"wholegrad: error: {line}" in done.stderr.splitlines() and "Traceback" not in done.stderr


def test_requirements_are_those_of_the_package() -> None:
    needed = software.requirements()
    assert needed is not None
    core = dict(needed[""])
    assert core["torch"] == "2.11" and core["openslide-bin"] == "4.0.0.8"
    assert {"dicom", "zarr", "dev"} <= needed.keys()


def test_an_extra_that_is_absent_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "requirements", lambda: {"zarr": [("no-such-package", "3.0")]})
    (told,) = software.look_at_extras()
    assert told.state is State.ABSENT and told.mend == "pip install 'wholegrad[zarr]'"


def test_pixels_that_come_out_wrong_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = reading.made_up()

    class Slide:
        shape = (3, *seen.shape[:2])

        def __enter__(self) -> Slide:
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, _: object) -> np.ndarray:
            return (seen ^ np.uint8(1)).transpose(2, 0, 1)

    monkeypatch.setattr(reading, "open_slide", lambda _: Slide())
    found = list(reading.look_at_reading(quick=True))
    assert named(found, "deflate").state is State.BROKEN and "come out wrong" in named(found, "deflate").text
    assert named(found, "JPEG").state is State.OK  # which may differ by its quality


def test_a_step_that_is_off_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "EXACT", 1e-30)
    (told,) = step.look_at_step()
    assert told.state is State.BROKEN and "from whole-image autograd" in told.text


def test_spill_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "spill_folder", lambda _: tmp_path / "none")
    (told,) = folders.look_at_spill(quick=True)
    assert told.state is State.BROKEN and told.mend == "set TMPDIR to a folder that is there"
    monkeypatch.setattr(folders, "spill_folder", lambda _: tmp_path)
    found = list(folders.look_at_spill(quick=True))
    assert named(found, "disk").value["write"] > 0 and list(tmp_path.iterdir()) == []
    for kind, said in (("tmpfs", "lies in memory"), ("nfs4", "lies on a network")):
        monkeypatch.setattr(folders, "file_system", lambda _, kind=kind: kind)
        told = named(folders.look_at_spill(quick=True), "folder")
        assert told.state is State.ADVICE and said in str(told.mend)


def test_a_disk_that_gives_back_something_else_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(spill_file.SpillFile):
        def read(self, view: memoryview, offset: int) -> None:
            super().read(view, offset)
            view[0] ^= 1

    monkeypatch.setattr(folders, "spill_folder", lambda _: tmp_path)
    monkeypatch.setattr(spill_file, "SpillFile", Forgetful)
    told = named(folders.look_at_spill(quick=True), "disk")
    assert told.state is State.BROKEN and told.text == "what is read is not what was written"


def test_little_room_for_boundaries_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "spill_folder", lambda _: tmp_path)
    monkeypatch.setattr(folders, "file_system", lambda _: "ext4")
    for free, state in ((1 << 30, State.ADVICE), (64 << 30, State.OK)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(folders.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert named(folders.look_at_spill(quick=True), "folder").state is state


@pytest.mark.skipif(host() is None, reason="no kernels on this machine")
def test_a_kernel_that_computes_something_else_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = thin.forward
    monkeypatch.setattr(thin, "forward", lambda *given: forward(*given) * 1.001)
    told = named(folders.look_at_kernels(quick=False), "kernel")
    assert told.state is State.BROKEN and told.text.startswith("is off by ")


@pytest.mark.parametrize(("load", "state"), [(3.0, State.ADVICE), (1.0, State.OK)])
def test_others_at_work_are_told(load: float, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert threads._load(4).state is state


def test_kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHOLEGRAD_CACHE", str(tmp_path))
    found = list(folders.look_at_kernels(quick=False))
    assert named(found, "kernel").state in (State.OK, State.ABSENT)
    kernels = list(cache_folder().iterdir())
    assert named(folders.look_at_kernels(quick=True), "cache").value["kernels"] == len(kernels)
    cache_folder().chmod(0o777)
    assert "chmod go-w" in str(named(folders.look_at_kernels(quick=True), "cache").mend)
    cache_folder().chmod(0o755)
    for path in kernels[:1]:
        path.write_bytes(path.read_bytes()[:-1])
        told = named(folders.look_at_kernels(quick=True), "cache")
        assert told.state is State.ADVICE and told.value["damaged"] == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WHOLEGRAD_CACHE", str(tmp_path / "file"))
    told = named(folders.look_at_kernels(quick=True), "cache")
    assert told.state is State.ADVICE and "set WHOLEGRAD_CACHE" in str(told.mend)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("OMP_NUM_THREADS", "64", "more threads than cores: set OMP_NUM_THREADS="),
        ("OMP_NUM_THREADS", "many", "unset it, or set "),
        ("OMP_WAIT_POLICY", "ACTIVE", "set OMP_WAIT_POLICY=passive"),
        ("OMP_PROC_BIND", "true", "share it: unset it"),
        ("MALLOC_PERTURB_", "7", "unset them outside of tests"),
        ("LD_PRELOAD", "/lib/libjemalloc.so.2", "by glibc's settings alone"),
    ],
)
def test_settings_that_get_in_the_way(setting: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setenv(setting, value)
    assert any(each.state is State.ADVICE and said in str(each.mend) for each in threads.look_at_threads())


@pytest.mark.parametrize(
    ("workers", "usable", "quota", "said"),
    [(8, 4, None, "set OMP_NUM_THREADS=4"), (4, 4, 1.5, "set OMP_NUM_THREADS=2"), (4, 4, None, None)],
)
def test_threads_beyond_the_cores(
    workers: int, usable: int, quota: float | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("default_workers", workers), ("usable_cores", usable), ("cpu_quota", quota)):
        monkeypatch.setattr(threads, name, lambda value=value: value)
    told = named(threads.look_at_threads(), "threads")
    assert (told.mend is None) if said is None else (said in str(told.mend))


def test_quotas_of_both_kinds_of_control_groups(tmp_path: Path) -> None:
    assert threads.cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert threads.cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert threads.cpu_quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.cpu_quota(tmp_path) is None


def test_quotas_of_groups_that_this_one_lies_in_count(tmp_path: Path) -> None:
    """As a service's or a job's does, of which the machine's own group knows nothing."""
    own, inner = tmp_path / "cgroup", tmp_path / "fs/system.slice/job.scope"
    own.write_text("12:cpu:/elsewhere\n0::/system.slice/job.scope\n")
    inner.mkdir(parents=True)
    assert threads.cpu_quota(tmp_path / "fs", own) is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert threads.cpu_quota(tmp_path / "fs", own) is None
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert threads.cpu_quota(tmp_path / "fs", own) == 1.5
    (inner / "cpu.max").write_text("400000 100000\n")
    assert threads.cpu_quota(tmp_path / "fs", own) == 1.5


def test_every_extra_of_the_package_is_looked_at() -> None:
    needed = software.requirements()
    assert needed is not None and software.EXTRAS.keys() == needed.keys() - {"", "dev", "docs"}


def test_folders_that_fail_are_not_to_be_reported() -> None:
    def look() -> Iterator[Finding]:
        raise FileNotFoundError("No usable temporary directory found")
        yield

    (told,) = all_of("decoders", look)
    assert told.state is State.BROKEN and "TMPDIR" in str(told.mend) and "report" not in str(told.mend)


def test_little_memory_and_limits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit("cgroup limit", 2 << 30, 1 << 30)
    monkeypatch.setattr(machine.limits, "limits", lambda: [limit])
    monkeypatch.setattr(machine.limits, "available", lambda: 1 << 30)
    monkeypatch.setattr(machine, "stalled", lambda: 50.0)
    found = list(machine.look_at_memory())
    assert named(found, "cgroup limit").text == "2.00 GiB, of which 1.00 GiB are free"
    assert named(found, "free").state is State.ADVICE and named(found, "pressure").state is State.ADVICE


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.torch.version, "cuda", None)
    which: Callable[[str], str | None] = lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None  # noqa: E731
    monkeypatch.setattr(machine.shutil, "which", which)
    told = named(machine.look_at_devices(), "cuda")
    assert told.state is State.ADVICE and "install PyTorch's CUDA build" in str(told.mend)


def test_an_accelerator_that_adds_wrongly_is_broken() -> None:
    told = machine._tried("meta", "a device without values")
    assert told.state is State.BROKEN and "check its driver" in str(told.mend)

"""Many slides: each done once, by whichever scheduler, whatever dies; what fails is named and stops no other."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile

import fleet_trouble
from wholegrad.cli import main
from wholegrad.errors import ConfigError, SlideError, WholegradError
from wholegrad.fleet import manifest as of_manifest
from wholegrad.fleet.dispatch import Fleet, Told, local_workers
from wholegrad.fleet.jobs import Outcome, attempt
from wholegrad.fleet.manifest import CLAIMED, DONE, FAILED, WAITING, Manifest, Slide
from wholegrad.fleet.sources import find_slides
from wholegrad.nets import unet4492
from wholegrad.train.state import Card, save_weights

JOB = {"job": "test", "mpp": 4.0}


def states(manifest: Manifest) -> dict[str, str]:
    return {row.name: row.state for row in manifest.rows()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"{name}.tif" for name in "abcd"}
    for path in found.values():
        path.write_text(path.name)
    return found


def test_two_schedulers_never_get_the_same_slide(tmp_path: Path, files: dict[str, Path]) -> None:
    one, other = Manifest(tmp_path, JOB), Manifest(tmp_path, JOB)
    for each in (one, other):
        each.add(files)
    first, second = one.claim(list(files), 3), other.claim(list(files), 3)
    assert [slide.name for slide in (*first, *second)] == ["a", "b", "c", "d"]
    assert not one.claim(list(files), 1)
    assert not one.finish("d", {}, 1.0)  # which is not its own
    assert one.finish("a", {"tissue": 0.5}, 1.0) and not one.finish("a", {}, 1.0)
    assert one.fail("b", "is truncated", again=False) and one.fail("c", "had bad luck", again=True)
    assert states(other) == {"a": DONE, "b": FAILED, "c": WAITING, "d": CLAIMED}
    assert [(slide.name, slide.attempts) for slide in other.claim(list(files), 3)] == [("c", 1)]
    other.close()  # gives back what it has
    assert states(one) == {"a": DONE, "b": FAILED, "c": WAITING, "d": WAITING}
    assert [(slide.name, slide.attempts) for slide in one.claim(list(files), 3)] == [("d", 0), ("c", 1)]


def test_claims_of_who_is_gone_are_free_again(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: gone.pid)
        killed = Manifest(tmp_path, JOB)
        killed.add(files)
        assert len(killed.claim(["a", "b"], 2)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(of_manifest, "host_number", lambda: "another")
        far = Manifest(tmp_path, JOB)
        assert len(far.claim(["c"], 1)) == 1
    here = Manifest(tmp_path, JOB)
    assert [slide.name for slide in here.claim(list(files), 9)] == ["a", "b", "d"]
    assert not killed.finish("a", {}, 1.0)
    monkeypatch.setattr(of_manifest, "LEASE", -1.0)
    assert [slide.name for slide in here.claim(list(files), 9)] == ["c"]


def test_claims_of_a_number_that_another_process_has_now_are_free_after_a_while(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    suspended, other = (Manifest(tmp_path, JOB) for _ in range(2))  # of this process's number, which runs
    suspended.add(files)
    assert len(suspended.claim(["a"], 1)) == 1 and not other.claim(["a"], 1)
    with monkeypatch.context() as patch:
        patch.setattr(of_manifest, "LEASE", -1.0)
        assert [slide.name for slide in other.claim(["a"], 1)] == ["a"]
    assert [slide.name for slide in suspended.claim(["b"], 1)] == ["b"]  # it wakes, and goes on
    with monkeypatch.context() as patch:
        patch.setattr(of_manifest, "LEASE", -1.0)
        assert [slide.name for slide in other.claim(["b"], 1)] == ["b"], "nobody would ever do it"


FLEET = """
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import cloudpickle

import fleet_trouble
from wholegrad.commands import fleet

cloudpickle.register_pickle_by_value(fleet_trouble)
fleet.Fleet = partial(fleet.Fleet, attempt=fleet_trouble.attempt)
out = Path(sys.argv[1])
args = Namespace(scheduler=None, workers=2, retries=2, retry_failed=False)
sys.exit(fleet.run_fleet(args, [out / "slides"], out, fleet_trouble.Trouble(str(out))))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent to a group of processes")
def test_ctrl_c_gives_back_what_is_under_way_and_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    names = ["slow0", "slow1", *(f"x{number}" for number in range(6))]
    for name in names:
        (tmp_path / "slides" / f"{name}.svs").write_text("")
    command = [sys.executable, "-c", FLEET, str(tmp_path)]
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "src")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen(command, start_new_session=True, **pipes) as run:
        try:
            until = time.monotonic() + 150
            while not all((tmp_path / f"slow{k}.began").exists() for k in range(2)) and time.monotonic() < until:
                time.sleep(0.1)
            assert (tmp_path / "slow0.began").exists(), "no worker began"
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to workers too
            printed, said = run.communicate(timeout=100)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130, said
    assert "stopped; the same command goes on" in said and "Traceback" not in said
    assert f"0 failed, {len(names)} left of {len(names)}" in printed
    found = Manifest(tmp_path, fleet_trouble.Trouble(str(tmp_path)).about())
    assert states(found) == dict.fromkeys(names, WAITING) and {row.attempts for row in found.rows()} == {0}
    found.close()
    (tmp_path / "go").touch()
    done = subprocess.run(command, timeout=200, check=False, **pipes)
    assert done.returncode == 0, done.stderr
    assert f"{len(names)} done, 0 failed, 0 left" in done.stdout
    assert sorted((tmp_path / "tries").read_text().split()) == sorted([*names, "slow0", "slow1"])


def test_only_what_must_be_is_done_again(tmp_path: Path, files: dict[str, Path]) -> None:
    manifest = Manifest(tmp_path, JOB)
    manifest.add(files)
    manifest.claim(list(files), 4)
    for name in "abc":
        manifest.finish(name, {}, 1.0)
    manifest.fail("d", "is truncated", again=False)
    manifest.add(files)
    assert states(manifest) == {"a": DONE, "b": DONE, "c": DONE, "d": FAILED}
    files["a"].write_text("another slide of that name")
    manifest.add(files, missing=["b", "d"])  # its mask was removed; d never had one
    assert states(manifest) == {"a": WAITING, "b": WAITING, "c": DONE, "d": FAILED}
    manifest.add(files, again=True)
    assert states(manifest)["d"] == WAITING
    with pytest.raises(ConfigError, match=r"a: is the name of .*a\.tif and of .*other"):
        manifest.add({"a": tmp_path / "other" / "a.tif"})
    with pytest.raises(ConfigError, match=r"was made with mpp = 4.0, and 8.0 is asked for; choose another --out"):
        Manifest(tmp_path, {**JOB, "mpp": 8.0})


def test_slides_are_found_in_folders_and_lists(tmp_path: Path) -> None:
    names = ("case1/x.svs", "case2/y.ndpi", "z.tif", "z.mask.ome.tif", "notes.txt", ".hidden.svs", "out/z.mask.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(find_slides([tmp_path], leave=tmp_path / "out")) == ["x", "y", "z"]
    (tmp_path / "list.txt").write_text("# mine\ncase1/x.svs\n\nz.tif\n")
    (tmp_path / "list.csv").write_text(f"slide,mask\n{tmp_path / 'case2/y.ndpi'},m\nz.tif,n\n")
    given = [tmp_path / "list.txt", tmp_path / "list.csv"]
    assert find_slides(given) == {
        "x": tmp_path / "case1/x.svs", "z": tmp_path / "z.tif", "y": tmp_path / "case2/y.ndpi"
    }  # fmt: skip
    (tmp_path / "case2/z.svs").write_text("")
    with pytest.raises(ConfigError, match=r"z: is the name of .*case2/z\.svs and of .*z\.tif; put"):
        find_slides([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: has no slides"):
        find_slides([tmp_path / "empty"])
    (tmp_path / "odd.csv").write_text("path\nz.tif\n")
    with pytest.raises(ConfigError, match=r"odd\.csv: has no column 'slide'"):
        find_slides([tmp_path / "odd.csv"])


@pytest.mark.slow
def test_a_fleet_does_each_slide_once_whatever_dies(tmp_path: Path) -> None:
    import cloudpickle

    cloudpickle.register_pickle_by_value(fleet_trouble)
    good = [f"good{number}" for number in range(12)]
    names = [*good[:4], "corrupt", "killed", "killer", "unlucky", *good[4:]]
    slides = {name: tmp_path / f"{name}.svs" for name in names}
    job, causes = fleet_trouble.Trouble(str(tmp_path)), list[tuple[str, str, bool]]()
    both = [Manifest(tmp_path, job.about()) for _ in range(2)]
    both[0].add(slides)
    told = Told(on_failed=lambda slide, cause, again: causes.append((slide.name, cause, again)))
    more: dict[str, Any] = {"retries": 2, "wanted": 2, "told": told, "attempt": fleet_trouble.attempt}
    with ThreadPoolExecutor(2) as pool, local_workers(2) as client:
        fleets = [Fleet(client, manifest, job, **more) for manifest in both]  # two, at once
        for ended in as_completed([pool.submit(fleet.run, names) for fleet in fleets], timeout=300):
            ended.result()
    assert states(both[0]) == dict.fromkeys(names, DONE) | {"corrupt": FAILED, "killer": FAILED}
    tries = (tmp_path / "tries").read_text().split()
    expected = dict.fromkeys(names, 1) | {"corrupt": 0, "killed": 2, "killer": 3, "unlucky": 2}
    off = {name: tries.count(name) - expected[name] for name in names}  # it was with a worker that another slide killed
    assert all(off[name] >= 0 for name in good)
    assert sum(abs(count) for count in off.values()) <= 4  # deaths
    said = {(name, again): cause for name, cause, again in causes}
    assert said["corrupt", False].endswith("corrupt.svs: is truncated; copy it again")
    assert said["killer", False].endswith("killer.svs: its worker died (out of memory, or killed)")
    assert said["unlucky", True].endswith("unlucky.svs: the network\nwas away")


@pytest.mark.slow
def test_an_outcome_that_its_worker_took_along_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cloudpickle

    cloudpickle.register_pickle_by_value(fleet_trouble)
    job, seen = fleet_trouble.Trouble(str(tmp_path)), list[str]()
    manifest = Manifest(tmp_path, job.about())
    manifest.add({"leaver": tmp_path / "leaver.svs"})

    def late(fleet: Fleet, futures: list[Any]) -> list[Any]:
        until = time.monotonic() + 60
        while not seen and futures[0].status != "lost" and time.monotonic() < until:
            if futures[0].status == "finished":
                (tmp_path / "leave").touch()
            time.sleep(0.005)
        seen.append(futures[0].status)
        return ended(fleet, futures)

    ended = Fleet._ended
    monkeypatch.setattr(Fleet, "_ended", late)
    with local_workers(1) as client:
        counts = Fleet(client, manifest, job, wanted=1, attempt=fleet_trouble.attempt).run(["leaver"])
    assert counts[DONE] == 1 and (tmp_path / "tries").read_text().split() == ["leaver"] * 2
    assert seen[0] == "lost"


def test_how_a_slide_ended_is_known_whatever_befalls_the_outcome() -> None:
    from dask.distributed import CancelledError, KilledWorker
    from dask.distributed import TimeoutError as DaskTimeoutError
    from distributed.comm import CommClosedError

    def outcome(error: BaseException | None, status: str = "finished", held: BaseException | None = None) -> Any:
        future = Mock(status=status)
        future.result.side_effect = [Outcome({}) if error is None else error]
        future.exception.return_value = held or error
        return Fleet._outcome(Slide("a", "a.svs"), future)

    assert outcome(None) == Outcome({})
    death, killed = (
        KilledWorker("a-1", Mock(address="tcp://a:1"), 0),
        "a.svs: its worker died (out of memory, or killed)",
    )
    for found in (outcome(death), outcome(death, "error"), outcome(DaskTimeoutError(), "error", death)):
        assert found == Outcome(None, killed, died=True)
    assert outcome(ImportError("no module\nnamed x")) == Outcome(None, "a.svs: ImportError: no module named x")
    assert outcome(DaskTimeoutError()) is None and outcome(TimeoutError()) is None
    assert outcome(TimeoutError("of the job"), "error") == Outcome(None, "a.svs: TimeoutError: of the job")
    assert outcome(OSError("of the job"), "error") == Outcome(None, "a.svs: OSError: of the job")
    for error in (CommClosedError("in <TCP>"), CancelledError("a-1"), RuntimeError("loop is closed")):
        with pytest.raises(WholegradError, match="scheduler: is gone"):
            outcome(error)


def test_an_outcome_that_does_not_come_yet_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest(tmp_path, JOB)
    manifest.add({"a": tmp_path / "a.svs"})
    future, client = Mock(status="finished"), Mock(status="running")
    future.result.side_effect = [TimeoutError(), Outcome({"tissue": 0.5})]
    client.nthreads.return_value, client.processing.return_value = {"here": 1}, {}
    client.submit.return_value = future
    monkeypatch.setattr(Fleet, "_ended", lambda fleet, futures: futures)
    assert Fleet(client, manifest, fleet_trouble.Trouble(str(tmp_path))).run(["a"])[DONE] == 1
    assert client.submit.call_count == 1 and future.result.call_count == 2


def test_a_client_that_gave_up_is_a_scheduler_that_is_gone(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, JOB)
    manifest.add({"a": tmp_path / "a.svs"})
    client = Mock(status="closed")
    client.nthreads.return_value, client.processing.return_value = {"here": 1}, {}
    client.submit.side_effect = Exception("Client is closed")
    with pytest.raises(WholegradError, match="scheduler: is gone"):
        Fleet(client, manifest, fleet_trouble.Trouble(str(tmp_path))).run(["a"])


@pytest.mark.slow
def test_segment_goes_over_a_folder_and_goes_on(
    tmp_path: Path, write_case: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate("ab"):
        write_case(tmp_path, name, seed=seed)
    cut = tmp_path / "slides/cut.tif"
    cut.write_bytes((tmp_path / "slides/a.tif").read_bytes()[:5000])
    out = tmp_path / "out"
    flags = ["--out", str(out), "--mpp", "0.5", "--only", "mask", "--min-area", "1", "--budget", "2GiB"]
    command = ["segment", str(tmp_path / "slides"), *flags]
    assert main([*command, "--workers", "1"]) == 1
    printed, said = capfd.readouterr()
    assert "2 done, 1 failed, 0 left of 3" in printed and "cut.tif" in said
    with (out / "fleet.csv").open() as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    assert {name: row["state"] for name, row in rows.items()} == {"a": DONE, "b": DONE, "cut": FAILED}
    assert "cut.tif" in rows["cut"]["cause"] and rows["cut"]["tries"] == "1"
    assert float(rows["a"]["tissue"]) > 0
    names = ["a.mask.ome.tif", "b.mask.ome.tif", "fleet.csv", "fleet.sqlite"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert tifffile.imread(out / "a.mask.ome.tif", level=0).any()
    before = (out / "a.mask.ome.tif").stat().st_mtime_ns
    assert main([*command, "--workers", "1"]) == 1  # nothing is left, so no worker starts
    assert (out / "a.mask.ome.tif").stat().st_mtime_ns == before
    assert main([*command, "--workers", "1", "--min-hole", "5"]) == 2
    assert "was made with min_hole = 50000.0, and 5.0 is asked for" in capfd.readouterr().err


def test_an_attempt_says_what_may_be_tried_again(tmp_path: Path) -> None:
    class Refused(fleet_trouble.Trouble):
        def run(self, path: str, name: str) -> dict[str, Any]:
            raise SlideError(path, "is truncated", "copy it again")

    job = fleet_trouble.Trouble(str(tmp_path))
    refused = attempt(Refused(str(tmp_path)), "x.svs", "x")
    assert refused == Outcome(None, "x.svs: is truncated; copy it again", final=True)
    assert attempt(job, "x.svs", "unlucky") == Outcome(None, "x.svs: TimeoutError: the network was away")
    assert attempt(job, "x.svs", "good").figures == {"shape": [1, 1]}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "0"], "--workers: is 0; give 1 or more"),
        (["--workers", "1", "--scheduler", "tcp://a:1"], "--workers and --scheduler: both given"),
        (["--workers", "1", "--retries", "-1"], "--retries: is -1; give 0 or more"),
        (["--scheduler", "tcp://127.0.0.1:1"], "--scheduler: without --budget; give that of each worker"),
        (["--workers", "2"], "has no slides"),
    ],
)
def test_wrong_flags_are_said_once(
    tmp_path: Path, flags: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["segment", str(tmp_path), "--out", str(tmp_path / "out"), *flags]) == 2
    assert said in capfd.readouterr().err
    command = ["predict", str(tmp_path), str(tmp_path), "--weights", "w", "--out", "m.tif"]
    assert main(command) == 2
    assert "does one slide to the files that --out names; give --workers for more" in capfd.readouterr().err


def test_predict_over_slides_writes_what_predict_of_one_writes(
    tmp_path: Path, write_case: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path, "a")
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, unet4492(seed=0), Card("unet4492", {"seed": 0}, 4492, 0, {}, {}, {}))

    class Client:
        """Runs what is submitted at once."""

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def nthreads(self) -> dict[str, int]:
            return {"here": 1}

        def processing(self) -> dict[str, tuple[str, ...]]:
            return {}

        def submit(self, function: Callable[..., Outcome], *args: Any, **more: Any) -> Any:
            outcome = function(*args)
            return Mock(status="finished", result=lambda timeout: outcome)

    monkeypatch.setattr("wholegrad.commands.fleet.local_workers", lambda count: Client())
    monkeypatch.setattr(Fleet, "_ended", lambda fleet, futures: futures)
    command = ["predict", str(tmp_path / "slides"), "--weights", str(weights), "--out", str(tmp_path / "many")]
    more = ["--kind", "logits", "--budget", "4GiB"]
    assert main([*command, "--format", ".npy", "--workers", "1", *more]) == 0, capfd.readouterr().err
    assert "1 done, 0 failed, 0 left of 1" in capfd.readouterr().out
    one = tmp_path / "one.npy"
    assert main(["predict", str(tmp_path / "slides/a.tif"), "--weights", str(weights), "--out", str(one), *more]) == 0
    many = np.load(tmp_path / "many/a.logits.npy")
    assert np.array_equal(many, np.load(one)) and many.std() > 0
    save_weights(weights, unet4492(seed=1), Card("unet4492", {"seed": 1}, 4492, 0, {}, {}, {}))
    assert main([*command, "--format", ".npy", "--workers", "1", *more]) == 2
    assert "was made with digest = " in capfd.readouterr().err
    assert main([*command, "--format", ".png", "--workers", "1", *more]) == 2
    assert "cannot show logits" in capfd.readouterr().err

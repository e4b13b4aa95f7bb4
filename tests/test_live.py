"""A run that is looked at: the bits of one that is not, a page that grows with it, and an end that leaves nothing."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from torch import nn

import wholegrad as wg
from wholegrad.cli import main
from wholegrad.commands.live import LivePage
from wholegrad.commands.view import _others
from wholegrad.errors import ConfigError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.train.config import Config, check_config
from wholegrad.train.events import Judged, Step, Watch
from wholegrad.train.live import FOLDER, Live, predictions, read_status
from wholegrad.train.loop import train
from wholegrad.train.state import load_model
from wholegrad.view.app import App
from wholegrad.view.live import KEEP, LEVEL_CACHE, Opening, _fetched_end
from wholegrad.view.run import RunFolder, completed
from wholegrad.view.scene import Files, Scene
from wholegrad.view.server import Server

VARY = ("seconds", "rss", "peak", "projected")  # of a log's lines, from run to run


@pytest.fixture
def slides(tmp_path: Path, write_case: Callable[..., None]) -> Path:
    for number, name in enumerate(("a", "b", "c", "d", "e")):
        write_case(tmp_path, name, size=(96 + 16 * number, 112), seed=number)
    return tmp_path


def configure(folder: Path, out: str, **settings: Any) -> Config:
    data = {"root": ".", "train": ["a", "b"], "val": ["c", "d"], "test": ["e"]}
    given = {"steps": 6, "lr": 0.01, "panels": False, "out": out, "budget": "8GiB", **settings}
    tables = {"data": data, "network": {"args": {"seed": 0}}, "train": given, "validation": {"steps": 3}}
    return check_config(tables, "test", folder)


def lines(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k not in VARY} for line in path.read_text().splitlines()]


def test_being_looked_at_changes_no_bit(slides: Path) -> None:
    """Not even with averaged weights and random draws: predictions come between evaluation and the next step."""
    plain = configure(slides, "plain", ema=0.9)
    watched = configure(slides, "watched", ema=0.9)
    train(plain)
    live = Live(watched.out)
    train(watched, live.watch())
    for name in ("weights.safetensors", "best.safetensors"):
        first, second = (load_model(config.out / name).state_dict() for config in (plain, watched))
        assert all(bool((first[key] == second[key]).all()) for key in first), name
    assert lines(plain.out / "log.jsonl") == lines(watched.out / "log.jsonl")


def test_the_latest_prediction_is_of_the_weights_that_were_judged(slides: Path) -> None:
    config = configure(slides, "out", ema=0.9)
    judged: list[Judged] = []
    expected: list[np.ndarray[Any, Any]] = []

    def look(found: Judged) -> None:
        judged.append(found)
        found.model.eval()
        with found.cases[1].open() as readers:
            said = wg.predict(found.model, readers.slide)
            assert said is not None
            expected.append(said)
        found.model.train()

    live = Live(config.out, "d")
    train(config, Watch.joined(Watch(on_judged=look), live.watch()))
    assert [found.step for found in judged] == [3, 6]
    ((step, path),) = predictions(config.out / FOLDER, "d")
    assert step == 6 and path.name == "d.6.tif", "older ones are gone"
    assert RunFolder(config.out).first().name == "d", "which the page shows"
    with wg.open_slide(slides / "slides/d.tif") as slide, wg.open_mask(path, like=slide) as mask:
        _, height, width = slide.shape
        assert np.array_equal(mask.read(Box(0, height, 0, width)), expected[-1])


def test_the_status_says_where_a_run_is(slides: Path) -> None:
    config = configure(slides, "out")
    live = Live(config.out)
    seen: list[dict[str, Any]] = []

    def look(step: Step) -> None:
        live._written = 0  # as if a second had gone by
        live._step(step)
        seen.append(read_status(config.out) or {})

    train(config, Watch.joined(live.watch(), Watch(on_step=look)))
    assert [status["step"] for status in seen] == [1, 2, 3, 4, 5, 6]
    assert {(s["state"], s["total"], s["first"], s["process"]) for s in seen} == {("running", 6, 0, os.getpid())}
    assert seen[0]["pixels"] in (96 * 112, 112 * 112) and seen[0]["predicts"] == "c"
    live.end("finished")
    assert (read_status(config.out) or {})["state"] == "finished"


def test_a_slide_that_is_not_judged_is_refused_before_the_first_step(slides: Path) -> None:
    config = configure(slides, "out")
    with pytest.raises(ConfigError, match="is no validation slide; choose from: c, d"):
        train(config, Live(config.out, "a").watch())
    assert not (config.out / "log.jsonl").exists()


def test_a_run_that_is_refused_says_nothing_in_anothers_folder(slides: Path) -> None:
    config = configure(slides, "out")
    train(config, Live(config.out).watch())
    before = read_status(config.out)
    live = Live(config.out)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config, live.watch())
    live.end("failed", "already holds a run")
    assert before is not None and read_status(config.out) == before


@pytest.mark.parametrize("error", [SlideError("disk", "is full", "free some"), OSError(28, "No space left on device")])
def test_a_prediction_that_fails_costs_no_run(error: Exception, slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(slides, "out")
    said: list[str] = []
    modes: list[bool] = []

    def fail(model: nn.Module, *args: Any, **more: Any) -> None:
        modes.append(model.training)
        raise error

    monkeypatch.setattr("wholegrad.train.live.wg.predict", fail)
    outcome = train(config, Live(config.out, None, said.append).watch())
    assert outcome.steps == 6 and said == [f"the live page has no new prediction: {error}"]
    assert modes == [False, False], "dropout and norms are those of a prediction"


@contextmanager
def following(out: Path) -> Iterator[tuple[Server, App]]:
    run = RunFolder(out)
    scene = Scene(completed(Files(run.first().slide), run), KEEP, LEVEL_CACHE, threads=1)
    app = App(scene, run, renewing=True)
    with Server(app) as server:
        yield server, app
    app.close()
    scene.close()


def told(url: str, path: str) -> Any:
    where = urlsplit(url)
    assert where.hostname
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=20)
    connection.request("GET", where.path + path)
    data = connection.getresponse().read()
    connection.close()
    return json.loads(data)


def test_a_new_prediction_takes_the_place_of_the_one_before(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(slides, "out")
    train(config, Live(config.out).watch())
    run = RunFolder(config.out)
    folder = config.out / FOLDER
    ((_, path),) = predictions(folder, "c")
    said = path.read_bytes()
    with following(config.out) as (server, app):
        found = told(server.url, "log/0")
        assert found["prediction"] == {"version": 0, "step": 6} and found["total"] == 6
        assert found["budget"] == 8 << 30 and len(found["steps"]) == 6 and len(found["steps"][0]) == 9
        before = app.scene.layers["prediction"]
        for step in (9, 12, 15):  # more often than files are kept open for
            time.sleep(0.01)  # files' times tell which is the newest
            (folder / f"c.{step}.tif").write_bytes(said)
            assert told(server.url, "log/0")["prediction"] == {"version": step // 3 - 2, "step": step}
            picture = app.answer("tiles/prediction/0/0_0", "v=1")
            assert picture is not None and picture.mime == "image/png"
        assert app.scene.layers["prediction"] is not before and "error" in app.scene.layers
        assert len(app.scene._screens) == 3, "truth, this prediction, the one before"
        (folder / "c.18.tif").write_bytes(b"no TIFF")
        assert told(server.url, "log/0")["prediction"]["step"] == 15
        assert any("c.18.tif" in problem for problem in app.scene.problems)
        problems = list(app.scene.problems)
        (folder / "c.21.tif").write_bytes(said)

        def gone(path: Path) -> None:
            path.unlink()  # the run made another just now
            path.read_bytes()

        monkeypatch.setattr(app.scene, "renew", gone)
        assert told(server.url, "log/0")["prediction"]["step"] == 15 and app.scene.problems == problems
    assert run.first().name == "c"


def test_scores_wait_for_the_runs_end(slides: Path) -> None:
    config = configure(slides, "out")
    live = Live(config.out)
    train(config, live.watch())
    with following(config.out) as (server, app):
        assert app.follower is not None and app.follower.going()
        assert not told(server.url, "scene.json")["score"] and told(server.url, "score.json") == {"state": "put off"}
        live.end("finished")
        assert told(server.url, "scene.json")["score"]
        assert told(server.url, "score.json")["state"] in ("running", "done")


def test_a_run_that_went_silent_is_said_to_be(slides: Path) -> None:
    config = configure(slides, "out")
    live = Live(config.out)
    train(config, live.watch())
    status = read_status(config.out) or {}
    (config.out / FOLDER / "status.json").write_text(json.dumps({**status, "now": status["now"] - 1000}))
    with following(config.out) as (server, app):
        assert told(server.url, "log/0")["status"]["silent"] is True
        assert app.follower is not None and not app.follower.going()


@pytest.mark.parametrize("text", ["[]", "{}", '{"state": "running"}', '{"state": 3, "now": 1}', '{"state": "run'])
def test_a_status_that_is_none_is_as_if_there_were_none(text: str, tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "status.json").write_text(text)
    assert read_status(tmp_path) is None


def test_the_page_before_the_run_says_so_and_nothing_more() -> None:
    opening = Opening()
    opening.said = "a <b> c"
    answer = opening.answer("", "")
    assert answer is not None and b"a &lt;b&gt; c" in answer.data
    assert opening.answer("scene.json", "") is None


def test_a_page_that_waits_for_the_runs_end_is_told_it(slides: Path) -> None:
    """Before it is closed: else an open page would only find that nobody answers."""
    config = configure(slides, "out")
    live = Live(config.out)
    train(config, live.watch())
    with following(config.out) as (server, _):
        told(server.url, "log/0")
        assert not _fetched_end(server)
        live.end("failed", "model: is odd; mend it")
        assert not _fetched_end(server), "nobody has asked since"
        assert told(server.url, "log/0")["status"]["said"] == "model: is odd; mend it"
        assert _fetched_end(server)


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (KeyboardInterrupt(), ("interrupted",)),
        (SlideError("a.tif", "is\ngone", "look"), ("failed", "a.tif: is gone; look")),
        (ValueError("odd"), ("failed", "ValueError: odd")),
    ],
)
def test_how_a_run_ended_is_noted_before_its_page_is_closed(
    error: BaseException, ended: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    page = object.__new__(LivePage)
    page.live = Live(Path("out"))
    monkeypatch.setattr(page.live, "end", lambda *how: seen.append(how))
    monkeypatch.setattr(page, "close", lambda: seen.append("closed"))
    with pytest.raises(type(error)), page:
        raise error
    assert seen == [ended, "closed"]


# The command.


@contextmanager
def running(slides: Path, out: str, *more: str, steps: int = 400) -> Iterator[subprocess.Popen[str]]:
    """A run with a page, killed at the end of the block if it has not ended by itself."""
    (slides / "run.toml").write_text(
        f'[data]\nroot = "{slides}"\ntrain = ["a", "b"]\nval = ["c"]\n[network]\nargs = {{ seed = 0 }}\n'
        f'[train]\nsteps = {steps}\nlr = 0.01\nbudget = "4GiB"\nout = "{out}"\npanels = false\n'
        "[validation]\nsteps = 40\n"
    )
    words = [sys.executable, "-m", "wholegrad", "train", str(slides / "run.toml"), "--live", *more]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("live page: "):
            return line.removeprefix("live page: ").strip()
    raise AssertionError("no address")


def until(look: Callable[[], Any], seconds: float = 180) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.2)
    raise TimeoutError


def page_process(process: subprocess.Popen[str]) -> psutil.Process:
    return next(p for p in psutil.Process(process.pid).children() if "--until-closed" in p.cmdline())


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_the_page_ends_with_the_run_however_that_ends(slides: Path, number: signal.Signals) -> None:
    with running(slides, "out", steps=100000) as process:
        url = address(process)
        page = page_process(process)
        until(lambda: (read_status(slides / "out") or {}).get("step"))
        assert page.nice() == min(19, int(psutil.Process(process.pid).nice()) + 10)
        assert page.memory_info().rss < 700 << 20
        process.send_signal(number)
        assert process.wait(120) == (130 if number == signal.SIGINT else -number)
        _, alive = psutil.wait_procs([page], timeout=60)
        assert not alive
        with pytest.raises(OSError):
            told(url, "log/0")
    if number == signal.SIGINT:
        assert (read_status(slides / "out") or {})["state"] == "interrupted"


def test_a_port_that_is_taken_is_said_before_anything_is_read(slides: Path) -> None:
    with (
        Server(Opening()) as server,
        running(slides, "out", "--port", str(server.server_address[1])) as process,
    ):
        _, said = process.communicate(timeout=180)
    assert process.returncode == 2 and "cannot be listened on" in said and not (slides / "out").exists()


def test_flags_of_the_page_need_it(slides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slides / "run.toml").write_text('[data]\ntrain = ["a"]\n[train]\nsteps = 1\n')
    assert main(["train", str(slides / "run.toml"), "--live-keep"]) == 2
    assert "--live-keep: is of a live page; add --live" in capsys.readouterr().err


def test_a_run_s_other_slides_are_named(slides: Path) -> None:
    config = configure(slides, "out", steps=1)
    train(config)
    run = RunFolder(config.out)
    assert _others(run, run.first().slide) == (
        f"other slides of the run: a, b, d, e; wholegrad view NAME --run {config.out} shows one"
    )
    run.entries = [run.first()]
    assert _others(run, run.first().slide) == ""

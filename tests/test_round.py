"""Ranks that torchrun starts anew find each other, not what earlier ones left in the store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from wholegrad.cli import main
from wholegrad.errors import WholegradError
from wholegrad.train.round import agree
from wholegrad.train.team import Place, Team

LIMIT = 30.0


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LIMIT))


def client(store: Any) -> Any:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=LIMIT))


def one_round(store: Any, size: int, order: list[int]) -> list[str]:
    """What each rank finds; they come in this order."""
    with ThreadPoolExecutor(size) as pool:
        found: dict[int, Future[str]] = {}
        for rank in order:
            found[rank] = pool.submit(agree, client(store), rank, size, LIMIT)
            time.sleep(0.1)
        return [found[rank].result() for rank in range(size)]


def test_each_round_has_a_name_of_its_own_in_a_store_that_remembers(store: Any) -> None:
    rounds = [
        one_round(store, 3, [0, 1, 2]),
        one_round(store, 3, [2, 1, 0]),
        one_round(store, 2, [1, 0]),  # one left
        one_round(store, 4, [3, 0, 2, 1]),  # two new ones
    ]
    for found in rounds:
        assert len(set(found)) == 1
    assert len({found[0] for found in rounds}) == len(rounds)


def test_a_rank_does_not_begin_a_round_that_another_answered_for_it(store: Any) -> None:
    one_round(store, 2, [0, 1])
    with pytest.raises(RuntimeError, match="rank 0 did not begin"):
        agree(client(store), 1, 2, 0.5)  # of the round before, which has begun without it
    with pytest.raises(RuntimeError, match="rank 1 did not come"):
        agree(client(store), 0, 2, 0.5)


def test_an_answer_to_the_round_before_is_given_again(store: Any) -> None:
    store.set("round", "before")
    with ThreadPoolExecutor(1) as pool:
        other, until = pool.submit(agree, client(store), 1, 2, LIMIT), time.monotonic() + LIMIT
        while not store.check(["before/1"]) and time.monotonic() < until:
            time.sleep(0.01)
        store.set("before/1", "of one who is gone")
        first = agree(client(store), 0, 2, LIMIT)
        assert other.result() == first and first != "before"


def test_an_answer_that_a_stranger_gave_is_given_anew(store: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, other = (pool.submit(agree, client(store), rank, 3, LIMIT) for rank in (0, 1))
        until = time.monotonic() + LIMIT
        while not (store.check(["round"]) and store.check([f"{store.get('round').decode()}/1"])):
            assert time.monotonic() < until
            time.sleep(0.01)
        store.set(f"{store.get('round').decode()}/1", "a stranger's")
        time.sleep(0.5)
        last = agree(client(store), 2, 3, LIMIT)
        assert first.result() == other.result() == last


@pytest.fixture
def launched(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of torchrun's, whose store is there whatever becomes of the rank."""
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    told |= {"MASTER_PORT": store.port, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("launched")
def test_a_rank_that_is_started_again_goes_on_with_its_own_run_alone(
    tmp_path: Path, write_case: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate("ab"):
        write_case(tmp_path, name, size=(96, 112), seed=seed)
    (tmp_path / "run.toml").write_text('[data]\ntrain = ["a"]\nval = ["b"]\n[train]\nsteps = 1\nbudget = "4GiB"\n')
    train = ["train", str(tmp_path / "run.toml"), "--set", "train.panels=false", "--out"]
    with monkeypatch.context() as alone:
        alone.delenv("RANK")
        assert main([*train, str(tmp_path / "others")]) == 0
    before = (tmp_path / "others/checkpoint.safetensors").read_bytes()
    for _ in range(2):  # refused, and refused again when torchrun starts it again
        capfd.readouterr()
        assert main([*train, str(tmp_path / "others"), "--seed", "5"]) == 2
        assert "already holds a run" in capfd.readouterr().err
    assert (tmp_path / "others/checkpoint.safetensors").read_bytes() == before
    assert main([*train, str(tmp_path / "own")]) == 0
    assert main([*train, str(tmp_path / "own"), "--steps", "2"]) == 0
    log = [json.loads(line) for line in (tmp_path / "own/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "step"] == [0, 1]


@pytest.mark.usefixtures("launched")
def test_a_store_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(WholegradError, match="rank 0: did not find torchrun's store in"):
        Team(Place.found(), timeout=0.5).join()


def test_a_store_that_is_gone_is_an_error() -> None:
    class Gone:
        """A store whose server ends while ranks wait."""

        def __init__(self) -> None:
            self.looks = 0
            self.held: dict[str, str] = {}

        def set(self, key: str, value: str) -> None:
            self.held[key] = value

        def check(self, keys: list[str]) -> bool:
            self.looks += 1
            if self.looks > 3:
                raise RuntimeError("Connection reset by peer")
            return False

    with pytest.raises(RuntimeError, match="reset by peer"):
        agree(Gone(), 0, 2, LIMIT)
    with pytest.raises(RuntimeError, match="reset by peer"):
        agree(Gone(), 1, 2, LIMIT)

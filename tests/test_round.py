"""Ranks that torchrun starts anew find each other, not what earlier ones left in the store."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from wholegrad.train.round import Round, agree

LIMIT = 30.0


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LIMIT))


def client(store: Any) -> Any:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=LIMIT))


def one_round(store: Any, size: int, order: list[int], restarts: dict[int, int]) -> list[Round]:
    """What each rank finds; they come in this order."""
    with ThreadPoolExecutor(size) as pool:
        found: dict[int, Future[Round]] = {}
        for rank in order:
            found[rank] = pool.submit(agree, client(store), rank, size, restarts.get(rank, 0), LIMIT)
            time.sleep(0.1)
        return [found[rank].result() for rank in range(size)]


def test_each_round_has_a_name_of_its_own_in_a_store_that_remembers(store: Any) -> None:
    rounds = [
        one_round(store, 3, [0, 1, 2], {}),
        one_round(store, 3, [2, 1, 0], {0: 1}),  # only the node of rank 0 counts this restart
        one_round(store, 2, [1, 0], {1: 2}),  # one left
        one_round(store, 4, [3, 0, 2, 1], {}),  # two new ones
    ]
    for found in rounds:
        assert len(set(found)) == 1
    assert len({found[0].name for found in rounds}) == len(rounds)
    assert [found[0].restarts for found in rounds] == [0, 1, 2, 0]


def test_a_rank_does_not_begin_a_round_that_another_answered_for_it(store: Any) -> None:
    one_round(store, 2, [0, 1], {})
    with pytest.raises(RuntimeError, match="rank 0 did not begin"):
        agree(client(store), 1, 2, 0, 0.5)  # of the round before, which has begun without it
    with pytest.raises(RuntimeError, match="rank 1 did not come"):
        agree(client(store), 0, 2, 0, 0.5)


def test_an_answer_to_the_round_before_is_given_again(store: Any) -> None:
    store.set("round", "before")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(agree, client(store), 1, 2, 0, LIMIT)
        while not store.check(["before/1"]):
            time.sleep(0.01)
        first = agree(client(store), 0, 2, 0, LIMIT)
        assert other.result() == first and first.name != "before"


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
        agree(Gone(), 0, 2, 0, LIMIT)
    with pytest.raises(RuntimeError, match="reset by peer"):
        agree(Gone(), 1, 2, 0, LIMIT)

"""The round of a run's ranks: those that torchrun started together, and none that it started before.

torchrun keeps one store for all its attempts, and what the last ones wrote there, their addresses too, is still in it.
Its count of restarts does not tell attempts apart, since each node has its own: a node whose ranks were stopped because
another's had died counts none. So rank 0 gives the round a name that nobody has had, the others answer to that name
each with one of their own, and the round begins when rank 0 has said whom it heard.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PATIENCE = 0.002, 0.2  # seconds between looks into the store, at first and at most


class Round(NamedTuple):
    """A round that all its ranks know.

    Attributes:
        name: of no round before it.
        restarts: the most that any rank has heard of.
    """

    name: str
    restarts: int


def agree(store: Any, rank: int, size: int, restarts: int, timeout: float) -> Round:
    """Find the others of one's round in a store that may remember earlier ones.

    Args:
        store: that all ranks share, as ``torch.distributed.rendezvous`` gives it.
        rank, size: of this process, and how many there are.
        restarts: as this rank heard of them.
        timeout: seconds.

    Raises:
        RuntimeError: a rank did not come in time, or the store is gone.
    """
    until = time.monotonic() + timeout
    mine = secrets.token_hex(8)
    return _first(store, mine, size, restarts, until) if rank == 0 else _other(store, mine, rank, restarts, until)


def _first(store: Any, mine: str, size: int, restarts: int, until: float) -> Round:
    store.set("round", mine)
    answers = {}
    for rank in range(1, size):
        key = f"{mine}/{rank}"
        _wait(lambda key=key: store.check([key]), until, f"rank {rank} did not come")  # type: ignore[misc]
        answers[rank] = json.loads(store.get(key))
    found = Round(mine, max([restarts, *(heard for _, heard in answers.values())]))
    store.set(f"{mine}/begin", json.dumps([found.restarts, *(name for name, _ in answers.values())]))
    return found


def _other(store: Any, mine: str, rank: int, restarts: int, until: float) -> Round:
    answered, found = "", list[Round]()

    def begun() -> bool:
        nonlocal answered
        if not store.check(["round"]):
            return False
        name = store.get("round").decode()
        if name != answered:  # also that of an earlier round: nobody begins it again
            store.set(f"{name}/{rank}", json.dumps([mine, restarts]))
            answered = name
        if not store.check([f"{name}/begin"]):
            return False
        most, *names = json.loads(store.get(f"{name}/begin"))
        if rank > len(names) or names[rank - 1] != mine:
            return False
        found.append(Round(name, most))
        return True

    _wait(begun, until, "rank 0 did not begin")
    return found[0]


def _wait(ready: Callable[[], bool], until: float, otherwise: str) -> None:
    pause = PATIENCE[0]
    while not ready():
        if time.monotonic() > until:
            raise RuntimeError(otherwise)
        time.sleep(pause)
        pause = min(2 * pause, PATIENCE[1])

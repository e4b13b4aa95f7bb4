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
from functools import partial
from typing import Any

PATIENCE = 0.002, 0.2  # seconds between looks into the store, at first and at most


def agree(store: Any, rank: int, size: int, timeout: float) -> str:
    """Find the others of one's round in a store that may remember earlier ones; returns the round's name.

    Args:
        store: that all ranks share, as ``torch.distributed.rendezvous`` gives it.
        rank, size: of this process, and how many there are.
        timeout: seconds.

    Raises:
        RuntimeError: a rank did not come in time, or the store is gone.
    """
    until = time.monotonic() + timeout
    mine = secrets.token_hex(8)
    return _first(store, mine, size, until) if rank == 0 else _other(store, mine, rank, until)


def _first(store: Any, mine: str, size: int, until: float) -> str:
    store.set("round", mine)
    for rank in range(1, size):
        _wait(partial(store.check, [f"{mine}/{rank}"]), until, f"rank {rank} did not come")
    names = [store.get(f"{mine}/{rank}").decode() for rank in range(1, size)]
    store.set(f"{mine}/begin", json.dumps(names))
    return mine


def _other(store: Any, mine: str, rank: int, until: float) -> str:
    found = list[str]()

    def begun() -> bool:
        if not store.check(["round"]):
            return False
        name = store.get("round").decode()  # also of an earlier round: nobody begins that again
        answer = f"{name}/{rank}"
        if store.check([f"{name}/begin"]):
            names = json.loads(store.get(f"{name}/begin"))
            if rank > len(names) or names[rank - 1] != mine:
                return False
            found.append(name)
        elif not store.check([answer]) or store.get(answer).decode() != mine:  # that of one who is gone, perhaps
            store.set(answer, mine)
        return bool(found)

    _wait(begun, until, "rank 0 did not begin")
    return found[0]


def _wait(ready: Callable[[], bool], until: float, otherwise: str) -> None:
    pause = PATIENCE[0]
    while not ready():
        if time.monotonic() > until:
            raise RuntimeError(otherwise)
        time.sleep(pause)
        pause = min(2 * pause, PATIENCE[1])

"""Runs ``wholegrad train`` on several ranks: imports once, then forks a process a rank, told what torchrun would tell.

    python ranks.py PORT "train run.toml --out a" 3 "STRIKE=SIGSTOP,1,2,struck train run.toml --out b" 2

Each run ends before the next begins; prints the exit codes of each run's ranks, a line a run. A rank that is left when
another has failed is killed after a while, as torchrun would.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

from wholegrad.cli import main

GRACE = 10.0  # seconds


def one_run(words: list[str], ranks: int, port: int) -> list[int]:
    children = [start(words, rank, ranks, port) for rank in range(ranks)]
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < ranks:
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + GRACE) if codes[child] else deadline
            elif time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    return [codes[child] for child in children]


def start(words: list[str], rank: int, ranks: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    settings = [word for word in words if word.isupper() or word.partition("=")[0].isupper()]
    os.environ.update(dict(word.split("=", 1) for word in settings))
    code = 99
    try:
        code = main([word for word in words if word not in settings])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for number, (words, ranks) in enumerate(zip(sys.argv[2::2], sys.argv[3::2], strict=True)):
        print(one_run(words.split(), int(ranks), int(sys.argv[1]) + number), flush=True)

"""Who was it? A rank that waits in vain asks the others, through the group's store, for whom they wait.

In a ring of waiting ranks only one is at fault, and most wait for one that waits itself. Each rank that gives up leaves
a note of whom it gave up on; whoever gives up follows these notes to a rank that left none.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist

GRACE = 3.0  # seconds to wait for others' notes
PAUSE = 0.05


def culprit(group: dist.ProcessGroup, rank: int, suspect: int) -> int:
    """Who keeps ``rank`` waiting, which itself waits for ``suspect``; the latter if nobody knows better.

    A store on a frozen host answers nobody, so a thread asks, and is left behind if it does not come back.
    """
    found = [suspect]

    def ask() -> None:
        try:
            _follow(group, rank, found)
        except Exception:  # the store is gone with its host, or too old to be asked: the suspect stands
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * GRACE)
    return found[0]


def _follow(group: dist.ProcessGroup, rank: int, found: list[int]) -> None:
    base = dist.distributed_c10d._get_default_store()
    store = dist.distributed_c10d.PrefixStore(f"wholegrad/{group.group_name}", base)
    store.set_timeout(timedelta(seconds=GRACE))
    store.set(str(rank), str(found[0]))
    seen, until = {rank}, time.monotonic() + GRACE
    while found[0] not in seen:
        note = str(found[0])
        while not store.check([note]):
            if time.monotonic() > until:
                return
            time.sleep(PAUSE)
        seen.add(found[0])
        found[0] = int(store.get(note))

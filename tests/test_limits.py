"""What control groups allow, read from folders made up as the kernel's are, and in a real group where one can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import wholegrad as wg
from wholegrad.errors import BudgetError, PlanError
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.run import budget, limits
from wholegrad.run.limits import Limit

GIB = 1 << 30
V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw\n"
V1 = """35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
"""


def system(root: Path, cgroup: str, mounts: str, files: Mapping[str, Any]) -> Path:
    """A root folder with these files, what a process there reads of itself first."""
    for name, content in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n" if not str(content).endswith("\n") else str(content))
    return root


def test_version_2_counts_every_group_up_to_the_root(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/jobs/memory.max": 4 * GIB,
        "sys/fs/cgroup/jobs/memory.high": "max",
        "sys/fs/cgroup/jobs/memory.current": 3 * GIB,
        "sys/fs/cgroup/jobs/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        "sys/fs/cgroup/jobs/mine/memory.max": "max",
        "sys/fs/cgroup/jobs/mine/memory.high": 3 * GIB,
        "sys/fs/cgroup/jobs/mine/memory.current": GIB // 2,
    }
    root = system(tmp_path, "0::/jobs/mine", V2, files)
    found = limits.group_limits(root)
    assert found == [Limit("cgroup limit", 3 * GIB, GIB // 2), Limit("cgroup limit", 4 * GIB, 2 * GIB)]
    assert [each.free for each in found] == [int(2.5 * GIB), 2 * GIB]
    assert limits.available(root) == min(2 * GIB, psutil.virtual_memory().available)


def test_version_1_reads_the_memory_hierarchy_alone(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": GIB,
        "sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes": GIB // 4,
        "sys/fs/cgroup/memory/docker/a/memory.stat": "inactive_file 1\ntotal_inactive_file 1024\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 7,
        "sys/fs/cgroup/cpu/docker/a/memory.limit_in_bytes": 5,
    }
    root = system(tmp_path, "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/", V1, files)
    assert limits.group_limits(root) == [Limit("cgroup limit", GIB, GIB // 4 - 1024)]


def test_in_a_container_the_mounted_folder_is_the_group(tmp_path: Path) -> None:
    mounts = "35 31 0:32 /docker/a /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": GIB,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 5,
    }
    for i, group in enumerate(("/docker/a", "/elsewhere/b")):
        root = system(tmp_path / str(i), f"4:memory:{group}", mounts, files)
        assert limits.group_limits(root) == [Limit("cgroup limit", GIB, 5)]


def test_a_system_without_groups_has_no_limits(tmp_path: Path) -> None:
    assert limits.group_limits(tmp_path) == []
    assert limits.tightest(tmp_path) is None
    assert limits.available(tmp_path) <= psutil.virtual_memory().total


def test_a_limit_on_addresses_counts() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
        "from wholegrad.run import limits; print(limits.available(), limits.limits()[-1].name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    free, name = done.stdout.split(maxsplit=1)
    assert int(free) < 3 * GIB and name.strip() == "limit on addresses"


def test_auto_takes_a_share_of_what_the_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "group_limits", lambda root=None: [Limit("cgroup limit", 3 * GIB, 2 * GIB)])
    monkeypatch.setattr(budget, "_automatic", budget.Automatic())
    held = psutil.Process().memory_info().rss
    for word in ("auto", None, " AUTO "):
        found = budget.budget_bytes(word)
        assert held < found <= held + 0.7 * GIB, word


def test_words_that_are_no_budget_are_refused() -> None:
    with pytest.raises(PlanError, match='"auto"'):
        budget.budget_bytes("automatic")


def test_a_run_that_a_group_would_kill_is_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((3, 256, 256), np.uint8)
    model = unet4492(seed=0)
    plan = wg.plan(model, LOSSES["bce"], image, image[:1], budget="4GiB")
    monkeypatch.setattr(limits, "group_limits", lambda root=None: [Limit("cgroup limit", 100 << 20, 5)])
    with pytest.raises(BudgetError, match=r"cgroup limit 100.0 MiB: is below the .* that the plan needs"):
        wg.backward(model, LOSSES["bce"], image, image[:1], plan=plan)
    assert all(p.grad is None for p in model.parameters())
    assert budget.limit_note(2 * GIB) == "cgroup limit 100.0 MiB is below the budget 2.00 GiB"
    assert budget.limit_note(90 << 20) is None


@pytest.fixture
def group() -> Iterator[Path]:
    """A real control group with a limit of 0.9 GiB, for a process to enter."""
    tops = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    names = ["memory.limit_in_bytes", "memory.max"]
    made = None
    for top, name in zip(tops, names, strict=True):
        folder = top / f"wholegrad-test-{os.getpid()}"
        try:
            folder.mkdir()
            made = folder
            (folder / name).write_text(str(int(0.9 * GIB)))
            break
        except OSError:
            if made is not None:
                made.rmdir()
            made = None
    if made is None:
        pytest.skip("no control group with a memory limit can be made here")
    yield made
    made.rmdir()


INSIDE = """
import json, os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
import numpy as np
import wholegrad as wg
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.run import limits
from wholegrad.run.process import peak_resident

model = unet4492(seed=0)
image = np.broadcast_to(np.uint8(9), (3, 2000, 6000))
plan = wg.plan(model, LOSSES["bce"], image, image[:1], budget="auto")
loss = wg.backward(model, LOSSES["bce"], image, image[:1], plan=plan).item()
said = None
wide = np.broadcast_to(np.uint8(9), (3, 6000, 12000))
large = wg.plan(model, LOSSES["bce"], wide, wide[:1], budget="3GiB", tile=(6000, 12000))
try:
    wg.backward(model, LOSSES["bce"], wide, wide[:1], plan=large)
except wg.WholegradError as error:
    said = str(error)
print(json.dumps({"limit": limits.tightest().limit, "budget": plan.budget, "projected": plan.projected, "loss": loss,
                  "peak": peak_resident(), "said": said}))
"""


def test_a_step_lives_in_a_real_group(group: Path) -> None:
    command = [sys.executable, "-c", INSIDE, str(group)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["limit"] == int(0.9 * GIB) // 4096 * 4096
    assert found["peak"] <= found["projected"] <= found["budget"] < found["limit"]
    assert found["said"].startswith("cgroup limit 921.6 MiB: is below the ")


BESIDE_AN_EATER = """
import json, os, subprocess, sys
from pathlib import Path
folder, out = sys.argv[1:3]
enter = "open(%r, 'w').write(str(os.getpid()))" % (folder + "/cgroup.procs")
exec(enter)
from wholegrad.run import limits
from wholegrad.run.blocks import drop_all
from wholegrad.train.config import load_config
from wholegrad.train.events import Watch
from wholegrad.train.loop import train

eaters, notes = [], []

def after(step):
    if step.step == 1:
        drop_all()  # what the step left: with it the next one would fit beside the eater
        take = limits.group_limits()[0].free - (90 << 20)
        code = "import os, sys, time; %s; held = b'x' * %d; print('full', flush=True); time.sleep(600)" % (enter, take)
        eaters.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        eaters[0].stdout.readline()
    if step.step == 3:
        eaters[0].kill()
        eaters[0].wait()

train(load_config(Path(out) / "run.toml"), Watch(on_note=notes.append, on_step=after))
print(json.dumps(notes))
"""


@pytest.mark.slow
def test_a_run_outlives_a_process_that_eats_its_memory(
    group: Path, tmp_path: Path, write_case: Callable[..., None]
) -> None:
    write_case(tmp_path, "a", size=(1600, 3200))
    text = '[data]\ntrain = ["a"]\n[train]\nsteps = 9\npanels = false\nbudget = "auto"\nout = "out"\n'
    (tmp_path / "run.toml").write_text(text)
    command = [sys.executable, "-c", BESIDE_AN_EATER, str(group), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    notes = json.loads(done.stdout.splitlines()[-1])
    assert len(notes) == 2, notes
    assert notes[0].startswith("other processes took memory") and notes[1].startswith("memory is free again")
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "step"] == list(range(9))

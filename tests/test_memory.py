"""Measured peak <= projected (rule 7): the whole process, in a process of its own."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wholegrad.errors import BudgetError

STEP = """
import json, sys
import numpy as np
import torch
import wholegrad as wg
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.run.process import peak_resident

folder, budget, loss, fixed = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
if "boundary_dtype" in fixed:
    fixed["boundary_dtype"] = getattr(torch, fixed["boundary_dtype"])
image, mask = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("image", "mask"))
model = unet4492(seed=0)
plan = wg.plan(model, LOSSES[loss], image, mask, budget=budget, **fixed)
for _ in range(5):
    value = wg.backward(model, LOSSES[loss], image, mask, plan=plan)
print(json.dumps({"peak": peak_resident(), "projected": plan.projected, "budget": plan.budget, "loss": value.item()}))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 3 x 1600 x 3200 noisy pixels and its mask, uncompressed."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    np.save(folder / "image.npy", rng.integers(0, 256, (3, 1600, 3200), dtype=np.uint8))
    np.save(folder / "mask.npy", rng.integers(0, 2, (1, 1600, 3200), dtype=np.uint8))
    return folder


def step(files: Path, budget: str, loss: str = "bce", **fixed: Any) -> dict[str, float]:
    command = [sys.executable, "-c", STEP, str(files), budget, loss, json.dumps(fixed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("budget", ["0.6GiB", "0.8GiB", "1.2GiB", "3GiB"])
def test_the_measured_peak_stays_below_the_projected_one(files: Path, budget: str) -> None:
    found = step(files, budget)
    assert found["peak"] <= found["projected"] <= found["budget"]


@pytest.mark.parametrize(
    ("loss", "fixed"),
    [
        ("bce+dice", {}),
        ("bce", {"boundaries": ["down1", "fuse2", "up1"], "placement": "disk"}),
        ("bce", {"boundaries": ["down1", "middle", "up1"], "placement": "host", "tile": [300, 500]}),
        ("bce", {"boundaries": ["down1", "fuse1"], "placement": "host", "boundary_dtype": "bfloat16"}),
        ("bce", {"boundaries": ["down1", "fuse1"], "placement": "disk", "boundary_dtype": "float16"}),
    ],
)
def test_so_it_does_for_other_losses_and_placements(files: Path, loss: str, fixed: dict[str, Any]) -> None:
    found = step(files, "1.2GiB", loss, **fixed)
    assert found["peak"] <= found["projected"] <= found["budget"]


def test_less_memory_is_used_when_less_is_allowed(files: Path, tmp_path: Path) -> None:
    for name in ("image", "mask"):  # four times the pixels, so that the fastest tiles are large
        np.save(tmp_path / f"{name}.npy", np.tile(np.load(files / f"{name}.npy", mmap_mode="r"), (1, 2, 2)))
    small, large = step(tmp_path, "0.5GiB", "bce+dice"), step(tmp_path, "3GiB", "bce+dice")
    assert small["peak"] < large["peak"] - (50 << 20)
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-9)


def test_a_budget_that_python_and_torch_alone_exceed_is_refused() -> None:
    import wholegrad as wg
    from wholegrad.losses import LOSSES
    from wholegrad.nets import unet4492

    image = np.zeros((3, 256, 256), np.uint8)
    with pytest.raises(BudgetError, match="too small"):
        wg.plan(unet4492(seed=0), LOSSES["bce"], image, image[:1], budget="50MiB")


OTHER = """
import json, sys
import numpy as np
sys.path.insert(0, sys.argv[4])
import wholegrad as wg
from memory_networks import NETWORKS
from wholegrad.run.process import peak_resident

folder, budget, name = sys.argv[1:4]
image, mask = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("image", "mask"))
build, loss, target = NETWORKS[name]
model = build()
target = mask if target is None else target
plan = wg.plan(model, loss, image, target, budget=budget)
for _ in range(4):
    wg.backward(model, loss, image, target, plan=plan)
print(json.dumps({"peak": peak_resident(), "projected": plan.projected, "budget": plan.budget}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("batch norm", "0.8GiB"),
        ("group norm, reflect", "0.8GiB"),
        ("instance norm", "2GiB"),
        ("attention", "2.5GiB"),
        ("classifier", "2GiB"),
    ],
)
def test_so_it_does_for_norms_pools_attention_and_classifiers(files: Path, name: str, budget: str) -> None:
    command = [sys.executable, "-c", OTHER, str(files), budget, name, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["projected"] <= found["budget"]


FAULTS = """
import gc, json, sys
from resource import RUSAGE_SELF, getrusage
import numpy as np
import wholegrad as wg
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.run.process import resident

def taken(what):
    faults, held = getrusage(RUSAGE_SELF).ru_minflt, resident()
    what()
    return getrusage(RUSAGE_SELF).ru_minflt - faults, resident() - held

folder = sys.argv[1]
image, mask = (np.load(f"{folder}/{name}.npy") for name in ("image", "mask"))
model, loss = unet4492(seed=0), LOSSES["bce"]
plan = wg.plan(model, loss, image, mask, budget="2GiB")
step = lambda plan: lambda: wg.backward(model, loss, image, mask, plan=plan)
steps = [taken(step(plan)) for _ in range(4)]
def other():
    made = wg.plan(model, loss, image, mask, budget="2GiB", tile=(256, 256), boundaries=["down1"])
    gc.collect()
def end():
    global plan
    del plan
    gc.collect()
found = {"steps": steps, "other": taken(other), "again": taken(step(plan))}
during = []
def look(progress):
    during.append(wg.plan(model, loss, image, mask, budget="2GiB") if not during else None)
between = taken(lambda: wg.backward(model, loss, image, mask, plan=plan, progress=look))
print(json.dumps({**found, "during": between, "last": taken(step(plan)), "end": taken(end)}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc keeps")
def test_the_next_step_finds_the_heap_that_a_step_left_and_other_plans_do_not(files: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS, str(files)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    left = 20 << 20  # bytes, at least, that a step of this plan leaves
    assert found["steps"][0][1] > left
    assert sorted(faults for faults, _ in found["steps"])[1] * 4096 < left / 4
    assert found["other"][1] < -left
    assert found["again"][0] * 4096 > left and found["again"][1] > left
    assert found["during"][1] < -left, "another plan was made meanwhile"
    assert found["last"][1] > left and found["end"][1] < -left


HEAPS = """
import contextlib, ctypes, sys, tempfile, threading
from pathlib import Path
from wholegrad.run import process

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p

def work(together):
    block = libc.malloc(ctypes.c_size_t(100_000))
    together.wait()
    libc.free(ctypes.c_void_p(block))

with process.reuse_memory() if sys.argv[1] == "running" else contextlib.nullcontext():
    together = threading.Barrier(4)
    threads = [threading.Thread(target=work, args=(together,)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    with tempfile.NamedTemporaryFile() as file:
        stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        print(Path(file.name).read_text().count("<heap nr="))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps are glibc's")
def test_threads_share_one_heap_while_a_step_runs() -> None:
    def heaps(when: str) -> int:
        done = subprocess.run([sys.executable, "-c", HEAPS, when], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert heaps("running") == 1 < heaps("before")

"""The stages, and running one measurement: a fresh process, its result, and what else the machine did meanwhile."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from common import GIB, area

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHUNK = 16 << 20  # bytes read at a time to bring a file into the page cache

BUDGET, SMALL_BUDGET = "1.5GiB", "0.75GiB"
BUDGETS = ("0.6GiB", "0.75GiB", "1GiB", "1.5GiB", "2GiB", "4GiB", "8GiB")
SCALES = (0.25, 0.5, 1, 2)  # of the slide's edges: 1/16 to 4 times its area
PEER_SIZE = 8000  # pixels, the most along an edge of what the whole-image peers train on
WITHOUT_ONEDNN = 4000  # the same for Keras without oneDNN, which takes several times the memory
ALLOCATORS = {
    "default": {},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30), "MALLOC_TOP_PAD_": str(1 << 30)},
}


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    size: str
    steps: int
    folder: Path
    data: Path

    @property
    def results(self) -> Path:
        return self.folder / "results" / self.size

    @property
    def raw(self) -> tuple[Path, Path]:
        """The uncompressed image and mask."""
        return self.folder / f"{self.size}.image.npy", self.folder / f"{self.size}.mask.npy"

    @property
    def slide(self) -> tuple[Path, Path]:
        """The compressed slide and mask."""
        return self.folder / f"{self.size}.tif", self.folder / f"{self.size}.mask.tif"

    def peer_size(self, most: int) -> str:
        """At most ``most`` pixels along an edge, in multiples of 16: there Keras pads as the network does."""
        return "x".join(str(min(edge, most) // 16 * 16) for edge in area(self.size))


@dataclass(frozen=True)
class Run:
    """One measurement.

    Attributes:
        name: of its result.
        command: a script of this folder and its arguments.
        files: brought into the page cache before.
        python: that runs the script.
        env: set on top of this process's environment.
    """

    name: str
    command: list[str]
    files: tuple[Path, ...] = ()
    python: str = sys.executable
    env: dict[str, str] = field(default_factory=dict)


def _ours(settings: Settings, name: str, what: str, budget: str, *more: str, files: tuple[Path, ...]) -> Run:
    command = ["ours.py", what, "--folder", str(settings.folder), "--size", settings.size, "--budget", budget]
    return Run(name, [*command, "--steps", str(settings.steps), *more], files)


def step(settings: Settings) -> list[Run]:
    return [_ours(settings, "step", "step", BUDGET, files=settings.raw)]


def budget(settings: Settings) -> list[Run]:
    return [_ours(settings, "budget", "step", SMALL_BUDGET, files=settings.raw)]


def budgets(settings: Settings) -> list[Run]:
    """The step within less and more memory."""
    return [_ours(settings, f"within-{budget}", "step", budget, files=settings.raw) for budget in BUDGETS]


def jpeg(settings: Settings) -> list[Run]:
    return [_ours(settings, "jpeg", "step", BUDGET, "--source", "jpeg", files=settings.slide)]


def predict(settings: Settings) -> list[Run]:
    return [
        _ours(settings, name, "predict", BUDGET, "--suffix", suffix, files=settings.raw[:1])
        for name, suffix in (("predict", ".npy"), ("predict-tiff", ".ome.tif"))
    ]


def scaled(settings: Settings) -> list[Run]:
    """The step on smaller and larger areas."""
    return [
        _ours(settings, f"area-{scale}", "step", BUDGET, "--scale", str(scale), files=settings.raw) for scale in SCALES
    ]


def tilings(settings: Settings) -> list[Run]:
    return [_ours(settings, "tilings", "tilings", BUDGET, "--data", str(settings.data), files=())]


def peers(settings: Settings) -> list[Run]:
    """Whole-image PyTorch and Keras, each with both settings of the allocator; Keras once without oneDNN."""
    check = settings.folder / "check.npz"
    _call([sys.executable, str(HERE / "peer_pytorch.py"), "--write-check", str(check)])
    keras = environment(settings.folder, "keras")
    image, mask = settings.raw
    inputs = ["--image", str(image), "--mask", str(mask), "--steps", str(settings.steps)]
    pytorch_command = ["peer_pytorch.py", *inputs, "--size", settings.peer_size(PEER_SIZE)]
    found = [Run(f"peer-pytorch-{name}", pytorch_command, env=env) for name, env in ALLOCATORS.items()]

    def keras_run(name: str, most: int, **env: str) -> Run:
        command = ["peer_keras.py", *inputs, "--check", str(check), "--size", settings.peer_size(most)]
        return Run(f"peer-keras-{name}", command, python=keras, env={"TF_CPP_MIN_LOG_LEVEL": "3", **env})

    found += [keras_run(name, PEER_SIZE, TF_ENABLE_ONEDNN_OPTS="1", **env) for name, env in ALLOCATORS.items()]
    return [*found, keras_run("default-without-onednn", WITHOUT_ONEDNN, TF_ENABLE_ONEDNN_OPTS="0")]


STAGES: dict[str, Callable[[Settings], list[Run]]] = {
    "step": step,
    "peers": peers,
    "budget": budget,
    "jpeg": jpeg,
    "predict": predict,
    "area": scaled,
    "budgets": budgets,
    "tilings": tilings,
}


def _call(command: list[str]) -> None:
    """Run a command that only prepares something; what it prints goes to the error stream."""
    subprocess.run(command, check=True, stdout=sys.stderr)


def prepare(settings: Settings) -> None:
    """Paint the slide and write its uncompressed copy, in a process of its own."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    _call([sys.executable, str(HERE / "inputs.py"), str(settings.folder), settings.size])


def environment(folder: Path, name: str) -> str:
    """The Python of an environment with ``requirements-NAME.txt``, made if it is not there yet."""
    path = folder / f"env-{name}"
    python, done = path / "bin" / "python", path / "installed"
    wanted = (HERE / f"requirements-{name}.txt").read_text()
    if not done.exists() or done.read_text() != wanted:
        _call([sys.executable, "-m", "venv", "--clear", str(path)])
        _call([str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / f"requirements-{name}.txt")])
        done.write_text(wanted)
    return str(python)


def bring_into_cache(files: tuple[Path, ...]) -> None:
    """Read files once, so that no step waits for the disk."""
    for path in files:
        with path.open("rb") as file:
            while file.read(CHUNK):
                pass


def _busy() -> float:
    """Seconds that all cores together worked since the machine started, for whomever."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0))


def _children() -> float:
    """Seconds that this process's finished children computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(run: Run) -> dict[str, Any] | None:
    """What the process reported, and how busy the machine was with other work; None if it failed."""
    bring_into_cache(run.files)
    load, busy, ours, started = os.getloadavg()[0], _busy(), _children(), time.monotonic()
    process = subprocess.run(
        [run.python, str(HERE / run.command[0]), *run.command[1:]],
        env={**os.environ, **run.env},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    wall = time.monotonic() - started
    if process.returncode:
        return None
    others = max(0.0, (_busy() - busy) - (_children() - ours)) / wall
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return {**found, "load_before": load, "others_cores": others}


def about() -> dict[str, Any]:
    """When, where and with what this is measured."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), "")
    memory = round(psutil.virtual_memory().total / GIB)
    vectors = ", AVX-512" if "avx512f" in info else ""
    describe = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    revision = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": f"{model}{vectors}, {os.cpu_count()} cores, {memory} GiB, {platform.system()}",
        "software": f"Python {platform.python_version()}, torch {version('torch')}",
        "revision": revision.stdout.strip(),
    }


def carry_out(settings: Settings, run: Run) -> bool:
    """Measure and keep the result as JSON; whether it succeeded."""
    print(f"{run.name}: {' '.join(run.command)}", file=sys.stderr, flush=True)
    found = measure(run)
    path = settings.results / f"{run.name}.json"
    path.unlink(missing_ok=True)  # an older result must not pass for this one's
    if found is None:
        print(f"{run.name}: failed, see above", file=sys.stderr)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about(), "size": settings.size, "name": run.name, **found}, indent=1) + "\n")
    return True

"""What tests share: threads, a cache, reproducible random cases in CI, tiny slides, the folder of real ones."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import settings

from wholegrad.kernels import pointwise, thin
from wholegrad.kernels.host import Host, host

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if IN_CI else "local")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers take the folder of the process that started them
    CACHE = tempfile.TemporaryDirectory(prefix="wholegrad-")  # for kernels of shapes that nobody else needs
    os.environ["WHOLEGRAD_CACHE"] = CACHE.name
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # workers share the cores: a thread that waits must not spin
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, where the real slides were promised, a test that skips for want of them has failed."""
    report = yield
    promised = IN_CI and "WHOLEGRAD_DATA" in os.environ
    if promised and report.skipped and "WHOLEGRAD_DATA" in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} must not skip in CI: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides and masks."""
    folder = Path(os.environ.get("WHOLEGRAD_DATA", ""))
    if "WHOLEGRAD_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("WHOLEGRAD_DATA names no folder of real slides")
    return folder


@pytest.fixture(scope="session")
def write_case() -> Callable[..., None]:
    """A function that writes a tiny slide and its mask: dark discs of tissue on white glass."""

    def write(root: Path, name: str, size: tuple[int, int] = (160, 208), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[: size[0], : size[1]]
        tissue = np.zeros(size, bool)
        for _ in range(3):
            cy, cx, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(20, 45)
            tissue |= (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        colour = np.where(tissue[..., None], (180, 90, 150), (242, 242, 240))
        pixels = np.clip(colour + rng.normal(0, 6, (*size, 3)), 0, 255).astype(np.uint8)
        for folder in ("slides", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        resolution = {"resolution": (20000.0, 20000.0), "resolutionunit": "CENTIMETER"}  # 0.5 um a pixel
        tifffile.imwrite(root / "slides" / f"{name}.tif", pixels, tile=(64, 64), photometric="rgb", **resolution)
        tifffile.imwrite(root / "masks" / f"{name}.mask.tif", tissue.astype(np.uint8), tile=(64, 64), **resolution)

    return write


@pytest.fixture
def fresh_kernels() -> Iterator[Callable[[], None]]:
    """Kernels are written anew in the test, which changes how, and again after it; call it to forget them once more."""
    kept: tuple[Any, ...] = (
        thin.slide_kernel, thin.slide_plan, thin.correlate_kernel, thin.correlate_plan, pointwise.kernel
    )  # fmt: skip

    def forget() -> None:
        for each in kept:
            each.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture
def narrow(fresh_kernels: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Host], None]:
    """Gives kernels the vectors of another processor; this one can run them if its own are not narrower."""

    def use(machine: Host) -> None:
        own = host()
        assert own is not None, "only for tests that kernels are there for"
        if machine.width > own.width:
            pytest.skip("wider than this processor's vectors")
        monkeypatch.setattr(thin, "_machine", lambda: machine)
        monkeypatch.setattr(pointwise, "host", lambda: machine)

    return use


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, for the tests of pages."""
    from browser import Browser, find_browser

    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on the PATH, and WHOLEGRAD_BROWSER names none")
    with Browser(path) as one:
        yield one

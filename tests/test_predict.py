"""Prediction is seamless: the same pixels as the whole image at once, streamed, whole or not at all."""

from __future__ import annotations

import errno
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wholegrad as wg
from wholegrad import api
from wholegrad.errors import ConfigError, SlideError
from wholegrad.nets import unet4492
from wholegrad.plan import planner
from wholegrad.predict import decide
from wholegrad.slide import bigtiff


def whole(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(image[None])[0]
        return result


@pytest.mark.parametrize("tile", [None, (1000, 1000), (50, 70), (33, 129)])
def test_logits_are_those_of_the_whole_image(tile: tuple[int, int] | None) -> None:
    model, image = unet4492(seed=0).double(), torch.rand(3, 150, 203, dtype=torch.float64)
    found = wg.predict(model, image, kind="logits", tile=tile)
    assert found is not None and found.dtype == np.float64
    np.testing.assert_allclose(found, whole(model, image), rtol=1e-12, atol=1e-13)


def test_masks_and_probabilities_reach_files(tmp_path: Path) -> None:
    model, image = unet4492(seed=0), torch.rand(3, 300, 520)
    logits = whole(model, image)
    edge = float(logits.median())
    with torch.no_grad():
        model.head.bias -= edge  # so that both labels occur
    truth = whole(model, image)
    wg.predict(model, image, out=tmp_path / "mask.tif", tile=(64, 100))
    wg.predict(model, image, out=tmp_path / "p.npy", kind="probability", tile=(64, 100))
    wg.predict(model, image, out=tmp_path / "p.ome.tif", kind="probability")
    import tifffile

    mask, probability = tifffile.imread(tmp_path / "mask.tif"), np.load(tmp_path / "p.npy")
    clear = (truth[0].abs() > 1e-4).numpy()
    assert 0.3 < mask.mean() < 0.7
    np.testing.assert_array_equal(mask[clear], (truth[0] > 0).numpy()[clear])
    np.testing.assert_allclose(probability, torch.sigmoid(truth), atol=1e-6)
    np.testing.assert_allclose(tifffile.imread(tmp_path / "p.ome.tif") / 255, torch.sigmoid(truth)[0], atol=3e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.tif", "p.npy", "p.ome.tif"]


def test_a_mask_compares_as_torch_does() -> None:
    logits = torch.tensor([[[-1.0, 0.0, 1e-30, float("nan"), float("inf"), math.log(3)]]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for threshold in (0.5, 0.75):
            edge = math.log(threshold / (1 - threshold))
            want = (logits.to(dtype) > edge).to(torch.uint8)
            torch.testing.assert_close(decide(logits.to(dtype), "mask", threshold), want)


@pytest.mark.parametrize("name", ["mask.npy", "mask.tif"])
def test_a_full_disk_is_a_plain_error_and_leaves_no_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = unet4492(seed=0), torch.rand(3, 200, 100)
    (tmp_path / name).write_bytes(b"as it was")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bigtiff.os, "fsync", full)
    with pytest.raises(SlideError, match="No space left on device"):
        wg.predict(model, image, out=tmp_path / name, tile=(40, 40))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"as it was"


def test_a_file_that_cannot_grow_is_a_plain_error(tmp_path: Path) -> None:
    file = bigtiff.PartialFile(tmp_path / "a.npy")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(SlideError, match="free disk space"):
            file.patch(0, memoryview(bytes(1 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
        file.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on pages")
def test_pages_of_what_is_on_disk_already_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, told = bigtiff.BEHIND, []
    monkeypatch.setattr(bigtiff.os, "posix_fadvise", lambda _, start, length, how: told.append((start, length, how)))
    file = bigtiff.PartialFile(tmp_path / "a.npy")
    for k in range(3):
        file.patch(k * size, memoryview(bytes(size)))
    file.commit()
    last = [told[k : k + 2] for k in range(0, len(told), 2)]
    assert [[start for start, _, _ in each] for each in last[1:]] == [[0, size], [size, 2 * size]]
    assert {how for _, _, how in told} == {os.POSIX_FADV_DONTNEED}
    assert (tmp_path / "a.npy").read_bytes() == bytes(3 * size)


def test_a_killed_run_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch, wholegrad as wg; from wholegrad.nets import unet4492\n"
        "stop = lambda seen: os._exit(9) if seen.done == seen.total - 1 else None\n"
        "wg.predict(unet4492(seed=0), torch.rand(3, 300, 200), out=sys.argv[1], tile=(64, 64), progress=stop)"
    )
    for name in ("mask.npy", "mask.tif"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
        assert done.returncode == 9 and not (tmp_path / name).exists()


class Fails:
    """A reader whose lower half cannot be read."""

    shape, dtype, cache_bytes, name = (3, 200, 100), np.dtype(np.uint8), 0, "broken.tif"

    def read(self, box: Any) -> np.ndarray:
        if box.y1 > 120:
            raise SlideError("broken.tif", "tile 3 is corrupt", "copy the slide again")
        return np.zeros((3, box.height, box.width), np.uint8)


@pytest.mark.parametrize("name", ["mask.tif", "mask.npy"])
def test_a_slide_that_breaks_off_leaves_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(SlideError, match="tile 3 is corrupt"):
        wg.predict(unet4492(seed=0), Fails(), out=tmp_path / name, tile=(40, 40))
    assert list(tmp_path.iterdir()) == []


def test_a_slide_that_breaks_off_in_training_leaves_no_gradient() -> None:
    from wholegrad.losses import LOSSES

    model = unet4492(seed=0)
    labels = np.ones((1, 200, 100), np.uint8)
    with pytest.raises(SlideError, match=r"broken\.tif"):
        wg.backward(model, LOSSES["bce"], Fails(), labels)
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model, image = unet4492(seed=0), torch.rand(3, 40, 40)
    with pytest.raises(ConfigError, match="ending"):
        wg.predict(model, image, out=tmp_path / "mask.jpg")
    with pytest.raises(ConfigError, match="cannot show logits"):
        wg.predict(model, image, out=tmp_path / "mask.geojson", kind="logits")
    with pytest.raises(ConfigError, match="threshold"):
        wg.predict(model, image, threshold=1.0)
    with pytest.raises(ConfigError, match="choose from mask, probability, logits"):
        wg.predict(model, image, kind="labels")  # type: ignore[arg-type]
    for name in ("a.npy", "a.tif"):
        with pytest.raises(SlideError, match="cannot be"):
            wg.predict(model, image, out=Path("/proc/nowhere") / name)


@pytest.mark.parametrize("kind", ["mask", "probability", "logits"])
def test_a_network_in_bfloat16_predicts(kind: Any) -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(1, 1, 3, padding=1).bfloat16()
    image = np.random.default_rng(0).random((1, 40, 60), dtype=np.float32)
    found = wg.predict(net, image, kind=kind, tile=(13, 17))
    logits = net(torch.from_numpy(image)[None].bfloat16()).detach().float()[0]
    wanted = {"mask": (logits > 0).float(), "probability": torch.sigmoid(logits), "logits": logits}[kind]
    close = torch.from_numpy(np.asarray(found)).float() - wanted
    assert close.abs().mean() < 0.01


def test_an_output_that_is_read_again_counts_as_kept() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 16, 1)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            return y, torch.relu(y).mean()

    graph_plans: list[Any] = []
    true = planner.make_plan

    def made(*args: Any) -> Any:
        graph_plans.append(true(*args))
        return graph_plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "make_plan", made)
        wg.predict(Twice(), np.zeros((1, 100, 150), np.float32), kind="logits", tile=(64, 64))
    assert len(graph_plans[0].placements) == 1

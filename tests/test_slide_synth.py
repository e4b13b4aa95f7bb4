"""Synthetic slides: the same for the same seed, their mask exact, their making bounded in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from wholegrad.errors import ConfigError
from wholegrad.graph.geometry import Box
from wholegrad.slide.mask import open_mask
from wholegrad.slide.slide import open_slide
from wholegrad.slide.synth import synthesize


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of one seed and one of another, of a size that no tile divides."""
    folder = tmp_path_factory.mktemp("synth")
    for name, seed in (("a", 5), ("again", 5), ("other", 6)):
        synthesize(1100, 2070, seed, folder / f"{name}.tif", folder / f"{name}.mask.tif")
    return folder


def test_same_seed_same_bytes(made: Path) -> None:
    for kind in ("tif", "mask.tif"):
        assert (made / f"a.{kind}").read_bytes() == (made / f"again.{kind}").read_bytes()
        assert (made / f"a.{kind}").read_bytes() != (made / f"other.{kind}").read_bytes()


@pytest.mark.parametrize("name", ["a", "other"])
def test_mask_lies_exactly_over_the_tissue(made: Path, name: str) -> None:
    with open_slide(made / f"{name}.tif") as slide:
        assert slide.shape == (3, 1100, 2070)
        assert slide.mpp == pytest.approx(0.5)
        box = Box(0, 1100, 0, 2070)
        pixels = slide.read(box).astype(np.float32)
        tissue = open_mask(made / f"{name}.mask.tif", like=slide).read(box)[0]
    assert set(np.unique(tissue)) == {0, 1}
    assert 0.03 < tissue.mean() < 0.8
    colour = pixels.max(axis=0) - pixels.min(axis=0)
    assert colour[tissue == 1].mean() > colour[tissue == 0].mean() + 30
    # moved by a few pixels in any direction, the mask fits the colours worse
    inner = (slice(20, -20), slice(20, -20))
    fits = {
        shift: float((colour * np.where(np.roll(tissue, shift, (0, 1)), 1, -1))[inner].sum())
        for shift in [(0, 0), (6, 0), (-6, 0), (0, 6), (0, -6)]
    }
    assert max(fits, key=lambda shift: fits[shift]) == (0, 0)


def test_mask_is_stored_at_full_resolution_with_a_pyramid(made: Path) -> None:
    with tifffile.TiffFile(made / "a.mask.tif") as tiff:
        assert tiff.series[0].levels[0].shape == (1100, 2070)
        assert len(tiff.series[0].levels) > 1
        assert set(np.unique(tiff.series[0].levels[-1].asarray())) <= {0, 1}


@pytest.mark.parametrize(("height", "width", "mpp"), [(64, 64, 0.5), (97, 1500, 1.0), (700, 513, 0.25)])
def test_odd_sizes_and_progress(tmp_path: Path, height: int, width: int, mpp: float) -> None:
    seen: list[tuple[int, int]] = []
    synthesize(
        height,
        width,
        1,
        tmp_path / "a.tif",
        tmp_path / "m.tif",
        mpp=mpp,
        progress=lambda a, b: seen.append((a, b)),
    )
    assert seen[0] == (0, height) and seen[-1] == (height, height)
    assert open_slide(tmp_path / "a.tif").shape == (3, height, width)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "m.tif"]


def test_failure_leaves_no_files(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done:  # a band is written by then
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(128, 128, 1, tmp_path / "a.tif", tmp_path / "m.tif", progress=stop)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="at least 64"):
        synthesize(10, 500, 1, tmp_path / "a.tif", tmp_path / "m.tif")


MEASURE = """
import sys
from wholegrad.run.process import peak_resident
from wholegrad.slide.synth import synthesize
synthesize(4000, 8000, 1, sys.argv[1] + "/a.tif", sys.argv[1] + "/m.tif")
print(peak_resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the parent too")
def test_memory_is_bounded(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 30  # bytes: the slide alone has 96 million values

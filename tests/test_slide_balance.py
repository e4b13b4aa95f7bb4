"""Evening out slides: the same section, however faint or tinted, comes out alike, and alike by any boxes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from wholegrad.errors import ShapeError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import ArrayReader
from wholegrad.slide.balance import INK, WHITE, Balance, Balanced, find_balance
from wholegrad.slide.slide import open_slide
from wholegrad.slide.thumbnail import thumbnail


def section(glass: tuple[float, float, float], ink: float, noise: float = 1.0) -> np.ndarray:
    """A disc of tissue of some density on glass, ``(96, 128, 3)``."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :128]
    density = np.where((y - 48) ** 2 + (x - 60) ** 2 < 30**2, ink * rng.uniform(0.5, 1.2, (96, 128)), 0.0)
    light = np.array(glass) * np.exp(-density[..., None] * np.array([0.8, 1.2, 1.0]))
    return np.clip(np.round(light + noise * rng.standard_normal((96, 128, 3))), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("glass", [(244.0, 243.0, 245.0), (228.0, 205.0, 233.0), (180.0, 190.0, 176.0)])
@pytest.mark.parametrize("ink", [0.15, 0.4, 0.6])
def test_glass_and_ink_come_out_alike(glass: tuple[float, float, float], ink: float) -> None:
    picture = section(glass, ink)
    balance = find_balance(picture)
    evened = Balanced(ArrayReader(np.moveaxis(picture, 2, 0)), balance).read(Box(0, 96, 0, 128))
    bare = np.median(evened[:, :10].reshape(3, -1), axis=1)
    assert np.abs(bare - WHITE).max() <= 2 * balance.gain
    density = -np.log(evened / WHITE).mean(axis=0)
    assert np.percentile(density[density > 0.15], 75) == pytest.approx(INK, abs=0.12)


def test_fill_is_not_glass() -> None:
    picture = section((225.0, 222.0, 228.0), 0.5)
    expected = find_balance(picture)
    picture[:40] = 255
    picture[80:] = 0
    found = find_balance(picture)
    assert np.abs(np.array(found.glass) - expected.glass).max() <= 1
    assert found.gain == pytest.approx(expected.gain, rel=0.1)


def test_a_picture_of_nothing_is_left_as_it_is() -> None:
    balance = find_balance(np.full((20, 20, 3), 243, np.uint8))
    assert balance == Balance((243.0, 243.0, 243.0), 1.0)
    assert balance.table()[0, 243] == WHITE


def test_boxes_do_not_matter() -> None:
    picture = np.moveaxis(section((240.0, 235.0, 238.0), 0.6), 2, 0)
    reader = Balanced(ArrayReader(picture), Balance((240.0, 235.0, 238.0), 1.7))
    whole = reader.read(Box(0, 96, 0, 128)).copy()
    assert np.array_equal(whole, np.stack([reader.balance.table()[c][picture[c]] for c in range(3)]))
    for box in (Box(3, 50, 7, 90), Box(95, 96, 0, 1)):
        rows, cols = box.slices()
        assert np.array_equal(reader.read(box), whole[:, rows, cols])


def test_one_channel_is_refused() -> None:
    with pytest.raises(ShapeError, match="three channels"):
        Balanced(ArrayReader(np.zeros((1, 4, 4), np.uint8)), Balance((240.0, 240.0, 240.0), 1.0))


@pytest.mark.skipif("WHOLEGRAD_DATA" not in os.environ, reason="WHOLEGRAD_DATA names no folder of real slides")
def test_real_glass_is_found() -> None:
    path = next((Path(os.environ["WHOLEGRAD_DATA"]) / "slides").glob("CMU-1*.svs"))
    with open_slide(path) as slide:
        balance = find_balance(thumbnail(slide, 512))
        assert all(240 <= value <= 248 for value in balance.glass)
        assert Balanced(slide, balance).mpp == slide.mpp

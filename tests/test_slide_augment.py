"""Transforms of readers: the same bits however they are cut, and what a plain whole-image computation gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wholegrad.errors import ShapeError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import ArrayReader
from wholegrad.slide.augment import Framed, Transformed, Turned
from wholegrad.slide.augment.blocks import LARGEST, blocks
from wholegrad.slide.augment.blur import LARGEST_SIGMA, Blurred, gaussian_weights
from wholegrad.slide.augment.colour import Coloured
from wholegrad.slide.augment.tones import Colour, reference, tone_table
from wholegrad.slide.reader import MapReader

Pixels = npt.NDArray[np.uint8]
STRONG = Colour((1.2, 0.8, 1.1), (0.1, -0.05, 0.2), contrast=1.3, brightness=-0.1)


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)


def interleaved(pixels: Pixels) -> ArrayReader:
    """A reader that gives views with the strides of a slide's: channels last in memory."""
    return ArrayReader(np.ascontiguousarray(pixels.transpose(1, 2, 0)).transpose(2, 0, 1))


def whole(reader: MapReader) -> Pixels:
    """The whole map in one read."""
    _, height, width = reader.shape
    return np.array(reader.read(Box(0, height, 0, width)))


def everything(reader: MapReader) -> Transformed:
    """Every transform, one on the other."""
    framed = Framed(reader, Box(-7, 60, 5, 120), fill_value=255)
    return Coloured(Blurred(Turned(framed, quarters=1, flip=True), sigma=1.3), STRONG)


MADE: dict[str, Callable[[MapReader], Transformed]] = {
    "inside": lambda reader: Framed(reader, Box(3, 50, 11, 90)),
    "beyond": lambda reader: Framed(reader, Box(-9, 75, -4, 130), fill_value=255),
    "elsewhere": lambda reader: Framed(reader, Box(500, 540, 500, 560), fill_value=3),
    "in a colour": lambda reader: Framed(reader, Box(-9, 75, -4, 130), fill_value=(235, 230, 238)),
    "turned": lambda reader: Turned(reader, 1),
    "flipped and turned": lambda reader: Turned(reader, 3, flip=True),
    "blurred": lambda reader: Blurred(reader, 2.1),
    "tones": lambda reader: Coloured(reader, Colour(contrast=0.7, brightness=0.1)),
    "stain": lambda reader: Coloured(reader, STRONG),
    "everything": everything,
}


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=25)
@given(data=st.data())
def test_a_box_is_that_part_of_the_whole(name: str, data: st.DataObject) -> None:
    reader = MADE[name](interleaved(noise(64, 100)))
    _, height, width = reader.shape
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = Box(y0, data.draw(st.integers(y0 + 1, height)), x0, data.draw(st.integers(x0 + 1, width)))
    rows, cols = box.slices()
    expected = whole(reader)[:, rows, cols]
    assert np.array_equal(reader.read(box), expected)
    into = np.zeros_like(expected)
    reader.read_into(box, into)
    assert np.array_equal(into, expected)


@pytest.mark.parametrize("name", MADE)
def test_cutting_into_blocks_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A box larger than a block, then the same in blocks of another size."""
    pixels = noise(700, 1300)
    large = whole(MADE[name](ArrayReader(pixels)))
    monkeypatch.setattr("wholegrad.slide.augment.blocks.SIDE", 97)
    monkeypatch.setattr("wholegrad.slide.augment.blocks.LARGEST", 130)
    assert np.array_equal(whole(MADE[name](ArrayReader(pixels))), large)


def test_blocks_partition_a_box() -> None:
    box = Box(5, 5 + 3 * LARGEST, 9, 1000)
    seen = np.zeros((2000, 1000), np.uint8)
    for block in blocks(box):
        rows, cols = block.slices()
        seen[rows, cols] += 1
    expected = np.zeros_like(seen)
    expected[5 : 5 + 3 * LARGEST, 9:1000] = 1
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("flip", [False, True])
def test_turns_are_numpys(quarters: int, flip: bool) -> None:
    pixels = noise(31, 47)
    expected = np.rot90(pixels[..., ::-1] if flip else pixels, quarters, axes=(1, 2))
    assert np.array_equal(whole(Turned(ArrayReader(pixels), quarters, flip)), expected)


def test_a_frame_beyond_the_map_is_filled() -> None:
    pixels = noise(10, 12)
    expected = np.pad(pixels, ((0, 0), (3, 5), (2, 4)), constant_values=255)
    assert np.array_equal(whole(Framed(ArrayReader(pixels), Box(-3, 15, -2, 16), 255)), expected)
    coloured = whole(Framed(ArrayReader(pixels), Box(-3, 15, -2, 16), (1, 2, 3)))
    assert coloured[:, 0, 0].tolist() == [1, 2, 3] and np.array_equal(coloured[:, 3:13, 2:14], expected[:, 3:13, 2:14])


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_blur_is_a_gaussian_with_the_borders_pixel_repeated(sigma: float) -> None:
    pixels = noise(40, 53)
    weights = gaussian_weights(sigma).astype(np.float64) / 4096
    reach = len(weights) // 2
    padded = np.pad(pixels.astype(np.float64), ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    rows = sum(w * padded[:, k : k + 40] for k, w in enumerate(weights))
    expected = sum(w * rows[:, :, k : k + 53] for k, w in enumerate(weights))
    assert np.array_equal(whole(Blurred(interleaved(pixels), sigma)), np.floor(expected + 0.5))
    exact = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    assert np.abs(weights - exact / exact.sum()).max() < 5 / 4096


def test_blur_keeps_a_constant_and_refuses_what_its_halo_cannot_hold() -> None:
    white = ArrayReader(np.full((3, 30, 30), 255, np.uint8))
    assert (whole(Blurred(white, LARGEST_SIGMA)) == 255).all()
    with pytest.raises(ShapeError, match="blur of sigma 50"):
        Blurred(white, 50)


@pytest.mark.parametrize("seed", range(4))
def test_stain_jitter_is_the_formula_to_a_level(seed: int) -> None:
    rng = np.random.default_rng(seed)
    colour = Colour(tuple(rng.uniform(0.85, 1.15, 3)), tuple(rng.uniform(-0.1, 0.1, 3)))
    pixels = noise(200, 200, seed)
    apart = np.abs(whole(Coloured(interleaved(pixels), colour)).astype(int) - reference(pixels, colour))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.03


def test_no_change_is_no_change() -> None:
    pixels = noise(50, 60)
    assert np.array_equal(whole(Coloured(ArrayReader(pixels), Colour())), pixels)
    nearly = Colour(scale=(1.0, 1.0, 1.0 + 1e-12))
    assert nearly.stains
    apart = np.abs(whole(Coloured(ArrayReader(pixels), nearly)).astype(int) - pixels)
    assert apart[pixels > 0].max() == 0


def test_tones() -> None:
    table = tone_table(Colour(contrast=2.0, brightness=0.1))
    assert (table[0], table[255]) == (0, 255)
    assert table[128] == 154  # 0.5 * 2 + 127.5 + 25.5
    assert (np.diff(table.astype(int)) >= 0).all()


def test_more_haematoxylin_is_bluer_and_darker() -> None:
    pink = np.tile(np.array([200, 150, 190], np.uint8)[:, None, None], (1, 2, 2))
    more = whole(Coloured(ArrayReader(pink), Colour(scale=(1.5, 1.0, 1.0)))).astype(int)
    assert (more <= pink).all() and (pink - more)[0].min() > (pink - more)[2].max()


def test_memory_is_that_of_blocks_whatever_the_box() -> None:
    reader = ArrayReader(np.broadcast_to(np.uint8(7), (3, 1 << 15, 1 << 15)))
    chain = Coloured(Blurred(Turned(Framed(reader, Box(0, 1 << 15, -9, 1 << 15)), 1), 2.0), STRONG)
    assert 3 * LARGEST**2 < chain.cache_bytes < 60 << 20
    chain.read(Box(0, 2000, 0, 2000))
    inner = [chain._reader, chain._reader._reader, chain._reader._reader._reader]  # type: ignore[attr-defined]
    assert all(each._buffer._local.size <= 3 * LARGEST**2 for each in inner)

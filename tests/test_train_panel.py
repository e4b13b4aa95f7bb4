"""Panels: the colours mean what the legend says, and any shape of slide makes a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wholegrad.train.panel import EXTRA, MISSED, RIGHT, draw_panel, outline


@pytest.mark.parametrize("size", [(60, 80), (40, 160), (160, 40), (3, 5)])
@pytest.mark.parametrize("known", [True, False])
def test_any_shape(tmp_path: Path, size: tuple[int, int], known: bool) -> None:
    slide = np.full((*size, 3), 240, np.uint8)
    truth = np.zeros(size, np.uint8)
    truth[: size[0] // 2] = 1
    draw_panel(tmp_path / "p.png", slide, truth if known else None, truth, "title", "caption")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width >= size[1]
        assert picture.height >= size[0]


def test_right_wrong_and_missed_have_their_colours(tmp_path: Path) -> None:
    slide = np.full((60, 60, 3), 240, np.uint8)
    truth, said = np.zeros((2, 60, 60), np.uint8)
    truth[10:30, 10:50], said[20:40, 10:50] = 1, 1
    draw_panel(tmp_path / "p.png", slide, truth, said, "t")
    with Image.open(tmp_path / "p.png") as picture:
        found = {colour for _, colour in picture.getcolors(1 << 16) or []}
    assert {RIGHT, EXTRA, MISSED} <= found


def test_the_outline_lies_inside_and_not_on_the_pictures_border() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:, :5] = True
    expected = np.zeros((8, 8), bool)
    expected[:, 3:5] = True
    assert np.array_equal(outline(mask), expected)

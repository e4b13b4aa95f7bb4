"""Tidied masks: what connected components say, whatever the bands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from wholegrad.slide.tidy import tidied


def by_components(mask: np.ndarray, min_area: float, min_hole: float) -> np.ndarray:
    """Pieces and holes hang together by the sides of pixels, as outlines have them."""
    kept = np.zeros_like(mask)
    pieces, count = ndimage.label(mask)
    for number in range(1, count + 1):
        piece = pieces == number
        enclosed = ndimage.binary_fill_holes(piece)
        if enclosed.sum() < min_area:
            continue
        holes, holes_count = ndimage.label(enclosed & ~piece)
        sizes = np.bincount(holes.ravel(), minlength=holes_count + 1)
        kept |= (enclosed & ~((sizes >= min_hole)[holes] & (holes > 0))).astype(np.uint8)
    return kept


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([0, 2, 6, 20]), st.sampled_from([0, 2, 6, 20]))
def test_tidied_masks_are_those_of_connected_components(seed: int, band: int, area: int, hole: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = (rng.random((6, 7)) < 0.6).astype(np.uint8).repeat(3, 0).repeat(3, 1)
    mask = np.where(rng.random(coarse.shape) < 0.1, 1 - coarse, coarse).astype(np.uint8)
    painting = tidied((mask[y : y + band] for y in range(0, len(mask), band)), mask.shape[1], area, hole)
    found = np.concatenate([rows for _, rows in painting.bands(band)])
    assert np.array_equal(found, by_components(mask, area, hole))


@pytest.mark.parametrize("value", [0, 1])
def test_nothing_and_everything_stay(value: int) -> None:
    mask = np.full((5, 8), value, np.uint8)
    assert np.array_equal(tidied([mask], 8, 3, 3).rows(0, 5), mask)


def test_a_piece_within_a_filled_hole_is_filled_over() -> None:
    mask = np.ones((9, 9), np.uint8)
    mask[2:7, 2:7] = 0
    mask[4, 4] = 1
    assert tidied([mask], 9, 0, 30).rows(0, 9).all()

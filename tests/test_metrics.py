"""Metrics agree with torchmetrics and MONAI, ignore what is to be ignored, and do not depend on the bands."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from wholegrad.errors import ConfigError, ShapeError
from wholegrad.metrics import compare as module
from wholegrad.metrics.boundary import Edges
from wholegrad.metrics.compare import METRICS, compare
from wholegrad.metrics.summary import summarise
from wholegrad.slide.arrays import as_reader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
    from monai.metrics.utils import get_edge_surface_distance
    from torchmetrics.functional.classification import multiclass_jaccard_index, multiclass_precision, multiclass_recall
    from torchmetrics.functional.segmentation import dice_score


def blobs(seed: int, classes: int = 3, size: tuple[int, int] = (70, 90)) -> Any:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((classes, *size)), (0, 5, 5))
    return noise.argmax(0).astype(np.uint8)


def score(predicted: Any, true: Any, **options: Any) -> Any:
    return compare(as_reader(predicted), as_reader(true), **{"mpp": 1.0, "tolerance": 3.0, **options})


@pytest.mark.parametrize("seed", range(5))
def test_counts_agree_with_torchmetrics(seed: int) -> None:
    predicted, true = blobs(seed), blobs(seed + 50)
    found = score(predicted, true)
    a, b = (torch.from_numpy(labels.astype(np.int64))[None] for labels in (predicted, true))
    wanted = {
        "iou": multiclass_jaccard_index(a, b, 3, average=None),
        "precision": multiclass_precision(a, b, 3, average=None),
        "recall": multiclass_recall(a, b, 3, average=None),
        "dice": dice_score(a, b, 3, average=None, input_format="index")[0],
    }
    for one in found.classes:
        assert one.counts.pixels == true.size
        for name, values in wanted.items():
            assert METRICS[name](one) == pytest.approx(float(values[one.label]), rel=1e-6)
    assert found.value("dice") == pytest.approx(float(wanted["dice"][1:].mean()), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI of itself
@pytest.mark.parametrize("seed", range(8))
def test_distances_agree_with_monai(seed: int) -> None:
    predicted, true = (blobs(seed + add) == 1 for add in (0, 50))
    mpp = 0.5
    (one,) = score(predicted.astype(np.uint8), true.astype(np.uint8), mpp=mpp).classes
    a, b = (torch.from_numpy(labels.astype(np.float32))[None, None] for labels in (predicted, true))
    both = {"include_background": True, "spacing": mpp}
    assert one.distances.hausdorff95 == pytest.approx(float(compute_hausdorff_distance(a, b, percentile=95, **both)))
    mean = float(compute_average_surface_distance(a, b, symmetric=True, **both))
    assert one.distances.mean == pytest.approx(mean, rel=1e-5)
    _, (there, back), _ = get_edge_surface_distance(a[0, 0].bool(), b[0, 0].bool(), spacing=(mpp, mpp), symmetric=True)
    p, r = ((np.asarray(d) <= 3.0).mean() for d in (there, back))
    assert one.distances.f1 == pytest.approx(2 * p * r / (p + r))


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, true = blobs(1), blobs(2)
    true[20:40, 10:50] = 255
    whole = score(predicted, true)
    for step in (16, 17, 69):
        monkeypatch.setattr(module, "BAND_BYTES", step * 90)
        assert score(predicted, true) == whole
    for rows in (1, 2, 5):
        edges = Edges(90)
        for top in range(0, 70, rows):
            edges.add(predicted[top : top + rows], true[top : top + rows])
        edges.finish()
        inside = (predicted == 1) & (true != 255)
        other = (predicted != 1) & (true != 255)
        wanted = inside & ndimage.binary_dilation(np.pad(other, 1, constant_values=True))[1:-1, 1:-1]
        assert np.array_equal(edges.of(1)[0], np.argwhere(wanted))


def test_ignored_pixels_count_nowhere() -> None:
    predicted, true = blobs(3), blobs(4)
    true[:, 40:60] = 255
    one = score(predicted, true)
    predicted[:, 41:59] = np.random.default_rng(0).integers(0, 3, (70, 18))
    assert score(predicted, true).classes[0].counts == one.classes[0].counts
    keep = true != 255
    first = one.classes[0].counts
    assert first.tp == ((predicted == 1) & (true == 1))[keep].sum() and first.pixels == keep.sum()
    points = Edges(90)
    points.add(np.ones((70, 90), np.uint8), np.where(keep, np.uint8(1), np.uint8(255)))
    points.finish()
    assert not np.isin(points.of(1)[0][:, 1], np.arange(39, 61)).all()
    assert set(np.unique(points.of(1)[0][1:-1, 1])) >= {0, 89}
    middle = points.of(1)[0][(points.of(1)[0][:, 0] > 0) & (points.of(1)[0][:, 0] < 69)]
    assert set(middle[:, 1]) == {0, 89}  # no boundary along what is ignored


def test_nothing_against_nothing_is_right_and_against_something_is_not() -> None:
    empty, some = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    some[5:10, 5:10] = 1
    both, extra, missed = score(empty, empty), score(some, empty), score(empty, some)
    assert [both.value(name) for name in METRICS] == [1, 1, 1, 1, 1, 0, 0]
    assert [extra.value(name) for name in METRICS] == [0, 0, 0, 1, 0, None, None]
    assert [missed.value(name) for name in METRICS] == [0, 0, 1, 0, 0, None, None]
    assert score(some, some, mpp=None).value("boundary_f1") is None


def test_bad_maps_are_refused() -> None:
    labels = np.zeros((20, 30), np.uint8)
    with pytest.raises(ShapeError, match="give two label maps"):
        score(labels, labels[:10])
    with pytest.raises(ShapeError, match="give two label maps"):
        score(labels.astype(np.int16), labels)
    with pytest.raises(ShapeError, match="holds label 255"):
        score(labels + np.uint8(255), labels)
    with pytest.raises(ConfigError, match="give a positive number"):
        score(labels, labels, tolerance=-1)


def test_summaries() -> None:
    values = np.random.default_rng(0).normal(0.9, 0.05, 30).tolist()
    found = summarise([*values, None], seed=3)
    assert (found.slides, found.missing) == (30, 1)
    assert found.mean == pytest.approx(np.mean(values)) and found.deviation == pytest.approx(np.std(values, ddof=1))
    half = 1.96 * np.std(values) / np.sqrt(30)
    assert found.low == pytest.approx(np.mean(values) - half, abs=0.004)
    assert found.high == pytest.approx(np.mean(values) + half, abs=0.004)
    assert summarise([*values, None], seed=3) == found != summarise(values, seed=4)
    assert summarise([0.5]).low is None and summarise([None]).mean is None

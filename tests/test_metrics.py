"""Metrics agree with torchmetrics and MONAI, ignore what is to be ignored, and do not depend on the bands."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from wholegrad.cli import main
from wholegrad.errors import ConfigError, ShapeError, SlideError
from wholegrad.metrics import boundary, nearest
from wholegrad.metrics import compare as module
from wholegrad.metrics.compare import METRICS, compare
from wholegrad.metrics.edges import Bands
from wholegrad.metrics.files import Pair, find_pairs, opened
from wholegrad.metrics.summary import summarise
from wholegrad.slide.arrays import as_reader
from wholegrad.slide.write import PyramidWriter

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


def edges_of(labels: Any, true: Any, label: int) -> Any:
    """Boundary pixels ``(n, 2)`` by morphology: those that a pixel of another label, or the map's edge, touches."""
    inside = (labels == label) & (true != 255)
    other = (labels != label) & (true != 255)
    touched = ndimage.binary_dilation(np.pad(other, 1, constant_values=True))[1:-1, 1:-1]
    return np.argwhere(inside & touched)


def with_trees(predicted: Any, true: Any, label: int, tolerance: float, mpp: float) -> tuple[float, float, float]:
    """Boundary F1, Hausdorff-95 and mean distance of all boundary pixels at once, by k-d trees."""
    a, b = (edges_of(labels, true, label) for labels in (predicted, true))
    there, back = (cKDTree(others).query(points)[0] * mpp for points, others in ((a, b), (b, a)))
    p, r = ((apart <= tolerance * (1 + 1e-9)).mean() for apart in (there, back))
    f1 = 2 * p * r / (p + r) if p + r else 0.0
    return f1, max(np.percentile(there, 95), np.percentile(back, 95)), np.concatenate([there, back]).mean()


def far_apart() -> tuple[Any, Any]:
    """Two boundaries that are hundreds of pixels apart, ragged and in several labels."""
    rng = np.random.default_rng(5)
    predicted, true = np.zeros((1300, 700), np.uint8), np.zeros((1300, 700), np.uint8)
    predicted[:40] = rng.choice(np.array([0, 1, 2], np.uint8), (40, 700))
    true[1280:, 300:320] = rng.choice(np.array([0, 1, 2], np.uint8), (20, 20))
    true[700:720] = 255
    return predicted, true


def ragged() -> tuple[Any, Any]:
    rng = np.random.default_rng(6)
    predicted, true = (rng.choice(np.array([0, 1, 2], np.uint8), (90, 130), p=(0.9, 0.08, 0.02)) for _ in range(2))
    true[30:50, 20:60] = 255
    return predicted, true


def empty_columns() -> tuple[Any, Any]:
    """Boundaries in few columns, one of them at the map's corner."""
    predicted, true = np.zeros((200, 300), np.uint8), np.zeros((200, 300), np.uint8)
    predicted[::3, 290], true[199, 0], true[0, 2] = 1, 1, 1
    return predicted, true


@pytest.mark.parametrize("make", [far_apart, ragged, empty_columns])
@pytest.mark.parametrize("patience", [0, 8])
def test_distances_are_those_of_all_boundary_pixels_at_once(
    make: Callable[[], tuple[Any, Any]], patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted, true = make()
    monkeypatch.setattr(nearest, "PATIENCE", patience)  # whether rows are done at once: read when compiled
    monkeypatch.setattr(nearest, "_measure", numba.njit(nearest._measure.py_func))
    for rows in (16, 37, 5000):
        monkeypatch.setattr(boundary, "BAND_BYTES", rows * true.shape[1])
        for one in score(predicted, true, mpp=0.25, tolerance=4.0).classes:
            f1, worst, mean = with_trees(predicted, true, one.label, 4.0, 0.25)
            assert one.distances.f1 == f1
            assert one.distances.hausdorff95 == pytest.approx(worst, rel=2.2e-5 if worst > 512 * 0.25 else 1e-12)
            assert one.distances.mean == pytest.approx(mean, rel=1e-12)


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for predicted, true in ((blobs(1), blobs(2)), ragged(), far_apart()):
        true[20:40, 10:50] = 255
        whole = score(predicted, true)
        for step in (16, 17, 69):
            for each in (module, boundary):
                monkeypatch.setattr(each, "BAND_BYTES", step * true.shape[1])
            assert score(predicted, true) == whole
            counted = score(predicted, true, boundaries=False)
            assert [one.counts for one in counted.classes] == [one.counts for one in whole.classes]
        monkeypatch.undo()


def test_boundary_pixels_are_those_of_morphology_whatever_the_bands() -> None:
    predicted, true = blobs(1), blobs(2)
    true[20:40, 10:50] = 255
    for rows in (1, 2, 5, 70):
        bands = Bands(as_reader(predicted), as_reader(true), rows)
        found = np.concatenate([bands[number].edges for number in range(len(bands))], axis=1)
        for which, labels in enumerate((predicted, true)):
            for label in (1, 2):
                assert np.array_equal(np.argwhere(found[which] == label), edges_of(labels, true, label))


def test_ignored_pixels_count_nowhere() -> None:
    predicted, true = blobs(3), blobs(4)
    true[:, 40:60] = 255
    one = score(predicted, true)
    predicted[:, 41:59] = np.random.default_rng(0).integers(0, 3, (70, 18))
    assert score(predicted, true) == one
    keep = true != 255
    first = one.classes[0].counts
    assert first.tp == ((predicted == 1) & (true == 1))[keep].sum() and first.pixels == keep.sum()
    band = Bands(as_reader(np.ones((70, 90), np.uint8)), as_reader(np.where(keep, np.uint8(1), np.uint8(255))), 70)[0]
    assert not band.edges[:, :, 40:60].any()
    assert set(np.nonzero(band.edges[0, 1:-1])[1]) == {0, 89}  # no boundary along what is ignored


class Made:
    """A label map ``(1, H, W)`` that is made when it is read: ragged everywhere, of any height."""

    dtype, cache_bytes, name = np.dtype(np.uint8), 0, "made"

    def __init__(self, height: int, width: int, seed: int) -> None:
        self.shape, self._seed = (1, height, width), seed

    def read(self, box: Any) -> Any:
        y, x = np.arange(box.y0, box.y1)[:, None], np.arange(box.x0, box.x1)
        return (((y * 7919 + x * 104729 + self._seed * y * x) >> 3) % 5 == 0).astype(np.uint8)[None]


def test_memory_does_not_grow_with_the_length_of_the_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "BAND_BYTES", 64 << 10)
    width, heights = 1000, (64, 1500, 6000)
    score(Made(*(64, width), 1), Made(*(64, width), 2), tolerance=1.5)  # whatever is loaded first
    peaks, lengths = [], []
    for height in heights:
        tracemalloc.start()
        (one,) = score(Made(height, width, 1), Made(height, width, 2), tolerance=1.5).classes
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        lengths.append(one.counts.tp + one.counts.fp)  # all of which are boundary
    assert lengths[2] > 3.9 * lengths[1] and lengths[2] * 12 > 10 << 20  # what holding each of them would take
    columns = 2 * 2 * 4 * width  # of one label, above and below, in both maps
    assert peaks[2] - peaks[1] < 20 * columns < 400_000
    assert peaks[2] < peaks[0] + 5 << 20


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


SQUARES = {"Tissue": (40, 80, 240, 280), "Fold": (200, 120, 280, 200)}  # x0, y0, x1, y1 in level-0 pixels
SCALE = 4


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A slide of 400 x 600 pixels at 0.5 um, two areas on it as outlines, and as labels at 2 um."""
    with PyramidWriter(tmp_path / "case.tif", (3, 400, 600), mpp=0.5) as slide:
        slide.write_rows(np.full((400, 600, 3), 240, np.uint8))
    features, labels = [], np.zeros((400 // SCALE, 600 // SCALE), np.uint8)
    for label, (name, (x0, y0, x1, y1)) in enumerate(SQUARES.items(), 1):
        ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        shape = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": shape, "properties": {"classification": {"name": name}}})
        labels[y0 // SCALE : y1 // SCALE, x0 // SCALE : x1 // SCALE] = label
    (tmp_path / "both.geojson").write_text(json.dumps(features))
    (tmp_path / "case.mask.geojson").write_text(json.dumps(features[:1]))
    Image.fromarray(labels).save(tmp_path / "both.png")
    x0, y0, x1, y1 = (side // SCALE for side in SQUARES["Tissue"])
    labels[...], labels[y0:y1, x0:x1] = 0, 1
    Image.fromarray(labels).save(tmp_path / "case.mask.png")
    np.save(tmp_path / "case.npy", labels[None])
    return tmp_path


def evaluated(folder: Path, *argv: str) -> Any:
    paths = [part if part.startswith("--") or part in SQUARES else str(folder / part) for part in argv]
    assert main(["evaluate", *paths, "--json", str(folder / "scores.json")]) == 0
    return json.loads((folder / "scores.json").read_text())["slides"]


def test_outlines_and_pictures_are_scored_on_their_slide(drawn: Path) -> None:
    classes = ("--class", "Tissue", "--class", "Fold")
    (one,) = evaluated(drawn, "--prediction", "both.png", "--mask", "both.geojson", "--slides", "case.tif", *classes)
    exact = {name: 0 if name.endswith("_um") else 1 for name in METRICS}
    assert {name: one[name] for name in METRICS} == exact and [each["label"] for each in one["classes"]] == [1, 2]
    assert [each["tp"] for each in one["classes"]] == [50 * 50 - 10 * 20, 20 * 20]
    ignored = ("--class", "Tissue", "--ignore", "Fold")
    (one,) = evaluated(drawn, "--prediction", "case.npy", "--mask", "both.geojson", "--slides", "case.tif", *ignored)
    assert one["dice"] == 1 and one["classes"][0]["tp"] == 50 * 50 - 10 * 20
    assert one["classes"][0]["tn"] == 100 * 150 - 50 * 50 - 10 * 20
    (one,) = evaluated(drawn, "--prediction", "case.mask.geojson", "--mask", "case.mask.png", "--slides", "case.tif")
    assert one["dice"] == 1 and one["classes"][0]["tp"] == 50 * 50
    outlines = "case.mask.geojson"
    (one,) = evaluated(drawn, "--prediction", outlines, "--mask", outlines, "--slides", "case.tif")
    assert one["dice"] == 1 and one["classes"][0]["tp"] == 200 * 200
    (drawn / "pairs.csv").write_text("prediction,mask,slide\ncase.npy,case.mask.geojson,case.tif\n")
    (one,) = evaluated(drawn, "--pairs", "pairs.csv")
    assert one["name"] == "case" and one["dice"] == 1 and one["boundary_f1"] == 1


def test_folders_with_several_files_of_a_name_and_their_slides(drawn: Path) -> None:
    for name in ("predictions", "masks", "slides"):
        (drawn / name).mkdir()
    for name in ("case.npy", "case.mask.geojson", "case.mask.png"):
        shutil.copy(drawn / name, drawn / "predictions")
    shutil.copy(drawn / "case.mask.geojson", drawn / "masks")
    shutil.copy(drawn / "case.tif", drawn / "slides")
    (one,) = evaluated(drawn, "--prediction", "predictions", "--mask", "masks", "--slides", "slides")
    assert one["dice"] == 1 and one["classes"][0]["tp"] == 50 * 50
    (pair,) = find_pairs(drawn / "predictions", drawn / "masks")
    assert pair.predicted.name == "case.npy" and pair.slide is None


def test_what_cannot_be_placed_is_refused(drawn: Path) -> None:
    def opens(predicted: str, true: str, slide: str | None = None) -> None:
        pair = Pair("case", drawn / predicted, drawn / true, slide and drawn / slide)  # type: ignore[arg-type]
        with opened(pair):
            pass

    with pytest.raises(ConfigError, match=r"geojson: is outlines, .* of unknown size; give the slide with --slides"):
        opens("case.npy", "case.mask.geojson")
    with pytest.raises(SlideError, match=r"both\.geojson: holds 2 classes"):
        opens("case.npy", "both.geojson", "case.tif")
    np.save(drawn / "other.npy", np.zeros((100, 100), np.uint8))
    with pytest.raises(SlideError, match=r"is 100 x 100 pixels, which is not .*case\.tif \(400 x 600\)"):
        opens("other.npy", "case.mask.geojson", "case.tif")
    white = np.zeros((100, 150), np.uint8)
    white[20:40] = 255
    Image.fromarray(white).save(drawn / "white.png")
    with pytest.raises(SlideError, match=r"white\.png: holds 0 and 255 alone, .*; write classes as 1, 2, \.\.\."):
        opens("case.npy", "white.png")
    (drawn / "bad.npy").write_bytes(b"no array")
    (drawn / "bad.zarr").mkdir()
    bad = {"bad.npy": "is not a .npy file", "bad.zarr": "cannot be read as Zarr", "no.png": "cannot be decoded"}
    for name, said in bad.items():
        with pytest.raises(SlideError, match=rf"{name}: .*{said}"):
            opens(name, "case.npy")
    with pytest.raises(ConfigError, match="is one slide, and masks are folders"):
        find_pairs(drawn, drawn, drawn / "case.tif")

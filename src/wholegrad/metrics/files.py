"""Pairs of label files to compare: which belong together, on which grid they are compared, how many um a pixel has."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.mask import open_mask
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.reader import MapReader
from wholegrad.slide.tiff import read_container

ENDINGS = (".mask.ome.tif", ".mask.tif", ".mask.tiff", ".ome.tif", ".ome.tiff", ".tif", ".tiff", ".zarr", ".npy")
OUTLINES = (".geojson", ".json", ".xml")


@dataclass(frozen=True)
class Pair:
    """A predicted and a true label file of the slide ``name``."""

    name: str
    predicted: Path
    true: Path


@dataclass(frozen=True)
class Frame:
    """The grid ``(1, H, W)`` on which two label maps are compared; stands for a slide where masks ask for one."""

    name: str
    shape: tuple[int, int, int]
    mpp: float | None
    cache_bytes: int = 0

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(np.uint8)

    def read(self, box: Box) -> npt.NDArray[Any]:
        raise SlideError(self.name, "has no pixels", "read one of the masks on it")


def find_pairs(predicted: Path, true: Path) -> list[Pair]:
    """Two files, or the files of two folders whose names agree but for their endings.

    Raises:
        ConfigError: one is missing, or a prediction has no mask.
    """
    for path in (predicted, true):
        if not path.exists():
            raise ConfigError(str(path), "does not exist", "check the path")
    if predicted.is_dir() != true.is_dir() and not predicted.name.endswith(".zarr"):
        raise ConfigError(str(predicted), "and the masks are a folder and a file", "give two files, or two folders")
    if not true.is_dir():
        return [Pair(stem(predicted), predicted, true)]
    masks, found = _by_stem(true), _by_stem(predicted)
    if not found:
        raise ConfigError(str(predicted), "holds no label file", f"write predictions as {', '.join(ENDINGS[3:])}")
    lost = [name for name in found if name not in masks]
    if lost:
        raise ConfigError(str(found[lost[0]]), f"has no mask of its name in {true}", "name the mask alike")
    return [Pair(name, path, masks[name]) for name, path in found.items()]


def read_pairs(path: Path) -> list[Pair]:
    """The rows of a CSV file with columns ``prediction`` and ``mask``, and ``name`` if need be; relative to its folder.

    Raises:
        ConfigError: it cannot be read, or lacks a column.
    """
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "give a CSV file") from None
    if not rows or not {"prediction", "mask"} <= rows[0].keys():
        raise ConfigError(str(path), "has no rows with columns prediction and mask", "add a header with these names")
    for number, row in enumerate(rows, 2):
        if not row["prediction"] or not row["mask"]:
            raise ConfigError(f"{path}, line {number}", "names no prediction or no mask", "fill in both columns")
    found = [(path.parent / row["prediction"], path.parent / row["mask"], row.get("name")) for row in rows]
    return [Pair(name or stem(predicted), predicted, true) for predicted, true, name in found]


@contextmanager
def opened(pair: Pair, mpp: float | None = None) -> Iterator[tuple[MapReader, MapReader, float | None]]:
    """Both maps on the grid of the prediction, and um a pixel.

    Raises:
        SlideError: one cannot be read, or they show different fields of view.
        ConfigError: one is outlines, which do not tell the size of their slide.
    """
    for path in (pair.predicted, pair.true):
        if path.suffix.lower() in OUTLINES:
            raise ConfigError(str(path), "is outlines, which have no pixels to count", "give the mask as .tif or .zarr")
    (height, width), own = _grid(pair.predicted)
    if own is None:
        (_, true_width), own = _grid(pair.true)
        own = own and own * true_width / width
    frame = Frame(pair.name, (1, height, width), own if mpp is None else mpp)
    predicted, true = (open_mask(_source(path), like=frame) for path in (pair.predicted, pair.true))
    try:
        yield predicted, true, frame.mpp
    finally:
        predicted.close()
        true.close()


def stem(path: Path) -> str:
    """A file's name without its ending."""
    return next((path.name[: -len(end)] for end in ENDINGS if path.name.lower().endswith(end)), path.stem)


def _by_stem(folder: Path) -> dict[str, Path]:
    return {stem(path): path for path in sorted(folder.iterdir()) if path.name.lower().endswith(ENDINGS)}


def _grid(path: Path) -> tuple[tuple[int, int], float | None]:
    """Height and width, and um a pixel if the file tells."""
    if path.suffix.lower() == ".npy":
        shape = np.load(_readable(path), mmap_mode="r").shape
        return (shape[-2], shape[-1]), None
    if _is_zarr(path):
        node = _zarr(path)
        scale = dict(node.attrs)["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
        known = "unit" in dict(node.attrs)["multiscales"][0]["axes"][-1]
        return node["0"].shape[-2:], float(scale[-1]) if known else None
    file = PositionedFile(path)
    try:
        container = read_container(path, file.size)
    finally:
        file.close()
    return (container.levels[0].height, container.levels[0].width), container.mpp


def _is_zarr(path: Path) -> bool:
    return path.suffix.lower() == ".zarr"


def _zarr(path: Path) -> Any:
    try:
        import zarr
    except ImportError:
        raise SlideError(str(path), "is a Zarr store, which zarr reads", "pip install 'wholegrad[zarr]'") from None
    try:
        return zarr.open_group(path, mode="r")
    except Exception as error:
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise SlideError(str(path), f"cannot be read as Zarr ({detail})", "write or copy it again") from None


def _source(path: Path) -> Any:
    if _is_zarr(path):
        return _zarr(path)["0"]
    return np.load(_readable(path), mmap_mode="r") if path.suffix.lower() == ".npy" else path


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise SlideError(str(path), "no such file", "check the path")
    return path

"""Pairs of label files to compare: which belong together, on which grid they are compared, how many um a pixel has.

Two label maps need nothing else. Outlines are in pixels of their slide's level 0, whose size only the slide tells.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import open_npy
from wholegrad.slide.library import library, read_by
from wholegrad.slide.mask import GEOJSON, open_mask
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.reader import MapReader
from wholegrad.slide.slide import Slide, open_slide
from wholegrad.slide.tiff import read_container

MAPS = (".mask.ome.tif", ".mask.tif", ".mask.tiff", ".ome.tif", ".ome.tiff", ".tif", ".tiff", ".zarr", ".npy")
ENDINGS = (*MAPS, ".mask.geojson", ".geojson", ".geojson.gz", ".xml", ".mask.png", ".png")  # the first that is there
SLIDES = (".ome.tif", ".ome.tiff")  # endings of slides beside those after the last dot
OUTLINES = (*GEOJSON, ".xml")


@dataclass(frozen=True)
class Pair:
    """A predicted and a true label file of the slide ``name``, and the slide's file where outlines need it."""

    name: str
    predicted: Path
    true: Path
    slide: Path | None = None


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


def find_pairs(predicted: Path, true: Path, slides: Path | None = None) -> list[Pair]:
    """Two files, or the files of two folders whose names agree but for their endings; likewise their slides.

    Raises:
        ConfigError: one is missing, or a prediction has no mask.
    """
    for path in (predicted, true, *([slides] if slides else [])):
        if not path.exists():
            raise ConfigError(str(path), "does not exist", "check the path")
    if predicted.is_dir() != true.is_dir() and not predicted.name.endswith(".zarr"):
        raise ConfigError(str(predicted), "and the masks are a folder and a file", "give two files, or two folders")
    if not true.is_dir():
        return [Pair(stem(predicted), predicted, true, slides)]
    if slides is not None and not slides.is_dir():
        raise ConfigError(str(slides), "is one slide, and masks are folders", "give the folder of the slides")
    masks, found = _by_stem(true), _by_stem(predicted)
    if not found:
        raise ConfigError(str(predicted), "holds no label file", f"write predictions as {', '.join(MAPS[3:])}")
    lost = [name for name in found if name not in masks]
    if lost:
        raise ConfigError(str(found[lost[0]]), f"has no mask of its name in {true}", "name the mask alike")
    known = {} if slides is None else {_slide_stem(path): path for path in sorted(slides.iterdir())}
    return [Pair(name, path, masks[name], known.get(name)) for name, path in found.items()]


def read_pairs(path: Path) -> list[Pair]:
    """The rows of a CSV file with columns ``prediction`` and ``mask``, perhaps ``name`` and ``slide``; from its folder.

    Raises:
        ConfigError: it cannot be read, or lacks a column.
    """
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", "check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        cause = f"is no CSV file ({' '.join(str(error).split())})"
        raise ConfigError(str(path), cause, "give a CSV file, saved as UTF-8") from None
    if not rows or not {"prediction", "mask"} <= rows[0].keys():
        raise ConfigError(str(path), "has no rows with columns prediction and mask", "add a header with these names")
    for number, row in enumerate(rows, 2):
        if not row["prediction"] or not row["mask"]:
            raise ConfigError(f"{path}, line {number}", "names no prediction or no mask", "fill in both columns")
    return [_of_row(path.parent, row) for row in rows]


def _of_row(folder: Path, row: dict[str, str]) -> Pair:
    predicted, slide = folder / row["prediction"], row.get("slide")
    name = row.get("name") or stem(predicted)
    return Pair(name, predicted, folder / row["mask"], folder / slide if slide else None)


@contextmanager
def opened(
    pair: Pair,
    mpp: float | None = None,
    classes: Mapping[str, int | None] | None = None,
    ignore: Iterable[str] | None = None,
) -> Iterator[tuple[MapReader, MapReader, float | None]]:
    """Both maps on one grid, and um a pixel: the prediction's grid; the mask's, or the slide's, if it is of outlines.

    Args:
        mpp: um a pixel of that grid, where no file tells.
        classes, ignore: what outlines mean, as for ``open_mask``.

    Raises:
        SlideError: one cannot be read, or they show different fields of view.
        ConfigError: outlines without their slide, or of classes that are not named.
    """
    grids = [None if is_outlines(path) else _grid(path) for path in (pair.predicted, pair.true)]
    if pair.slide is None and None in grids:
        path = pair.true if grids[1] is None else pair.predicted
        cause = "is outlines, which lie on a slide of unknown size"
        raise ConfigError(str(path), cause, "give the slide with --slides, or the mask as .tif, .zarr or .png")
    with ExitStack() as stack:
        slide = None if pair.slide is None else stack.enter_context(open_slide(pair.slide))
        (height, width), own = _frame(grids, slide)
        known = own if mpp is None else mpp
        like = Frame(pair.name, (1, height, width), known) if slide is None else slide
        maps = []
        for path in (pair.predicted, pair.true):
            named = (classes, ignore) if is_outlines(path) else (None, None)
            mask = stack.enter_context(open_mask(source(path), like=like, classes=named[0], ignore=named[1]))
            maps.append(mask if slide is None else mask.at(height, width))
        yield maps[0], maps[1], known


Grid = tuple[tuple[int, int], float | None]


def _frame(grids: Sequence[Grid | None], slide: Slide | None) -> Grid:
    """Height and width of the grid of comparison, and its um a pixel, which any of the files may tell."""
    on_slide = None if slide is None else (slide.shape[1:], slide.mpp)
    told = [grid for grid in (*grids, on_slide) if grid is not None]
    (height, width), _ = told[0]
    known = [mpp * other / width for (_, other), mpp in told if mpp is not None]
    return (height, width), known[0] if known else None


def is_outlines(path: Path) -> bool:
    """Whether a file holds outlines, by its name."""
    return path.name.lower().endswith(OUTLINES)


def stem(path: Path) -> str:
    """A file's name without its ending."""
    return next((path.name[: -len(end)] for end in ENDINGS if path.name.lower().endswith(end)), path.stem)


def _slide_stem(path: Path) -> str:
    return next((path.name[: -len(end)] for end in SLIDES if path.name.lower().endswith(end)), path.stem)


def _by_stem(folder: Path) -> dict[str, Path]:
    """A folder's label files by name; of several of one name the one that comes first in ``ENDINGS``."""
    found: dict[str, Path] = {}
    for ending in ENDINGS:
        for path in sorted(folder.iterdir()):
            if path.name.lower().endswith(ending):
                found.setdefault(stem(path), path)
    return dict(sorted(found.items()))


def _grid(path: Path) -> Grid:
    """Height and width, and um a pixel if the file tells."""
    if path.suffix.lower() == ".png":
        return _picture(path).shape[1:], None
    if path.suffix.lower() == ".npy":
        return open_npy(path).shape[1:], None
    if _is_zarr(path):
        with read_by(str(path), "as Zarr", "give an OME-Zarr store of labels"):
            image = dict(_zarr(path).attrs)["multiscales"][0]
            scale = image["datasets"][0]["coordinateTransformations"][0]["scale"]
            known = "unit" in image["axes"][-1]
            return _zarr(path)["0"].shape[-2:], float(scale[-1]) if known else None
    file = PositionedFile(path)
    try:
        container = read_container(path, file.size)
    finally:
        file.close()
    return (container.levels[0].height, container.levels[0].width), container.mpp


def _is_zarr(path: Path) -> bool:
    return path.suffix.lower() == ".zarr"


def _zarr(path: Path) -> Any:
    zarr = library("zarr", str(path), "a Zarr store", "zarr")
    with read_by(str(path), "as Zarr", "write or copy it again"):
        return zarr.open_group(path, mode="r")


def _picture(path: Path) -> npt.NDArray[np.uint8]:
    """The labels ``(1, h, w)`` of a PNG."""
    from wholegrad.slide.pictures import read_label_picture  # Pillow

    labels = read_label_picture(str(path))
    if set(np.unique(labels)) == {0, 255}:
        cause = "holds 0 and 255 alone, and 255 means that a pixel is not to be counted"
        raise SlideError(str(path), cause, "write classes as 1, 2, ...")
    return labels


def source(path: Path) -> Any:
    """What ``open_mask`` takes for a label file: its path, or the largest array of a Zarr store."""
    if _is_zarr(path):
        return _zarr(path)["0"]
    return path

"""Chooses by its ending what each file of a prediction is written with, and feeds them all from the same bands."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from wholegrad.errors import ConfigError, SlideError
from wholegrad.slide.arrays import as_reader
from wholegrad.slide.grid import Grid, OutlineOptions
from wholegrad.slide.origin import describe
from wholegrad.slide.output import Array, ClassNames, Output, PyramidOutput
from wholegrad.slide.placement import Placement
from wholegrad.slide.write import PyramidWriter
from wholegrad.slide.zarr_write import ZarrWriter, check_replaceable

Kind = Literal["mask", "probability", "logits"]
Depth = Literal["uint8", "float32"]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

MASK_ONLY = (".geojson", ".json", ".png")
ENDINGS = (".ome.tif", ".ome.tiff", ".tif", ".tiff", ".zarr", ".npy", *MASK_ONLY)


@dataclass(frozen=True)
class Result:
    """What is to be written.

    Attributes:
        shape: ``(C, H, W)``.
        kind: what its values are.
        dtype: of its values.
        mpp: um a pixel, None if unknown.
        image: that it was made from; its ``placement``, or else its ``size`` (H, W of level 0), says where on a
            slide it lies.
        classes: names of labels 1 on.
        depth: what ``.tif`` and ``.zarr`` hold probabilities in.
        outlines: what is kept of outlines.
    """

    shape: tuple[int, int, int]
    kind: Kind
    dtype: np.dtype[Any]
    mpp: float | None
    image: Any
    classes: ClassNames
    depth: Depth = "uint8"
    outlines: OutlineOptions | None = None

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of pyramids."""
        if self.kind == "probability":
            return np.dtype(self.depth)
        return self.dtype

    @property
    def channels(self) -> tuple[str, ...]:
        """A name for each channel."""
        if self.shape[0] == 1:
            return ("Labels",) if self.kind == "mask" else self.classes.names[:1]
        return ("Background", *(self.classes.name(k) for k in range(1, self.shape[0])))

    @property
    def grid(self) -> Grid:
        """Where its pixels lie on the slide's level 0."""
        _, height, width = self.shape
        placed, size = getattr(self.image, "placement", None), getattr(self.image, "size", None)
        if placed is not None:  # the image's own grid may be of other pixels than the result's
            _, rows, columns = self.image.shape
            scale = float(placed.cols.step) * columns / width, float(placed.rows.step) * rows / height
            return Grid(scale, (float(placed.cols.start), float(placed.rows.start)))
        if isinstance(size, tuple) and len(size) == 2:
            return Grid((size[1] / width, size[0] / height))
        return Grid()


def checked_paths(out: Paths, kind: Kind, depth: str = "uint8", slide: Any = None) -> list[Path]:
    """The files to write, looked at before anything is computed.

    Raises:
        ConfigError: an unknown ending, a name given twice or that is the slide's, a file that cannot hold such values.
        SlideError: the folder is missing or not writable.
    """
    if depth not in get_args(Depth):
        raise ConfigError("depth", f"is {depth!r}", f"choose from {', '.join(get_args(Depth))}")
    paths = [Path(p) for p in ([out] if isinstance(out, str | os.PathLike) else out)]
    if not paths:
        raise ConfigError("out", "names no file", "name one, or leave it out to get an array")
    for path in paths:
        _check(path, kind)
        if isinstance(slide, Path) and path.absolute() == slide.absolute():
            raise ConfigError(str(path), "is the slide itself", "choose another name")
    if len({path.absolute() for path in paths}) != len(paths):
        raise ConfigError("out", "names a file twice", "give each output a name of its own")
    return paths


def _check(path: Path, kind: Kind) -> None:
    ending = _ending(path)
    if ending not in ENDINGS:
        raise ConfigError(str(path), "has an ending that says nothing", f"name it {', '.join(ENDINGS[:-1])}")
    if ending in MASK_ONLY and kind != "mask":
        raise ConfigError(str(path), f"cannot show {kind}", "use kind='mask', or write .tif, .zarr or .npy")
    if ending == ".zarr":
        check_replaceable(path)
    elif path.is_dir():
        raise ConfigError(str(path), "is a folder", "name a file")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        cause = "cannot be written (its folder is missing or not writable)"
        raise SlideError(str(path), cause, "check that the folder exists and is writable")


def _ending(path: Path) -> str:
    return path.suffix.lower()


def open_outputs(paths: Sequence[Path], result: Result, npy: Callable[[Path], Output]) -> Several:
    """A writer for each path; ``npy`` makes those of array files.

    Raises:
        ConfigError, SlideError: one cannot be written; then none is begun.
    """
    opened: list[Output] = []
    try:
        for path in paths:
            opened.append(npy(path) if _ending(path) == ".npy" else _open(path, result))
    except BaseException:
        for output in opened:
            output.abort()
        raise
    return Several(opened)


def _open(path: Path, result: Result) -> Output:
    ending, label = _ending(path), result.kind == "mask"
    if ending == ".zarr":
        zarr = ZarrWriter(path, result.shape, result.stored, mpp=result.mpp, label=label, channels=result.channels)
        return PyramidOutput(zarr)
    if ending in (".geojson", ".json"):
        from wholegrad.slide.outlines import OutlineWriter  # with Numba and shapely

        return OutlineWriter(path, result.shape[2], result.mpp, result.classes, result.grid, result.outlines)
    if ending == ".png":
        from wholegrad.slide.overlay import OverlayWriter  # with Pillow

        reader = as_reader(result.image)
        title = Path(reader.name).name if reader.name != "image" else ""
        return OverlayWriter(path, result.shape[1:], reader, result.classes, result.mpp, title)
    how: dict[str, Any] = {"mpp": result.mpp, "label": label, "channels": result.channels}
    return PyramidOutput(PyramidWriter(path, result.shape, result.stored, description=_part(result.image), **how))


def _part(image: Any) -> str | None:
    """What a file remembers of where on its slide a part of it lies; None if it is all of a slide, or no slide."""
    placed = getattr(image, "placement", None)
    if not isinstance(placed, Placement):
        return None
    axes = zip((placed.rows, placed.cols), image.shape[1:], placed.size, strict=True)
    if all(axis.start == 0 and axis.step * length == size for axis, length, size in axes):
        return None
    return describe(Path(as_reader(image).name).name, placed, image.shape[1:])


class Several(Output):
    """Outputs of one result: all are complete before the first gets its name."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.outputs = tuple(outputs)
        wanted = {output.dtype for output in self.outputs}
        self.dtype = wanted.pop() if len(wanted) == 1 else max(wanted, key=lambda dtype: dtype.itemsize)
        self.held_bytes = sum(output.held_bytes for output in self.outputs)

    def write(self, y0: int, band: Array) -> None:
        for output in self.outputs:
            output.write(y0, band)

    def seal(self) -> None:
        for output in self.outputs:
            output.seal()

    def publish(self) -> None:
        for output in self.outputs:
            output.publish()

    def abort(self) -> None:
        for output in self.outputs:
            output.abort()

"""Run a model over a whole slide, forward only, and stream its mask, probability or logits to a file or an array.

Tiles come row by row. A band of one row of tiles is held and handed on when its last tile is done, so that memory
does not grow with the height of the slide. Files appear complete or not at all (rule 11).
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wholegrad.api import DeviceLike, run_outputs
from wholegrad.errors import ConfigError, ShapeError
from wholegrad.given import given
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Ref, Spec
from wholegrad.kernels.expression import Leaf, Program, Step
from wholegrad.outputs import Depth, Kind, Paths, Result, Several, checked_paths, open_outputs
from wholegrad.plan.boundaries import storable
from wholegrad.ranked import RanksLike, of_one_image, told_by_first
from wholegrad.run.executor import ProgressFn
from wholegrad.run.sink import Sink
from wholegrad.run.sources import model_dtype
from wholegrad.slide.balance import Balanced
from wholegrad.slide.bigtiff import PartialFile
from wholegrad.slide.grid import OutlineOptions
from wholegrad.slide.output import ClassNames, Output

Array = npt.NDArray[Any]
Shape = tuple[int, int, int]


class _Bands(ABC):
    """Takes tiles row by row and hands on complete bands ``(C, h, W)``."""

    held_bytes = 0  # beside the band

    def __init__(self, channels: int, width: int, dtype: npt.DTypeLike) -> None:
        self.channels, self.width, self.dtype = channels, width, np.dtype(dtype)
        self._band: Array | None = None

    def take(self, box: Box, values: Array) -> None:
        if self._band is None or self._band.shape[1] != box.height:
            self._band = np.empty((self.channels, box.height, self.width), self.dtype)
        self._band[:, :, box.x0 : box.x1] = values
        if box.x1 == self.width:
            self.write(box.y0, self._band)

    @abstractmethod
    def write(self, y0: int, band: Array) -> None: ...
    @abstractmethod
    def close(self) -> None: ...
    @abstractmethod
    def abort(self) -> None: ...


class _Memory(_Bands):
    """An array in memory."""

    def __init__(self, shape: tuple[int, int, int], dtype: npt.DTypeLike) -> None:
        super().__init__(shape[0], shape[2], dtype)
        self.array = np.empty(shape, dtype)

    def write(self, y0: int, band: Array) -> None:
        self.array[:, y0 : y0 + band.shape[1]] = band

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


class _Npy(_Bands):
    """A ``.npy`` file of shape ``(C, H, W)``, written aside and renamed."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: npt.DTypeLike) -> None:
        super().__init__(shape[0], shape[2], dtype)
        self.height = shape[1]
        header = io.BytesIO()
        said = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, said)
        self.file = PartialFile(path)
        self.file.append(header.getvalue())
        self.start = self.file.end

    def write(self, y0: int, band: Array) -> None:
        for c in range(self.channels):
            offset = self.start + (c * self.height + y0) * self.width * self.dtype.itemsize
            self.file.patch(offset, np.ascontiguousarray(band[c]).data)

    def close(self) -> None:
        self.file.commit()

    def seal(self) -> None:
        self.file.seal()

    def publish(self) -> None:
        self.file.publish()

    def abort(self) -> None:
        self.file.discard()


class _Elsewhere(_Bands):
    """Where another rank writes."""

    def write(self, y0: int, band: Array) -> None:
        raise AssertionError("only rank 0 writes")

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def npy_output(path: Path, shape: Shape, dtype: np.dtype[Any]) -> Output:
    """What writes bands ``(C, h, W)`` to a ``.npy`` file."""
    return cast(Output, _Npy(path, shape, dtype))


class _Files(_Bands):
    """Files of any kinds, all from the same bands."""

    def __init__(self, outputs: Several, shape: tuple[int, int, int]) -> None:
        super().__init__(shape[0], shape[2], outputs.dtype)
        self.outputs, self.held_bytes = outputs, outputs.held_bytes

    def write(self, y0: int, band: Array) -> None:
        self.outputs.write(y0, band)

    def close(self) -> None:
        self.outputs.seal()
        self.outputs.publish()

    def abort(self) -> None:
        self.outputs.abort()


def decide(logits: torch.Tensor, kind: Kind, threshold: float) -> torch.Tensor:
    """Logits ``(C, h, w)`` as what was asked for: labels (uint8), probabilities (float32) or logits.

    One channel: sigmoid, and 1 where the probability exceeds ``threshold``. More: softmax, and the likeliest class.
    """
    if kind == "logits":
        return logits
    if kind == "probability":
        return (torch.sigmoid(logits) if logits.shape[0] == 1 else torch.softmax(logits, 0)).float()
    if logits.shape[0] == 1:
        return _above(logits, _edge(threshold))
    return logits.argmax(0, keepdim=True).to(torch.uint8)


def _edge(threshold: float) -> float:
    """The logit of a probability."""
    return math.log(threshold / (1 - threshold))


def _above(logits: torch.Tensor, edge: float) -> torch.Tensor:
    """1 where logits exceed ``edge``, else 0. NumPy compares seven times as fast as PyTorch does."""
    if logits.dtype not in (torch.float32, torch.float64) or logits.device.type != "cpu":
        return (logits > edge).to(torch.uint8)
    return torch.from_numpy(np.greater(logits.detach().numpy(), edge).view(np.uint8))


def predict(
    model: nn.Module,
    image: Any,
    *,
    out: Paths | None = None,
    kind: Kind = "mask",
    threshold: float = 0.5,
    classes: Sequence[str] | None = None,
    depth: Depth = "uint8",
    min_area: float = 0.0,
    min_hole: float = 0.0,
    simplify: float | None = None,
    budget: str | int | None = None,
    tile: tuple[int, int] | None = None,
    progress: ProgressFn | None = None,
    device: DeviceLike = None,
    host_budget: str | int | None = None,
    group: RanksLike = None,
) -> Array | None:
    """Run ``model`` over the whole image, exactly as if it fitted in memory; no seams.

    Args:
        model: its first output is a map of logits ``(1, C, h, w)``; run in the mode that it is in.
        image: ``(C, H, W)`` as :func:`wholegrad.backward` takes it.
        out: one file or several, written together, each by its ending: ``.ome.tif`` or ``.tif`` for a tiled pyramid,
            ``.zarr`` for OME-Zarr, ``.npy`` for an array file ``(C, h, w)``; of a mask also ``.geojson`` for outlines
            as QuPath opens them, ``.png`` for a picture of the mask on the slide. None to return the array.
        kind: ``"mask"`` (uint8 labels), ``"probability"`` or ``"logits"``.
        threshold: probability above which a pixel of a one-channel output is labelled 1.
        classes: names of labels 1, 2, ...; label 0 is background.
        depth: ``"uint8"`` (times 255) or ``"float32"``: what pyramids and Zarr hold probabilities in.
        min_area: um2; outlined pieces that are smaller are left out of GeoJSON.
        min_hole: um2; smaller holes of outlines are filled.
        simplify: um by which outlines may move; None for one pixel, 0 for exact pixel edges.
        budget: the whole process's peak, as for :func:`wholegrad.plan`; so are ``device`` and ``host_budget``.
        group: processes that share the image, each with this call, as for :func:`wholegrad.backward`: each does a band
            of columns, and rank 0 alone writes.

    Returns:
        An array ``(C, h, w)`` if ``out`` is None; of several ranks, on rank 0 alone.

    Raises:
        ConfigError: ``out`` and ``kind`` do not go together, or the options make no sense.
        SlideError: pixels cannot be read or a file cannot be written; no file is left behind.
        RankError: ranks do not mean the same prediction, or one does not answer in time.
    """
    ranks = of_one_image(group)
    writes = ranks is None or ranks.rank == 0
    first = given(image, None, model_dtype(model)).inputs.tensors[0]
    if first.shape[0] != 1:
        raise ShapeError("image", f"is a batch of {first.shape[0]}", "predict one image at a time")
    if kind not in get_args(Kind):
        raise ConfigError("kind", f"is {kind!r}", f"choose from {', '.join(get_args(Kind))}")
    if not isinstance(threshold, int | float) or not 0 < threshold < 1:
        raise ConfigError("threshold", f"is {threshold!r}", "choose a probability between 0 and 1")
    paths: list[Path] | None = None

    def check() -> str:
        nonlocal paths
        paths = None if out is None else checked_paths(out, kind, depth, getattr(image, "path", None))
        return "checked"

    told_by_first(ranks, check)
    outlines = OutlineOptions(min_area, min_hole, simplify)
    outlines.in_pixels(getattr(image, "mpp", None))
    writers: list[_Bands] = []

    def sinks(graph: Graph) -> dict[Ref, Sink]:
        spec = graph.spec(graph.outputs[0])
        names = ClassNames.of(classes, max(1, spec.shape[1] - 1) if len(spec.shape) == 4 else 1)

        def opened() -> str:
            shown = partial(_result, image, names, depth, outlines, first.shape)
            writers.append(_writer(paths, spec, kind, shown))
            return writers[0].dtype.str

        dtype = told_by_first(ranks, opened)
        writer = writers[0] if writes else _Elsewhere(spec.shape[1], spec.shape[-1], dtype)
        return {graph.outputs[0]: _sink(writer, spec, kind, threshold)}

    def close() -> None:
        for writer in writers:
            writer.close()

    try:
        with torch.no_grad():
            held = partial(_held, kind, writers)
            where: dict[str, Any] = {"device": device, "host_budget": host_budget, "ranks": ranks}
            run_outputs(model, image, sinks, budget, tile, progress, held, **where, then=close)
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    return writers[0].array if writers and isinstance(writers[0], _Memory) else None


def _held(kind: Kind, writers: Sequence[_Bands]) -> tuple[int, int]:
    """Bytes a pixel that a band and its copies on the way take at most, and what the writers hold beside."""
    return 4 if kind == "mask" else 16, sum(writer.held_bytes for writer in writers)


def _sink(writer: _Bands, spec: Spec, kind: Kind, threshold: float) -> Sink:
    """What makes of logits what was asked for, and hands it to ``writer``."""

    def make(logits: torch.Tensor) -> torch.Tensor:
        found = decide(logits[0], kind, threshold)[None]
        if writer.dtype == np.uint8 and kind == "probability":
            found = (found * 255).round().to(torch.uint8)
        return found.float() if found.dtype == torch.bfloat16 else found

    store = None
    if kind == "mask" and spec.shape[1] == 1:
        store = Program((Leaf(),), (Step("gt", (0,), (_edge(threshold),)),))
    return Sink(lambda box, found: writer.take(box, found[0].numpy()), make, store)


def _numpy_dtype(dtype: torch.dtype) -> Any:
    """What logits are written in: their own dtype, float32 for bfloat16, which NumPy does not have."""
    return np.float32 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype


def _writer(
    paths: Sequence[Path] | None, spec: Spec, kind: Kind, result: Callable[[Shape, Kind, np.dtype[Any]], Result]
) -> _Bands:
    shape = spec.shape
    if len(shape) != 4 or not storable(spec):
        raise ShapeError("model", f"returns shape {shape}", "predict needs a map of logits (1, C, H, W)")
    full = (1 if kind == "mask" else shape[1], shape[2], shape[3])
    dtype = np.dtype({"mask": np.uint8, "probability": np.float32, "logits": _numpy_dtype(spec.dtype)}[kind])
    if paths is None:
        return _Memory(full, dtype)
    if [path.suffix.lower() for path in paths] == [".npy"]:
        return _Npy(paths[0], full, dtype)
    opened = open_outputs(paths, result(full, kind, dtype), lambda path: npy_output(path, full, dtype))
    return _Files(opened, full)


def _result(
    image: Any,
    names: ClassNames,
    depth: Depth,
    outlines: OutlineOptions,
    read: tuple[int, ...],
    shape: Shape,
    kind: Kind,
    dtype: np.dtype[Any],
) -> Result:
    """What is to be written; where the result is coarser than the image of shape ``read``, so is its mpp."""
    mpp = getattr(image, "mpp", None)
    coarser = None if mpp is None else mpp * read[2] / shape[1]
    shown = image.beneath if isinstance(image, Balanced) else image  # pictures show a slide as it is
    return Result(shape, kind, dtype, coarser, shown, names, depth, outlines)

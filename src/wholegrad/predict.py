"""Run a model over a whole slide, forward only, and stream its mask, probability or logits to a file or an array.

Tiles come row by row. A band of one row of tiles is held and handed on when its last tile is done, so that memory
does not grow with the height of the slide. Files appear complete or not at all (rule 11).
"""

from __future__ import annotations

import io
import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wholegrad.api import run_outputs
from wholegrad.errors import ConfigError, ShapeError
from wholegrad.given import given
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph, Ref, Spec
from wholegrad.plan.boundaries import storable
from wholegrad.run.executor import ProgressFn, Sink
from wholegrad.run.sources import model_dtype
from wholegrad.slide.bigtiff import PartialFile
from wholegrad.slide.write import PyramidWriter

Kind = Literal["mask", "probability", "logits"]
Array = npt.NDArray[Any]


class _Bands(ABC):
    """Takes tiles row by row and hands on complete bands ``(C, h, W)``."""

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

    def abort(self) -> None:
        self.file.discard()


class _Tiff(_Bands):
    """A tiled pyramidal TIFF of one 8-bit channel."""

    def __init__(self, path: Path, shape: tuple[int, int, int], mpp: float | None, label: bool) -> None:
        super().__init__(1, shape[2], np.uint8)
        self.writer = PyramidWriter(path, shape, np.uint8, compression="deflate", mpp=mpp, label=label)

    def write(self, y0: int, band: Array) -> None:
        self.writer.write_rows(band[0])

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.abort()


def decide(logits: torch.Tensor, kind: Kind, threshold: float) -> torch.Tensor:
    """Logits ``(C, h, w)`` as what was asked for: labels (uint8), probabilities (float32) or logits.

    One channel: sigmoid, and 1 where the probability exceeds ``threshold``. More: softmax, and the likeliest class.
    """
    if kind == "logits":
        return logits
    if kind == "probability":
        return (torch.sigmoid(logits) if logits.shape[0] == 1 else torch.softmax(logits, 0)).float()
    if logits.shape[0] == 1:
        return _above(logits, math.log(threshold / (1 - threshold)))
    return logits.argmax(0, keepdim=True).to(torch.uint8)


def _above(logits: torch.Tensor, edge: float) -> torch.Tensor:
    """1 where logits exceed ``edge``, else 0. NumPy compares seven times as fast as PyTorch does."""
    if logits.dtype not in (torch.float32, torch.float64) or logits.device.type != "cpu":
        return (logits > edge).to(torch.uint8)
    return torch.from_numpy(np.greater(logits.detach().numpy(), edge).view(np.uint8))


def predict(
    model: nn.Module,
    image: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    kind: Kind = "mask",
    threshold: float = 0.5,
    budget: str | int | None = None,
    tile: tuple[int, int] | None = None,
    progress: ProgressFn | None = None,
) -> Array | None:
    """Run ``model`` over the whole image, exactly as if it fitted in memory; no seams.

    Args:
        model: its first output is a map of logits ``(1, C, h, w)``; run in the mode that it is in.
        image: ``(C, H, W)`` as :func:`wholegrad.backward` takes it.
        out: ``.tif`` or ``.ome.tif`` for a tiled pyramid of 8-bit labels or probabilities (times 255), ``.npy`` for
            an array file ``(C, h, w)``; None to return the array.
        kind: ``"mask"`` (uint8 labels), ``"probability"`` or ``"logits"``.
        threshold: probability above which a pixel of a one-channel output is labelled 1.
        budget: the whole process's peak, as for :func:`wholegrad.plan`.

    Returns:
        An array ``(C, h, w)`` if ``out`` is None.

    Raises:
        ConfigError: ``out`` and ``kind`` do not go together.
        SlideError: pixels cannot be read or the file cannot be written; no file is left behind.
    """
    first = given(image, None, model_dtype(model)).inputs.tensors[0]
    if first.shape[0] != 1:
        raise ShapeError("image", f"is a batch of {first.shape[0]}", "predict one image at a time")
    if kind not in get_args(Kind):
        raise ConfigError("kind", f"is {kind!r}", f"choose from {', '.join(get_args(Kind))}")
    if not isinstance(threshold, int | float) or not 0 < threshold < 1:
        raise ConfigError("threshold", f"is {threshold!r}", "choose a probability between 0 and 1")
    path = None if out is None else Path(out)
    if path is not None and path.suffix.lower() not in (".tif", ".tiff", ".npy"):
        raise ConfigError(str(path), "has an ending that says nothing", "name it .tif, .ome.tif or .npy")
    writers: list[_Bands] = []

    def sinks(graph: Graph) -> dict[Ref, Sink]:
        spec = graph.spec(graph.outputs[0])
        writer = _writer(path, spec, kind, getattr(image, "mpp", None), first.shape)
        writers.append(writer)
        return {graph.outputs[0]: lambda box, value: writer.take(box, _as_array(writer, value, kind, threshold))}

    try:
        with torch.no_grad():
            run_outputs(model, image, sinks, budget, tile, progress, _band_bytes(kind))
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    return writers[0].array if isinstance(writers[0], _Memory) else None


def _band_bytes(kind: Kind) -> int:
    """Bytes a pixel that a band, its copies on the way to the file and the writer's own rows take at most."""
    return 4 if kind == "mask" else 16


def _as_array(writer: _Bands, value: torch.Tensor, kind: Kind, threshold: float) -> Array:
    found = decide(value[0], kind, threshold)
    if writer.dtype == np.uint8 and kind == "probability":
        found = (found * 255).round().to(torch.uint8)
    return (found.float() if found.dtype == torch.bfloat16 else found).numpy()


def _numpy_dtype(dtype: torch.dtype) -> Any:
    """What logits are written in: their own dtype, float32 for bfloat16, which NumPy does not have."""
    return np.float32 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype


def _writer(
    path: Path | None,
    spec: Spec,
    kind: Kind,
    mpp: float | None,
    image: tuple[int, ...],
) -> _Bands:
    shape = spec.shape
    if len(shape) != 4 or not storable(spec):
        raise ShapeError("model", f"returns shape {shape}", "predict needs a map of logits (1, C, H, W)")
    channels = 1 if kind == "mask" else shape[1]
    full = (channels, shape[2], shape[3])
    dtype = np.dtype({"mask": np.uint8, "probability": np.float32, "logits": _numpy_dtype(spec.dtype)}[kind])
    if path is None:
        return _Memory(full, dtype)
    if path.suffix.lower() == ".npy":
        return _Npy(path, full, dtype)
    if kind == "logits" or channels != 1:
        raise ConfigError(str(path), f"cannot hold {kind} of {channels} channels", "write .npy, or kind='mask'")
    coarser = None if mpp is None else mpp * image[2] / shape[2]
    return _Tiff(path, full, coarser, kind == "mask")

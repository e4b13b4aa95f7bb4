"""Makes a map reader of what the user has in hand: an array, a raw or .npy file, a Zarr array, a tensor.

Memory-mapped arrays are not read through their map, for mapped pages count in the resident set (rule 7): the
same bytes are read from the file by position. ``Cropped`` and ``Padded`` change any reader's field of view.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wholegrad.errors import ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.buffers import ReusedBuffer, check_box
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.reader import MapReader


def as_reader(obj: Any, *, name: str = "image") -> MapReader:
    """A reader of an array ``(C, H, W)`` or ``(H, W)``, of a tensor, or a MapReader as it is.

    An array is anything with ``shape``, ``dtype`` and ``__getitem__``: NumPy, memmap, Zarr, HDF5. A tensor on another
    device stays there; tiles that run on that device read it where it lies.

    Raises:
        ShapeError: another rank, an empty array, or a tensor without values or of a dtype that NumPy lacks.
    """
    if isinstance(obj, MapReader):
        return obj
    if isinstance(getattr(obj, "device", None), torch.device):
        if obj.device.type not in ("cpu", "meta"):
            return DeviceReader(obj, name=name)
        obj = _tensor_as_array(obj, name)
    if not all(hasattr(obj, part) for part in ("shape", "dtype", "__getitem__")):
        raise ShapeError(name, f"is a {type(obj).__name__}, not an image", "give an array, tensor or opened slide")
    shape = _three(tuple(int(size) for size in obj.shape), name)
    raw = _raw_of_memmap(obj, shape) if isinstance(obj, np.memmap) else None
    return raw if raw is not None else ArrayReader(obj, name=name)


def _tensor_as_array(tensor: Any, name: str) -> npt.NDArray[Any]:
    if tensor.device.type != "cpu":
        raise ShapeError(name, f"is a tensor on {tensor.device}, without values", "give one that has some")
    try:
        array: npt.NDArray[Any] = tensor.detach().numpy()
    except TypeError:
        remedy = "give it with .float(), which changes no value: a model in that dtype gets it so"
        raise ShapeError(name, f"is a tensor of {tensor.dtype}, which NumPy does not have", remedy) from None
    return array


class DeviceReader:
    """A tensor ``(C, H, W)`` in a device's memory; ``tensor`` is what tiles that run there read."""

    concurrent = True
    cache_bytes = 0

    def __init__(self, tensor: torch.Tensor, *, name: str) -> None:
        self.shape = _three(tuple(tensor.shape), name)
        self.tensor = tensor.detach().reshape(self.shape)
        self.dtype = _tensor_as_array(torch.empty(0, dtype=tensor.dtype), name).dtype
        self.name = name

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        """The pixels of ``box``, copied to the host's memory."""
        check_box(self.name, self.shape, box)
        rows, cols = box.slices()
        return self.tensor[:, rows, cols].to("cpu").numpy()


def _three(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    if len(shape) not in (2, 3) or 0 in shape:
        raise ShapeError(name, f"has shape {shape}", "give (C, H, W) or (H, W), none of them zero")
    return (1, *shape) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def _raw_of_memmap(array: np.memmap[Any, Any], shape: tuple[int, int, int]) -> RawReader | None:
    """A reader of the file behind ``array``; None unless it is the whole C-contiguous map and not a view."""
    if array.filename is None or not array.flags.c_contiguous or not isinstance(array.base, mmap):
        return None  # a view's base is the array, and its offset is that array's
    if array.mode == "c":
        return None  # private changes are not in the file
    array.flush()
    return RawReader(array.filename, shape, array.dtype, array.offset)


class ArrayReader:
    """Boxes of anything that is indexed like an array ``(C, H, W)`` or ``(H, W)``."""

    concurrent = True  # a buffer a thread

    def __init__(self, array: Any, *, name: str = "image") -> None:
        self._array, self.name = array, name
        self.shape = _three(tuple(int(size) for size in array.shape), name)
        self.dtype: np.dtype[np.generic] = np.dtype(array.dtype)
        self.cache_bytes = 0

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        """The pixels of ``box`` as ``(C, h, w)``: a view where the array gives views.

        Raises:
            ShapeError: the box is empty or reaches outside the map.
        """
        check_box(self.name, self.shape, box)
        rows, cols = box.slices()
        if len(self._array.shape) == 2:
            return np.asarray(self._array[rows, cols])[None]
        return np.asarray(self._array[:, rows, cols])


class RawReader:
    """Boxes of a C-contiguous array ``(C, H, W)`` in a file, read by position into a reused buffer.

    Args:
        path: of the file.
        shape: ``(C, H, W)``, or ``(H, W)`` for one channel.
        dtype: of the values.
        offset: of the first value, bytes.

    Raises:
        SlideError: the file is missing or too short for the array.
        ShapeError: the shape has another rank or is empty.
    """

    concurrent = True  # a buffer a thread

    def __init__(
        self, path: str | os.PathLike[str], shape: Sequence[int], dtype: npt.DTypeLike, offset: int = 0
    ) -> None:
        self.shape = _three(tuple(shape), str(path))
        self.dtype: np.dtype[np.generic] = np.dtype(dtype)
        self._file, self._offset = PositionedFile(path), offset
        need = offset + int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        if self._file.size < need:
            cause = f"has {self._file.size} bytes, an array of {self.shape} {self.dtype} needs {need}"
            raise SlideError(str(path), cause, "the file is truncated or the shape is wrong")
        self._buffer, self._rows = ReusedBuffer(), ReusedBuffer()

    @property
    def name(self) -> str:
        return str(self._file.path)

    @property
    def cache_bytes(self) -> int:
        """Bytes held besides the buffer of one box: one row where rows are read whole."""
        return self.shape[2] * self.dtype.itemsize

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        """The pixels of ``box`` as ``(C, h, w)``, valid until this thread's next read.

        Raises:
            ShapeError: the box is empty or reaches outside the map.
            SlideError: the file is closed or cannot be read.
        """
        check_box(self.name, self.shape, box)
        out = self._buffer.take((self.shape[0], box.height, box.width), self.dtype)
        self.read_into(box, out)
        return out

    def read_into(self, box: Box, out: npt.NDArray[np.generic]) -> None:
        """Fill a C-contiguous ``(C, h, w)`` of the map's dtype with the pixels of ``box``; errors as for ``read``."""
        check_box(self.name, self.shape, box)
        for channel in range(self.shape[0]):
            if box.width == self.shape[2]:
                self._file.read_into(self._position(channel, box.y0, 0), _bytes(out[channel]))
            else:
                step = self.shape[2] * self.dtype.itemsize
                self._file.read_rows(self._position(channel, box.y0, box.x0), step, out[channel].view(np.uint8))

    def _position(self, channel: int, y: int, x: int) -> int:
        _, height, width = self.shape
        return self._offset + ((channel * height + y) * width + x) * self.dtype.itemsize

    def close(self) -> None:
        """Close the file; reading afterwards is a SlideError."""
        self._file.close()

    def __repr__(self) -> str:
        return f"RawReader({self._file.path.name}, {self.shape}, {self.dtype})"


def _bytes(array: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def open_npy(path: str | os.PathLike[str]) -> RawReader:
    """A reader of a .npy file that holds a C-contiguous array ``(C, H, W)`` or ``(H, W)``.

    Raises:
        SlideError: missing, not a .npy file, Fortran order or Python objects.
        ShapeError: another rank.
    """
    file = PositionedFile(path)  # for its plain error when the file is missing
    file.close()
    with Path(path).open("rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
        except ValueError as error:
            raise SlideError(str(path), f"is not a .npy file ({error})", "write it with numpy.save") from None
        if fortran or dtype.hasobject:
            cause = "holds Python objects" if dtype.hasobject else "is stored column by column (Fortran order)"
            raise SlideError(str(path), cause, "save it with numpy.save(path, numpy.ascontiguousarray(a))")
        return RawReader(path, shape, dtype, stream.tell())


class _OfReader:
    """What a map made of another reader takes over from it."""

    _reader: MapReader

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self._reader.dtype

    @property
    def concurrent(self) -> bool:
        """Whether several threads may read at once: as the reader beneath."""
        return bool(getattr(self._reader, "concurrent", False))

    @property
    def cache_bytes(self) -> int:
        return self._reader.cache_bytes

    @property
    def name(self) -> str:
        return self._reader.name


class Cropped(_OfReader):
    """A region of interest of another reader, as a map of its own.

    Raises:
        ShapeError: ``box`` is empty or reaches outside the reader.
    """

    def __init__(self, reader: MapReader, box: Box) -> None:
        check_box(reader.name, reader.shape, box)
        self._reader, self._box = reader, box
        self.shape = (reader.shape[0], box.height, box.width)

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        """The pixels of ``box``, counted from the region's own corner; errors as those of the reader."""
        check_box(self.name, self.shape, box)
        y, x = self._box.y0, self._box.x0
        return self._reader.read(Box(box.y0 + y, box.y1 + y, box.x0 + x, box.x1 + x))


class Padded(_OfReader):
    """Another reader made ``height`` x ``width`` pixels, with a constant below and to the right.

    Raises:
        ShapeError: the new size is smaller than the reader's.
    """

    def __init__(self, reader: MapReader, height: int, width: int, value: float = 0) -> None:
        channels, inner_height, inner_width = reader.shape
        if height < inner_height or width < inner_width:
            cause = f"is {inner_height} x {inner_width} pixels and cannot be padded to {height} x {width}"
            raise ShapeError(reader.name, cause, "pad to a larger size, or crop")
        self._reader, self._value = reader, value
        self.shape = (channels, height, width)
        self._buffer = ReusedBuffer()

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        """The pixels of ``box``, valid until this thread's next read; errors as those of the reader."""
        check_box(self.name, self.shape, box)
        _, height, width = self._reader.shape
        if box.y1 <= height and box.x1 <= width:
            return self._reader.read(box)
        out = self._buffer.take((box.height, box.width, self.shape[0]), self.dtype).transpose(2, 0, 1)
        out[...] = self._value
        inner = Box(box.y0, min(box.y1, height), box.x0, min(box.x1, width))
        if inner.height > 0 and inner.width > 0:
            out[:, : inner.height, : inner.width] = self._reader.read(inner)
        return out

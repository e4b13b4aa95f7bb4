"""Streams an image or a label map of any size into an OME-Zarr store: pyramid, um a pixel, channel names.

Follows OME-NGFF 0.4 on Zarr 2 (axes c, y, x; "/" between chunk numbers; zlib), which QuPath, napari and ``zarr`` read.
Chunks are files of their own, written here without the ``zarr`` package; those of zeros are left out, as Zarr 2 has it.
The store grows under a hidden name beside its own and is renamed when complete (rule 11). A store of that name is
replaced; any other folder is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.aside import REPLACED, aside, sweep
from wholegrad.errors import ConfigError, SlideError
from wholegrad.slide.bigtiff import sync_folder
from wholegrad.slide.levels import Array, Levels, LevelWriter, deflate

VERSION = "0.4"
CHUNK = 1024
MARKS = (".zgroup", ".zarray", ".zattrs", "zarr.json")  # one of which every Zarr store holds


class ZarrWriter(LevelWriter):
    """An OME-Zarr store ``(C, H, W)`` that is written from top to bottom and appears only when complete.

    Args:
        path: of the store, a folder; an existing store is replaced at the end.
        shape: ``(C, H, W)``.
        dtype: of the values.
        tile: edge of the square chunks, pixels.
        mpp: um a pixel; None writes pixels as the unit.
        levels: how many, or "auto": until the smallest fits in one chunk.
        label: lower levels take one of the labels instead of the mean.
        channels: a name for each channel.
        threads: that encode chunks; by default two.

    Raises:
        ConfigError: settings that do not go together, or a folder of that name that is no Zarr store.
        SlideError: the store cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: tuple[int, int, int],
        dtype: npt.DTypeLike = np.uint8,
        *,
        tile: int = CHUNK,
        mpp: float | None = None,
        levels: Levels = "auto",
        label: bool = False,
        channels: Sequence[str] = (),
        threads: int | None = None,
    ) -> None:
        super().__init__(path, shape, dtype, tile=tile, levels=levels, label=label, planar=True, threads=threads)
        self._mpp, self._names = mpp, tuple(channels)
        check_replaceable(self.path)
        try:
            sweep(self.path.parent)
            self._folder = aside(self.path)
            self._folder.mkdir()
        except OSError as error:
            cause = f"cannot be written ({error.strerror})"
            raise SlideError(str(path), cause, "check that the folder exists and is writable") from None

    def _encode(self, tile: Array) -> bytes:
        return deflate(tile) if tile.any() else b""

    def _store(self, level: int, row: int, channel: int, data: list[bytes]) -> None:
        folder = self._folder / str(level) / str(channel) / str(row)
        for column, chunk in enumerate(data):
            if chunk:
                self._write(folder / str(column), chunk)

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
        except OSError as error:
            raise SlideError(str(self.path), f"cannot be written ({error.strerror})", "free disk space") from error

    def _seal(self) -> None:
        self._describe(".zgroup", {"zarr_format": 2})
        self._describe(".zattrs", self._attributes())
        for number in range(len(self.levels)):
            self._describe(f"{number}/.zarray", self._array(number))
        try:
            _sync_all(self._folder)
        except OSError as error:
            raise SlideError(str(self.path), f"cannot be written ({error.strerror})", "free disk space") from error

    def _publish(self) -> None:
        """Rename; a store that was there steps aside first, and is removed last."""
        before = aside(self.path, REPLACED)
        try:
            if self.path.exists():
                self.path.rename(before)
            self._folder.rename(self.path)
        except OSError as error:
            if before.exists() and not self.path.exists():
                before.rename(self.path)
            raise SlideError(str(self.path), f"cannot be named ({error.strerror})", "check the folder") from error
        sync_folder(self.path.parent)
        with suppress(OSError):
            self._folder = before.rename(aside(self.path))  # half of it shall not come back
        shutil.rmtree(self._folder, ignore_errors=True)

    def _discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _describe(self, name: str, value: dict[str, Any]) -> None:
        self._write(self._folder / name, json.dumps(value, indent=1).encode())

    def _array(self, number: int) -> dict[str, Any]:
        level = self.levels[number]
        return {
            "zarr_format": 2,
            "shape": [self.shape[0], level.height, level.width],
            "chunks": [1, self._tile, self._tile],
            "dtype": self.dtype.str if self.dtype.itemsize == 1 else self.dtype.newbyteorder("<").str,
            "compressor": {"id": "zlib", "level": 6},
            "fill_value": 0,
            "order": "C",
            "filters": None,
            "dimension_separator": "/",
        }

    def _attributes(self) -> dict[str, Any]:
        unit = {"unit": "micrometer"} if self._mpp else {}
        axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", **unit} for n in "yx")]
        datasets = [
            {"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": self._scale(n)}]}
            for n in range(len(self.levels))
        ]
        multiscales = {"version": VERSION, "name": self.path.stem, "axes": axes, "datasets": datasets}
        multiscales["type"] = "nearest" if self._label else "mean"
        names = self._names or [str(c) for c in range(self.shape[0])]
        return {
            "multiscales": [multiscales],
            "omero": {"version": VERSION, "channels": [self._channel(n) for n in names]},
        }

    def _scale(self, number: int) -> list[float]:
        return [1.0, *([(self._mpp or 1.0) * 2**number] * 2)]

    def _channel(self, name: str) -> dict[str, Any]:
        most = 1.0 if self.dtype.kind == "f" else float(np.iinfo(self.dtype).max)
        window = {"min": 0.0, "max": most, "start": 0.0, "end": most}
        return {"label": name, "active": True, "color": "FFFFFF", "window": window}


def check_replaceable(path: Path) -> None:
    """Refuse a file, or a folder that holds something else than a Zarr store.

    Raises:
        ConfigError: it does.
    """
    if path.exists() and not (path.is_dir() and any((path / mark).exists() for mark in MARKS)):
        raise ConfigError(str(path), "exists and is no Zarr store", "move it away, or choose another name")


def _sync_all(folder: Path) -> None:
    for base, _, files in os.walk(folder):
        for name in files:
            handle = os.open(Path(base) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(base))

"""What a prediction's results are written through: bands from top to bottom in, a complete file or nothing out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError
from wholegrad.slide.levels import LevelWriter

Array = npt.NDArray[Any]
Colour = tuple[int, int, int]

IGNORE = 255
COLOURS: tuple[Colour, ...] = (
    (22, 140, 96), (196, 60, 48), (40, 98, 190), (222, 142, 22), (128, 66, 180), (20, 158, 176), (190, 70, 140),
    (112, 128, 32),
)  # fmt: skip
IGNORED: Colour = (150, 150, 150)


@dataclass(frozen=True)
class ClassNames:
    """Names and colours of labels 1, 2, ...; label 0 is background, 255 what is not to be counted.

    "Ignore*" is QuPath's own name for the latter.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str] | None, count: int) -> ClassNames:
        """The names given, or made up, for labels 1 to ``count``.

        Raises:
            ConfigError: another number of names, an empty one, or the same name twice.
        """
        if names is None:
            return cls(("Tissue",) if count == 1 else tuple(f"Class {k}" for k in range(1, count + 1)))
        if isinstance(names, str) or len(names) != count or len(set(names)) != count or not all(names):
            remedy = f"give {count} different name{'s' * (count > 1)}, of label 1 on"
            raise ConfigError("classes", f"are {names!r}", remedy)
        return cls(tuple(names))

    def name(self, label: int) -> str:
        if label == IGNORE:
            return "Ignore*"
        return self.names[label - 1] if label <= len(self.names) else f"Class {label}"

    def colour(self, label: int) -> Colour:
        return IGNORED if label == IGNORE else COLOURS[(label - 1) % len(COLOURS)]


class Output(ABC):
    """Takes bands ``(C, h, W)`` top to bottom. ``seal`` completes the result under another name, ``publish`` names it.

    Attributes:
        dtype: that it wants bands in.
        held_bytes: most bytes that it holds beside the band.
    """

    dtype: np.dtype[Any] = np.dtype(np.uint8)
    held_bytes: int = 0

    @abstractmethod
    def write(self, y0: int, band: Array) -> None: ...
    @abstractmethod
    def seal(self) -> None: ...
    @abstractmethod
    def publish(self) -> None: ...
    @abstractmethod
    def abort(self) -> None: ...


class PyramidOutput(Output):
    """A TIFF or Zarr pyramid; probabilities go into uint8 times 255."""

    def __init__(self, pyramid: LevelWriter) -> None:
        self.pyramid, self.dtype = pyramid, pyramid.dtype
        self.held_bytes = 2 * pyramid.buffer_bytes  # bands, and their encoded tiles

    def write(self, y0: int, band: Array) -> None:
        if self.dtype == np.uint8 and band.dtype.kind == "f":
            band = np.rint(band * 255).astype(np.uint8)
        self.pyramid.write_rows(band.transpose(1, 2, 0))

    def seal(self) -> None:
        self.pyramid.seal()

    def publish(self) -> None:
        self.pyramid.publish()

    def abort(self) -> None:
        self.pyramid.abort()

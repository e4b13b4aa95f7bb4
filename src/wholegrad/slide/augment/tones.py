"""How colours are changed, in numbers: one draw of stain, brightness and contrast, its tables, and the plain formula.

Stain after Ruifrok and Johnston, "Quantification of histochemical staining by color deconvolution" (2001), and Tellez
et al., "Whole-slide mitosis detection in H&E breast histology using PHH3" (2018): optical densities are taken apart
into haematoxylin, eosin and DAB, each scaled and shifted, and put together again. All of that is one 3 x 3 matrix and
a shift on densities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wholegrad.slide.augment.blocks import Pixels

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # rows: H, E, DAB; Ruifrok, Johnston
UNIT = 4096  # of a density in fixed point
DENSITIES = 1 << 15  # of the second table: densities from 0 to 8, beyond which all is black


@dataclass(frozen=True)
class Colour:
    """One draw of colour; the default changes nothing.

    Attributes:
        scale: factors of haematoxylin, eosin and DAB.
        shift: added to each, in natural optical density.
        contrast: factor of a value's distance from middle grey (127.5).
        brightness: added afterwards, as a fraction of white.
    """

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    contrast: float = 1.0
    brightness: float = 0.0

    @property
    def stains(self) -> bool:
        """Whether it changes the stain."""
        return (self.scale, self.shift) != ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


def tone_table(colour: Colour) -> npt.NDArray[np.uint8]:
    """Brightness and contrast: the new value of each byte."""
    values = (np.arange(256) - 127.5) * colour.contrast + 127.5 + 255 * colour.brightness
    return np.asarray(np.clip(np.floor(values + 0.5), 0, 255), np.uint8)


def density_table() -> npt.NDArray[np.int32]:
    """The optical density ``-ln(v / 255)`` of each byte in fixed point; black counts as half a level."""
    values = np.maximum(np.arange(256), 0.5) / 255
    return np.round(-np.log(values) * UNIT).astype(np.int32)


def byte_table(colour: Colour) -> npt.NDArray[np.uint8]:
    """The byte of each fixed-point density, brightness and contrast applied."""
    values = np.floor(255 * np.exp(-np.arange(DENSITIES) / UNIT) + 0.5).astype(np.uint8)
    return np.asarray(tone_table(colour)[values])


def stain_matrix(colour: Colour) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """``(3, 3)`` and ``(3,)`` in fixed point: densities as a row times the matrix, plus the shift, are the new ones."""
    mixed = np.linalg.inv(STAINS) @ np.diag(colour.scale) @ STAINS
    shift = np.array(colour.shift) @ STAINS
    return np.round(mixed * UNIT).astype(np.int64), np.round(shift * UNIT).astype(np.int64)


def reference(pixels: Pixels, colour: Colour) -> Pixels:
    """The same by the formula, in float64 on whole arrays: what tests and doubters compare with."""
    density = -np.log(np.maximum(pixels.astype(np.float64), 0.5) / 255)
    hed = np.einsum("chw,cs->shw", density, np.linalg.inv(STAINS))
    hed = hed * np.array(colour.scale)[:, None, None] + np.array(colour.shift)[:, None, None]
    stained = 255 * np.exp(-np.maximum(np.einsum("shw,sc->chw", hed, STAINS), 0))
    values = (np.floor(stained + 0.5) - 127.5) * colour.contrast + 127.5 + 255 * colour.brightness
    return np.asarray(np.clip(np.floor(values + 0.5), 0, 255), np.uint8)

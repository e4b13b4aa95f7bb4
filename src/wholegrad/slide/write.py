"""Streams an image or a label map of any size into a tiled, pyramidal BigTIFF or OME-TIFF in bounded memory.

A plain TIFF chains its levels one after the other, as OpenSlide and libvips read them. An OME-TIFF has them as SubIFDs
of the full image (OME-TIFF specification 6.0, as Bio-Formats and QuPath read them), one directory a channel with names
in OME-XML. With a single directory the levels are chained as well, so that OpenSlide, which follows no SubIFDs, sees
the whole pyramid; readers of OME-TIFF take what the XML names, the first directory, and pass over the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

import imagecodecs
import numpy as np
import numpy.typing as npt

from wholegrad.errors import ConfigError
from wholegrad.slide import bigtiff
from wholegrad.slide.bigtiff import LONG, LONG8, SHORT, PartialFile, Tag
from wholegrad.slide.levels import Array, Levels, LevelWriter, deflate

Compression = Literal["jpeg", "deflate"] | None

COMPRESSION_TAG = {None: 1, "jpeg": 7, "deflate": 8}
SAMPLE_FORMAT = {"u": 1, "i": 2, "f": 3}


class PyramidWriter(LevelWriter):
    """A tiled pyramidal BigTIFF that is written from top to bottom and appears only when complete (rule 11).

    Args:
        path: of the file; an existing one is replaced at the end.
        shape: ``(C, H, W)``, with one channel for labels.
        dtype: of the values; JPEG needs uint8 and one or three channels.
        tile: edge of the square tiles, pixels, a multiple of 16.
        compression: "jpeg" (colour as YCbCr 4:2:0), "deflate" or None.
        quality: of JPEG, 1 to 100.
        mpp: um a pixel, written as resolution tags (and in OME-XML); None leaves them out.
        levels: how many, or "auto": until the smallest fits in one tile.
        label: lower levels take one of the labels instead of the mean.
        ome: OME-TIFF, its lower levels as SubIFDs; by default if the name ends in .ome.tif or .ome.tiff.
        description: text for the file's first directory, or for the image in its OME-XML.
        channels: names of channels that are not colours, in OME-XML; None: three channels are RGB.
        threads: that encode tiles; by default two.

    Raises:
        ConfigError: settings that do not go together.
        SlideError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: tuple[int, int, int],
        dtype: npt.DTypeLike = np.uint8,
        *,
        tile: int = 512,
        compression: Compression = "deflate",
        quality: int = 80,
        mpp: float | None = None,
        levels: Levels = "auto",
        label: bool = False,
        ome: bool | None = None,
        description: str | None = None,
        channels: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self._ome = os.fspath(path).lower().endswith((".ome.tif", ".ome.tiff")) if ome is None else ome
        self._colour = shape[0] == 3 and channels is None
        planar = self._ome and shape[0] > 1 and not self._colour
        super().__init__(path, shape, dtype, tile=tile, levels=levels, label=label, planar=planar, threads=threads)
        self._compression, self._mpp, self._names, self._description = compression, mpp, channels, description
        self._check(quality)
        self._encoder = _encoder(compression, quality)
        planes = shape[0] if planar else 1
        self._places = [[(list[int](), list[int]()) for _ in self.levels] for _ in range(planes)]  # offsets, sizes
        self._file = PartialFile(self.path)
        bigtiff.start(self._file)

    def _check(self, quality: int) -> None:
        where, channels = str(self.path), self.shape[0]
        if self._compression not in COMPRESSION_TAG:
            raise ConfigError(where, f"compression={self._compression!r}", "give 'jpeg', 'deflate' or None")
        if self._compression == "jpeg" and (self.dtype != np.uint8 or channels not in (1, 3) or self._label):
            cause = f"JPEG cannot keep {'labels' if self._label else f'{channels} channels of {self.dtype}'}"
            raise ConfigError(where, cause, "use compression='deflate'")
        if not 1 <= quality <= 100:
            raise ConfigError(where, f"quality {quality}", "give a quality of 1 to 100")
        if self._names is not None and len(self._names) != channels:
            raise ConfigError(where, f"{len(self._names)} names for {channels} channels", "name each channel")

    def _encode(self, tile: Array) -> bytes:
        return self._encoder(tile)

    def _store(self, level: int, row: int, channel: int, data: list[bytes]) -> None:
        offsets, sizes = self._places[channel][level]
        for tile in data:
            offsets.append(self._file.append(tile))
            sizes.append(len(tile))

    def _seal(self) -> None:
        planes = [[self._tags(plane, level) for level in range(len(self.levels))] for plane in range(len(self._places))]
        bigtiff.finish(self._file, planes, self._ome)
        self._file.seal()

    def _publish(self) -> None:
        self._file.publish()

    def _discard(self) -> None:
        self._file.discard()

    def _tags(self, plane: int, number: int) -> list[Tag]:
        """The directory of one level."""
        level, (offsets, sizes) = self.levels[number], self._places[plane][number]
        channels = 1 if len(self._places) > 1 else self.shape[0]
        tags: list[Tag] = [
            (254, LONG, [1 if number else 0]),  # NewSubfileType: reduced
            (256, LONG, [level.width]),
            (257, LONG, [level.height]),
            (258, SHORT, [8 * self.dtype.itemsize] * channels),
            (259, SHORT, [COMPRESSION_TAG[self._compression]]),
            (262, SHORT, [(6 if self._compression == "jpeg" else 2) if self._colour else 1]),  # Photometric
            (277, SHORT, [channels]),
            (284, SHORT, [1]),  # channels interleaved
            bigtiff.text(305, "wholegrad"),
            (322, LONG, [self._tile]),
            (323, LONG, [self._tile]),
            (324, LONG8, offsets),
            (325, LONG8, sizes),
            (339, SHORT, [SAMPLE_FORMAT[self.dtype.kind]] * channels),
        ]
        if self._colour and self._compression == "jpeg":
            tags.append((530, SHORT, [2, 2]))  # chroma subsampling
        if not self._colour and channels > 1:
            tags.append((338, SHORT, [0] * (channels - 1)))  # extra samples of no stated meaning
        if self._ome and number == plane == 0:
            tags.append(bigtiff.text(270, self._ome_xml()))
        elif self._description and number == plane == 0:
            tags.append(bigtiff.text(270, self._description))
        return tags + self._resolution(level.width)

    def _resolution(self, width: int) -> list[Tag]:
        if self._mpp is None:
            return []
        per_cm = 1e4 / self._mpp * width / self.shape[2]
        return [bigtiff.rational(282, per_cm), bigtiff.rational(283, per_cm), (296, SHORT, [3])]

    def _ome_xml(self) -> str:
        channels, height, width = self.shape
        kind = {"u": "uint", "i": "int"}.get(self.dtype.kind)
        pixel = f"{kind}{8 * self.dtype.itemsize}" if kind else {4: "float", 8: "double"}[self.dtype.itemsize]
        size = "".join(f' PhysicalSize{xy}="{self._mpp}" PhysicalSize{xy}Unit="\u00b5m"' for xy in "XY" if self._mpp)
        samples = 1 if self._names or len(self._places) > 1 else channels
        names = [f" Name={quoteattr(name)}" for name in self._names or ()]
        described = "".join(
            f'<Channel ID="Channel:0:{c}"{names[c] if names else ""} SamplesPerPixel="{samples}"/>'
            for c in range(channels // samples)
        )
        said = f"<Description>{escape(self._description)}</Description>" if self._description else ""
        planes = "".join(f'<TiffData FirstC="{c}" IFD="{c}" PlaneCount="1"/>' for c in range(len(self._places)))
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
            ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:schemaLocation='
            '"http://www.openmicroscopy.org/Schemas/OME/2016-06'
            ' http://www.openmicroscopy.org/Schemas/OME/2016-06/ome.xsd" Creator="wholegrad">'
            f'<Image ID="Image:0" Name={quoteattr(self.path.name)}>{said}'
            f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="{pixel}" SizeX="{width}" SizeY="{height}"'
            f' SizeC="{channels}" SizeZ="1" SizeT="1" BigEndian="false"'
            f' Interleaved="{"true" if samples > 1 else "false"}"{size}>{described}{planes}'
            "</Pixels></Image></OME>"
        )


def _encoder(compression: Compression, quality: int) -> Callable[[Array], bytes]:
    """The function that turns a tile ``(T, T, C)`` into bytes."""
    if compression is None:
        return lambda tile: tile.tobytes()
    if compression == "deflate":
        return deflate

    def encode(tile: Array) -> bytes:
        if tile.shape[2] == 1:
            return bytes(imagecodecs.jpeg8_encode(tile[..., 0], level=quality))
        encoded = imagecodecs.jpeg8_encode(
            tile, level=quality, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
        )
        return bytes(encoded)

    return encode

"""Reads the container of a slide: which levels a TIFF, BigTIFF, SVS or OME-TIFF file has, at which mpp, and
where the bytes of their tiles are. Decodes nothing.

A level is the largest page, or a smaller one of the same layout and the same field of view; label, macro and
thumbnail pages are not levels. Strips are treated as tiles that are as wide as the image. Philips slides pad
their smaller levels to whole tiles: the padding is cut off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tifffile import TiffFile, TiffFileError, TiffPage

from wholegrad.errors import SlideError
from wholegrad.slide.decode import RAW, DecodeSegment, segment_decoder
from wholegrad.slide.origin import Origin, read_origin

PLAUSIBLE_MPP = (0.02, 40.0)  # um a pixel; 300 dpi, a scanner's default tag, is 85
LARGEST_TILE = 256 << 20  # bytes, decoded
RAW_STRIP = 1 << 20  # bytes; uncompressed strips are read in pieces of about this size


@dataclass(frozen=True)
class Level:
    """One pyramid level: its size in pixels, its tile grid, and where each tile's bytes are.

    Attributes:
        segments: decoders, of one page or of one for each colour plane.
        offsets, counts: ``(planes, down * across)``, bytes; a count of 0 is a tile that was never written.
        samples: values a pixel in one plane.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int
    samples: int
    segments: tuple[DecodeSegment, ...]
    white_is_zero: bool
    premultiplied: bool
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @property
    def across(self) -> int:
        return -(-self.width // self.tile_width)

    @property
    def down(self) -> int:
        return -(-self.height // self.tile_height)

    @property
    def planes(self) -> int:
        return len(self.offsets)

    @property
    def channels(self) -> int:
        return self.planes * self.samples


@dataclass(frozen=True)
class Container:
    """A slide file's levels, largest first, and the um a pixel of level 0 (None: the file does not say; NaN: it says
    something that is no size), and where it is a copy of another slide, of what part."""

    levels: tuple[Level, ...]
    mpp: float | None
    origin: Origin | None = None


def read_container(path: Path, size: int, plane: int | None = None) -> Container:
    """Levels and resolution of the file at ``path``, which is ``size`` bytes long.

    Args:
        plane: of an OME-TIFF whose channels lie apart: the one to read, in place of the first or of three colours.

    Raises:
        SlideError: not a TIFF, truncated, no image in it, or a layout that cannot be read by box.
    """
    try:
        with TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if isinstance(page, TiffPage) and page.imagewidth > 0]
            base = _base_planes(pages) if plane is None else [_channel_planes(pages)[plane]]
            levels = tuple(_level(path, group, base[0]) for group in _pyramid(base, pages))
            mpp = read_mpp(pages[0] if pages else base[0], base[0])
            origin = read_origin(base[0].description)
    except SlideError:
        raise
    except (TiffFileError, ValueError, IndexError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise SlideError(str(path), *_why_unreadable(path, size, str(error))) from None
    for number, level in enumerate(levels):
        _check_complete(path, size, number, level)
    return Container(levels, mpp, origin)


def _why_unreadable(path: Path, size: int, message: str) -> tuple[str, str]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] not in (b"II", b"MM") or not {42, 43} & set(magic[2:]):
        return "is not a TIFF", "convert it to a tiled TIFF (vips tiffsave --tile --pyramid --bigtiff)"
    detail = message.splitlines()[0][:120] if message else "none found"
    return (
        f"its list of images cannot be read ({detail}), the file has {size} bytes",
        "it is probably truncated: copy it again",
    )


def _base_planes(pages: list[TiffPage]) -> list[TiffPage]:
    """The page of level 0, or the three pages of its colour planes (OME-TIFF)."""
    if not pages:
        raise ValueError("none found")
    tiled = [page for page in pages if page.is_tiled] or pages[:1]
    base = max(tiled, key=lambda page: page.imagewidth * page.imagelength)
    first = pages.index(base)
    planes = [page for page in pages[first : first + 3] if page.shape == base.shape]
    if base.is_ome and base.samplesperpixel == 1 and 'SizeC="3"' in base.description and len(planes) == 3:
        return planes
    return [base]


def count_planes(path: Path, size: int) -> int:
    """How many channels lie apart in an OME-TIFF; 1 of any other file.

    Raises:
        SlideError: it is no TIFF that can be read.
    """
    try:
        with TiffFile(path) as tiff:
            return len(_channel_planes([p for p in tiff.pages if isinstance(p, TiffPage) and p.imagewidth > 0]))
    except (TiffFileError, ValueError, IndexError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise SlideError(str(path), *_why_unreadable(path, size, str(error))) from None


def _channel_planes(pages: list[TiffPage]) -> list[TiffPage]:
    """The page of level 0 of each channel of an OME-TIFF that has one a channel; of other files that of level 0."""
    base = _base_planes(pages)[:1]
    told = re.search(r'SizeC="(\d+)"', base[0].description) if base[0].is_ome else None
    count = int(told[1]) if told and base[0].samplesperpixel == 1 else 1
    first = pages.index(base[0])
    planes = [page for page in pages[first : first + count] if page.shape == base[0].shape]
    return planes if len(planes) == count else base


def _pyramid(base: list[TiffPage], pages: list[TiffPage]) -> Iterator[list[TiffPage]]:
    """Pages (one for each plane) of every level, largest first."""
    yield base
    reduced = [[page for page in (plane.pages or ()) if isinstance(page, TiffPage)] for plane in base]
    groups = [list(group) for group in zip(*reduced, strict=False)]
    if len(base) == 1:
        groups += [[page] for page in pages]
    seen = {base[0].imagewidth}
    for group in sorted(groups, key=lambda group: -group[0].imagewidth):
        if group[0].imagewidth not in seen and _same_view(base[0], group[0]):
            seen.add(group[0].imagewidth)
            yield group


def _same_view(base: TiffPage, page: TiffPage) -> bool:
    """Whether ``page`` is ``base`` made smaller: same layout, same aspect but for rounding."""
    h0, w0, h, w = base.imagelength, base.imagewidth, page.imagelength, page.imagewidth
    if page.is_tiled != base.is_tiled or not (page.is_tiled or page.is_reduced):
        return False
    if page.samplesperpixel != base.samplesperpixel or h >= h0 or w >= w0:
        return False
    if re.match(r"\s*(label|macro|thumbnail)", page.description.rpartition("\n")[2], re.IGNORECASE):
        return False
    padding = (page.tilelength * w0 + page.tilewidth * h0) if base.is_philips else 2 * (w0 + h0)
    return abs(h * w0 - w * h0) <= padding


def _level(path: Path, pages: list[TiffPage], base: TiffPage) -> Level:
    page = pages[0]
    if page.bitspersample != 8 or np.dtype(page.dtype) != np.uint8:
        raise SlideError(
            str(path), f"has {page.bitspersample}-bit {page.dtype} values", "convert it to 8 bits a channel"
        )
    if page.photometric == 3:
        raise SlideError(str(path), "has a colour palette", "convert it to RGB or, for a mask, to grey values")
    apart = page.planarconfig == 2 and page.samplesperpixel > 1
    planes = page.samplesperpixel if apart else len(pages)
    height, width = _true_size(page, base)
    level = Level(
        height=height,
        width=width,
        tile_height=page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength),
        tile_width=page.tilewidth if page.is_tiled else page.imagewidth,
        samples=1 if apart else page.samplesperpixel,
        segments=tuple(segment_decoder(page) for page in pages),
        white_is_zero=page.photometric == 0,
        premultiplied=1 in page.extrasamples,
        offsets=_per_tile(pages, planes, "dataoffsets"),
        counts=_per_tile(pages, planes, "databytecounts"),
    )
    level = _cut_raw_strips(level) if not page.is_tiled and page.compression == RAW else level
    _check_grid(path, level)
    return level


def _true_size(page: TiffPage, base: TiffPage) -> tuple[int, int]:
    """Height and width without the padding of Philips' smaller levels."""
    if page is base or not base.is_philips:
        return page.imagelength, page.imagewidth
    scale = 2 ** round(math.log2(base.imagewidth / page.imagewidth))
    return base.imagelength // scale, base.imagewidth // scale


def _per_tile(pages: list[TiffPage], planes: int, what: str) -> npt.NDArray[np.int64]:
    """Offsets or byte counts ``(planes, tiles)``."""
    values = np.concatenate([np.asarray(getattr(page, what), np.int64) for page in pages])
    return values.reshape(planes, -1)


def _cut_raw_strips(level: Level) -> Level:
    """Uncompressed strips as shorter ones, so that a whole image in one strip is still read by box."""
    row = level.width * level.samples
    rows = max(1, min(level.tile_height, RAW_STRIP // row))
    if level.offsets.shape[1] > 1 and level.tile_height % rows:
        rows = next(r for r in range(rows, 0, -1) if level.tile_height % r == 0)
    tops = np.arange(0, level.height, rows)
    strip, within = tops // level.tile_height, tops % level.tile_height
    counts = np.minimum(rows, level.height - tops) * row
    written = level.counts[:, strip] > 0
    offsets = level.offsets[:, strip] + np.where(written, within * row, 0)
    counts = np.where(written, counts, 0)
    return replace(level, tile_height=rows, offsets=offsets, counts=counts)


def _check_grid(path: Path, level: Level) -> None:
    tiles, expected = level.offsets.shape[1], level.down * level.across
    if tiles < expected:
        raise SlideError(
            str(path),
            f"lists {tiles} tiles where {level.height} x {level.width} pixels need {expected}",
            "the file is damaged or written by a faulty program: export it again",
        )
    tile = level.tile_height * level.tile_width * max(level.channels, 3)
    if tile > LARGEST_TILE:
        raise SlideError(
            str(path),
            f"is not tiled: a strip of {level.tile_height} x {level.tile_width} takes {tile >> 20} MiB",
            "convert it to a tiled TIFF (vips tiffsave --tile --pyramid --bigtiff)",
        )


def _check_complete(path: Path, size: int, number: int, level: Level) -> None:
    ends = np.where(level.counts > 0, level.offsets + level.counts, 0)
    missing = np.argwhere(ends > size)
    if len(missing):
        row, col = divmod(int(missing[0][1]), level.across)
        raise SlideError(
            str(path),
            f"is truncated: it has {size} bytes, and tile row {row}, column {col} of level {number} ends at"
            f" byte {int(ends[tuple(missing[0])])} ({len(missing)} tiles of that level are cut off)",
            "copy the file again",
        )


def read_mpp(first: TiffPage, base: TiffPage) -> float | None:
    """um a pixel of level 0: Aperio's MPP, OME's PhysicalSizeX, Philips' spacing or the resolution tags.

    NaN if the file states one that is not a positive number.
    """
    text = first.description or base.description
    aperio = re.search(r"\bMPP\s*=\s*([^|\s]*)", text)
    if aperio:
        return _stated(aperio[1])
    ome = re.search(r'PhysicalSizeX="([^"]*)"', text)
    if ome:
        unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', text)
        return _stated(ome[1], {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}.get(unit[1] if unit else "", 1.0))
    spacing = re.search(r'DICOM_PIXEL_SPACING"[^>]*>(?:&quot;|")?([^"&<\s]*)', text)
    if spacing:
        return _stated(spacing[1], 1e3)
    return _mpp_of_tags(base)


def _mpp_of_tags(page: TiffPage) -> float | None:
    resolution = page.tags.valueof("XResolution")
    micrometres = {2: 25400.0, 3: 10000.0}.get(int(page.tags.valueof("ResolutionUnit", default=2)))
    if resolution is None or micrometres is None or 0 in resolution:
        return None
    return plausible_mpp(micrometres * resolution[1] / resolution[0])


def _stated(text: str, scale: float = 1.0) -> float | None:
    """A size that the file states in words; NaN if it is none."""
    try:
        value = float(text) * scale
    except ValueError:
        return math.nan
    return plausible_mpp(value) if math.isfinite(value) and value > 0 else math.nan


def plausible_mpp(mpp: float) -> float | None:
    """``mpp``, or None for the default that a program without a microscope writes."""
    return mpp if PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] else None

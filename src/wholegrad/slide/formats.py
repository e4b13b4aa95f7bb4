"""Finds what a slide file is, by what is in it rather than by its name, and opens it with the library that reads it."""

from __future__ import annotations

from pathlib import Path

from wholegrad.errors import SlideError
from wholegrad.slide.arrays import open_npy
from wholegrad.slide.dicom import DicomPyramid, is_dicom
from wholegrad.slide.openslides import OpenSlidePyramid, vendor_of
from wholegrad.slide.positioned import PositionedFile
from wholegrad.slide.pyramid import HeldPyramid, Pyramid
from wholegrad.slide.tiff_tiles import TiffPyramid
from wholegrad.slide.zarrs import ZarrPyramid, is_zarr

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PICTURE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff")
QUICK = (None, "aperio", "generic-tiff", "philips")  # formats of plain tiles, which are read without OpenSlide
READ = "wholegrad reads OpenSlide's formats (SVS, NDPI, MRXS ...), TIFF, OME-TIFF, DICOM, Zarr, PNG, JPEG and .npy"


def open_pyramid(path: Path) -> Pyramid:
    """The slide at ``path``, with nothing decoded.

    Raises:
        SlideError: missing, damaged or of an unknown format, or its library is not installed.
    """
    name = str(path)
    if not path.is_dir():
        PositionedFile(path).close()  # for its plain error when the file is missing
    if is_zarr(path):
        return ZarrPyramid(name)
    if is_dicom(path):
        return DicomPyramid(name)
    if path.is_dir():
        raise SlideError(name, "is a folder without a slide (no Zarr, no DICOM)", "give a file, or such a folder")
    with path.open("rb") as file:
        magic = file.read(4)
    vendor = vendor_of(name) if not magic.startswith(PICTURE_MAGIC) or path.suffix.lower() == ".mrxs" else None
    if vendor not in QUICK:
        return OpenSlidePyramid(name)
    if magic in TIFF_MAGIC:
        return TiffPyramid(name)
    if magic.startswith(PICTURE_MAGIC):
        from wholegrad.slide.pictures import open_picture  # Pillow, for those who need it

        return open_picture(name)
    if path.suffix.lower() == ".npy":
        return _npy(path)
    raise SlideError(name, "is of no format that is known here", f"{READ}: convert it to one of them")


def _npy(path: Path) -> HeldPyramid:
    reader = open_npy(path)
    if reader.shape[0] != 3 or reader.dtype.name != "uint8":
        cause = f"holds {reader.shape} {reader.dtype}"
        raise SlideError(
            str(path), cause, "an image is (3, H, W) of uint8; wrap other arrays with numpy.load(mmap_mode='r')"
        )
    return HeldPyramid(reader, None)

"""Small slides of formats that need more than one call to write: Leica SCN, DICOM, OME-Zarr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile

Image = np.ndarray[Any, Any]
GLASS = (235, 230, 238)

_SCN = (
    '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="u">'
    '<collection name="c" uuid="u" sizeX="1000000" sizeY="750000"><barcode>QQ==</barcode>{images}</collection></scn>'
)
_SCN_IMAGE = (
    '<image name="{name}" uuid="{name}"><creationDate>2020</creationDate><device model="x" version="1"/>'
    '<pixels sizeX="{size}" sizeY="{size}">{levels}</pixels>'
    '<view sizeX="{width}" sizeY="{height}" offsetX="{x}" offsetY="{y}" spacingZ="0"/><scanSettings>'
    "<objectiveSettings><objective>{power}</objective></objectiveSettings><illuminationSettings>"
    "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"
)


def write_scn(path: Path) -> None:
    """1500 x 2000 pixels of 0.5 um; two areas of 512 x 512 were scanned, at (y, x) = (200, 100) and (700, 1000)."""
    told = [_scn_image("macro", 64, [(64, 0)], 1000000, 750000, 0, 0, 1)]
    for number, (y, x) in enumerate([(200, 100), (700, 1000)]):
        levels = [(512, 2 * number + 1), (128, 2 * number + 2)]
        told.append(_scn_image(f"area{number}", 512, levels, 256000, 256000, x * 500, y * 500, 20))
    area = np.full((512, 512, 3), GLASS, np.uint8)
    area[100:300, 100:300] = (180, 80, 150)
    options: dict[str, Any] = {"metadata": None, "compression": "jpeg", "photometric": "rgb"}
    options |= {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        description = _SCN.format(images="".join(told))
        tiff.write(np.full((64, 64, 3), 200, np.uint8), tile=(64, 64), description=description, **options)
        for _ in range(2):
            tiff.write(area, tile=(256, 256), **options)
            tiff.write(np.ascontiguousarray(area[::4, ::4]), tile=(64, 64), **options)


def _scn_image(
    name: str, size: int, levels: list[tuple[int, int]], width: int, height: int, x: int, y: int, power: int
) -> str:
    told = [f'<dimension sizeX="{s}" sizeY="{s}" r="{r}" ifd="{ifd}"/>' for r, (s, ifd) in enumerate(levels)]
    return _SCN_IMAGE.format(
        name=name, size=size, levels="".join(told), width=width, height=height, x=x, y=y, power=power
    )


def write_dicom(folder: Path, levels: list[Image], mpp: float, tile: int = 128) -> None:
    """A VL Whole Slide Microscopy pyramid, a file a level, uncompressed and TILED_FULL."""
    from pydicom.uid import generate_uid

    uids = [generate_uid() for _ in range(4)]
    folder.mkdir()
    for number, image in enumerate(levels):
        step = levels[0].shape[0] / image.shape[0]
        _dicom(image, tile, mpp * step, uids, number).save_as(folder / f"{number}.dcm", enforce_file_format=True)


def _dicom(image: Image, tile: int, mpp: float, uids: list[str], number: int) -> Any:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = generate_uid(), ExplicitVRLittleEndian
    height, width, _ = image.shape
    kind = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"] if number else ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    mm = mpp / 1000
    padded = np.pad(image, ((0, -height % tile), (0, -width % tile), (0, 0)))
    down, across = padded.shape[0] // tile, padded.shape[1] // tile
    frames = padded.reshape(down, tile, across, tile, 3).transpose(0, 2, 1, 3, 4)
    measures = _sequence(PixelSpacing=[mm, mm], SliceThickness=0.001)
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": uids[0], "SeriesInstanceUID": uids[1], "FrameOfReferenceUID": uids[2],
        "DimensionOrganizationUID": uids[3], "Modality": "SM", "ImageType": kind, "InstanceNumber": number + 1,
        "NumberOfOpticalPaths": 1, "TotalPixelMatrixFocalPlanes": 1, "Rows": tile, "Columns": tile,
        "TotalPixelMatrixRows": height, "TotalPixelMatrixColumns": width, "ImagedVolumeWidth": width * mm,
        "ImagedVolumeHeight": height * mm, "ImagedVolumeDepth": 0.001, "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7,
        "PixelRepresentation": 0, "LossyImageCompression": "00", "DimensionOrganizationType": "TILED_FULL",
        "DimensionOrganizationSequence": _sequence(DimensionOrganizationUID=uids[3]), "SpecimenLabelInImage": "NO",
        "BurnedInAnnotation": "NO", "FocusMethod": "AUTO", "ExtendedDepthOfField": "NO",
        "VolumetricProperties": "VOLUME", "ImageOrientationSlide": [0, 1, 0, 1, 0, 0],
        "AcquisitionDateTime": "20260101",
        "TotalPixelMatrixOriginSequence": _sequence(
            XOffsetInSlideCoordinateSystem=0.0, YOffsetInSlideCoordinateSystem=0.0
        ),
        "SharedFunctionalGroupsSequence": _sequence(
            PixelMeasuresSequence=measures, WholeSlideMicroscopyImageFrameTypeSequence=_sequence(FrameType=kind)
        ),
        "OpticalPathSequence": _sequence(
            OpticalPathIdentifier="0",
            IlluminationTypeCodeSequence=_code("111744", "DCM", "Brightfield illumination"),
            IlluminationColorCodeSequence=_code("371251000", "SCT", "White"),
        ),
        "NumberOfFrames": down * across, "PixelData": np.ascontiguousarray(frames).tobytes(),
    }  # fmt: skip
    made = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    for name, value in values.items():
        setattr(made, name, value)
    return made


def _sequence(**values: Any) -> Any:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return Sequence([item])


def _code(value: str, scheme: str, meaning: str) -> Any:
    return _sequence(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def write_ome_zarr(path: Path, levels: list[Image], mpp: float, version: int, axes: str = "cyx") -> Any:
    """An OME-Zarr of levels ``(h, w, 3)``: 0.4 in Zarr 2 or 0.5 in Zarr 3. Returns the group."""
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=2 if version == 2 else 3)
    scales = []
    for number, level in enumerate(levels):
        stored = level.transpose(["yxc".index(axis) for axis in axes if axis in "yxc"])
        sizes = dict(zip("yxc", level.shape, strict=True))
        stored = stored.reshape([sizes.get(axis, 1) for axis in axes])
        chunks = [{"c": 1, "y": 64, "x": 96}.get(axis, 1) for axis in axes]
        array = group.create_array(str(number), shape=stored.shape, dtype="uint8", chunks=chunks)
        array[...] = stored
        step = levels[0].shape[0] / level.shape[0] * mpp * 1000
        scale = [step if axis in "yx" else 1.0 for axis in axes]
        scales.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    kinds = {"c": "channel", "t": "time"}
    named = [{"name": a, "type": kinds.get(a, "space")} | ({"unit": "nanometer"} if a in "yx" else {}) for a in axes]
    told = {"axes": named, "datasets": scales}
    if version == 2:
        group.attrs["multiscales"] = [{"version": "0.4"} | told]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [told]}
    return group

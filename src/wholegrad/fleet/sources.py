"""The slides that a fleet is asked for: files, folders of them, and lists in files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from wholegrad.errors import ConfigError
from wholegrad.slide.dicom import is_dicom
from wholegrad.slide.zarrs import is_zarr
from wholegrad.train.tables import stem

ENDINGS = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".isyntax",
    ".png", ".jpg", ".jpeg", ".npy", ".dcm", ".zarr",
)  # fmt: skip
LISTS = (".txt", ".csv")
RESULTS = (".mask.ome.tif", ".mask.tif", ".mask.png")  # of an earlier run, in the same folder


def find_slides(given: Sequence[Path], leave: Path | None = None) -> dict[str, Path]:
    """Slides by the name that their results get, in order.

    Args:
        given: slides; folders, in which and below which slides are looked for; text files with a path a line, or CSV
            files with a column ``slide``. Paths in a list start at its folder.
        leave: a folder in which nothing is looked for: that of the results.

    Raises:
        ConfigError: a list cannot be read, two slides have one name, or there is none.
    """
    found: dict[str, Path] = {}
    for path in given:
        for slide in _slides(path, leave):
            slide = slide.absolute()
            name = stem(slide.name)
            if found.get(name, slide) != slide:
                cause = f"is the name of {found[name]} and of {slide}"
                raise ConfigError(name, cause, "put their results into different folders")
            found[name] = slide
    if not found:
        raise ConfigError(", ".join(map(str, given)), "has no slides", f"give slides ({', '.join(ENDINGS[:3])} ...)")
    return found


def _slides(path: Path, leave: Path | None) -> Iterator[Path]:
    if path.suffix.lower() in LISTS:
        yield from _listed(path)
    elif path.is_dir() and not is_zarr(path) and not is_dicom(path):
        yield from _within(path, leave)
    else:
        yield path


def _within(folder: Path, leave: Path | None) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (leave is not None and path.absolute() == leave.absolute()):
            continue
        if path.is_dir():
            if is_zarr(path) or is_dicom(path):
                yield path
            else:
                yield from _within(path, leave)
        elif path.suffix.lower() in ENDINGS and not path.name.endswith(RESULTS):
            yield path


def _listed(path: Path) -> Iterator[Path]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(str(path), f"cannot be read ({said})", "check the path") from None
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(text.splitlines())
        if "slide" not in (rows.fieldnames or ()):
            raise ConfigError(str(path), "has no column 'slide'", "name the column of paths so")
        lines = [row["slide"] or "" for row in rows]
    else:
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in lines:
        if line.strip():
            yield path.parent / line.strip()

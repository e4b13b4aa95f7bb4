"""How fast slides are decoded here, on a small one that is made for it, and whether pixels come out as they went in."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wholegrad.doctor.finding import Finding, Findings, State
from wholegrad.graph.geometry import Box
from wholegrad.slide.slide import open_slide

EDGE, TILE = 1024, 256  # pixels of the slide and of its tiles
SECONDS = 0.3  # that each is read for, at least
CLOSE = 6.0  # mean difference that JPEG's quality may make, of 255
LOSSY = ("jpeg", "jpeg2000")
CODECS = {"jpeg": "JPEG", "jpeg2000": "JPEG 2000", "deflate": "deflate", None: "uncompressed"}

Pixels = npt.NDArray[np.uint8]


def look_at_reading(quick: bool) -> Findings:
    """Pixels a second on one thread, by compression; and the library behind other formats."""
    picture = made_up()
    with tempfile.TemporaryDirectory(prefix="wholegrad-doctor-") as folder:
        for codec in ("jpeg", "deflate") if quick else CODECS:
            yield _read(Path(folder) / f"{codec}.tif", codec, picture, 0.0 if quick else SECONDS)
    yield _openslide()


def made_up(edge: int = EDGE) -> Pixels:
    """A picture ``(edge, edge, 3)`` that compresses about as tissue does."""
    y, x = np.mgrid[:edge, :edge]
    waves = [np.sin(x / 9 + k) + np.sin(y / 13 - k) + np.sin((x + y) / 31) for k in range(3)]
    grain = np.random.default_rng(0).normal(0, 4, (edge, edge, 1))
    values = 170 + 25 * np.stack(waves, -1) + grain
    return np.asarray(np.clip(values, 0, 255), np.uint8)


def _read(path: Path, codec: str | None, picture: Pixels, seconds: float) -> Finding:
    import tifffile

    name = CODECS[codec]
    level = {"level": 90} if codec == "jpeg" else None
    tifffile.imwrite(path, picture, tile=(TILE, TILE), photometric="rgb", compression=codec, compressionargs=level)
    with open_slide(path) as slide:
        found = slide.read(Box(0, picture.shape[0], 0, picture.shape[1])).transpose(1, 2, 0)
    apart = float(np.abs(found.astype(np.int16) - picture).mean())
    if apart > (CLOSE if codec in LOSSY else 0):
        mend = "pip install --force-reinstall imagecodecs tifffile"
        text = f"pixels come out wrong, by {apart:.1f} of 255 on average"
        return Finding(name, text, None, State.BROKEN, mend)
    rate = _rate(path, seconds)
    return Finding(name, f"{rate / 1e6:.0f} Mpixel/s on a thread", rate)


def _rate(path: Path, seconds: float) -> float:
    """Pixels a second, each time from a slide that was just opened, since tiles are kept."""
    best, begin = 0.0, time.perf_counter()
    while not best or time.perf_counter() - begin < seconds:
        with open_slide(path) as slide:
            started = time.perf_counter()
            pixels = slide.read(Box(0, EDGE, 0, EDGE))
            best = max(best, pixels.shape[1] * pixels.shape[2] / max(time.perf_counter() - started, 1e-9))
    return best


def _openslide() -> Finding:
    mend = "pip install --force-reinstall openslide-python openslide-bin"
    try:
        import openslide
    except Exception as error:  # its shared library
        said = " ".join(str(error).split())[:200]
        return Finding("OpenSlide", f"does not load ({said})", None, State.BROKEN, mend)
    return Finding("OpenSlide", openslide.__library_version__, openslide.__library_version__)

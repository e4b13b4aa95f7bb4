"""What is looked at: a slide and what belongs to it, opened, and drawn tile by tile, a thread a core.

Nothing outside the files that are opened here can be asked for: an address names a layer and numbers, never a path.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wholegrad.errors import ConfigError, WholegradError
from wholegrad.graph.geometry import Box
from wholegrad.metrics.files import is_outlines
from wholegrad.slide.output import IGNORE, ClassNames
from wholegrad.slide.slide import open_slide
from wholegrad.view import paint
from wholegrad.view.labels import Screen
from wholegrad.view.ladder import TILE, Ladder, tile_box
from wholegrad.view.layers import (
    ErrorLayer,
    LabelLayer,
    Layer,
    Look,
    Picture,
    ProbabilityLayer,
    SlideLayer,
    ThresholdLayer,
)
from wholegrad.view.lru import Lru
from wholegrad.view.opened import likeliest, open_labels, open_probability, part_of_region

KEEP = 128 << 20  # bytes of tiles as they are sent, and as many of tiles made of others
LEVEL_CACHE = 48 << 20  # bytes of decoded tiles for each level of the file that is in use
PROBLEMS = 8  # different ones that are kept to be shown
THUMB = 192  # pixels, edge of a small picture of a region
WASH = 0.55  # how strongly errors lie over it


@dataclass(frozen=True)
class Files:
    """What to open.

    Attributes:
        mask, prediction: labels, as ``open_mask`` takes them.
        probability: of label 1.
        classes: names of labels 1, 2, ...
        painted: the label of each class of outlines, where ``classes`` does not tell.
        threshold: probability from which it is a prediction, where there is no ``prediction``.
        slide_mpp: um a pixel of level 0, where the slide does not say.
        quality: of JPEG, in place of exact pixels.
        region: ``(x, y, width, height)`` in level-0 pixels that prediction and probability show, where their files do
            not tell.
    """

    slide: Path
    mask: Path | None = None
    prediction: Path | None = None
    probability: Path | None = None
    classes: Sequence[str] | None = None
    threshold: float = 0.5
    slide_mpp: float | None = None
    painted: Mapping[str, int | None] | None = None
    quality: int | None = None
    region: tuple[int, int, int, int] | None = None


class Scene:
    """An opened slide with its layers. Thread-safe.

    Args:
        keep: bytes of tiles as they are sent, and as many of tiles made of others.
        level_cache: bytes of decoded tiles for each level of the file that is in use.
        threads: that draw at once; one a core without.

    Raises:
        ConfigError: names of classes, a threshold or quality that cannot be.
        SlideError: a file cannot be opened, or is not of this slide.
    """

    def __init__(self, files: Files, keep: int = KEEP, level_cache: int = LEVEL_CACHE, threads: int = 0) -> None:
        _check(files)
        self.files, self.threshold = files, -int(-files.threshold * 255 // 1)
        self.slide = open_slide(files.slide, slide_mpp=files.slide_mpp, cache_bytes=level_cache, threads=1)
        self.ladder = Ladder(self.slide, keep)
        self.layers: dict[str, Layer] = {}
        self.problems: list[str] = []
        self.tiles: Lru[Picture] = Lru(keep)
        self.version = 0  # counts predictions, where a run makes new ones
        self._screens: list[Screen] = []
        self._retired: Screen | None = None
        self._renewing = threading.Lock()
        self._turns = threading.BoundedSemaphore(threads or max(2, os.cpu_count() or 1))
        try:
            for layer in self._open():
                self.layers[layer.key] = layer
        except BaseException:
            self.close()
            raise

    def _open(self) -> Iterator[Layer]:
        files, sizes = self.files, self.ladder.sizes
        yield SlideLayer(self.ladder, files.slide.name, files.quality)
        given = files.painted
        if files.classes is not None:
            given = {name: label for label, name in enumerate(files.classes, 1)}
        part = None if files.region is None else part_of_region(files.region)
        screens = {
            key: self._held(open_labels(path, self.slide, sizes, given if is_outlines(path) else None, shows))
            for key, path, shows in (("truth", files.mask, None), ("prediction", files.prediction, part))
            if path is not None
        }
        channels = open_probability(files.probability, self.slide, sizes, part) if files.probability else []
        self._screens += channels
        names = self._names(list(screens.values()), len(channels))
        made: dict[str, LabelLayer] = {}
        for key, screen in screens.items():
            yield made.setdefault(key, LabelLayer(key, key.capitalize(), Path(screen.full.name).name, screen, names))
        if files.probability:
            told = files.probability.name
            if "prediction" not in made and len(channels) == 1:
                layer: LabelLayer = ThresholdLayer("prediction", "Prediction", told, channels[0], names)
                yield made.setdefault("prediction", layer)
            elif "prediction" not in made:
                layer = LabelLayer(
                    "prediction", "Prediction", f"likeliest in {told}", likeliest(channels, sizes), names
                )
                yield made.setdefault("prediction", layer)
            yield ProbabilityLayer(told, channels, ["background", *map(names.name, range(1, len(channels)))])
        if len(made) == 2:
            yield ErrorLayer(made["truth"], made["prediction"], len(names.names))

    def renew(self, path: Path) -> None:
        """Show another prediction in place of the one before, which was made of the same slide.

        Raises:
            SlideError: it cannot be opened, or is not of this slide; the one before stays.
        """
        with self._renewing:
            given = self.files.painted if is_outlines(path) else None
            screen = open_labels(path, self.slide, self.ladder.sizes, given)
            truth = self.layers.get("truth")
            known = [truth.screen] if isinstance(truth, LabelLayer) else []
            names = self._names([*known, screen], 0)
            layers = {key: layer for key, layer in self.layers.items() if key not in ("prediction", "error")}
            made = layers["prediction"] = LabelLayer("prediction", "Prediction", path.name, screen, names)
            if isinstance(truth, LabelLayer):
                layers["error"] = ErrorLayer(truth, made, len(names.names))
            before = self.layers.get("prediction")
            self.layers = layers  # whoever draws by the old ones goes on: their file stays open until the next change
            self.version += 1
            if self._retired is not None:
                self._retired.close()
                self._screens.remove(self._retired)
            self._retired = before.screen if isinstance(before, LabelLayer) else None
            self._screens.append(screen)

    def _names(self, screens: Sequence[Screen], channels: int) -> ClassNames:
        """The names given, or one for each label up to the largest that a small picture shows or has a channel."""
        if self.files.classes is not None:
            return ClassNames.of(self.files.classes, len(self.files.classes))
        found = [label for screen in screens for label in screen.labels() if label != IGNORE]
        return ClassNames.of(None, max([1, channels - 1, *found]))

    def _held(self, screen: Screen) -> Screen:
        self._screens.append(screen)
        return screen

    @property
    def error(self) -> ErrorLayer | None:
        """Prediction against truth, where there are both."""
        layer = self.layers.get("error")
        return layer if isinstance(layer, ErrorLayer) else None

    def about(self) -> dict[str, Any]:
        """What the page needs to know before it asks for tiles; sizes in level-0 pixels."""
        _, height, width = self.slide.shape
        levels = [
            {"width": w, "height": h, "mpp": mpp}
            for (h, w), mpp in zip(self.slide.level_shapes, self.slide.level_mpps, strict=True)
        ]
        return {
            "name": self.files.slide.name,
            "width": width,
            "height": height,
            "mpp": self.slide.mpp,
            "levels": levels,
            "tile": TILE,
            "rungs": len(self.ladder.sizes),
            "from_all": self.ladder.from_all,
            "threshold": self.threshold,
            "version": self.version,
            "layers": [layer.about() for layer in self.layers.values()],
        }

    def tile(self, key: str, rung: int, col: int, row: int, look: Look) -> Picture | None:
        """One tile, or None if there is no such layer, rung or place.

        Raises:
            SlideError: it cannot be read.
        """
        version, layer = self.version, self.layers.get(key)
        if layer is None or not 0 <= rung < len(self.ladder.sizes):
            return None
        box = tile_box(self.ladder.sizes[rung], col, row)
        if box is None:
            return None
        how = tuple(getattr(look, part) for part in layer.drawn_by)
        made = version if key in ("prediction", "error") else 0
        return self.tiles.get((key, made, rung, col, row, how), lambda: self._draw(layer, rung, box, look))

    def _draw(self, layer: Layer, rung: int, box: Box, look: Look) -> Picture:
        with self._turns:
            try:
                return layer.draw(rung, box, look)
            except WholegradError as error:
                self.note(str(error))
                raise

    def note(self, problem: str) -> None:
        """Keep what went wrong, to be shown."""
        if problem not in self.problems and len(self.problems) < PROBLEMS:
            self.problems.append(problem)

    def thumb(self, box: Box, threshold: int) -> Picture | None:
        """A small picture of a region of level 0, errors on it; None if it reaches outside the slide."""
        _, height, width = self.slide.shape
        if not (0 <= box.y0 < box.y1 <= height and 0 <= box.x0 < box.x1 <= width):
            return None
        return self.tiles.get(("thumb", self.version, box, threshold), lambda: self._thumb(box, threshold))

    def _thumb(self, box: Box, threshold: int) -> Picture:
        rung = 0
        while rung + 1 < len(self.ladder.sizes) and max(box.height, box.width) >> (rung + 1) >= THUMB // 2:
            rung += 1
        high, wide = self.ladder.sizes[rung]
        y0, x0 = min(box.y0 >> rung, high - 1), min(box.x0 >> rung, wide - 1)
        small = Box(y0, min(high, max(y0 + 1, box.y1 >> rung)), x0, min(wide, max(x0 + 1, box.x1 >> rung)))
        with self._turns:
            pixels = self.ladder.read(rung, small).astype("f4")
            if self.error is not None:
                verdict = self.error.verdict(rung, small, threshold)
                for wrong in (paint.EXTRA, paint.MISSED, paint.MIXED):
                    where = verdict == wrong
                    pixels[where] += WASH * (paint.VERDICTS[wrong][1] - pixels[where])
            return Picture(paint.jpeg(pixels.round().astype("u1"), 88), "image/jpeg")

    def at(self, y: int, x: int, look: Look) -> dict[str, Any] | None:
        """What every layer has at a pixel of level 0; None beyond the slide."""
        _, height, width = self.slide.shape
        if not (0 <= y < height and 0 <= x < width):
            return None
        box = Box(y, y + 1, x, x + 1)
        with self._turns:
            found: dict[str, Any] = {"rgb": self.slide.read(box)[:, 0, 0].tolist()}
            for layer in self.layers.values():
                if isinstance(layer, LabelLayer):
                    found[layer.key] = layer.said(int(layer.labels(0, box, Look(threshold=look.threshold))[0, 0]))
                elif isinstance(layer, ProbabilityLayer):
                    found[layer.key] = round(int(layer.values(0, box, look)[0, 0]) / 255, 3)
        return found

    def close(self) -> None:
        """Close every file; drawing afterwards is a SlideError."""
        for screen in self._screens:
            screen.close()
        self.ladder.close()
        self.slide.close()


def _check(files: Files) -> None:
    if not 0 < files.threshold <= 1:
        raise ConfigError("threshold", f"is {files.threshold}", "give a probability above 0, up to 1")
    if files.quality is not None and not 1 <= files.quality <= 100:
        raise ConfigError("quality", f"is {files.quality}", "give a quality of JPEG, 1 to 100")

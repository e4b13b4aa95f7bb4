"""The layers of a slide's picture: its pixels, and over them truth, prediction, probability, and where these differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wholegrad.graph.geometry import Box
from wholegrad.slide.output import IGNORE, ClassNames
from wholegrad.view import paint
from wholegrad.view.labels import Labels, Screen
from wholegrad.view.ladder import Ladder

# Of a single class, truth and prediction have the colour of what is in one of them alone.
ALONE = {"truth": paint.MISSED, "prediction": paint.EXTRA}


@dataclass(frozen=True)
class Look:
    """How a layer is to be drawn.

    Attributes:
        line: outlines in place of areas.
        hidden: bit ``k - 1`` hides what the legend has as ``k``.
        threshold: probability times 255 from which it is a prediction.
    """

    line: bool = False
    hidden: int = 0
    threshold: int = 128


@dataclass(frozen=True)
class Picture:
    """A tile as the browser gets it."""

    data: bytes
    mime: str

    @property
    def nbytes(self) -> int:
        return len(self.data)


class Layer(ABC):
    """One layer.

    Attributes:
        key: in addresses.
        title, file: for people; the file's name, or what it was made from.
        drawn_by: the parts of a :class:`Look` that change its tiles.
    """

    key: str
    title: str
    file: str
    drawn_by: tuple[str, ...] = ()

    @abstractmethod
    def draw(self, rung: int, box: Box, look: Look) -> Picture:
        """A box of a rung that is one tile.

        Raises:
            SlideError: it cannot be read.
        """

    def about(self) -> dict[str, Any]:
        """What the page needs to know of it."""
        return {"key": self.key, "title": self.title, "file": self.file, "looks": list(self.drawn_by)}


@dataclass
class SlideLayer(Layer):
    """The slide's own pixels, exact, or as JPEG of that quality."""

    ladder: Ladder
    file: str
    quality: int | None = None
    key: str = "slide"
    title: str = "Slide"

    def draw(self, rung: int, box: Box, look: Look) -> Picture:
        pixels = self.ladder.read(rung, box)
        if self.quality is None:
            return Picture(paint.bmp(pixels), "image/bmp")
        return Picture(paint.jpeg(pixels, self.quality), "image/jpeg")


@dataclass
class LabelLayer(Layer):
    """A label map in the colours of its classes."""

    key: str
    title: str
    file: str
    screen: Screen
    names: ClassNames
    drawn_by: tuple[str, ...] = ("line", "hidden")
    colours: Mapping[int, paint.Colour] = field(init=False)

    def __post_init__(self) -> None:
        labels = [*range(1, max(8, len(self.names.names)) + 1), IGNORE]
        self.colours = {label: self.names.colour(label) for label in labels}
        if len(self.names.names) == 1 and self.key in ALONE:
            self.colours[1] = paint.VERDICTS[ALONE[self.key]][1]

    def draw(self, rung: int, box: Box, look: Look) -> Picture:
        return _drawn(self.labels(rung, box, look), paint.palette(self.colours, look.hidden))

    def labels(self, rung: int, box: Box, look: Look) -> Labels:
        """The labels to show: all, or their rims."""
        if not look.line:
            return self.screen.read(rung, box)
        return _inner(paint.rims(self.screen.read_around(rung, box, paint.RIM)))

    def about(self) -> dict[str, Any]:
        legend = [
            {"bit": label, "name": name, "colour": _css(self.colours[label])}
            for label, name in enumerate(self.names.names, 1)
        ]
        return {**super().about(), "legend": legend}


@dataclass
class ProbabilityLayer(Layer):
    """Probabilities from dark violet to yellow, the more transparent the nearer to nothing."""

    file: str
    screen: Screen
    key: str = "probability"
    title: str = "Probability"

    def __post_init__(self) -> None:
        self._palette = paint.scale_palette()

    def draw(self, rung: int, box: Box, look: Look) -> Picture:
        return _drawn(self.screen.read(rung, box), self._palette)

    def about(self) -> dict[str, Any]:
        return {**super().about(), "scale": [_css(colour) for colour in paint.SCALE]}


@dataclass
class ThresholdLayer(LabelLayer):
    """The prediction that probabilities make at a threshold."""

    drawn_by: tuple[str, ...] = ("line", "hidden", "threshold")

    def labels(self, rung: int, box: Box, look: Look) -> Labels:
        if not look.line:
            return (self.screen.read(rung, box) >= look.threshold).view(np.uint8)
        around = self.screen.read_around(rung, box, paint.RIM) >= look.threshold
        return _inner(paint.rims(around.view(np.uint8)))


@dataclass
class ErrorLayer(Layer):
    """Prediction against truth, pixel by pixel."""

    truth: LabelLayer
    prediction: LabelLayer
    classes: int = 1
    key: str = "error"
    title: str = "Errors"
    file: str = "prediction against truth"

    def __post_init__(self) -> None:
        self.drawn_by = ("hidden", "threshold") if "threshold" in self.prediction.drawn_by else ("hidden",)

    def draw(self, rung: int, box: Box, look: Look) -> Picture:
        colours = {verdict: colour for verdict, (_, colour) in paint.VERDICTS.items()}
        return _drawn(self.verdict(rung, box, look.threshold), paint.palette(colours, look.hidden))

    def verdict(self, rung: int, box: Box, threshold: int) -> Labels:
        """What each pixel of a box is, as ``paint.judge`` says."""
        said = self.prediction.labels(rung, box, Look(threshold=threshold)).copy()
        return paint.judge(self.truth.labels(rung, box, Look()), said)

    def about(self) -> dict[str, Any]:
        legend = [
            {"bit": verdict, "name": name, "colour": _css(colour)}
            for verdict, (name, colour) in paint.VERDICTS.items()
            if verdict != paint.MIXED or self.classes > 1
        ]
        return {**super().about(), "legend": legend}


def _drawn(values: Labels, table: paint.Pixels) -> Picture:
    return Picture(paint.png(np.ascontiguousarray(values), table), "image/png")


def _inner(values: Labels) -> Labels:
    margin = paint.RIM
    return values[margin:-margin, margin:-margin]


def _css(colour: paint.Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)

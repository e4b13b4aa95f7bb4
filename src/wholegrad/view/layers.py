"""The layers of a slide's picture: its pixels, and over them truth, prediction, probability, and where these differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wholegrad.graph.geometry import Box
from wholegrad.slide.output import IGNORE, ClassNames
from wholegrad.slide.partial import PartMask
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
        channel: of probabilities.
    """

    line: bool = False
    hidden: int = 0
    threshold: int = 128
    channel: int = 0


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
    colours: dict[int, paint.Colour] = field(init=False)

    def __post_init__(self) -> None:
        labels = [*range(1, max(8, len(self.names.names)) + 1), IGNORE]
        self.colours = {label: self.names.colour(label) for label in labels}
        if isinstance(self.screen.full, PartMask):
            del self.colours[IGNORE]  # beyond the part nothing was said
        if len(self.names.names) == 1 and self.key in ALONE:
            self.colours[1] = paint.VERDICTS[ALONE[self.key]][1]

    def draw(self, rung: int, box: Box, look: Look) -> Picture:
        return _drawn(self.labels(rung, box, look), paint.palette(self.colours, look.hidden))

    def labels(self, rung: int, box: Box, look: Look) -> Labels:
        """The labels to show: all, or their rims."""
        if not look.line:
            return self.screen.read(rung, box)
        return _inner(paint.rims(self.screen.read_around(rung, box, paint.RIM)))

    def said(self, label: int) -> str:
        """A label in words."""
        if label == IGNORE and isinstance(self.screen.full, PartMask):
            return "not predicted"
        return self.names.name(label) if label else "background"

    def about(self) -> dict[str, Any]:
        legend = [
            {"bit": label, "name": name, "colour": _css(self.colours[label])}
            for label, name in enumerate(self.names.names, 1)
        ]
        return {**super().about(), "legend": legend}


@dataclass
class ProbabilityLayer(Layer):
    """Probabilities from dark violet to yellow, the more transparent the nearer to nothing.

    Attributes:
        screens: one a channel.
        names: of the channels, where there are several.
    """

    file: str
    screens: Sequence[Screen]
    names: Sequence[str] = ()
    key: str = "probability"
    title: str = "Probability"

    def __post_init__(self) -> None:
        self._palette = paint.scale_palette()
        self.drawn_by = ("channel",) if len(self.screens) > 1 else ()

    @property
    def first(self) -> int:
        """The channel that is shown at first: that of label 1."""
        return min(1, len(self.screens) - 1)

    def values(self, rung: int, box: Box, look: Look) -> Labels:
        """Probabilities times 255 of the channel that is looked at; nothing beyond what the map shows.

        Raises:
            SlideError: they cannot be read.
        """
        screen = self.screens[look.channel if look.channel < len(self.screens) else self.first]
        values, beyond = screen.read(rung, box), screen.beyond(rung, box)
        return values if beyond is None else np.where(beyond, np.uint8(0), values)

    def draw(self, rung: int, box: Box, look: Look) -> Picture:
        return _drawn(self.values(rung, box, look), self._palette)

    def about(self) -> dict[str, Any]:
        several = {"channels": list(self.names), "channel": self.first} if len(self.screens) > 1 else {}
        return {**super().about(), "scale": [_css(colour) for colour in paint.SCALE], **several}


@dataclass
class ThresholdLayer(LabelLayer):
    """The prediction that probabilities make at a threshold."""

    drawn_by: tuple[str, ...] = ("line", "hidden", "threshold")

    def labels(self, rung: int, box: Box, look: Look) -> Labels:
        beyond = self.screen.beyond(rung, box)
        if not look.line:
            found = (self.screen.read(rung, box) >= look.threshold).view(np.uint8)
            return found if beyond is None else np.where(beyond, np.uint8(IGNORE), found)
        around = self.screen.read_around(rung, box, paint.RIM) >= look.threshold
        rims = _inner(paint.rims(around.view(np.uint8)))
        return rims if beyond is None else np.where(beyond, np.uint8(0), rims)


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

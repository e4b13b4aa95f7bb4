"""Turns pixels and labels into what a browser shows: exact pixels, JPEG, or a palette with transparency."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

RIM = 3  # pixels of the screen on either side of a label's edge, of outlines

# What a pixel of prediction against truth is.
NOTHING, RIGHT, EXTRA, MISSED, MIXED, LEFT_OUT = range(6)
VERDICTS: Mapping[int, tuple[str, Colour]] = {
    RIGHT: ("True positive", (22, 140, 96)),
    EXTRA: ("False positive", (226, 92, 16)),
    MISSED: ("False negative", (32, 84, 214)),
    MIXED: ("Wrong class", (196, 30, 130)),
    LEFT_OUT: ("Not counted", (130, 130, 130)),
}
# Of a probability of 0 to 1, in equal steps: dark violet to yellow, of even brightness (after matplotlib's viridis).
SCALE: Sequence[Colour] = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37),
)  # fmt: skip


def judge(truth: Labels, said: Labels) -> Labels:
    """What each pixel is, by ``NOTHING`` to ``LEFT_OUT``; 255 in either does not count."""
    verdict = np.zeros(truth.shape, np.uint8)
    real, found = truth != 0, said != 0
    verdict[real & found] = RIGHT
    verdict[real & found & (truth != said)] = MIXED
    verdict[found & ~real] = EXTRA
    verdict[real & ~found] = MISSED
    verdict[(truth == 255) | (said == 255)] = LEFT_OUT
    return verdict


def rims(labels: Labels, width: int = RIM) -> Labels:
    """``labels`` where another label is within ``width`` pixels, 0 elsewhere; the array's own border is no edge."""
    padded = np.pad(labels, width, mode="edge")
    height, across = labels.shape
    edge = np.zeros(labels.shape, bool)
    for shift in range(2 * width + 1):
        edge |= padded[shift : shift + height, width:-width] != labels
        edge |= padded[width:-width, shift : shift + across] != labels
    return np.where(edge, labels, np.uint8(0))


def scale_palette() -> Pixels:
    """``(256, 4)``: colour and opacity of a probability times 255; nothing is shown of 0."""
    at = np.linspace(0, len(SCALE) - 1, 256)
    stops = np.array(SCALE, np.float64)
    colour = np.stack([np.interp(at, np.arange(len(SCALE)), stops[:, channel]) for channel in range(3)], axis=1)
    opacity = 255 * np.clip(np.arange(256) / 64, 0, 1)  # full from a quarter on
    palette: Pixels = np.rint(np.concatenate([colour, opacity[:, None]], axis=1)).astype(np.uint8)
    return palette


def palette(colours: Mapping[int, Colour], hidden: int = 0) -> Pixels:
    """``(256, 4)``: opaque where a label has a colour, transparent elsewhere and where bit ``label - 1`` hides it."""
    table = np.zeros((256, 4), np.uint8)
    for label, colour in colours.items():
        if not hidden >> (label - 1) & 1:
            table[label] = (*colour, 255)
    return table


def png(values: Labels, table: Pixels) -> bytes:
    """A PNG of ``values`` ``(h, w)`` with the colours of ``table`` ``(256, 4)``."""
    from PIL import Image  # for those who need it

    used = int(values.max()) + 1
    picture = Image.fromarray(values)
    indexed = Image.frombuffer("P", picture.size, values.tobytes(), "raw", "P", 0, 1)
    indexed.putpalette(table[:used, :3].tobytes())
    buffer = io.BytesIO()
    indexed.save(buffer, "png", compress_level=1, transparency=table[:used, 3].tobytes())
    return buffer.getvalue()


def bmp(pixels: Pixels) -> bytes:
    """The very pixels ``(h, w, 3)`` as a 24-bit BMP, which costs a copy and no coding."""
    height, width, _ = pixels.shape
    stride = (3 * width + 3) // 4 * 4
    rows = np.zeros((height, stride), np.uint8)
    rows[:, : 3 * width].reshape(height, width, 3)[...] = pixels[::-1, :, ::-1]
    head = struct.pack("<2sIHHI", b"BM", 54 + rows.nbytes, 0, 0, 54)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, rows.nbytes, 2835, 2835, 0, 0)
    return head + info + rows.tobytes()


def jpeg(pixels: Pixels, quality: int) -> bytes:
    """``(h, w, 3)`` as a JPEG, colours at full resolution."""
    import imagecodecs

    return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(pixels), level=quality, subsampling="444"))

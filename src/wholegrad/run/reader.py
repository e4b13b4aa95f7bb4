"""What the engine asks of an image or a label map: its size, and pixels by box. Nothing else crosses this line."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from wholegrad.graph.geometry import Box


@runtime_checkable
class MapReader(Protocol):
    """A lazily read map of shape ``(C, H, W)`` (rule 9: pixels are read by box, when a tile needs them).

    Attributes:
        shape: ``(C, H, W)`` in pixels.
        dtype: of the stored values (uint8 for slides and masks).
        cache_bytes: the most memory that the reader holds between and during calls (decoded tiles, buffers),
            in bytes; plans count it.
        name: the file or a short description, for messages.
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def dtype(self) -> np.dtype[np.generic]: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def name(self) -> str: ...

    def read(self, box: Box) -> npt.NDArray[np.generic]:
        """The pixels of ``box`` as an array ``(C, box.height, box.width)``, of any strides.

        ``box`` lies within the map. The array belongs to the caller until the next call of ``read``. A reader
        with an attribute ``concurrent = True`` may be called by several threads at once, and its array then belongs
        to the calling thread until that thread's next call; others are called by one thread at a time.

        Raises:
            SlideError: the pixels cannot be read.
        """
        ...

"""Transforms of slides that are exact under tiling: each is a reader around a reader, and is read by box."""

from wholegrad.slide.augment.blocks import Transformed
from wholegrad.slide.augment.views import Framed, Turned

__all__ = ["Framed", "Transformed", "Turned"]

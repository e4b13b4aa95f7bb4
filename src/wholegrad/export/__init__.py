"""A trained network as one file for other programs, with a card that says how to run it over a slide without seams."""

from wholegrad.export.card import ExportCard
from wholegrad.export.check import MismatchError
from wholegrad.export.network import export
from wholegrad.export.tiles import run_tiled

__all__ = ["ExportCard", "MismatchError", "export", "run_tiled"]

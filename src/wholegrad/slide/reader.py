"""The engine's reader protocol, under the name that readers of slides know it by."""

from wholegrad.run.reader import MapReader

__all__ = ["MapReader"]

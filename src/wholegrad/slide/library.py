"""What reading through somebody else's library has in common: it may be missing, and whatever it raises is one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wholegrad.errors import SlideError, WholegradError


def library(name: str, path: str, what: str, extra: str) -> Any:
    """The module ``name``, which reads ``path``.

    Args:
        what: the file is, for the message.
        extra: of this package that installs it.

    Raises:
        SlideError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        remedy = f"pip install 'wholegrad[{extra}]'"
        raise SlideError(path, f"is {what}, which {name} reads", remedy) from None


@contextmanager
def read_by(path: str, how: str, remedy: str) -> Iterator[None]:
    """Turn what a library raises within the block into one line: ``path: cannot be read HOW (...); remedy``.

    Raises:
        SlideError: it raised something.
    """
    try:
        yield
    except WholegradError:
        raise
    except Exception as error:  # each library has its own
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise SlideError(path, f"cannot be read {how} ({detail})", remedy) from None

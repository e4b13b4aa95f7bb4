"""In which dtype a boundary is stored, and how many bytes that takes.

Storing boundaries in 16 bits halves them; it is off unless asked for, because it rounds. Only what is stored is
narrow: ops run in the graph's own dtypes, and so are boundaries' gradients kept, into which tiles add one by one.
"""

from __future__ import annotations

import torch

from wholegrad.graph.graph import Spec

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def stored_dtype(spec: Spec, narrow: torch.dtype | None) -> torch.dtype:
    """``narrow`` for a floating-point map of a wider dtype, else the map's own."""
    if narrow is None or not spec.dtype.is_floating_point or spec.dtype.itemsize <= narrow.itemsize:
        return spec.dtype
    return narrow


def stored_bytes(spec: Spec, narrow: torch.dtype | None) -> int:
    """Bytes of a boundary as it is stored, its gradient not counted."""
    return spec.numel * stored_dtype(spec, narrow).itemsize

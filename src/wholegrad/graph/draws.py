"""Random numbers by coordinate (rule 6): what an element draws depends on seed, call and place, not on the tile.

Element i of random call k is the i-th output of a SplitMix64 generator (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), whose state is a counter, so that any element can be had alone. Its key
mixes the step's seed with k. i counts the elements of the whole tensor in row-major order.
"""

from __future__ import annotations

import torch

from wholegrad.graph.geometry import Box
from wholegrad.graph.layout import Layout, Role, axes, plain, tile_shape

CPU = torch.device("cpu")
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLY = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mixed(value: int) -> int:
    """SplitMix64's finalizer on one unsigned 64-bit integer."""
    value = ((value ^ (value >> 30)) * _MULTIPLY[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLY[1]) & _MASK
    return value ^ (value >> 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right; PyTorch's copies the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def positions(layout: Layout, box: Box, device: torch.device = CPU) -> torch.Tensor:
    """Row-major index of each element on ``box`` in the whole tensor, int64, in the tile's shape."""
    flat = axes(layout)
    stride = 1
    total = torch.zeros((), dtype=torch.int64, device=device)
    for back, axis in enumerate(reversed(flat), 1):
        lo, hi = {Role.PLAIN: (0, axis.size), Role.ROW: (box.y0, box.y1), Role.COL: (box.x0, box.x1)}[axis.role]
        along = torch.arange(lo, hi, dtype=torch.int64, device=device) * stride
        total = total + along.reshape(-1, *[1] * (back - 1))
        stride *= axis.size
    return total.reshape(tile_shape(layout, box))


def uniform(seed: int, call: int, layout: Layout, box: Box, device: torch.device = CPU) -> torch.Tensor:
    """Numbers in ``[0, 1)`` with 53 random bits, float64, the same on every device."""
    key = mixed((seed & _MASK) ^ mixed((call + 1) * _GAMMA & _MASK))
    x = positions(layout, box, device)
    x.mul_(_signed(_GAMMA)).add_(_signed(key + _GAMMA))  # in place: 64 bits for each element
    x.bitwise_xor_(_shifted(x, 30)).mul_(_signed(_MULTIPLY[0]))
    x.bitwise_xor_(_shifted(x, 27)).mul_(_signed(_MULTIPLY[1]))
    x.bitwise_xor_(_shifted(x, 31))
    return _shifted(x, 11).to(torch.float64).mul_(2.0**-53)


def normal(seed: int, call: int, layout: Layout, box: Box, device: torch.device = CPU) -> torch.Tensor:
    """Standard normal numbers, float64 (by the inverse of the normal distribution function)."""
    u = uniform(seed, call, layout, box, device) + 2.0**-54
    result: torch.Tensor = torch.special.ndtri(u)
    return result


def whole_uniform(seed: int, call: int, shape: tuple[int, ...]) -> torch.Tensor:
    """:func:`uniform` for a whole tensor of this shape."""
    return uniform(seed, call, plain(shape), Box(0, 1, 0, 1))

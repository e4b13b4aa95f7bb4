"""Small programs over single elements: what a kernel computes of some maps when it reads them, and its derivative.

``1 - image / 255`` or a leaky ReLU costs nothing beside a convolution that reads its result from a register; as a map
of its own it costs a pass through memory, there and back. A :class:`Program` says what is computed, as plain tuples, so
that it can be part of what a kernel is compiled for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from wholegrad.kernels.emit import Code

MAP, EACH, ONE = "map", "each", "one"


class Leaf(NamedTuple):
    """What a program reads.

    Attributes:
        kind: a ``map``; one value for ``each`` channel; ``one`` value.
        bytes: of an element if it is an unsigned 8-bit integer, 1; 0 if it is of the program's own precision.
        grad: whether a derivative with respect to it is wanted.
    """

    kind: str = MAP
    bytes: int = 0
    grad: bool = False


class Step(NamedTuple):
    """One operation on earlier values, numbered leaves first; ``numbers`` are constants."""

    op: str
    values: tuple[int, ...]
    numbers: tuple[float, ...] = ()


class Program(NamedTuple):
    """The last value, or the leaf itself where there are no steps."""

    leaves: tuple[Leaf, ...]
    steps: tuple[Step, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is one map as it is."""
        return not self.steps and len(self.leaves) == 1 and self.leaves[0].kind == MAP and not self.leaves[0].bytes

    @property
    def wanted(self) -> tuple[int, ...]:
        """The leaves whose derivatives are wanted."""
        return tuple(i for i, leaf in enumerate(self.leaves) if leaf.grad)

    @property
    def mask(self) -> bool:
        """Whether the last value is a mask: it is stored as bytes, 0 or 1."""
        return bool(self.steps) and self.steps[-1].op in MASKS

    def cost(self) -> int:
        """Instructions for a vector, about."""
        return sum(COSTS.get(step.op, 1) for step in self.steps)


IDENTITY = Program((Leaf(),))
COSTS = {"div": 8, "sqrt": 8, "exp": 20, "log": 20, "sigmoid": 30, "silu": 30, "bce": 50, "u8": 2}
MASKS = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"})


def slope_follows(program: Program) -> bool:
    """Whether the derivative at a value is that at the program's value of it, so that the latter is enough to keep."""
    if len(program.steps) != 1 or len(program.leaves) != 1:
        return False
    (step,) = program.steps
    return step.op == "relu" or (step.op == "leaky" and step.numbers[0] > 0)


class Dual(NamedTuple):
    """A value and its derivative; None where it does not depend on the leaf."""

    value: str
    slope: str | None = None


def evaluate(code: Code, program: Program, leaves: Sequence[str], wrt: int | None = None) -> Dual:
    """Write what computes ``program``, with its derivative with respect to leaf ``wrt``.

    Args:
        leaves: a vector of the kernel's precision for each leaf.
    """
    found = [Dual(name, constant(code, 1.0) if i == wrt else None) for i, name in enumerate(leaves)]
    for step in program.steps:
        found.append(_OPS[step.op](code, [found[i] for i in step.values], step.numbers))
    return found[-1]


def rounded(code: Code, number: float) -> float:
    """``number`` in the kernel's precision."""
    if code.real == "double" or not math.isfinite(number):
        return number
    return float(struct.unpack("f", struct.pack("f", number))[0])


def constant(code: Code, number: float) -> str:
    """``number`` in every lane, rounded to the kernel's precision."""
    bits = struct.unpack("Q", struct.pack("d", rounded(code, number)))[0]
    return "<" + ", ".join([f"{code.real} 0x{bits:016X}"] * code.lanes) + ">"


def _times(code: Code, slope: str | None, factor: str) -> str | None:
    return None if slope is None else code.real2("fmul", slope, factor)


def _plus(code: Code, a: str | None, b: str | None) -> str | None:
    if a is None or b is None:
        return a if b is None else b
    return code.real2("fadd", a, b)


def _add(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    """``a + alpha b``"""
    a, b = given
    alpha = numbers[0] if numbers else 1.0
    if alpha != 1.0:
        by = constant(code, alpha)
        b = Dual(code.real2("fmul", b.value, by), _times(code, b.slope, by))
    return Dual(code.real2("fadd", a.value, b.value), _plus(code, a.slope, b.slope))


def _sub(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    """``a - alpha b``"""
    a, b = given
    alpha = numbers[0] if numbers else 1.0
    if alpha != 1.0:
        by = constant(code, alpha)
        b = Dual(code.real2("fmul", b.value, by), _times(code, b.slope, by))
    minus = None if b.slope is None else code.set(f"fneg {code.vector} {b.slope}")
    return Dual(code.real2("fsub", a.value, b.value), _plus(code, a.slope, minus))


def _mul(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    a, b = given
    slope = _plus(code, _times(code, a.slope, b.value), _times(code, b.slope, a.value))
    return Dual(code.real2("fmul", a.value, b.value), slope)


def _div(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    a, b = given
    value = code.real2("fdiv", a.value, b.value)
    slope = a.slope
    if b.slope is not None:
        part = code.set(f"fneg {code.vector} {code.real2('fmul', value, b.slope)}")
        slope = _plus(code, slope, part)
    return Dual(value, None if slope is None else code.real2("fdiv", slope, b.value))


def _neg(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    (a,) = given
    minus = None if a.slope is None else code.set(f"fneg {code.vector} {a.slope}")
    return Dual(code.set(f"fneg {code.vector} {a.value}"), minus)


def _constant(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    return Dual(constant(code, numbers[0]))


def _fraction(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    """``a / 255`` of a whole number up to 255, rounded as a division rounds it (a test tries all of them).

    1 / 255 is the sum of what the precision holds of it and of what that misses.
    """
    exact, nearest = Fraction(1, 255), rounded(code, 1 / 255)
    missed = code.real2("fmul", given[0].value, constant(code, float(exact - Fraction(nearest))))
    return Dual(code.fma(given[0].value, constant(code, nearest), missed))


def _leaky(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    """``a`` where it is positive, else ``slope a``."""
    (a,), by = given, constant(code, numbers[0])
    positive = code.compare("ogt", a.value, constant(code, 0.0))
    value = code.select(positive, a.value, code.real2("fmul", a.value, by))
    if a.slope is None:
        return Dual(value)
    return Dual(value, code.select(positive, a.slope, code.real2("fmul", a.slope, by)))


def _prelu(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    """``a`` where it is positive, else ``b a``."""
    (a, b), zero = given, constant(code, 0.0)
    positive = code.compare("ogt", a.value, zero)
    value = code.select(positive, a.value, code.real2("fmul", a.value, b.value))
    slope = _plus(code, _times(code, a.slope, b.value), _times(code, b.slope, a.value))
    return Dual(value, None if slope is None else code.select(positive, a.slope or zero, slope))


def _relu(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    (a,), zero = given, constant(code, 0.0)
    off = code.compare("ole", a.value, zero)
    slope = None if a.slope is None else code.select(off, zero, a.slope)
    return Dual(code.select(off, zero, a.value), slope)


def _clamp(open_ends: bool) -> Callable[..., Dual]:
    def clamp(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
        """``min(max(a, low), high)``; slope 1 between, and at the ends unless ``open_ends``; none where NaN."""
        (a,), (low, high) = given, (constant(code, number) for number in numbers)
        value = code.select(code.compare("olt", a.value, low), low, a.value)
        value = code.select(code.compare("ogt", value, high), high, value)
        if a.slope is None:
            return Dual(value)
        above, below = ("ogt", "olt") if open_ends else ("oge", "ole")
        zero = constant(code, 0.0)
        slope = code.select(code.compare(above, a.value, low), a.slope, zero)
        return Dual(value, code.select(code.compare(below, a.value, high), slope, zero))

    return clamp


def _compare(kind: str) -> Callable[..., Dual]:
    def compare(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
        other = given[1].value if len(given) > 1 else constant(code, numbers[0])
        return Dual(code.compare(kind, given[0].value, other))

    return compare


def _logic(op: str) -> Callable[..., Dual]:
    def logic(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
        return Dual(code.set(f"{op} <{code.lanes} x i1> {given[0].value}, {given[1].value}"))

    return logic


def _not(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    ones = "<" + ", ".join(["i1 true"] * code.lanes) + ">"
    return Dual(code.set(f"xor <{code.lanes} x i1> {given[0].value}, {ones}"))


def _real(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    """1 where a mask is on, else 0."""
    return Dual(code.select(given[0].value, constant(code, 1.0), constant(code, 0.0)))


def _where(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    mask, a, b = given
    value = code.select(mask.value, a.value, b.value)
    if a.slope is None and b.slope is None:
        return Dual(value)
    zero = constant(code, 0.0)
    return Dual(value, code.select(mask.value, a.slope or zero, b.slope or zero))


def _abs(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    (a,), zero = given, constant(code, 0.0)
    minus = code.set(f"fneg {code.vector} {a.value}")
    negative, positive = code.compare("olt", a.value, zero), code.compare("ogt", a.value, zero)
    value = code.select(negative, minus, code.select(positive, a.value, code.real2("fmul", a.value, a.value)))
    if a.slope is None:
        return Dual(value)
    down = code.set(f"fneg {code.vector} {a.slope}")
    return Dual(value, code.select(negative, down, code.select(positive, a.slope, zero)))


def _square(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    (a,) = given
    twice = code.real2("fadd", a.value, a.value)
    return Dual(code.real2("fmul", a.value, a.value), _times(code, a.slope, twice))


def _exp(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    (a,) = given
    value = exponential(code, a.value)
    return Dual(value, _times(code, a.slope, value))


def _sigmoid(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    (a,), one = given, constant(code, 1.0)
    minus = code.set(f"fneg {code.vector} {a.value}")
    value = code.real2("fdiv", one, code.real2("fadd", one, exponential(code, minus)))
    slope = code.real2("fmul", value, code.real2("fsub", one, value))
    return Dual(value, _times(code, a.slope, slope))


def _silu(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    (a,), one = given, constant(code, 1.0)
    gate = _sigmoid(code, [Dual(a.value)], ()).value
    rest = code.fma(a.value, code.real2("fsub", one, gate), one)
    return Dual(code.real2("fmul", a.value, gate), _times(code, a.slope, code.real2("fmul", gate, rest)))


def _bce(code: Code, given: list[Dual], numbers: tuple[float, ...]) -> Dual:
    """Binary cross-entropy of a logit and a truth without slope: ``max(x, 0) - x y + log(1 + exp(-|x|))``."""
    (x, y), one, zero = given, constant(code, 1.0), constant(code, 0.0)
    positive = code.compare("ogt", x.value, zero)
    minus = code.set(f"fneg {code.vector} {x.value}")
    decay = exponential(code, code.select(positive, minus, x.value))
    high = code.select(code.compare("olt", x.value, zero), zero, x.value)
    value = code.real2("fadd", code.real2("fsub", high, code.real2("fmul", x.value, y.value)), log_1_plus(code, decay))
    if x.slope is None:
        return Dual(value)
    chance = code.real2("fdiv", code.select(positive, one, decay), code.real2("fadd", one, decay))
    return Dual(value, _times(code, x.slope, code.real2("fsub", chance, y.value)))


_OPS: dict[str, Callable[[Code, list[Dual], tuple[float, ...]], Dual]] = {
    "constant": _constant,
    "u8": _fraction,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "leaky": _leaky,
    "prelu": _prelu,
    "relu": _relu,
    "clamp": _clamp(False),
    "hardtanh": _clamp(True),
    "lt": _compare("olt"),
    "le": _compare("ole"),
    "gt": _compare("ogt"),
    "ge": _compare("oge"),
    "eq": _compare("oeq"),
    "ne": _compare("une"),
    "and": _logic("and"),
    "or": _logic("or"),
    "not": _not,
    "real": _real,
    "where": _where,
    "abs": _abs,
    "square": _square,
    "exp": _exp,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "bce": _bce,
}

# exp(r) on [-ln 2 / 2, ln 2 / 2]: Taylor's, the last coefficient's term is 2**-27.
_EXP = [1 / math.factorial(k) for k in range(8)]
_LOG2E, _LN2_HIGH, _LN2_LOW = 1 / math.log(2), 0.693359375, math.log(2) - 0.693359375


def exponential(code: Code, x: str) -> str:
    """``exp(x)``: in float32 to about one rounding, in float64 the C library's."""
    if code.real == "double":
        return _by_lane(code, "exp", x)
    # n nearest x / ln 2, kept where 2**n can be made of two factors; NaN stays NaN.
    near = code.real2("fmul", x, constant(code, _LOG2E))
    near = code.select(code.compare("ogt", near, constant(code, 250.0)), constant(code, 250.0), near)
    near = code.select(code.compare("olt", near, constant(code, -250.0)), constant(code, -250.0), near)
    n = code.call("llvm.rint", near)
    rest = code.fma(n, constant(code, -_LN2_LOW), code.fma(n, constant(code, -_LN2_HIGH), x))
    value = constant(code, _EXP[-1])
    for factor in reversed(_EXP[:-1]):
        value = code.fma(value, rest, constant(code, factor))
    whole = f"<{code.lanes} x i32>"
    power = code.set(f"fptosi {code.vector} {n} to {whole}")
    half = code.set(f"ashr {whole} {power}, {_whole(code, 1)}")
    for part in (half, code.set(f"sub {whole} {power}, {half}")):
        bits = code.set(f"shl {whole} {code.set(f'add {whole} {part}, {_whole(code, 127)}')}, {_whole(code, 23)}")
        value = code.real2("fmul", value, code.set(f"bitcast {whole} {bits} to {code.vector}"))
    # Beyond both ends the remainder means nothing.
    value = code.select(code.compare("ogt", x, constant(code, 89.0)), constant(code, math.inf), value)
    return code.select(code.compare("olt", x, constant(code, -104.0)), constant(code, 0.0), value)


def _whole(code: Code, number: int) -> str:
    return "<" + ", ".join([f"i32 {number}"] * code.lanes) + ">"


def log_1_plus(code: Code, x: str) -> str:
    """``log(1 + x)`` for x in [0, 1]: ``2 artanh(x / (2 + x))``, whose series ends below float32's rounding."""
    if code.real == "double":
        return _by_lane(code, "log1p", x)
    s = code.real2("fdiv", x, code.real2("fadd", x, constant(code, 2.0)))
    square = code.real2("fmul", s, s)
    value = constant(code, 2 / 17)
    for k in range(15, 0, -2):
        value = code.fma(value, square, constant(code, 2 / k))
    return code.real2("fmul", value, s)


def _by_lane(code: Code, name: str, x: str) -> str:
    """A function of the C library, lane by lane."""
    result = "poison"
    for i in range(code.lanes):
        one = code.set(f"extractelement {code.vector} {x}, i64 {i}")
        one = code.set(f"call double @{name}(double {one})")
        result = code.set(f"insertelement {code.vector} {result}, double {one}, i64 {i}")
    return result
